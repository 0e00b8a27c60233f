"""Checkpoints: the whole state of a run in one file, written beside the training, whole or not at all.

One rank writes; when a run goes on, that rank reads and the others hear from it, so they need not
share a file system.
"""

import concurrent.futures
import contextlib
import json
import math
import pathlib
import re
import time

import mindspore
import numpy as np
from mindspore import Tensor

from launch.communicator import ALONE
from launch.errors import UserError
from model import weights

NAME = re.compile(r"step-(\d{8})\.ckpt")
BEST = "best.ckpt"
"""The weights that validated best, with their EPE as a text: MindSpore keeps numbers in float32, and a run
that goes on must compare with the same number as one that was not interrupted."""
AT_MOST = 60
"""Seconds of training that a run which ends without notice loses, and a step. mpirun ends its ranks a
third of a second after SIGTERM or Ctrl-C, which is less than many a step takes."""


class Checkpoints:
    """The checkpoints of a run: regular ones, and one between them whenever the last is old. The newest
    few regular ones are kept, the newest two of all, and the weights that validated best.

    A save costs the training a copy of the state: a thread writes it. Used as a context manager, it
    has written everything when it ends.

    Args:
        folder: of the files.
        model_options: keyword arguments that build the network, kept in the files.
        every: how many steps lie between regular ones.
        keep: how many of these to keep.
        enabled: False on all ranks but one, where nothing is written.
        validation: name of the dataset whose EPE says which weights are the best.
    """

    def __init__(self, folder, model_options, every, keep=3, enabled=True, validation="") -> None:
        self.folder = pathlib.Path(folder)
        self.model_options = json.dumps(model_options)
        self.every = every
        self.keep = keep
        self.enabled = enabled
        self.best = math.inf
        self.validation = validation
        self.saved = time.monotonic()
        self.writer = concurrent.futures.ThreadPoolExecutor(1)
        self.writing = []
        if enabled:  # what a killed run was about to write
            for left in self.folder.glob("*.partial-*"):
                left.unlink()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            self.wait()
        except OSError:
            if kind is None:  # else it is most likely that which is on its way already
                raise
        finally:
            self.writer.shutdown()

    def wait(self) -> None:
        """Wait until all is on the disk; OSError if it could not be written."""
        while self.writing:
            self.writing.pop(0).result()

    def is_due(self, step):
        """Whether to save after a step: it is a regular one, or the last is old. OSError if one could
        not be written."""
        while self.writing and self.writing[0].done():
            self.writing.pop(0).result()
        return step % self.every == 0 or time.monotonic() - self.saved > AT_MOST

    def save(self, step, state) -> None:
        """Write the checkpoint of a step and delete those that are no longer to be kept.

        Args:
            step: how many steps lie behind this state.
            state: a Cell whose parameters are to be kept, `train.step.State`.
        """
        self.saved = time.monotonic()
        if self.enabled:
            extra = {"step": step, "model": self.model_options, "best": repr(self.best), "validation": self.validation}
            self.write(self.folder / f"step-{step:08d}.ckpt", state, extra)
            self.writing.append(self.writer.submit(self.delete_others, step))

    def save_if_best(self, step, network, epe) -> None:
        """Write the weights of a network after a step if no earlier one had so small an error."""
        if epe < self.best:
            self.best = epe
            if self.enabled:
                self.write(
                    self.folder / BEST,
                    network,
                    {"model": self.model_options, "step": step, "best": repr(epe), "validation": self.validation},
                )

    def write(self, path, cell, extra) -> None:
        self.wait()  # never more than one copy
        self.folder.mkdir(parents=True, exist_ok=True)
        copy = [
            {"name": parameter.name, "data": Tensor(parameter.asnumpy().copy())} for parameter in cell.get_parameters()
        ]
        self.writing.append(self.writer.submit(weights.write, path, copy, extra))

    def delete_others(self, step) -> None:
        """Delete the checkpoints that are not to be kept beside that of a step, the newest."""
        saved = {step_of(path): path for path in list_checkpoints(self.folder)}
        # Those of later steps are damaged: the run has gone on from one before them.
        whole = sorted(other for other in saved if other <= step)
        regular = [other for other in whole if other % self.every == 0]
        for other in saved.keys() - {*whole[-2:], *regular[-self.keep :]}:
            saved[other].unlink()

    def restore(self, state, comm=ALONE):
        """Load the newest whole checkpoint into a Cell on every rank.

        A damaged one is passed over with a warning, and deleted with the next save.

        Args:
            state: a Cell with exactly the parameters that were saved.
            comm: the ranks, a `launch.communicator.Communicator`.

        Returns:
            The step of the checkpoint, 0 if there is none.

        Raises:
            UserError: all are damaged, or it belongs to another network or optimiser, or to a newer
                version of this trainer.
        """
        path, values = comm.from_rank_0(self.read_newest) or (None, None)
        if not path:
            return 0
        step, self.best = int(values.pop("step")), float(values.pop("best", math.inf))
        for name in ("model", "validation"):
            values.pop(name, None)
        weights.load_exactly(path, to_parameters(values), state)
        return step

    def read_newest(self):
        """(path, values as numbers and NumPy arrays) of the newest whole checkpoint, or None."""
        saved = list_checkpoints(self.folder)
        for path in reversed(saved):
            try:
                values = weights.read(path)
            except weights.NewerFormat:
                raise
            except UserError as error:
                print(f"warning: {error}; going on from the one before", flush=True)
                continue
            if "step" not in values:
                raise UserError(f"{path}: has no training step; it was not written by this trainer")
            return str(path), to_arrays(values | {"best": self.read_best(values)})
        if saved:
            raise UserError(
                f"{self.folder}: all of its {len(saved)} checkpoints are damaged; restore "
                "one from a copy, or start again with another --out"
            )
        return None

    def read_best(self, values):
        """The EPE of the weights in best.ckpt, which may be of a step after the newest checkpoint, by the
        values of that checkpoint; infinite if they were the best on another dataset."""
        with contextlib.suppress(UserError):
            best = weights.read(self.folder / BEST)
            if "best" in best:
                values = best
        same = values.get("validation", self.validation) == self.validation
        return float(values.get("best", math.inf)) if same else math.inf


def start_from(path, network, comm) -> None:
    """Load the weights of a checkpoint that rank 0 has into a network on every rank.

    Raises:
        UserError: the file is damaged, or of another network.
    """
    values = comm.from_rank_0(lambda: to_arrays(weights.read(path)))
    weights.load_weights(path, to_parameters(values), network)


def to_arrays(values):
    """A checkpoint's values with NumPy arrays for parameters, as they go from rank to rank."""
    return {name: value.asnumpy() if isinstance(value, Tensor) else value for name, value in values.items()}


def to_parameters(values):
    """The opposite of `to_arrays`."""
    return {
        name: mindspore.Parameter(value, name=name) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def list_checkpoints(folder):
    """The checkpoints of a folder that appeared, oldest first."""
    return sorted(path for path in pathlib.Path(folder).glob("step-*.ckpt") if NAME.fullmatch(path.name))


def step_of(path):
    """The step in a checkpoint's name."""
    return int(NAME.fullmatch(path.name)[1])
