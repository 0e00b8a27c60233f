"""One data-parallel training step: gradients of this rank's pairs, their sum over ranks, update.

The gradients are one vector: one sum over ranks, one norm and one update. One for each of the 118 weights takes as long
to compile as the network does. The update is apart from the graph of forward and backward pass, so that a batch can go
through in micro-batches and MPI can sum between them.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from mindspore import Parameter, Tensor, float32, nn, ops
from mindspore.ops.auto_generate import SplitWithSize

from launch import collective
from launch.communicator import ALONE, Communicator
from model import native
from model.graph_cache import compile_graph
from model.pwcnet import to_network
from prep.reader import Batch
from train.update import GraphUpdate, NativeUpdate, State, StepOptions, StepResult, UpdateInputs, buffer, flatten


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
        self.sum_over_ranks: Callable[..., object] = collective.HostSum(comm)
        size = sum(weight.size for weight in self.weights)
        self.state = State(network, size, self.options)
        self.sums = buffer("losses", loss.length), buffer("gradient", size)
        self.add = AddGradients(network, loss, self.state, self.sums, self.options.accumulates)
        self.passes = comm.size * self.options.accumulation_steps
        inputs = UpdateInputs(self.weights, self.state, *self.sums, self.options, self.passes)
        self.update: GraphUpdate | NativeUpdate
        if getattr(network, "backend", "") == "native" and native.has_operator("adam"):
            self.update = NativeUpdate(inputs)
        else:
            self.update = GraphUpdate(inputs, ops.AllReduce() if comm.nccl else None)
        self.put = PutWeights(self.weights)

    def __call__(self, batch: Batch, learning_rate: float) -> StepResult:
        """Do the step on this rank's share of a global batch."""
        for micro_batch in self.micro_batches(batch):
            self.add(*micro_batch)
        self.sum_over_ranks(*self.sums)
        return self.do_update(learning_rate)

    def do_update(self, learning_rate: float) -> StepResult:
        """Update the weights from the sums of gradients and losses."""
        if isinstance(self.update, NativeUpdate):
            return self.update(learning_rate)
        losses, norm, finite = self.update(Tensor(learning_rate, float32))
        return StepResult(losses, float(norm), bool(finite))

    def compile(self, batch: Batch, *key: object) -> None:
        """Compile all graphs for batches of the shape of this one.

        Args:
            batch: only its shape matters.
            key: texts or numbers that determine network and loss, for the graph cache.
        """
        key = (*key, self.options, self.passes)
        compile_graph(self.add, next(self.micro_batches(batch)), *key)
        if isinstance(self.update, GraphUpdate):
            compile_graph(self.update, [Tensor(0.0, float32)], *key)

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


put_part = ops.MultitypeFuncGraph("put_part")


@put_part.register("Tensor", "Tensor")
def _(weight: Tensor, part: Tensor) -> Tensor:
    return ops.assign(weight, ops.reshape(part, weight.shape))
