"""How the published PyTorch networks differ from this one: in the names of parameters, and in taking BGR images."""

from typing import Any, TypeVar

from model.pwcnet import CONTEXT_LAYERS, ESTIMATOR_CHANNELS, OUTPUT_LEVELS, PYRAMID_CHANNELS, PWCNet

Weights = TypeVar("Weights")

FIRST_LAYER = "feature_pyramid_extractor.convs.0.0.0.weight"


def published_names(variant: str) -> dict[str, str]:
    """Names of a dense network's parameters here and in its publishers' checkpoints.

    Returns:
        Name here to name there, without prefix, in the order of the network. For "irr" they are the same.
    """
    if variant == "irr":
        return {parameter.name: parameter.name for parameter in PWCNet(variant).get_parameters()}
    layers = {}
    for level in range(1, len(PYRAMID_CHANNELS)):
        # In the publishers' sixth level the layer aa comes first.
        parts = ("aa", "a", "b") if level == 6 else ("a", "aa", "b")
        for index, part in enumerate(parts):
            here = f"feature_pyramid_extractor.convs.{level - 1}.{index}.0"
            layers[here] = f"conv{level}{part}.0"
    for index in range(OUTPUT_LEVELS):
        level = 6 - index
        for number in range(len(ESTIMATOR_CHANNELS)):
            here = f"flow_estimators.{index}.conv{number + 1}.0"
            layers[here] = f"conv{level}_{number}.0"
        layers[f"flow_estimators.{index}.conv_last.0"] = f"predict_flow{level}"
        if index < OUTPUT_LEVELS - 1:
            layers[f"upsamplings.{index}.flow"] = f"deconv{level}"
            layers[f"upsamplings.{index}.features"] = f"upfeat{level}"
    for index in range(len(CONTEXT_LAYERS)):
        layers[f"context_networks.convs.{index}.0"] = f"dc_conv{index + 1}.0"
    last = len(CONTEXT_LAYERS)
    layers[f"context_networks.convs.{last}.0"] = f"dc_conv{last + 1}"
    return {f"{here}.{kind}": f"{there}.{kind}" for here, there in layers.items() for kind in ("weight", "bias")}


def swap_red_and_blue(name: str, value: Weights) -> Weights:
    """Turn a parameter of a network that takes BGR images, as NVlabs' does, into one of ours, or back.

    Reversing the input channels of the first convolution once, at import, lets everything else use RGB images.

    Args:
        name: of the parameter, here.
        value: its weights, an array or a PyTorch tensor.

    Returns:
        The weights, the three input channels reversed if it is that convolution.
    """
    if name == FIRST_LAYER:
        images: Any = value
        return images[:, [2, 1, 0]]
    return value
