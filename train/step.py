"""One data-parallel training step: gradients of this rank's pairs, their sum over ranks, update.

Two graphs, so that a batch may go through in several parts and MPI can sum between them. There all gradients
are one vector: one sum over ranks, one norm and one update where each of the 118 weights would have its own,
which takes as long to compile as the network does.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, float32, nn, ops
from mindspore.ops.auto_generate import SplitWithSize

from launch import collective
from launch.communicator import ALONE, Communicator
from model.layers import Convolution
from model.pwcnet import to_network
from model.reductions import ordered_sum
from prep.reader import Batch

LOSS_SCALE = {"start": 2.0**16, "factor": 2.0, "every": 1000}
"""Dynamic loss scaling: first scale, factor of change, steps without overflow before it grows."""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Of Adam (D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", 2015)."""


def use_float16(network) -> None:
    """Have a network's convolutions compute in float16 and leave the rest in float32.

    Flow, warping, cost volume, loss and weight updates are sums of many or differences of close
    numbers; the convolutions are nearly all of the time.
    """
    for _, cell in network.cells_and_names():
        if isinstance(cell, Convolution):
            cell.use_float16()


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How gradients become new weights."""

    accumulation_steps: int = 1
    """Equal parts in which a rank's batch goes through the network, to need less memory; the result is the same but
    for rounding."""
    clip_norm: float = 0.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no limit."""
    loss_scaling: bool = False
    """Dynamic loss scaling, for float16."""
    weight_decay: float = 0.0
    """Share of each weight that is added to its gradient."""
    decoupled_decay: bool = False
    """Weight decay apart from the gradient, a share of each weight per step and learning rate: AdamW (I. Loshchilov
    and F. Hutter, "Decoupled Weight Decay Regularization", 2019)."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, such as 0.999. 0: no average."""


class StepResult(NamedTuple):
    """What a training step returns."""

    losses: Tensor
    """The loss vector, mean over micro-batches and ranks."""
    gradient_norm: Tensor
    """() global norm of the mean gradient, before clipping."""
    finite: Tensor
    """() bool; if False a gradient overflowed and the weights were left as they were."""


class TrainStep:
    """A step on this rank's part of the global batch, by Adam or AdamW.

    Args:
        network: images to flows, a Cell.
        loss: (flows, flow, valid) to a vector whose sum is minimised, a Cell; the mean over a batch.
        options: see `StepOptions`.
        comm: the ranks that share the batch; gradients and losses are their mean.

    Attributes:
        state: a Cell with all that a run must keep: network, moments, loss scale, moving average.
    """

    def __init__(
        self, network: nn.Cell, loss: nn.Cell, options: StepOptions | None = None, comm: Communicator = ALONE
    ) -> None:
        self.options = options or StepOptions()
        self.weights = tuple(network.trainable_params())
        self.sum_over_ranks = collective.create(comm)
        numbers = sum(weight.size for weight in self.weights)
        self.state = State(network, numbers, self.options)
        self.sums = hidden("losses", loss.length), hidden("gradient", numbers)
        self.add = AddGradients(network, loss, self.state, *self.sums, self.options.accumulation_steps > 1)
        passes = comm.size * self.options.accumulation_steps
        self.update = Update(self.weights, self.state, self.sums, self.options, passes, self.sum_over_ranks.in_graph)
        self.put = PutWeights(self.weights)

    def __call__(self, batch: Batch, learning_rate: float) -> StepResult:
        """Do the step on this rank's part of a global batch."""
        for part in self.micro_batches(batch):
            self.add(*part)
        self.sum_over_ranks(*self.sums)
        return StepResult(*self.update(Tensor(learning_rate, float32)))

    def compile(self, batch: Batch) -> None:
        """Compile both graphs for batches of the same shape as this one."""
        self.add.compile(*next(self.micro_batches(batch)))
        self.update.compile(Tensor(0.0, float32))

    def micro_batches(self, batch: Batch) -> Iterator[list[Tensor]]:
        """Yield image1, image2, flow and valid of each part of a batch."""
        for rows in np.split(np.arange(len(batch.image1)), self.options.accumulation_steps):
            part = slice(rows[0], rows[-1] + 1)
            yield [Tensor(array[part]) for array in (batch.image1, batch.image2, batch.flow, batch.valid)]

    @property
    def loss_scale(self):
        """What the loss is multiplied by, a number."""
        return float(self.state.loss_scale)

    @property
    def overflows(self):
        """How many steps of the run were left out for an overflow, a number."""
        return int(self.state.overflows)

    @contextlib.contextmanager
    def averaged_weights(self):
        """Inside, the network has the averaged weights; afterwards, bit for bit, its own."""
        own = np.concatenate([weight.asnumpy().ravel() for weight in self.weights])
        self.put(Tensor(own + self.state.average_offset.asnumpy()))
        try:
            yield
        finally:
            self.put(Tensor(own))


def hidden(name, *shape, value=0.0, dtype=float32):
    """A Parameter that no gradient goes to, filled with one value."""
    return Parameter(Tensor(np.full(shape, value), dtype), name=name, requires_grad=False)


class State(nn.Cell):
    """What a run must keep to go on: the network's parameters, and these."""

    def __init__(self, network: nn.Cell, numbers: int, options: StepOptions) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.moment1 = hidden("moment1", numbers)
        self.moment2 = hidden("moment2", numbers)
        self.beta1_power = hidden("beta1_power", value=1.0)
        self.beta2_power = hidden("beta2_power", value=1.0)
        self.loss_scale = hidden("loss_scale", value=LOSS_SCALE["start"] if options.loss_scaling else 1.0)
        self.finite_steps = hidden("finite_steps", dtype=mindspore.int32)
        self.overflows = hidden("overflows", dtype=mindspore.int32)
        if options.ema_decay:
            # Averaged weights minus weights.
            self.average_offset = hidden("average_offset", numbers)


class AddGradients(nn.Cell):
    """Forward and backward pass, adding loss vector and gradient to the two sums, or replacing them."""

    def __init__(self, network, loss, state, losses, gradient, accumulate: bool) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.loss = loss
        self.loss_scale = state.loss_scale
        self.losses = losses
        self.gradient = gradient
        self.put = ops.assign_add if accumulate else ops.assign
        self.value_and_grad = ops.value_and_grad(self.forward, None, tuple(network.trainable_params()), has_aux=True)

    def forward(self, image1, image2, flow, valid, scale):
        losses = self.loss(self.network(image1, image2), flow, valid)
        return losses.sum() * scale, losses

    def construct(self, image1, image2, flow, valid):
        (_, losses), gradients = self.value_and_grad(
            to_network(image1),
            to_network(image2),
            flow.transpose(0, 3, 1, 2),
            (valid > 0).astype(float32).expand_dims(1),
            self.loss_scale,
        )
        self.put(self.losses, losses)
        self.put(self.gradient, flatten(gradients))
        return losses


class Update(nn.Cell):
    """From the two sums, over `passes` passes on all ranks, to new weights; empties the sums for more passes."""

    def __init__(
        self,
        weights: tuple[Parameter, ...],
        state: State,
        sums: tuple[Parameter, Parameter],
        options: StepOptions,
        passes: int,
        all_reduce: ops.Primitive | None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.weights = weights
        self.sizes = tuple(weight.size for weight in weights)
        self.state = state
        self.losses, self.gradient = sums
        self.change = hidden("change", *self.gradient.shape)
        self.passes = passes
        self.accumulate = options.accumulation_steps > 1
        self.clip_norm = options.clip_norm
        self.loss_scaling = options.loss_scaling
        self.decay = 0.0 if options.decoupled_decay else options.weight_decay
        self.decoupled_decay = options.weight_decay if options.decoupled_decay else 0.0
        self.ema_decay = options.ema_decay
        self.all_reduce = all_reduce
        self.adam = ops.Adam()
        self.split = SplitWithSize()
        self.each = ops.HyperMap()

    def construct(self, learning_rate):
        state = self.state
        scale = state.loss_scale + 0.0  # a copy: the parameter is assigned to below
        losses, gradient = self.losses, self.gradient
        if self.accumulate:
            losses, gradient = losses + 0.0, gradient + 0.0
        if self.all_reduce is not None:
            # An overflow on one rank is one in the sum, so all ranks decide alike.
            losses, gradient = self.all_reduce(losses), self.all_reduce(gradient)
        factor = 1.0 / (scale * self.passes)
        norm = ordered_sum(ops.square(gradient)).sqrt() * factor
        finite = ops.isfinite(norm)
        if self.clip_norm > 0:
            factor = factor * ops.minimum(self.clip_norm / (norm + 1e-6), 1.0)
        ops.assign(self.change, ops.zeros_like(self.change))
        if finite:
            gradient = gradient * factor
            if self.decay > 0:
                gradient = gradient + flatten(self.weights) * self.decay
            ops.assign(state.beta1_power, state.beta1_power * BETA1)
            ops.assign(state.beta2_power, state.beta2_power * BETA2)
            # Adam of weights that are zero gives what is to be added to the weights.
            self.adam(
                self.change,
                state.moment1,
                state.moment2,
                state.beta1_power,
                state.beta2_power,
                learning_rate,
                BETA1,
                BETA2,
                EPSILON,
                gradient,
            )
            if self.decoupled_decay > 0:
                ops.assign_add(self.change, flatten(self.weights) * (-self.decoupled_decay * learning_rate))
            if self.ema_decay > 0:
                # average' - weights' = decay (average - weights'), weights' = weights + change
                ops.assign(state.average_offset, (state.average_offset - self.change) * self.ema_decay)
        self.each(add_part, self.weights, self.split(self.change, self.sizes, 0))
        if self.accumulate:
            ops.assign(self.losses, ops.zeros_like(self.losses))
            ops.assign(self.gradient, ops.zeros_like(self.gradient))
        if self.loss_scaling:
            self.adjust_loss_scale(finite)
        return losses / self.passes, norm, finite

    def adjust_loss_scale(self, finite) -> None:
        """Lower the scale after an overflow, raise it after many steps without one."""
        state = self.state
        steps = ops.select(finite, state.finite_steps + 1, ops.zeros_like(state.finite_steps))
        grow = steps >= LOSS_SCALE["every"]
        scale = ops.select(finite, state.loss_scale, ops.maximum(state.loss_scale / LOSS_SCALE["factor"], 1.0))
        scale = ops.select(grow, scale * LOSS_SCALE["factor"], scale)
        ops.assign(state.loss_scale, scale)
        ops.assign_add(state.overflows, 1 - finite.astype(mindspore.int32))
        ops.assign(state.finite_steps, ops.select(grow, ops.zeros_like(steps), steps))


class PutWeights(nn.Cell):
    """Gives weights the values in a vector.

    A graph, because graphs that are compiled do not see what Parameter.set_data brings.
    """

    def __init__(self, weights) -> None:
        super().__init__(auto_prefix=False)
        self.weights = weights
        self.sizes = tuple(weight.size for weight in weights)
        self.split = SplitWithSize()
        self.each = ops.HyperMap()

    def construct(self, vector):
        self.each(put_part, self.weights, self.split(vector, self.sizes, 0))
        return vector.shape


to_row = ops.MultitypeFuncGraph("to_row")
add_part = ops.MultitypeFuncGraph("add_part")
put_part = ops.MultitypeFuncGraph("put_part")


def flatten(tensors):
    """Tensors to one vector."""
    return ops.Concat()(ops.HyperMap()(to_row, tensors))


@to_row.register("Tensor")
def _(tensor):
    return ops.reshape(tensor, (-1,))


@add_part.register("Tensor", "Tensor")
def _(weight, part):
    return ops.assign_add(weight, ops.reshape(part, weight.shape))


@put_part.register("Tensor", "Tensor")
def _(weight, part):
    return ops.assign(weight, ops.reshape(part, weight.shape))
