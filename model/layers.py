"""The layer that the network is made of: a 3x3 convolution with bias and LeakyReLU."""

from typing import Any

import numpy as np
from mindspore import Tensor, bfloat16, float16, float32, nn, ops
from mindspore.common.initializer import HeNormal

from model import native
from model.backend import Backend
from model.precision import Precision

BLOCK = 16
"""Channels in a block of the blocked layout."""


class Convolution(nn.Conv2d):
    """A 3x3 convolution with bias that keeps the size (over stride), and LeakyReLU 0.1.

    The native one, for the CPU, is a single operator, which also activates: Winograd's minimal filtering, on processors
    with AVX-512, or oneDNN in the layouts that it is fastest in. MindSpore's needs three, and multiplies a copy of each
    pixel's neighbourhood.

    The native one also reads and writes the blocked layout that it computes in; see `keep_blocked_layout`.

    On GPUs, bias and LeakyReLU are one native operator behind MindSpore's convolution.

    Args:
        channels_in, channels_out: as the weights have them.
        backend: of the network; where there is no native convolution, MindSpore's takes its place.
        stride, dilation: in pixels.
        activation: whether LeakyReLU follows.
        reads_image: whether x is an image, whose gradient is seldom asked for.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        backend: Backend,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: bool = True,
        reads_image: bool = False,
    ) -> None:
        super().__init__(
            channels_in,
            channels_out,
            3,
            stride,
            pad_mode="pad",
            padding=dilation,
            dilation=dilation,
            has_bias=True,
            weight_init=HeNormal(),
            bias_init="zeros",
        )
        self.activation = nn.LeakyReLU(0.1) if activation else None
        self.geometry = [stride, dilation, int(activation)]
        self.can_be_native = backend == "native" and native.has_operator("Convolution3x3")
        self.activates_natively = activation and backend == "native" and native.has_operator("BiasActivation")
        if self.activates_natively:
            self.activate = native_activation()
        self.blocked_output = False
        self.reads_image = reads_image
        self.set_precision("float32")

    def construct(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C_out, ceil(H / stride), ceil(W / stride)), each in plain or blocked layout."""
        if self.is_native:
            return self.operator(x, self.weight, self.bias, self.settings)
        y = self.conv2d(x.astype(self.number_type), self.weight.astype(self.number_type))
        if self.activates_natively:
            return self.activate(y, self.bias)
        y = self.bias_add(y, self.bias.astype(self.number_type))
        if self.activation is not None:
            y = self.activation(y)
        return y

    def set_precision(self, precision: Precision) -> None:
        """Compute in `precision` from here on; the weights stay float32."""
        self.precision: Precision = precision
        self.is_native = self.can_be_native and precision != "float16"
        self.number_type = float16 if precision == "float16" else float32  # of MindSpore's convolution
        self.settings = Tensor(np.array([*self.geometry, precision == "bfloat16"], np.int32))
        if self.is_native:
            blocked_type = bfloat16 if precision == "bfloat16" else float32
            self.operator = native_convolution(
                self.geometry[0], blocked_type if self.blocked_output else None, self.reads_image
            )


def keep_blocked_layout(layers: list[nn.SequentialCell]) -> None:
    """Keep the results between consecutive native convolutions in the blocked layout that they compute in.

    This saves two conversions each, forward and backward. Nothing else may read these results.

    Args:
        layers: as `conv` makes them, the first one to be computed first.
    """
    for layer in layers[:-1]:
        layer[0].blocked_output = True
        layer[0].set_precision(layer[0].precision)


def native_convolution(stride: int, blocked_type: Any, reads_image: bool) -> ops.Custom:
    """The native convolution with its gradient: (x, weight, bias, settings) to y.

    Images in blocked layout are (N, ceil(C / BLOCK), H, W, BLOCK), in the type that the convolution multiplies, and
    zeros fill up the last block. x is in that layout if it has five axes, and in that of `native_flow_estimator`'s
    features if it has six.

    Args:
        stride: in pixels.
        blocked_type: of y in blocked layout; None for y in plain layout.
        reads_image: whether the gradient of x is an operator of its own, which MindSpore leaves out where it can be.
    """
    type_of_y = blocked_type or float32

    def infer_shape(x: list[int], weight: list[int], bias: list[int], settings: list[int]) -> list[int]:
        # The features of a flow estimator have six axes.
        n, *sides = (x[2], x[3] - 1, x[4]) if len(x) == 6 else (x[0], *x[2:4])
        height, width = ((side - 1) // stride + 1 for side in sides)
        if blocked_type:
            return [n, -(-weight[0] // BLOCK), height, width, BLOCK]
        return [n, weight[0], height, width]

    gradients = native.operator(
        "Convolution3x3Gradient",
        lambda x, weight, y, dy, settings: (weight, [weight[0]], x),
        lambda x, weight, y, dy, settings: (float32, float32, x),
    )

    def bprop(
        x: Tensor, weight: Tensor, bias: Tensor, settings: Tensor, y: Tensor, dy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight_gradient, bias_gradient, x_gradient = gradients(x, weight, y, dy, settings)
        return x_gradient, weight_gradient, bias_gradient, ops.zeros_like(settings)

    if not reads_image:
        return native.operator("Convolution3x3", infer_shape, lambda *_: type_of_y, bprop)
    weight_gradients = native.operator(
        "Convolution3x3Gradient",
        lambda x, weight, y, dy, settings: (weight, [weight[0]]),
        lambda x, weight, y, dy, settings: (float32, float32),
    )

    def bprop_of_image(
        x: Tensor, weight: Tensor, bias: Tensor, settings: Tensor, y: Tensor, dy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight_gradient, bias_gradient = weight_gradients(x, weight, y, dy, settings)
        return gradients(x, weight, y, dy, settings)[2], weight_gradient, bias_gradient, ops.zeros_like(settings)

    return native.operator("ImageConvolution3x3", infer_shape, lambda *_: type_of_y, bprop_of_image)


def native_activation() -> ops.Custom:
    """The native bias and LeakyReLU 0.1 of a convolution's result, with their gradient: (x, bias) to y.

    x and y are float32 or float16, the bias is float32.
    """
    gradients = native.operator("BiasActivationGradient", lambda y, dy: (y, [y[1]]), lambda y, dy: (y, float32))

    def bprop(x: Tensor, bias: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return gradients(y, dy)

    return native.operator("BiasActivation", lambda x, bias: x, lambda x, bias: x, bprop)


def native_flow_estimator(precision: Precision, with_flow: bool, is_read: bool) -> ops.Custom:
    """The native dense flow estimator with its gradient: (x, six weights, six biases, settings) to (features, flow).

    x is (N, C, H, W), the flow (N, 2, H, W). The features are the results of the layers, the last one's first, x, and,
    if `with_flow`, the flow, in a layout for native operators alone: (1, blocks of channels, N, H + 1, W, block).

    Args:
        precision: float32 or bfloat16.
        with_flow: whether the features include the flow.
        is_read: whether anything reads the features.
    """
    features_type = bfloat16 if precision == "bfloat16" else float32
    block = native.estimator_block(precision == "bfloat16")

    def infer_shape(x: list[int], *rest: list[int]) -> tuple[list[int], list[int]]:
        channels = x[1] + sum(weight[0] for weight in rest[:5]) + 2 * with_flow
        return [1, -(-channels // block), x[0], x[2] + 1, x[3], block], [x[0], 2, x[2], x[3]]

    def infer_gradient_shapes(*shapes: list[int]) -> tuple[list[int], ...]:
        weights, flow = shapes[:6], shapes[-2]
        return ([flow[0], weights[0][1], flow[2], flow[3]], *weights, *([weight[0]] for weight in weights))

    gradients = native.operator("FlowEstimatorGradient", infer_gradient_shapes, lambda *_: (float32,) * 13)

    def bprop(
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        w4: Tensor,
        w5: Tensor,
        w6: Tensor,
        b1: Tensor,
        b2: Tensor,
        b3: Tensor,
        b4: Tensor,
        b5: Tensor,
        b6: Tensor,
        settings: Tensor,
        results: tuple[Tensor, Tensor],
        upstream: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, ...]:
        used = upstream if is_read else upstream[1:]
        return (*gradients(w1, w2, w3, w4, w5, w6, results[0], *used, settings), ops.zeros_like(settings))

    name = "FeatureEstimator" if is_read else "FlowEstimator"
    return native.operator(name, infer_shape, lambda *_: (features_type, float32), bprop)


def native_unpack_features(channels: int) -> ops.Custom:
    """Features of the native flow estimator, without the flow, to (N, channels, H, W)."""
    gradients = native.operator("UnpackFeaturesGradient", lambda dy, features: features, lambda dy, features: features)

    def bprop(features: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor]:
        return (gradients(dy, features),)

    return native.operator(
        "UnpackFeatures",
        lambda features: [features[2], channels, features[3] - 1, features[4]],
        lambda features: float32,
        bprop,
    )


def conv(channels_in: int, channels_out: int, backend: Backend, **options: Any) -> nn.SequentialCell:
    """A `Convolution` with the name 0 that it has in published weights."""
    return nn.SequentialCell(Convolution(channels_in, channels_out, backend, **options))
