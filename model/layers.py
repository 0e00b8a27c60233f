"""The layer that the network is made of: a 3x3 convolution with bias and LeakyReLU."""

import numpy as np
from mindspore import Tensor, float16, float32, nn, ops
from mindspore.common.initializer import HeNormal

from model import native


class Convolution(nn.Conv2d):
    """A 3x3 convolution with bias that keeps the size (over stride), and LeakyReLU 0.1.

    On the CPU it is one operator of the project's own, in float32: oneDNN in the layouts that it is
    fastest in, with the activation and the concatenation done on the way. MindSpore's would be four,
    and a matrix product over a copy of each pixel's neighbourhood.

    Args:
        channels_in, channels_out: as the weights have them.
        stride, dilation: in pixels.
        activation: whether LeakyReLU follows.
        concatenate: the output has the input's channels behind its own (DenseNet).
    """

    def __init__(self, channels_in, channels_out, stride=1, dilation=1, activation=True, concatenate=False) -> None:
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
        self.fused = convolution_operator(stride, concatenate)

    def construct(self, x):
        """(N, C, H, W) to (N, C_out or C_out + C, ceil(H / stride), ceil(W / stride))."""
        if self.fused is not None:
            return self.fused(x, self.weight, self.bias, self.settings)
        y = super().construct(x)
        if self.activation is not None:
            y = self.activation(y)
        return ops.concat((y, x), 1) if self.concatenate else y

    def use_float16(self) -> None:
        """Compute in float16 from here on, with MindSpore's operators; the weights stay float32."""
        self.fused = None
        self.to_float(float16)


def convolution_operator(stride, concatenate):
    """The project's convolution with its gradient, (x, weight, bias, settings) to y, or None."""
    if native.device() != "CPU":
        return None

    def shape(x, weight, bias, settings):
        channels = weight[0] + x[1] if concatenate else weight[0]
        return [x[0], channels, (x[2] - 1) // stride + 1, (x[3] - 1) // stride + 1]

    gradients = native.operator(
        "Convolution3x3Gradient",
        lambda x, weight, y, dy, settings: (x, weight, [weight[0]]),
        lambda x, weight, y, dy, settings: (float32, float32, float32),
    )
    if gradients is None:
        return None

    def bprop(x, weight, bias, settings, y, dy):
        to_x, to_weight, to_bias = gradients(x, weight, y, dy, settings)
        return to_x, to_weight, to_bias, ops.zeros_like(settings)

    return native.operator("Convolution3x3", shape, lambda *_: float32, bprop)


def conv(channels_in, channels_out, stride=1, dilation=1, activation=True, concatenate=False):
    """A `Convolution` under the name 0 that published weights have it under."""
    return nn.SequentialCell(Convolution(channels_in, channels_out, stride, dilation, activation, concatenate))
