"""Fixed splits: lists of the pairs that are reserved for validation."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from launch.errors import UserError
from prep.datasets import PairFiles

FOLDER = Path(__file__).resolve().parent.parent / "splits"


class SplitFile(NamedTuple):
    """The contents of a split file."""

    indices: list[int]
    """0-based positions of the validation pairs in `list_pairs`, or, in prep/splits, in the complete release."""
    sha256: str
    """SHA-256 of the file's bytes, in hexadecimal."""


class Split(NamedTuple):
    """Pairs divided into training and validation, each in the original order."""

    train: list[PairFiles]
    val: list[PairFiles]


def read_split_file(path: Path) -> SplitFile:
    """Read a split file: one 0-based index per line, comments start with #.

    Raises:
        UserError: a line is not an index, or an index is listed twice.
    """
    data = path.read_bytes()
    indices = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            if not (line.isascii() and line.isdigit() and len(line) < 10):
                raise UserError(f"{path}: line {number} is {line[:40]!r}, expected the 0-based index of a pair")
            indices.append(int(line))
    if len(set(indices)) != len(indices):
        twice = next(index for n, index in enumerate(indices) if index in indices[:n])
        raise UserError(f"{path}: index {twice} is listed twice; list each pair at most once")
    return SplitFile(indices, hashlib.sha256(data).hexdigest())


def held_out_indices(pairs: list[PairFiles]) -> list[int]:
    """Positions of the pairs that the dataset itself reserves for validation."""
    return [index for index, pair in enumerate(pairs) if pair.held_out]


def fixed_indices(pairs: list[PairFiles], places: Iterable[int]) -> list[int]:
    """Positions of the pairs at these places of the complete release, whether or not `pairs` is complete.

    Raises:
        UserError: it is not known which pair of the release one is.
    """
    for pair in pairs:
        if pair.place is None:
            raise UserError(
                f"{pair.flow}: pair {pair.name} is not in the original release, to which the fixed validation split "
                "refers; remove or rename it, or list the validation pairs yourself with --split-file"
            )
    chosen = set(places)
    return [index for index, pair in enumerate(pairs) if pair.place in chosen]


def divide(pairs: list[PairFiles], validation: Iterable[int]) -> Split:
    """Divide pairs into training and validation by the positions of the validation pairs."""
    chosen = set(validation)
    return Split(
        train=[pair for index, pair in enumerate(pairs) if index not in chosen],
        val=[pair for index, pair in enumerate(pairs) if index in chosen],
    )
