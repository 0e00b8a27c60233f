"""One data-parallel training step: gradients of this rank's pairs, their sum over ranks, update.

There are two graphs, so that a batch can go through in micro-batches and MPI can sum between them. In the second,
all gradients are one vector: one sum over ranks, one norm and one update. One for each of the 118 weights takes as
long to compile as the network does.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, float32, nn, ops
from mindspore.ops.auto_generate import SplitWithSize

from launch import collective
from launch.communicator import ALONE, Communicator
from model.pwcnet import to_network
from model.reductions import ordered_sum
from prep.reader import Batch

INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_FACTOR = 2.0
"""The loss scale is divided by this after an overflow, and multiplied by it after many steps without one."""
LOSS_SCALE_STEPS = 1000
"""Steps without overflow after which the loss scale grows."""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Of Adam (D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", 2015)."""


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How gradients become new weights."""

    accumulation_steps: int = 1
    """Micro-batches in which a rank's batch goes through the network, to need less memory; the result is the same up
    to rounding."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient; larger gradients are scaled down to it. 0: no clipping."""
    loss_scaling: bool = False
    """Dynamic loss scaling, for float16."""
    weight_decay: float = 0.0
    """Share of each weight added to its gradient (L2 regularisation)."""
    decoupled_decay: bool = False
    """Apply weight decay apart from the gradient, in proportion to the learning rate: AdamW (I. Loshchilov and F.
    Hutter, "Decoupled Weight Decay Regularization", 2019)."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, such as 0.999. 0: no average."""


class StepResult(NamedTuple):
    """What a training step returns."""

    losses: Tensor
    """The loss vector, mean over micro-batches and ranks."""
    gradient_norm: Tensor
    """() global norm of the mean gradient, before clipping."""
    finite: Tensor
    """() bool; if False, a gradient overflowed and the weights are unchanged."""


class TrainStep:
    """A step of Adam or AdamW on this rank's share of the global batch.

    Args:
        network: maps two images to the flows of the pyramid levels.
        loss: maps (flows, flow, valid) to the loss vector, a mean over the batch; its sum is minimised.
        options: see `StepOptions`.
        comm: the ranks that share the batch; gradients and losses are their mean.

    Attributes:
        state: all that a checkpoint stores: network, moments, loss scale, moving average.
    """

    def __init__(
        self, network: nn.Cell, loss: nn.Cell, options: StepOptions | None = None, comm: Communicator = ALONE
    ) -> None:
        self.options = options or StepOptions()
        self.weights = tuple(network.trainable_params())
        all_reduce = collective.create(comm)
        self.sum_over_ranks: Callable[..., object] = all_reduce
        size = sum(weight.size for weight in self.weights)
        self.state = State(network, size, self.options)
        self.sums = buffer("losses", loss.length), buffer("gradient", size)
        self.add = AddGradients(network, loss, self.state, self.sums, self.options.accumulation_steps > 1)
        passes = comm.size * self.options.accumulation_steps
        self.update = Update(self.weights, self.state, self.sums, self.options, passes, all_reduce.in_graph)
        self.put = PutWeights(self.weights)

    def __call__(self, batch: Batch, learning_rate: float) -> StepResult:
        """Do the step on this rank's share of a global batch."""
        for micro_batch in self.micro_batches(batch):
            self.add(*micro_batch)
        self.sum_over_ranks(*self.sums)
        return StepResult(*self.update(Tensor(learning_rate, float32)))

    def compile(self, batch: Batch) -> None:
        """Compile both graphs for batches of the shape of this one."""
        self.add.compile(*next(self.micro_batches(batch)))
        self.update.compile(Tensor(0.0, float32))

    def micro_batches(self, batch: Batch) -> Iterator[list[Tensor]]:
        """Yield image1, image2, flow and valid of each micro-batch."""
        size = len(batch.image1) // self.options.accumulation_steps
        for start in range(0, len(batch.image1), size):
            rows = slice(start, start + size)
            yield [Tensor(array[rows]) for array in (batch.image1, batch.image2, batch.flow, batch.valid)]

    @property
    def loss_scale(self) -> float:
        """The factor by which the loss is multiplied."""
        return float(self.state.loss_scale)

    @property
    def overflows(self) -> int:
        """How many steps of the run were skipped because a gradient overflowed."""
        return int(self.state.overflows)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """A context in which the network has the averaged weights; afterwards it has its own, bit for bit."""
        own = np.concatenate([weight.asnumpy().ravel() for weight in self.weights])
        self.put(Tensor(own + self.state.average_offset.asnumpy()))
        try:
            yield
        finally:
            self.put(Tensor(own))


def buffer(name: str, *shape: int, value: float = 0.0, dtype: mindspore.dtype.Type = float32) -> Parameter:
    """A Parameter without gradient, filled with one value."""
    return Parameter(Tensor(np.full(shape, value), dtype), name=name, requires_grad=False)


class State(nn.Cell):
    """What a run needs to resume: the parameters of the network, and these."""

    def __init__(self, network: nn.Cell, size: int, options: StepOptions) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.moment1 = buffer("moment1", size)
        self.moment2 = buffer("moment2", size)
        self.beta1_power = buffer("beta1_power", value=1.0)
        self.beta2_power = buffer("beta2_power", value=1.0)
        self.loss_scale = buffer("loss_scale", value=INITIAL_LOSS_SCALE if options.loss_scaling else 1.0)
        self.finite_steps = buffer("finite_steps", dtype=mindspore.int32)
        self.overflows = buffer("overflows", dtype=mindspore.int32)
        if options.ema_decay:
            # Averaged weights minus weights. Checkpoints of older versions have this name, too.
            self.average_offset = buffer("average_offset", size)


class AddGradients(nn.Cell):
    """Forward and backward pass; adds the loss vector and the gradient to their sums, or replaces these."""

    def __init__(
        self, network: nn.Cell, loss: nn.Cell, state: State, sums: tuple[Parameter, Parameter], accumulate: bool
    ) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.loss = loss
        self.loss_scale = state.loss_scale
        self.losses, self.gradient = sums
        self.put = ops.assign_add if accumulate else ops.assign
        self.value_and_grad = ops.value_and_grad(self.forward, None, tuple(network.trainable_params()), has_aux=True)

    def forward(
        self, image1: Tensor, image2: Tensor, flow: Tensor, valid: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses = self.loss(self.network(image1, image2), flow, valid)
        return losses.sum() * scale, losses

    def construct(self, image1: Tensor, image2: Tensor, flow: Tensor, valid: Tensor) -> Tensor:
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
    """Updates the weights from the sums over `passes` forward and backward passes, and clears the sums.

    Without accumulation the next pass replaces the sums, so they need no clearing.
    """

    def __init__(
        self,
        weights: tuple[Parameter, ...],
        state: State,
        sums: tuple[Parameter, Parameter],
        options: StepOptions,
        passes: int,
        all_reduce: ops.Primitive | None,  # None if the sums are over all ranks already
    ) -> None:
        super().__init__(auto_prefix=False)
        self.weights = weights
        self.sizes = tuple(weight.size for weight in weights)
        self.state = state
        self.losses, self.gradient = sums
        self.change = buffer("change", *self.gradient.shape)
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

    def construct(self, learning_rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state
        scale = state.loss_scale + 0.0  # a copy: the parameter is assigned to below
        losses, gradient = self.losses, self.gradient
        if self.accumulate:
            losses, gradient = losses + 0.0, gradient + 0.0
        if self.all_reduce is not None:
            # An overflow on one rank is also one in the sum, so all ranks decide alike.
            losses, gradient = self.all_reduce(losses), self.all_reduce(gradient)
        factor = 1.0 / (scale * self.passes)
        norm = ordered_sum(ops.square(gradient)).sqrt() * factor
        finite = ops.isfinite(norm)
        if self.clip_norm > 0:
            factor = factor * ops.minimum(self.clip_norm / (norm + 1e-6), 1.0)
        ops.assign_sub(self.change, self.change)
        if finite:
            gradient = gradient * factor
            if self.decay > 0:
                gradient = gradient + flatten(self.weights) * self.decay
            ops.assign(state.beta1_power, state.beta1_power * BETA1)
            ops.assign(state.beta2_power, state.beta2_power * BETA2)
            # Applied to zeros, Adam gives the change of the weights.
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

    def adjust_loss_scale(self, finite: Tensor) -> None:
        """Lower the scale after an overflow, raise it after many steps without one."""
        state = self.state
        steps = ops.select(finite, state.finite_steps + 1, ops.zeros_like(state.finite_steps))
        grow = steps >= LOSS_SCALE_STEPS
        scale = ops.select(finite, state.loss_scale, ops.maximum(state.loss_scale / LOSS_SCALE_FACTOR, 1.0))
        scale = ops.select(grow, scale * LOSS_SCALE_FACTOR, scale)
        ops.assign(state.loss_scale, scale)
        ops.assign_add(state.overflows, 1 - finite.astype(mindspore.int32))
        ops.assign(state.finite_steps, ops.select(grow, ops.zeros_like(steps), steps))


class PutWeights(nn.Cell):
    """Sets weights to the values in a vector.

    It is a graph because compiled graphs do not see what Parameter.set_data sets.
    """

    def __init__(self, weights: tuple[Parameter, ...]) -> None:
        super().__init__(auto_prefix=False)
        self.weights = weights
        self.sizes = tuple(weight.size for weight in weights)
        self.split = SplitWithSize()
        self.each = ops.HyperMap()

    def construct(self, vector: Tensor) -> tuple[int, ...]:
        self.each(put_part, self.weights, self.split(vector, self.sizes, 0))
        return vector.shape


to_row = ops.MultitypeFuncGraph("to_row")
add_part = ops.MultitypeFuncGraph("add_part")
put_part = ops.MultitypeFuncGraph("put_part")


def flatten(tensors: tuple[Tensor, ...]) -> Tensor:
    """Concatenate tensors of any shape to one vector."""
    return ops.Concat()(ops.HyperMap()(to_row, tensors))


@to_row.register("Tensor")
def _(tensor: Tensor) -> Tensor:
    return ops.reshape(tensor, (-1,))


@add_part.register("Tensor", "Tensor")
def _(weight: Tensor, part: Tensor) -> Tensor:
    return ops.assign_add(weight, ops.reshape(part, weight.shape))


@put_part.register("Tensor", "Tensor")
def _(weight: Tensor, part: Tensor) -> Tensor:
    return ops.assign(weight, ops.reshape(part, weight.shape))
