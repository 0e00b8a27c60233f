"""The layer that the network is made of: a convolution with bias and LeakyReLU."""

from mindspore import nn
from mindspore.common.initializer import HeNormal


def conv(channels_in, channels_out, stride=1, dilation=1, activation=True):
    """A 3x3 convolution with bias that keeps the size (over stride), and LeakyReLU 0.1."""
    layer = nn.Conv2d(
        channels_in, channels_out, 3, stride, pad_mode="pad", padding=dilation, dilation=dilation,
        has_bias=True, weight_init=HeNormal(), bias_init="zeros",
    )
    return nn.SequentialCell(layer, nn.LeakyReLU(0.1)) if activation else nn.SequentialCell(layer)
