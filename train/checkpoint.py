"""Checkpoints: the whole state of a run in one file, written whole or not at all."""

import json
import os
import pathlib
import re

import mindspore

from model.pwcnet import PWCNet
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
    partial = folder / f"writing-{path.name}"
    extra = {"step": step, "model": json.dumps(model_options)}
    mindspore.save_checkpoint(state, str(partial), append_dict=extra, crc_check=True)
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)  # MindSpore leaves it readable for the owner alone
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder):
    """The whole checkpoints of a folder, oldest first."""
    return sorted(path for path in pathlib.Path(folder).glob("step-*.ckpt")
                  if NAME.fullmatch(path.name))


def read(path):
    """Read a checkpoint into a dict of name to Parameter or number; UserError if damaged."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        return mindspore.load_checkpoint(str(path), crc_check=True)
    except Exception as error:  # MindSpore raises whatever its parser meets
        reason = str(error).strip().splitlines()
        raise UserError(f"{path}: damaged or no MindSpore checkpoint "
                        f"({reason[0] if reason else type(error).__name__}); use another one"
                        ) from None


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


def load_exactly(path, values, cell):
    """Load parameters into a Cell, or raise UserError naming what does not fit."""
    expected = {parameter.name: parameter for parameter in cell.get_parameters()}
    problems = [f"{name} is missing" for name in expected if name not in values]
    problems += [f"{name} is unknown" for name in values if name not in expected]
    problems += [
        f"{name} has shape {tuple(values[name].shape)}, expected {tuple(parameter.shape)}"
        for name, parameter in expected.items()
        if name in values and tuple(values[name].shape) != tuple(parameter.shape)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path}: does not fit this network: {'; '.join(problems[:3])}{more}")
    for name, parameter in expected.items():
        parameter.set_data(values[name])


def load_network(path):
    """Build the network that a checkpoint was made with, and load its weights.

    Args:
        path: a checkpoint of this trainer, or one of network weights alone, which is then taken for
            the published network.
    """
    values = read(path)
    options = json.loads(str(values.get("model", "{}")))
    network = PWCNet(**options)
    names = {parameter.name for parameter in network.get_parameters()}
    weights = {name: value for name, value in values.items() if name in names}
    load_exactly(path, weights, network)
    return network
