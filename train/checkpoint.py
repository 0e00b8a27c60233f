"""Checkpoints: the whole state of a run in one file, written whole or not at all."""

import json
import pathlib
import re

from model.weights import load_exactly, read, write
from prep.errors import UserError

NAME = re.compile(r"step-(\d{8})\.ckpt")


def save(folder, step, state, model_options, keep=3):
    """Write the checkpoint of a step and delete the oldest beyond the last `keep`.

    Args:
        folder: of the run's checkpoints.
        step: how many steps lie behind this state.
        state: a Cell whose parameters are to be kept (network, optimiser, loss scale).
        model_options: keyword arguments that build the network, kept in the file.

    Returns:
        The path of the file.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.ckpt"
    write(path, state, {"step": step, "model": json.dumps(model_options)})
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder):
    """The whole checkpoints of a folder, oldest first."""
    return sorted(path for path in pathlib.Path(folder).glob("step-*.ckpt")
                  if NAME.fullmatch(path.name))


def restore(path, state):
    """Load a checkpoint into a Cell that has exactly its parameters.

    Returns:
        The step of the checkpoint.

    Raises:
        UserError: the file is damaged or belongs to another network or optimiser.
    """
    values = read(path)
    if "step" not in values:
        raise UserError(f"{path}: has no training step; it was not written by this trainer")
    step = int(values.pop("step"))
    values.pop("model", None)
    load_exactly(path, values, state)
    return step
