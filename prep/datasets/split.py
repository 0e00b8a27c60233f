"""Fixed splits: which pairs of a data set are for validation, by lists of indices."""

import hashlib
import os

from launch.errors import UserError

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "splits")


def read_list(path):
    """The 0-based indices in a split file and the SHA-256 of its bytes.

    A split file has one index a line; lines that begin with # are comments.
    """
    with open(path, "rb") as file:
        data = file.read()
    indices = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            if not (line.isascii() and line.isdigit() and len(line) < 10):
                raise UserError(f"{path}: line {number} is {line[:40]!r}, expected a pair's 0-based index")
            indices.append(int(line))
    if len(set(indices)) != len(indices):
        twice = next(i for n, i in enumerate(indices) if i in indices[:n])
        raise UserError(f"{path}: index {twice} is there twice; each pair may be listed once")
    return indices, hashlib.sha256(data).hexdigest()


def held_out(pairs):
    """The indices of the `pairs` that their data set itself has for validation."""
    return [i for i, pair in enumerate(pairs) if pair.held_out]


def divide(pairs, indices):
    """The (train, val) lists of `pairs`: val has those whose position is in `indices`, in order."""
    chosen = set(indices)
    train = [p for i, p in enumerate(pairs) if i not in chosen]
    return train, [p for i, p in enumerate(pairs) if i in chosen]
