#!/usr/bin/env python3
"""Import the weights of a published PWC-Net, a PyTorch file, as a checkpoint of this network.

python model/import_torch.py IN.pth OUT.ckpt [--variant irr|nvlabs] [--channels rgb|bgr]
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import importlib
import pathlib
import pickle
import re
import zipfile
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from launch.arguments import Parser
from launch.errors import UserError, run
from model.checkpoint_file import ZIP_MAGIC

if TYPE_CHECKING:
    from model.backend import Backend
    from model.pwcnet import PWCNet

CONTAINERS = ("state_dict", "model")
PREFIXES = ("_model.", "module.", "model.")
UNUSED = ("deconv2.weight", "deconv2.bias")
"""NVlabs' network and its checkpoints have this layer, but never call it."""
LIGHTNING = "pytorch-lightning_version"
"""PyTorch Lightning, and so ptlflow, writes this key into its checkpoints."""
MAX_ENTRIES = 100_000
"""Entries in a PyTorch file of the zip format at most; there is one for each tensor."""


def load_torch() -> Any:
    """The package torch, which only exchanging weights needs; raises UserError without it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"PyTorch is needed to read and write its files and cannot be imported "
            f"({error}); install it: pip install -e '.[torch]'"
        ) from None
    return torch


def read_torch(path: pathlib.Path) -> Any:
    """Read a PyTorch file of any age without running code in it.

    Args:
        path: of a file that torch.save wrote, in the zip format or in the older one.

    Returns:
        The object in it.

    Raises:
        UserError: the file does not exist, is damaged or not from PyTorch, or holds objects other than tensors, numbers
            and text.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a PyTorch checkpoint")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty, expected a PyTorch checkpoint; download it again")
    check_zip(path)
    torch = load_torch()
    scalar = importlib.import_module("numpy.core.multiarray").scalar
    # Statistics beside the weights may be NumPy scalars, under their name before or after NumPy 2.
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
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            if code and isinstance(error, pickle.UnpicklingError):
                raise UserError(
                    f"{path}: holds {code[1]}, code that would run on loading, expected only tensors and numbers; "
                    "if you trust the file, save its state_dict() alone with PyTorch"
                ) from None
            raise UserError(
                f"{path}: damaged or not a PyTorch checkpoint ({first_line(error)}); "
                "expected what torch.save writes: download it again"
            ) from None


def check_zip(path: pathlib.Path) -> None:
    """Refuse a zip file whose content is larger than the file.

    torch.save does not compress, and torch.load unpacks everything: a compressed megabyte may become a gigabyte.

    Raises:
        UserError: entries are compressed or overlap, or the directory of entries is damaged.
    """
    with open(path, "rb") as file:
        if file.read(4) != ZIP_MAGIC:  # by which torch.load recognises this format
            return
        try:
            with zipfile.ZipFile(file) as entries:
                infos = entries.infolist()
        except Exception as error:  # the module raises whatever its parser meets
            raise UserError(
                f"{path}: damaged or not a PyTorch checkpoint ({first_line(error)}); "
                "expected what torch.save writes: download it again"
            ) from None
    size = path.stat().st_size
    content = sum(info.file_size for info in infos)
    if content > size or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise UserError(
            f"{path}: holds {content} bytes in {size}, compressed or overlapping; expected what torch.save writes, "
            "without compression: if you trust the file, load it and save it again with PyTorch"
        )
    if len(infos) > MAX_ENTRIES:
        raise UserError(f"{path}: has {len(infos)} entries, expected a few hundred; use another file")


def first_line(error: BaseException) -> str:
    """An exception as its type and first sentence."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].split('. ')[0][:120]}"


def find_tensors(path: pathlib.Path, content: Any) -> tuple[dict[str, Any], list[str]]:
    """The state_dict in a file's content.

    Args:
        path: of the file, for the error.
        content: a dict of tensors, or one with such a dict under "state_dict" or "model".

    Returns:
        Name (without the prefixes of wrappers) to tensor, and the keys of everything that is not a tensor.

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


def guess_variant(path: pathlib.Path, names: Collection[str]) -> str:
    """The variant that shares most names with a state_dict; raises UserError if none shares any."""
    from model.published import published_names
    from model.pwcnet import VARIANTS

    shared = {variant: len(set(published_names(variant).values()) & set(names)) for variant in VARIANTS}
    variant = max(shared, key=lambda name: shared[name])
    if not shared[variant]:
        raise UserError(
            f"{path}: holds {len(names)} tensors such as {', '.join(list(names)[:3])}; "
            "none is named as in PWC-Net by visinf/irr (irr) or NVlabs (nvlabs); "
            "use a checkpoint of one of these"
        )
    return variant


def detect_channels(
    path: pathlib.Path, variant: str, tensors: Collection[str], others: Collection[str]
) -> tuple[str, str]:
    """The channel order of the images that a file's network takes.

    visinf/irr trains with RGB. NVlabs' networks take BGR; ptlflow trains networks of the same names, except for the
    unused layer, with RGB, and its files are PyTorch Lightning's.

    Args:
        path: of the file, for the error.
        variant: "irr" or "nvlabs".
        tensors: names of the weights in the file.
        others: keys of everything else in the file.

    Returns:
        "rgb" or "bgr", and how it was detected.

    Raises:
        UserError: the file does not show it.
    """
    if variant == "irr":
        return "rgb", "as visinf/irr trains this variant"
    unused, lightning = all(name in tensors for name in UNUSED), LIGHTNING in others
    if unused and not lightning:
        return "bgr", "detected by the layer deconv2, as in NVlabs' files"
    if lightning and not unused:
        return "rgb", f"detected by {LIGHTNING} without the layer deconv2, as in ptlflow's files"
    signs = ("the layer deconv2, as in NVlabs' files, which take BGR", f"{LIGHTNING}, as in ptlflow's, which take RGB")
    found = f"both {signs[0]}, and {signs[1]}" if unused else f"neither {signs[0]}, nor {signs[1]}"
    raise UserError(
        f"{path}: has {found}; give the channel order of the network's images to model/import_torch.py: "
        "--channels bgr or --channels rgb"
    )


class Imported(NamedTuple):
    """A published network, read from a file."""

    variant: str
    channels: str
    """"rgb" or "bgr", the channel order of the images that the file's network took."""
    reason: str
    """How the channel order was detected."""
    left_out: list[str]
    """Keys in the file that the network does not use."""
    network: "PWCNet"


def read_network(
    source: pathlib.Path, variant: str | None = None, channels: str | None = None, backend: "Backend" = "native"
) -> Imported:
    """Build the network of a PyTorch file with its weights, which then takes RGB images.

    Args:
        source: path of the file.
        variant: "irr" or "nvlabs"; None: the one with the names in the file.
        channels: "rgb" or "bgr", the channel order of the images that the file's network takes; None: detect it.
        backend: see `model.backend`.

    Raises:
        UserError: it is not such a file, its weights are not exactly the network's, or it does not show its channel
            order.
    """
    from mindspore import Parameter

    from model import weights
    from model.published import published_names, swap_red_and_blue
    from model.pwcnet import PWCNet

    tensors, left_out = find_tensors(source, read_torch(source))
    variant = variant or guess_variant(source, tensors)
    present = set(tensors)
    if variant == "nvlabs":
        left_out += [name for name in UNUSED if tensors.pop(name, None) is not None]
    names = published_names(variant)
    network = PWCNet(variant, backend=backend)
    shapes = {names[parameter.name]: parameter.shape for parameter in network.get_parameters()}
    weights.compare(
        source,
        {name: tensor.shape for name, tensor in tensors.items()},
        shapes,
        f"the published network of the variant {variant}",
    )
    reason = "as --channels says"
    if channels is None:
        channels, reason = detect_channels(source, variant, present, left_out)
    values = {}
    for name, published in names.items():
        value = to_array(source, published, tensors[published])
        if channels == "bgr":
            value = swap_red_and_blue(name, value)
        values[name] = Parameter(np.ascontiguousarray(value), name=name)
    weights.load_exactly(source, values, network)
    return Imported(variant, channels, reason, left_out, network)


def import_weights(
    source: pathlib.Path, target: pathlib.Path, variant: str | None = None, channels: str | None = None
) -> Imported:
    """Write the weights of a PyTorch file as a checkpoint of this network, whole or not at all.

    Args:
        source: path of the file.
        target: path of the checkpoint, ending in .ckpt.
        variant, channels: as of `read_network`.

    Raises:
        UserError: as `read_network`, or the target does not end in .ckpt.
        OSError: the target cannot be written.
    """
    from model import weights

    weights.check_name(target)
    imported = read_network(source, variant, channels)
    weights.save_network(target, imported.network, {"variant": imported.variant})
    return imported


def to_array(path: pathlib.Path, name: str, tensor: Any) -> np.ndarray:
    """A tensor as a float32 array; raises UserError unless it holds finite floating-point numbers."""
    problem = f"{path}: {name} is {tensor.dtype}, expected finite floating-point weights"
    if not tensor.is_floating_point():
        raise UserError(f"{problem}; use another checkpoint")
    try:
        value = tensor.detach().float().numpy()
    except (RuntimeError, TypeError) as error:  # sparse, or without data
        raise UserError(f"{problem} ({first_line(error)}); use another checkpoint") from None
    if not np.isfinite(value).all():
        raise UserError(f"{problem}, found NaN or infinity; use another checkpoint")
    return value


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "source", type=pathlib.Path, metavar="IN", help="a PyTorch checkpoint: .pth, .pth.tar, .pt, or IRR's .ckpt"
    )
    parser.add_argument("target", type=pathlib.Path, metavar="OUT.ckpt", help="the checkpoint to write")
    parser.add_argument(
        "--variant",
        choices=("irr", "nvlabs"),
        help="network variant: irr (visinf/irr) or nvlabs (NVlabs) (default: detected from the names in the file)",
    )
    parser.add_argument(
        "--channels",
        choices=("rgb", "bgr"),
        help="channel order of the images that the file's network takes: rgb for irr and ptlflow, bgr for NVlabs "
        "(default: detected from the file)",
    )
    args = parser.parse_args()
    imported = import_weights(args.source, args.target, args.variant, args.channels)
    print(f"its network took {imported.channels.upper()} images, {imported.reason}; this one takes RGB")
    if imported.left_out:
        print(f"left out, as the network does not use it: {', '.join(imported.left_out)}")
    print(
        f"{args.target}: weights of the variant {imported.variant}; next: "
        f"python model/predict.py IMAGE1 IMAGE2 --ckpt {args.target} --out DIR"
    )


if __name__ == "__main__":
    run(main)
