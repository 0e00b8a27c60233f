"""Files of network weights: MindSpore checkpoints that also hold the options to build the network with."""

import contextlib
import inspect
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from launch.errors import UserError
from launch.files import replacing
from model import checkpoint_file
from model.backend import Backend
from model.pwcnet import VARIANTS, PWCNet

Path = str | pathlib.Path

DEFAULT_OPTIONS: dict[str, Any] = {
    name: parameter.default for name, parameter in inspect.signature(PWCNet).parameters.items() if name != "backend"
}
"""Options of the network for a file that lacks them."""
CHOICES = {"variant": VARIANTS, "warp_mode": ("bilinear", "nearest")}
FORMAT = 1
"""Version of the checkpoint's entries, stored in its entry "format"; files without one are older."""
LISTED = 10
"""How many names of each kind an error about mismatched weights lists."""


class NewerFormat(UserError):
    """A file from a newer version of this package."""


def check_format(path: Path, version: int) -> None:
    """Raise NewerFormat unless this version of the package reads files of that format version."""
    if version > FORMAT:
        raise NewerFormat(
            f"{path}: has format {version}, but this version reads formats up to {FORMAT}; "
            "use the version that wrote it, or a newer one"
        )


def read(path: Path) -> dict[str, Parameter | str]:
    """Read a checkpoint into a dict of name to Parameter or text.

    Raises:
        UserError: there is no such file, or it is not a complete MindSpore checkpoint.
        NewerFormat: the file is from a newer version.
    """
    values = checkpoint_file.read_values(path)
    version = values.pop("format", np.zeros(()))
    if not isinstance(version, np.ndarray) or version.size != 1:
        raise UserError(f"{path}: damaged (its format is not a number); use another file")
    check_format(path, int(version))
    return {
        name: Parameter(Tensor(value), name=name) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def write(path: Path, cell: nn.Cell | list[dict[str, Any]], extra: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: of the file, ending in .ckpt; its folder exists.
        cell: whose parameters are written; or a list of dicts with "name" and "data", a tensor.
        extra: plain values to write beside them.

    Raises:
        UserError: the name does not end in .ckpt, which MindSpore requires.
        OSError: the file, which the error names, cannot be written; nothing is left of it.
    """
    path = pathlib.Path(path)
    check_name(path)
    with replacing(path) as partial, written_by_mindspore(partial):
        mindspore.save_checkpoint(cell, str(partial), append_dict={"format": FORMAT, **extra}, crc_check=True)


@contextlib.contextmanager
def written_by_mindspore(path: pathlib.Path) -> Iterator[None]:
    """A context in which MindSpore writes a file: it hides why it cannot, and makes the file unreadable for others."""
    path.write_bytes(b"")  # raises an OSError that says why
    try:
        yield
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)
    finally:
        path.with_suffix(".tmp").unlink(missing_ok=True)  # MindSpore writes that first


def check_name(path: Path) -> None:
    """Raise UserError unless the name ends in .ckpt."""
    if pathlib.Path(path).suffix != ".ckpt":
        raise UserError(f"{path}: a checkpoint's name must end in .ckpt; rename it")


def save_network(path: Path, network: nn.Cell, options: Mapping[str, Any]) -> None:
    """Write the weights of a network whole or not at all, for `load_network`.

    Args:
        path: of the file, ending in .ckpt.
        network: a `PWCNet`.
        options: the keyword arguments that build it.

    Raises:
        UserError, OSError: as `write`.
    """
    write(path, network, {"model": json.dumps(options)})


def network_options(path: Path) -> dict[str, Any]:
    """The keyword arguments of the `PWCNet` that a checkpoint was made with.

    Args:
        path: a checkpoint of the trainer, or one of network weights alone.

    Returns:
        All of them; those that the file lacks have their defaults.

    Raises:
        UserError: the file is damaged, or this version does not know its options.
    """
    return parse_options(path, checkpoint_file.read_values(path, only="model").get("model", "{}"))


def parse_options(path: Path, text: Parameter | np.ndarray | str) -> dict[str, Any]:
    """The options in a checkpoint's entry "model", JSON, as `network_options` returns them."""
    try:
        options = json.loads(str(text))
        for name, value in options.items():
            default = DEFAULT_OPTIONS.get(name)
            if type(value) is not type(default) or value not in CHOICES.get(name, (value,)):
                raise ValueError(f"{name} {value!r}"[:80])
    except (AttributeError, RecursionError, ValueError) as error:
        raise UserError(
            f"{path}: its network's options {str(text)[:200]} are unknown to this version "
            f"({error}); use the version that wrote it or another file"
        ) from None
    return DEFAULT_OPTIONS | options


def load_network(path: Path, backend: Backend = "native") -> PWCNet:
    """Build the network that a file belongs to, and load its weights.

    Args:
        path: a checkpoint of the trainer, a file of network weights, or a published network's file of PyTorch. A
            checkpoint without options is taken for the published network of the variant "irr".
        backend: see `model.backend`.

    Raises:
        UserError: the file is damaged, or its weights or options are those of another network, or not finite.
    """
    if checkpoint_file.is_torch_file(path):
        from model.import_torch import read_network

        return read_network(pathlib.Path(path), backend=backend).network
    values = read(path)
    network = PWCNet(**parse_options(path, values.get("model", "{}")), backend=backend)
    load_weights(path, values, network)
    return network


def load_weights(path: Path, values: Mapping[str, Parameter | str], network: nn.Cell) -> None:
    """Load the weights among a checkpoint's values, as `read` gives them, into a network.

    Raises:
        UserError: they are those of another network, or not finite.
    """
    values = {name: value for name, value in values.items() if name != "model"}
    if "step" in values:  # a trainer's checkpoint, which also holds the optimiser's state
        names = {parameter.name for parameter in network.get_parameters()}
        values = {name: value for name, value in values.items() if name in names}
    load_exactly(path, values, network)
    for parameter in network.get_parameters():
        if not np.isfinite(parameter.asnumpy()).all():
            raise UserError(
                f"{path}: {parameter.name} holds NaN or infinity, expected finite weights; use another checkpoint"
            )


def load_exactly(path: Path, values: Mapping[str, Any], cell: nn.Cell) -> None:
    """Load parameters into a Cell that has exactly these.

    Args:
        path: where they come from, for the error.
        values: name to Parameter.
        cell: a Cell.

    Raises:
        UserError: names or shapes differ; see `compare`.
    """
    parameters = {parameter.name: parameter for parameter in cell.get_parameters()}
    compare(
        path,
        {name: getattr(value, "shape", ()) for name, value in values.items()},
        {name: parameter.shape for name, parameter in parameters.items()},
        "this network",
    )
    for name, parameter in parameters.items():
        parameter.set_data(values[name])


def compare(
    path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], network: str
) -> None:
    """Raise UserError unless the names and shapes of a file's weights are those of `network`, a description.

    The message has the counts and the first names of those that are missing, unknown or of another shape.
    """
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    shapes = [
        f"{name} has {tuple(found[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise UserError(
            f"{path}: does not fit {network}, which has {len(expected)} parameters: "
            f"{'; '.join(problems)}; use weights of the same network"
        )
