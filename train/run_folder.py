"""The folder of a training run: its files, what it records of every start, and the lock on it."""

import hashlib
import json
import pathlib
import re
from typing import Any

from launch.errors import UserError
from launch.files import write_bytes, write_json
from launch.lock import Lock
from launch.logs import print_note
from train import goodput, plain_yaml
from train import recipe as recipes
from train.recipe import Recipe

FORMAT = 1
"""Version of what the files of a run mean; folders without one are older."""
LOGS = "logs"
"""Folder in it with the log file of each rank."""
LOCK = "lock"
BEST = "best.ckpt"
"""File in the folder of checkpoints with the weights that have the smallest validation EPE."""
CHECKPOINT = re.compile(r"step-(\d{8})\.ckpt")
"""Names of the other checkpoints, which hold the whole state after a step."""
RENAMED = {"parts of a rank's batch": "accumulation steps"}
"""Former names of what a start records."""


class RunFolder:
    """The folder that a training run writes to; only rank 0 uses the files, except for the logs.

    Args:
        path: of the folder; created by `lock`.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.starts = path / "starts.json"
        self.checkpoints = path / "checkpoints"
        self.best_checkpoint = self.checkpoints / BEST
        self.goodput = path / "goodput.json"
        self.result = path / "result.json"
        self._lock: Lock | None = None

    def lock(self) -> None:
        """Keep other runs out until `release` or the end of this process.

        Raises:
            UserError: another run holds the lock.
        """
        if not self._lock:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path / LOCK, "training run")

    def release(self) -> None:
        """Release the lock, if this process holds it."""
        if self._lock:
            self._lock.release()
            self._lock = None

    def check(self, recipe: Recipe) -> None:
        """Raise UserError unless a run with this recipe can start here, or resume."""
        if self.recipe.exists():
            self.check_resumable(recipe)
        elif self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; expected a folder, give another --out")
        elif self.path.exists() and any(file.name not in (LOGS, LOCK) for file in self.path.iterdir()):
            raise UserError(f"{self.path}: already exists, is not empty and is not a training run; give another --out")

    def check_resumable(self, recipe: Recipe) -> None:
        """Raise UserError unless the run here can resume with this recipe."""
        starts = self.read_starts()
        if starts and (version := starts[-1].get("format", 0)) > FORMAT:
            raise UserError(
                f"{self.path}: a run of format {version}, but this version reads formats up to {FORMAT}; use the "
                "version that wrote it, or a newer one"
            )
        options, source = self.network_options(None)
        options = {key: value for key, value in options.items() if key not in recipe.sources}
        effective = recipes.adopt_network_options(recipe, options, source)
        for key, old, new in recipes.differences(self.recipe, effective):
            if key not in recipes.CHANGEABLE:
                old, new = recipes.to_text(old), recipes.to_text(new)
                raise UserError(
                    f"{self.path}: holds a run with another recipe: there {key} is {old}, here {new}; give another "
                    f"--out, or {key}={old} to resume that run (only {', '.join(recipes.CHANGEABLE)} may change)"
                )

        self.check_checkpoints(starts)

    @property
    def has_checkpoints(self) -> bool:
        """Whether a step of the run is saved."""
        return bool(list_checkpoints(self.checkpoints))

    def check_checkpoints(self, starts: list[dict[str, Any]]) -> None:
        """Raise UserError if the records know of a saved step, but no checkpoint is left: the run would start again.

        A run that was killed before its first checkpoint starts again, so steps done are not enough.
        """
        if self.has_checkpoints:
            return
        records = goodput.read(self.goodput)
        steps = [start.get("after_step", 0) for start in starts] + [record.get("saved", 0) for record in records]
        if self.result.exists():
            steps += [record["step"] for record in records]
        if saved := max(steps, default=0):
            raise UserError(
                f"{self.checkpoints}: has no checkpoints, but the run's records say that step {saved} was saved; "
                "restore the checkpoints from a copy, or give another --out to start again"
            )

    def check_init(self, init: pathlib.Path | None) -> dict[str, Any]:
        """Check the weights that a run starts from; while no step is saved, they must remain the same.

        Args:
            init: checkpoint given for this start, or None.

        Returns:
            For the record: `init`, with the path and SHA-256 of the file, or None for random weights. Empty if the run
            resumes and its earlier starts, of an older version, did not record it.

        Raises:
            UserError: the file is missing, or is not the one that the run started from.
            OSError: it cannot be read.
        """
        recorded = [start["init"] for start in self.read_starts() if "init" in start][-1:]
        if self.has_checkpoints:
            if init:
                print_note(f"--init {init} is ignored: {self.path} resumes from its own checkpoints")
            return {"init": recorded[0]} if recorded else {}
        if init and not init.is_file():
            raise UserError(f"{init}: no such checkpoint file; give an existing --init")
        given = {"path": str(init), "sha256": hashlib.sha256(init.read_bytes()).hexdigest()} if init else None
        before = recorded[0] if recorded else given
        if (given and given["sha256"]) != (before and before["sha256"]):
            here = f"--init {init} has other weights" if given and before else f"--init is {init or 'missing'}"
            remedy = f"give --init {before['path']} as it was" if before else "leave out --init"
            raise UserError(
                f"{self.path}: holds a run that starts from {before['path'] if before else 'random weights'} and has "
                f"saved no step yet, but {here}; {remedy}, or give another --out"
            )
        return {"init": given}

    def read_starts(self) -> list[dict[str, Any]]:
        """What earlier starts recorded, oldest first."""
        try:
            starts = json.loads(self.starts.read_text()) if self.starts.exists() else []
            return [{RENAMED.get(key, str(key)): value for key, value in start.items()} for start in starts]
        except (ValueError, AttributeError, TypeError):
            raise UserError(
                f"{self.starts}: damaged; restore it from a copy, or remove it, which loses the record of what the "
                "run was made with"
            ) from None

    def network_options(self, init: pathlib.Path | None) -> tuple[dict[str, Any], str]:
        """The network options of the weights that a run resumes with, or starts from.

        Args:
            init: checkpoint that a new run starts from, or None.

        Returns:
            The options by recipe key, and the file that they come from.
        """
        if self.recipe.exists():
            stored = plain_yaml.read_file(self.recipe)
            return {key: stored[key].value for key in recipes.NETWORK_OPTIONS if key in stored}, str(self.recipe)
        if init:
            from model import weights

            return weights.network_options(init), str(init)
        return {}, ""

    def record_start(self, recipe: Recipe, made_with: dict[str, Any], steps_done: int) -> list[str]:
        """Store the recipe, and what this start is made with beside the records of earlier ones.

        Returns:
            What has changed since the last start, as texts.

        Raises:
            OSError: a file cannot be written.
        """
        changes = [
            f"{key} {recipes.to_text(new)} (was {recipes.to_text(old)})"
            for key, old, new in (recipes.differences(self.recipe, recipe) if self.recipe.exists() else [])
        ]
        write_bytes(self.recipe, recipe.to_yaml().encode())
        starts = self.read_starts()
        last = starts[-1] if starts else made_with
        changes += [
            f"{key} {value} (was {last.get(key)})" for key, value in made_with.items() if value != last.get(key, value)
        ]
        write_json(self.starts, [*starts, {"after_step": steps_done, "format": FORMAT, **made_with}])
        return changes


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint after a step; it matches `CHECKPOINT`."""
    return f"step-{step:08d}.ckpt"


def list_checkpoints(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """The regular and in-between checkpoints in a folder by their steps, oldest first."""
    matches = ((CHECKPOINT.fullmatch(path.name), path) for path in sorted(folder.glob("step-*.ckpt")))
    return {int(match[1]): path for match, path in matches if match}
