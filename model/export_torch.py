#!/usr/bin/env python3
"""Export a network's weights as a PyTorch file that its publishers' code loads.

python model/export_torch.py IN.ckpt OUT.pth
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import collections
import pathlib

from launch.arguments import Parser
from launch.errors import UserError, run
from launch.files import replacing


def export_weights(source: pathlib.Path, target: pathlib.Path) -> str:
    """Write a network's weights under their published names, whole or not at all.

    "irr": {"state_dict": {"_model." + name: tensor}}, as visinf/irr restores it. "nvlabs": the state_dict alone, with
    zeros for `deconv2`: the network never calls this layer, but NVlabs' code refuses a state_dict without it.

    Args:
        source: path of a checkpoint of the trainer, or of network weights.
        target: path of the file to write.

    Returns:
        The variant.

    Raises:
        UserError: the checkpoint is damaged, or its network was never published.
        OSError: the target cannot be written.
    """
    from model import weights
    from model.import_torch import UNUSED, load_torch
    from model.published import published_names, swap_red_and_blue

    torch = load_torch()
    network = weights.load_network(source)
    variant = network.variant
    differences = {
        "dense: false": not network.dense,
        "normalize_features: true": network.normalize_features,
        "warp_mode: nearest": network.warp.mode != "bilinear",
    }
    if any(differences.values()):
        found = ", ".join(name for name, differs in differences.items() if differs)
        raise UserError(
            f"{source}: its network has {found}, unlike the published one, whose code would compute another flow; "
            "export a network trained without these options"
        )
    names = published_names(variant)
    tensors = {}
    for parameter in network.get_parameters():
        tensor = torch.from_numpy(parameter.asnumpy().copy())
        if variant == "nvlabs":  # its publishers' code feeds it BGR
            tensor = swap_red_and_blue(parameter.name, tensor)
        tensors[names[parameter.name]] = tensor.contiguous()
    if variant == "irr":
        tensors = {"_model." + name: tensor for name, tensor in tensors.items()}
        content = {"state_dict": collections.OrderedDict(tensors)}
    else:
        tensors |= {name: torch.zeros((2, 2, 4, 4) if name.endswith("weight") else 2) for name in UNUSED}
        content = collections.OrderedDict(tensors)
    with replacing(target) as partial:
        # The format before PyTorch 1.6, which the publishers' code needs.
        torch.save(content, partial, _use_new_zipfile_serialization=False)
    return variant


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "source", type=pathlib.Path, metavar="IN.ckpt", help="a checkpoint of a run, or network weights"
    )
    parser.add_argument("target", type=pathlib.Path, metavar="OUT.pth", help="the file to write")
    args = parser.parse_args()
    variant = export_weights(args.source, args.target)
    print(f"{args.target}: weights of the variant {variant}, for its publishers' code")


if __name__ == "__main__":
    run(main)
