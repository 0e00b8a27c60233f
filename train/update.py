"""How gradients become new weights, on every device: Adam or AdamW, clipping, loss scaling, moving average."""

import ctypes
import dataclasses
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, float32, nn, ops
from mindspore.ops.auto_generate import SplitWithSize

from model import native
from model.reductions import ordered_sum

INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_FACTOR = 2.0
"""The loss scale is divided by this after an overflow, and multiplied by it after many steps without one."""
LOSS_SCALE_STEPS = 1000
"""Steps without overflow after which the loss scale grows."""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Constants of Adam (D. P. Kingma and J. Ba, "Adam: A Method for Stochastic Optimization", 2015)."""


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

    @property
    def accumulates(self) -> bool:
        """Whether an update follows several forward and backward passes."""
        return self.accumulation_steps > 1

    @property
    def l2_decay(self) -> float:
        """Share of each weight added to its gradient."""
        return 0.0 if self.decoupled_decay else self.weight_decay

    @property
    def adamw_decay(self) -> float:
        """Share of each weight, times the learning rate, subtracted from it."""
        return self.weight_decay if self.decoupled_decay else 0.0


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


class StepResult(NamedTuple):
    """What a training step returns."""

    losses: Tensor
    """The loss vector, mean over micro-batches and ranks."""
    gradient_norm: float
    """Global norm of the mean gradient, before clipping."""
    finite: bool
    """If False, a gradient overflowed and the weights are unchanged."""


@dataclasses.dataclass(frozen=True)
class UpdateInputs:
    """What an update works on."""

    weights: tuple[Parameter, ...]
    """The network's parameters."""
    state: State
    losses: Parameter
    """The sum of the loss vectors of all passes."""
    gradient: Parameter
    """The sum of the gradients of all passes."""
    options: StepOptions
    passes: int
    """Forward and backward passes, of all ranks."""


class GraphUpdate(nn.Cell):
    """Updates the weights from the sums of losses and gradients, and clears the sums.

    Without accumulation the next pass replaces the sums, so they need no clearing.

    Args:
        inputs: see `UpdateInputs`.
        all_reduce: sums over ranks; None if the sums are over all ranks already.
    """

    def __init__(self, inputs: UpdateInputs, all_reduce: ops.Primitive | None) -> None:
        super().__init__(auto_prefix=False)
        self.weights, self.state, options = inputs.weights, inputs.state, inputs.options
        self.sizes = tuple(weight.size for weight in self.weights)
        self.losses, self.gradient = inputs.losses, inputs.gradient
        self.change = buffer("change", *self.gradient.shape)
        self.passes = inputs.passes
        self.accumulate = options.accumulates
        self.clip_norm = options.clip_norm
        self.loss_scaling = options.loss_scaling
        self.decay = options.l2_decay
        self.decoupled_decay = options.adamw_decay
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


class Settings(ctypes.Structure):
    """`AdamSettings` of model/native/cpu/adam.cpp."""

    _fields_ = [
        ("factor", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("beta1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("rate", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("decoupled_decay", ctypes.c_float),
        ("ema_decay", ctypes.c_float),
        ("clear", ctypes.c_int32),
    ]


class NativeUpdate:
    """Updates the weights from the sums of losses and gradients over all ranks, and clears the sums.

    For the CPU: the same as `GraphUpdate` in one pass over memory, where a graph needs twenty, and without a graph to
    compile. It writes to the memory of the parameters, which is that of the graphs.

    Raises:
        model.native.build.BuildError: there are no native operators.
    """

    def __init__(self, inputs: UpdateInputs) -> None:
        self.inputs = inputs
        self.sizes = (ctypes.c_int64 * len(inputs.weights))(*(weight.size for weight in inputs.weights))
        self.sum_of_squares = native.function("sum_of_squares", ctypes.c_double)
        self.adam = native.function("adam", None)

    def __call__(self, learning_rate: float) -> StepResult:
        """Do an update."""
        inputs, options = self.inputs, self.inputs.options
        losses, gradient = inputs.losses.asnumpy(), inputs.gradient.asnumpy()
        mean_losses = Tensor(losses / np.float32(inputs.passes))
        factor = 1 / (float(inputs.state.loss_scale) * inputs.passes)
        norm = self.sum_of_squares(address(inputs.gradient), ctypes.c_int64(gradient.size)) ** 0.5 * factor
        finite = bool(np.isfinite(norm))
        if finite:
            if options.clip_norm > 0:
                factor *= min(options.clip_norm / (norm + 1e-6), 1.0)
            self.apply(learning_rate, factor)
        if options.accumulates:
            losses[...] = 0
            if not finite:
                gradient[...] = 0
        if options.loss_scaling:
            self.adjust_loss_scale(finite)
        return StepResult(mean_losses, norm, finite)

    def apply(self, learning_rate: float, factor: float) -> None:
        """Change weights and moments; `factor` scales the gradient, which is cleared if it is a sum of several."""
        weights, state, options = self.inputs.weights, self.inputs.state, self.inputs.options
        power1, power2 = state.beta1_power.asnumpy(), state.beta2_power.asnumpy()
        power1 *= BETA1
        power2 *= BETA2
        settings = Settings(
            factor=factor,
            decay=options.l2_decay,
            beta1=BETA1,
            beta2=BETA2,
            rate=learning_rate * float(1 - power2) ** 0.5 / float(1 - power1),
            epsilon=EPSILON,
            decoupled_decay=options.adamw_decay * learning_rate,
            ema_decay=options.ema_decay,
            clear=options.accumulates,
        )
        self.adam(
            ctypes.c_int64(len(weights)),
            (ctypes.c_void_p * len(weights))(*(address(weight).value for weight in weights)),
            self.sizes,
            address(self.inputs.gradient),
            address(state.moment1),
            address(state.moment2),
            address(state.average_offset) if options.ema_decay else None,
            ctypes.byref(settings),
        )

    def adjust_loss_scale(self, finite: bool) -> None:
        """Lower the scale after an overflow, raise it after many steps without one."""
        state = self.inputs.state
        scale, steps, overflows = (
            parameter.asnumpy() for parameter in (state.loss_scale, state.finite_steps, state.overflows)
        )
        steps[...] = steps + 1 if finite else 0
        overflows += not finite
        if not finite:
            scale[...] = max(scale / np.float32(LOSS_SCALE_FACTOR), 1)
        elif steps >= LOSS_SCALE_STEPS:
            scale *= np.float32(LOSS_SCALE_FACTOR)
            steps[...] = 0


def address(parameter: Parameter) -> ctypes.c_void_p:
    """Where the values of a parameter are in memory."""
    return ctypes.c_void_p(parameter.asnumpy().ctypes.data)


to_row = ops.MultitypeFuncGraph("to_row")
add_part = ops.MultitypeFuncGraph("add_part")


def flatten(tensors: tuple[Tensor, ...]) -> Tensor:
    """Concatenate tensors of any shape to one vector."""
    return ops.Concat()(ops.HyperMap()(to_row, tensors))


@to_row.register("Tensor")
def _(tensor: Tensor) -> Tensor:
    return ops.reshape(tensor, (-1,))


@add_part.register("Tensor", "Tensor")
def _(weight: Tensor, part: Tensor) -> Tensor:
    return ops.assign_add(weight, ops.reshape(part, weight.shape))
