#!/usr/bin/env python3
"""Import weights of a published PWC-Net, a file of PyTorch, as a checkpoint of this network.

python model/import_torch.py IN.pth OUT.ckpt [--variant irr|nvlabs] [--channels rgb|bgr]
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import pathlib
import pickle
import re
import typing
import zipfile

import numpy as np

from launch.arguments import Parser
from launch.errors import UserError, run

CONTAINERS = ("state_dict", "model")
PREFIXES = ("_model.", "module.", "model.")
UNUSED = ("deconv2.weight", "deconv2.bias")
"""NVlabs' network has this layer, in its checkpoints too, and never calls it."""
LIGHTNING = "pytorch-lightning_version"
"""What PyTorch Lightning, and so ptlflow, writes into its checkpoints."""
MOST_ENTRIES = 100_000
"""In a file of PyTorch in the zip format, one for each tensor."""


def load_torch():
    """The package torch, which only the exchange of weights needs; UserError without it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"PyTorch is needed to read and write its files and cannot be imported "
            f"({error}); install it: pip install -e '.[torch]'"
        ) from None
    return torch


def read_torch(path):
    """Read a file of PyTorch of any age without running any code in it.

    Args:
        path: of a file that torch.save wrote, in the zip format or in the one before it.

    Returns:
        The object in it.

    Raises:
        UserError: no such file, no torch file, a damaged one, or one that holds other things than
            tensors, numbers and texts.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a checkpoint of PyTorch")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty, expected a checkpoint of PyTorch; download it again")
    check_zip(path)
    torch = load_torch()
    scalar = np.core.multiarray.scalar
    # Statistics beside the weights may be scalars of NumPy, under the name before or after NumPy 2.
    harmless = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),
    ]
    with open(path, "rb") as file:
        try:
            with torch.serialization.safe_globals(harmless):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # PyTorch raises whatever its parsers meet
            is_code = isinstance(error, pickle.UnpicklingError)
            if found := is_code and re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise UserError(
                    f"{path}: holds {found[1]}, code that would run on loading, "
                    "expected tensors and numbers alone; save the network's "
                    "state_dict() by itself where you trust the file"
                ) from None
            raise UserError(
                f"{path}: damaged or no checkpoint of PyTorch ({first_line(error)}); "
                "expected what torch.save writes: download it again"
            ) from None


def check_zip(path: pathlib.Path) -> None:
    """Refuse a file of the zip format whose content is larger than the file.

    torch.save compresses nothing, and torch.load unpacks all that there is: of a compressed
    megabyte it may make a gigabyte.

    Raises:
        UserError: compressed or overlapping entries, or a damaged directory of entries.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # the sign by which torch.load knows this format
            return
        try:
            with zipfile.ZipFile(file) as entries:
                infos = entries.infolist()
        except Exception as error:  # the module raises whatever its parser meets
            raise UserError(
                f"{path}: damaged or no checkpoint of PyTorch ({first_line(error)}); "
                "expected what torch.save writes: download it again"
            ) from None
    size = path.stat().st_size
    content = sum(info.file_size for info in infos)
    if content > size or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise UserError(
            f"{path}: holds {content} bytes in {size}, compressed or one over the other; "
            "expected what torch.save writes, which does not compress: load and save it "
            "again with PyTorch where you trust the file"
        )
    if len(infos) > MOST_ENTRIES:
        raise UserError(f"{path}: has {len(infos)} entries, expected some hundred; use another file")


def first_line(error) -> str:
    """An exception as its type and its first sentence."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].split('. ')[0][:120]}"


def find_tensors(path, content):
    """The state_dict in a file's content.

    Args:
        path: of the file, for the error.
        content: a dict of tensors, or one with such a dict under "state_dict" or "model".

    Returns:
        A dict of name (without the prefixes of wrappers) to tensor, and a list of what was left out
        because it is no tensor.

    Raises:
        UserError: there are no tensors.
    """
    torch = load_torch()
    left_out = []
    while isinstance(content, dict):
        inner = [key for key in CONTAINERS if isinstance(content.get(key), dict)]
        if not inner:
            break
        left_out += [str(key) for key in content if key != inner[0]]
        content = content[inner[0]]
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds {type(content).__name__}, expected a dict of tensors (a "
            "state_dict); save the network's state_dict()"
        )
    left_out += [str(key) for key, value in content.items() if not torch.is_tensor(value)]
    tensors = {str(key): value for key, value in content.items() if torch.is_tensor(value)}
    if not tensors:
        raise UserError(
            f"{path}: holds no tensors but {', '.join(left_out[:10]) or 'nothing'}; "
            'expected a state_dict, alone or under "state_dict" or "model"'
        )
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors, left_out


def guess_variant(path, names):
    """The variant that shares most names with a state_dict; UserError if none shares any."""
    from model.pwcnet import VARIANTS
    from model.weights import published_names

    shared = {variant: len(set(published_names(variant).values()) & set(names)) for variant in VARIANTS}
    variant = max(shared, key=shared.get)
    if not shared[variant]:
        raise UserError(
            f"{path}: holds {len(names)} tensors such as {', '.join(list(names)[:3])}; "
            "none is one of PWC-Net's as visinf/irr (irr) or NVlabs (nvlabs) name "
            "them; use a checkpoint of one of these"
        )
    return variant


def tell_channels(
    path: pathlib.Path, variant: str, tensors: typing.Collection[str], others: typing.Collection[str]
) -> tuple[str, str]:
    """In which order the network of a file takes the colours of its images.

    visinf/irr trains with RGB. NVlabs' networks take BGR; ptlflow trains networks with the same
    names, but for the unused layer, and gives them RGB. Its files are those of PyTorch Lightning.

    Args:
        path: of the file, for the error.
        variant: "irr" or "nvlabs".
        tensors: the names of the weights in the file.
        others: the names of what else it holds.

    Returns:
        "rgb" or "bgr", and what says so.

    Raises:
        UserError: the file does not tell.
    """
    if variant == "irr":
        return "rgb", "as visinf/irr trains this variant"
    unused, lightning = all(name in tensors for name in UNUSED), LIGHTNING in others
    if unused == lightning:
        signs = (
            f"the layer deconv2, as NVlabs' files, which take BGR, and {LIGHTNING}, as ptlflow's, which take RGB"
            if unused
            else f"neither the layer deconv2, as NVlabs' files, which take BGR, nor {LIGHTNING}, as "
            "ptlflow's, which take RGB"
        )
        raise UserError(
            f"{path}: has {signs}; say in which order the network was given its colours: "
            "--channels bgr or --channels rgb"
        )
    if unused:
        return "bgr", "told by the layer deconv2, as in NVlabs' files"
    return "rgb", f"told by {LIGHTNING} and no layer deconv2, as in ptlflow's files"


class Imported(typing.NamedTuple):
    """What an import made of a file."""

    variant: str
    channels: str
    """"rgb" or "bgr", in which order the file's network took its images' colours."""
    reason: str
    """What said so."""
    left_out: list[str]
    """Names in the file that the network does not use."""


def import_weights(
    source: pathlib.Path, target: pathlib.Path, variant: str | None = None, channels: str | None = None
) -> Imported:
    """Write the weights of a PyTorch file as a checkpoint of our network, whole or not at all.

    Args:
        source, target: paths, the latter ending in .ckpt.
        variant: "irr" or "nvlabs"; None: whichever the names are of.
        channels: "rgb" or "bgr", the order of colours in which the file's network takes images;
            None: what the file tells.

    Raises:
        UserError: the file is none, its weights are not exactly those of the network, or it does
            not tell its order of colours.
    """
    from mindspore import Parameter

    from model import weights
    from model.pwcnet import PWCNet

    weights.check_name(target)
    tensors, left_out = find_tensors(source, read_torch(source))
    variant = variant or guess_variant(source, tensors)
    present = set(tensors)
    if variant == "nvlabs":
        left_out += [name for name in UNUSED if tensors.pop(name, None) is not None]
    names = weights.published_names(variant)
    network = PWCNet(variant)
    shapes = {names[p.name]: p.shape for p in network.get_parameters()}
    weights.compare(
        source,
        {name: tensor.shape for name, tensor in tensors.items()},
        shapes,
        f"the published network of the variant {variant}",
    )
    reason = "as --channels says"
    if channels is None:
        channels, reason = tell_channels(source, variant, present, left_out)
    values = {}
    for name, published in names.items():
        value = to_array(source, published, tensors[published])
        if channels == "bgr":
            value = weights.swap_red_and_blue(name, value)
        values[name] = Parameter(np.ascontiguousarray(value), name=name)
    weights.load_exactly(source, values, network)
    weights.save_network(target, network, {"variant": variant})
    return Imported(variant, channels, reason, left_out)


def to_array(path, name, tensor):
    """A tensor as a float32 array; UserError if it has no finite floating-point numbers."""
    problem = f"{path}: {name} is of {tensor.dtype}, expected finite floating-point weights"
    if not tensor.is_floating_point():
        raise UserError(f"{problem}; use another checkpoint")
    try:
        value = tensor.detach().float().numpy()
    except (RuntimeError, TypeError) as error:  # sparse, or without data
        raise UserError(f"{problem} ({first_line(error)}); use another checkpoint") from None
    if not np.isfinite(value).all():
        raise UserError(f"{problem} and found NaN or infinity; use another checkpoint")
    return value


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", type=pathlib.Path, metavar="IN", help="a checkpoint of PyTorch: .pth, .pth.tar, .pt, IRR's .ckpt"
    )
    parser.add_argument("target", type=pathlib.Path, metavar="OUT.ckpt", help="the checkpoint to write")
    parser.add_argument(
        "--variant", choices=("irr", "nvlabs"), help="whose network it is; default: told by the names in it"
    )
    parser.add_argument(
        "--channels",
        choices=("rgb", "bgr"),
        help="the order of colours in which the file's network takes images: rgb of irr "
        "and ptlflow, bgr of NVlabs; default: told by what is in the file",
    )
    args = parser.parse_args()
    done = import_weights(args.source, args.target, args.variant, args.channels)
    print(f"{args.target}: weights of the variant {done.variant}")
    print(f"its network took {done.channels.upper()} images, {done.reason}; this one takes RGB")
    if done.left_out:
        print(f"left out, as the network does not use it: {', '.join(done.left_out)}")


if __name__ == "__main__":
    run(main)
