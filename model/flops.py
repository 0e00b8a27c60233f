"""How much a network computes, and how much a processor could: the bound that its speed is compared with."""

from mindspore import nn

from model import native
from model.layers import Convolution
from model.precision import Precision
from model.pwcnet import OUTPUT_LEVELS, PYRAMID_CHANNELS, PWCNet

TRAINING_FACTOR = 3
"""A training step computes three convolutions for one of inference: values, gradients of inputs and of weights."""


def count_flops(network: PWCNet, height: int, width: int) -> int:
    """Floating-point operations of the convolutions for the flow of one pair.

    A multiplication and an addition are two. All other operators together need a hundredth of it. Counted are those of
    the definition. Winograd's filtering (model/native/cpu/winograd.cpp) needs four ninths of them, so that a network
    may seem faster than the processor's peak.

    Args:
        network: of any variant.
        height, width: of the images, multiples of 64 pixels.
    """
    levels = len(PYRAMID_CHANNELS) - 1
    total = 0
    for level, layers in enumerate(network.feature_pyramid_extractor.convs, 1):
        total += 2 * sum_layers(layers, height >> level, width >> level)
    for cells in (network.flow_estimators, network.upsamplings):
        for index, cell in enumerate(cells):
            total += sum_layers(cell, height >> (levels - index), width >> (levels - index))
    finest = levels - OUTPUT_LEVELS + 1
    return total + sum_layers(network.context_networks, height >> finest, width >> finest)


def sum_layers(cell: nn.Cell, height: int, width: int) -> int:
    """Operations of all convolutions in a Cell, each of which is applied to (or, transposed, at) so many pixels."""
    layers = [layer for _, layer in cell.cells_and_names() if isinstance(layer, (Convolution, nn.Conv2dTranspose))]
    return 2 * height * width * sum(layer.weight.size for layer in layers)


def measure_peak(precision: Precision) -> float | None:
    """The operations in a second that the native convolution reaches where it is fastest, with this rank's threads.

    Returns:
        None where there is no native convolution in this precision.
    """
    if precision == "float16":
        return None
    return native.measure_peak(precision == "bfloat16")
