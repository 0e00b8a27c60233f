"""Checkpoints: the whole state of a run in one file, written in the background, whole or not at all.

One rank writes. When a run resumes, that rank reads and sends the values to the others, so they need not share a
file system.
"""

import concurrent.futures
import contextlib
import json
import math
import pathlib
import time
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from mindspore import Parameter, Tensor, nn

from launch.communicator import ALONE, Communicator
from launch.errors import UserError, print_warning
from launch.logs import print_note
from model import weights
from train.run_folder import BEST, checkpoint_name, list_checkpoints

KEPT = 3
"""Number of regular checkpoints that are kept."""
MAX_AGE = 60
"""Seconds of training, and a step, that a run loses at most if it is killed. mpirun kills its ranks a third of a
second after SIGTERM or Ctrl-C, which is less than many a step takes."""


class Saved(NamedTuple):
    """A checkpoint that was read."""

    path: str
    values: dict[str, Any]
    """Values by name: NumPy arrays for parameters, numbers and texts for the rest."""


class Checkpoints:
    """The checkpoints of a run: regular ones, one in between whenever the last is old, and the best weights.

    The newest `KEPT` regular ones stay, and the newest two of all. A save costs the training a copy of the state,
    which a thread writes. As a context manager, it has written everything when it ends.

    Args:
        folder: of the files.
        model_options: keyword arguments that build the network, stored in the files.
        every: steps between regular checkpoints.
        enabled: False on all ranks but one, where nothing is written.
        validation: name of the dataset whose EPE decides which weights are the best.

    Attributes:
        best: smallest validation EPE so far, in pixels. The files hold it as text: MindSpore stores numbers in float32,
            and a resumed run must compare with the same number as one that was not interrupted.
        on_disk: newest step that is known to be on the disk.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        model_options: dict[str, Any],
        every: int,
        enabled: bool = True,
        validation: str = "",
    ) -> None:
        self.folder = folder
        self.model_options = json.dumps(model_options)
        self.every = every
        self.enabled = enabled
        self.best = math.inf
        self.on_disk = 0
        self.validation = validation
        self.saved = time.monotonic()
        self.writer = concurrent.futures.ThreadPoolExecutor(1)
        self.writing: list[concurrent.futures.Future] = []
        if enabled:  # what a killed run left half written
            for partial in self.folder.glob("*.partial-*"):
                partial.unlink()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except OSError:
            if kind is None:  # otherwise it is most likely the error that is being raised
                raise
        finally:
            self.writer.shutdown()

    def wait(self) -> None:
        """Wait until everything is on the disk; raises OSError if it could not be written."""
        while self.writing:
            self.writing.pop(0).result()

    def is_due(self, step: int) -> bool:
        """Whether to save after a step: it is a regular one, or the last checkpoint is old.

        Raises:
            OSError: an earlier checkpoint could not be written.
        """
        while self.writing and self.writing[0].done():
            self.writing.pop(0).result()
        return step % self.every == 0 or time.monotonic() - self.saved > MAX_AGE

    def save(self, step: int, state: nn.Cell) -> None:
        """Write a checkpoint and delete those that need not be kept.

        Args:
            step: number of steps done.
            state: whose parameters to store, `train.step.State`.
        """
        self.saved = time.monotonic()
        if self.enabled:
            self.write(self.folder / checkpoint_name(step), state, {"step": step, "best": repr(self.best)})
            self.writing.append(self.writer.submit(self.delete_old, step))

    def save_if_best(self, step: int, network: nn.Cell, epe: float) -> None:
        """Write the weights of a network after a step if its validation EPE, in pixels, is the smallest so far."""
        if epe < self.best:
            if self.enabled and math.isinf(self.best):
                self.keep_other_best()
            self.best = epe
            if self.enabled:
                self.write(self.folder / BEST, network, {"step": step, "best": repr(epe)})

    def keep_other_best(self) -> None:
        """Rename a best.ckpt that was the best on another dataset, before the first one on this dataset replaces it."""
        path = self.folder / BEST
        with contextlib.suppress(UserError):
            values = weights.read(path)
            if (other := values.get("validation", self.validation)) != self.validation:
                kept = path.with_name(f"best-{other}-step-{int(values['step']):08d}.ckpt")
                path.rename(kept)
                print_note(f"{BEST} is now the best on {self.validation}; {kept.name} has the best weights on {other}")

    def write(self, path: pathlib.Path, cell: nn.Cell, extra: dict[str, Any]) -> None:
        """Copy a Cell's parameters and write the copy in the background, with extra values."""
        self.wait()  # never more than one copy
        try:
            self.folder.mkdir(exist_ok=True)
        except FileNotFoundError:  # a new folder of that name would lack all else, so that the run could not resume
            raise UserError(
                f"{self.folder.parent}: was moved or removed during the run; give its new name as "
                "--out to resume from the last checkpoint"
            ) from None
        copy = [
            {"name": parameter.name, "data": Tensor(parameter.asnumpy().copy())} for parameter in cell.get_parameters()
        ]
        extra = extra | {"model": self.model_options, "validation": self.validation}
        self.writing.append(self.writer.submit(weights.write, path, copy, extra))

    def delete_old(self, newest: int) -> None:
        """Delete the checkpoints that need not be kept beside that of step `newest`."""
        saved = list_checkpoints(self.folder)
        # Those of later steps are damaged: the run has resumed from an earlier one.
        intact = sorted(step for step in saved if step <= newest)
        self.on_disk = max(intact, default=0)
        regular = [step for step in intact if step % self.every == 0]
        for step in saved.keys() - {*intact[-2:], *regular[-KEPT:]}:
            saved[step].unlink()

    def restore(self, state: nn.Cell, comm: Communicator = ALONE) -> int:
        """Load the newest intact checkpoint into a Cell on every rank.

        A damaged one is skipped with a warning, and deleted with the next save.

        Args:
            state: a Cell with exactly the parameters that were saved.
            comm: the ranks.

        Returns:
            The step of the checkpoint; 0 if there is none.

        Raises:
            UserError: all are damaged, or it is of another network or optimiser, or of a newer version.
        """
        saved = comm.from_rank_0(self.read_newest)
        if not saved:
            return 0
        path, values = saved
        step, self.best = int(values.pop("step")), float(values.pop("best", math.inf))
        for name in ("model", "validation"):
            values.pop(name, None)
        weights.load_exactly(path, to_parameters(values), state)
        return step

    def read_newest(self) -> Saved | None:
        """Read the newest intact checkpoint; None if there are no checkpoints."""
        paths = list_checkpoints(self.folder)
        for path in reversed(paths.values()):
            try:
                values = weights.read(path)
            except weights.NewerFormat:
                raise
            except UserError as error:
                print_warning(f"{error}; resuming from the one before")
                continue
            if "step" not in values:
                raise UserError(f"{path}: has no training step, so this trainer did not write it; move it elsewhere")
            return Saved(str(path), to_arrays(values) | {"best": self.read_best(values)})
        if paths:
            raise UserError(
                f"{self.folder}: all of its {len(paths)} checkpoints are damaged; restore one from a copy, or start "
                "again with another --out"
            )
        return None

    def read_best(self, values: dict[str, Any]) -> float:
        """The EPE of best.ckpt; infinite if it is of another dataset, or if there is none, so that it is written anew.

        It may be of a later step than the newest checkpoint, whose values stand in for those of older versions' files.
        """
        try:
            best = weights.read(self.folder / BEST)
        except UserError as error:
            if float(values.get("best", math.inf)) < math.inf:
                print_warning(f"{error}; the next validation writes it anew")
            return math.inf
        if "best" in best:
            values = best
        is_same = values.get("validation", self.validation) == self.validation
        return float(values.get("best", math.inf)) if is_same else math.inf


def load_initial_weights(path: pathlib.Path, network: nn.Cell, comm: Communicator) -> None:
    """Load the weights of a checkpoint that only rank 0 needs to have, on every rank.

    Raises:
        UserError: the file is damaged, or of another network.
    """
    values = comm.from_rank_0(lambda: to_arrays(weights.read(path)))
    weights.load_weights(path, to_parameters(values), network)


def to_arrays(values: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's values with NumPy arrays in place of parameters, which ranks can send each other."""
    return {name: value.asnumpy() if isinstance(value, Tensor) else value for name, value in values.items()}


def to_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `to_arrays`."""
    return {
        name: Parameter(value, name=name) if isinstance(value, np.ndarray) else value for name, value in values.items()
    }
