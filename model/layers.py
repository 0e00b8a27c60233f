"""The layer that the network is made of: a 3x3 convolution with bias and LeakyReLU."""

import numpy as np
from mindspore import Tensor, float16, float32, nn, ops
from mindspore.common.initializer import HeNormal

from model import native
from model.backend import Backend


class Convolution(nn.Conv2d):
    """A 3x3 convolution with bias that keeps the size (over stride), and LeakyReLU 0.1.

    The native one, for the CPU and float32, is a single operator: oneDNN in the layouts that it is fastest in, which
    also activates and concatenates. MindSpore's needs four, and multiplies a copy of each pixel's neighbourhood.

    Args:
        channels_in, channels_out: as the weights have them.
        backend: of the network; where there is no native convolution, MindSpore's takes its place.
        stride, dilation: in pixels.
        activation: whether LeakyReLU follows.
        concatenate: whether the input's channels follow the output's (DenseNet).
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
        concatenate: bool = False,
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
        self.concatenate = concatenate
        self.activation = nn.LeakyReLU(0.1) if activation else None
        self.settings = Tensor(np.array([stride, dilation, activation, concatenate], np.int32))
        self.is_native = backend == "native" and native.has_operator("Convolution3x3")
        if self.is_native:
            self.operator = native_convolution(stride, concatenate)

    def construct(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C_out or C_out + C, ceil(H / stride), ceil(W / stride))."""
        if self.is_native:
            return self.operator(x, self.weight, self.bias, self.settings)
        y = super().construct(x)
        if self.activation is not None:
            y = self.activation(y)
        return ops.concat((y, x), 1) if self.concatenate else y

    def use_float16(self) -> None:
        """Compute in float16 from here on, with MindSpore's operators; the weights stay float32."""
        self.is_native = False
        self.to_float(float16)


def native_convolution(stride: int, concatenate: bool) -> ops.Custom:
    """The native convolution with its gradient: (x, weight, bias, settings) to y."""

    def infer_shape(x: list[int], weight: list[int], bias: list[int], settings: list[int]) -> list[int]:
        channels = weight[0] + x[1] if concatenate else weight[0]
        return [x[0], channels, (x[2] - 1) // stride + 1, (x[3] - 1) // stride + 1]

    gradients = native.operator(
        "Convolution3x3Gradient",
        lambda x, weight, y, dy, settings: (x, weight, [weight[0]]),
        lambda x, weight, y, dy, settings: (float32, float32, float32),
    )

    def bprop(
        x: Tensor, weight: Tensor, bias: Tensor, settings: Tensor, y: Tensor, dy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_gradient, weight_gradient, bias_gradient = gradients(x, weight, y, dy, settings)
        return x_gradient, weight_gradient, bias_gradient, ops.zeros_like(settings)

    return native.operator("Convolution3x3", infer_shape, lambda *_: float32, bprop)


def conv(
    channels_in: int,
    channels_out: int,
    backend: Backend,
    *,
    stride: int = 1,
    dilation: int = 1,
    activation: bool = True,
    concatenate: bool = False,
) -> nn.SequentialCell:
    """A `Convolution` with the name 0 that it has in published weights."""
    return nn.SequentialCell(
        Convolution(
            channels_in,
            channels_out,
            backend,
            stride=stride,
            dilation=dilation,
            activation=activation,
            concatenate=concatenate,
        )
    )
