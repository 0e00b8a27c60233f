"""A training run as it is configured, and as it is once everything that needs no MindSpore has been checked."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launch import ranks, session, versions
from launch.errors import UserError, counted
from model.backend import Backend
from prep.reader import DatasetSplit
from prep.shards import hash_manifest
from train.recipe import Recipe
from train.run_folder import LOGS, RunFolder

if TYPE_CHECKING:
    from train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A run whose options, datasets and folder have been checked; see `RunConfig.prepare`."""

    recipe: Recipe
    training: list[DatasetSplit]
    validation: dict[str, DatasetSplit]
    """Splits by the name of their dataset; the first one decides which checkpoint is the best."""
    folder: RunFolder
    made_with: dict[str, Any]
    """Versions, ranks and hashes of the data, for the record."""
    init: pathlib.Path | None = None
    """Checkpoint whose weights a new run starts from."""
    accumulation_steps: int = 1
    """Micro-batches in which each rank computes its share of the batch."""
    backend: Backend = "native"
    """Operators of the network."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What to train, on what, and where to write it."""

    recipe: Recipe | Callable[[], Recipe]
    """The recipe, or a function that loads it: an error of that on every rank is reported once."""
    data: Sequence[str | pathlib.Path]
    """Folders of the datasets to train on, from prep/convert.py."""
    out: str | pathlib.Path
    """Folder of the run. If it holds a run of the same recipe, that run resumes."""
    validate: Sequence[str | pathlib.Path] = ()
    """Folders of datasets to validate on only; the first of these, or without any the first of `data`, decides which
    checkpoint is the best."""
    init: str | pathlib.Path | None = None
    """Checkpoint or imported file whose weights a new run starts from."""
    accumulation_steps: int = 1
    """Micro-batches in which each rank computes its share of the batch, to need less memory."""
    backend: Backend = "native"
    """Operators of the network, see `model.backend`."""

    def prepare(self) -> tuple[dict[str, str], RunPlan]:
        """Check on every rank all that can be checked before MindSpore starts.

        Returns:
            The settings that must be the same on all ranks, and the plan.

        Raises:
            UserError: the recipe does not fit the ranks or the data, a dataset is damaged, or `out` cannot take or
                resume this run, or another run holds its lock.
        """
        rank, recipe = ranks.current(), self.recipe if isinstance(self.recipe, Recipe) else self.recipe()
        data, validate = [pathlib.Path(folder) for folder in self.data], [*map(pathlib.Path, self.validate)]
        self.check_batch(recipe.batch, rank.size)
        if recipe.mixture and len(recipe.mixture) != len(data):
            raise UserError(
                f"mixture has {counted(len(recipe.mixture), 'share')} for "
                f"{counted(len(data), 'training dataset')}; give one share for each --data, in the same order"
            )
        training = [open_training(folder, recipe) for folder in data]
        check_labelled(training)
        validation = open_validation(data, validate)
        folder, init = RunFolder(pathlib.Path(self.out)), pathlib.Path(self.init) if self.init else None
        folder.check(recipe)
        init_record = folder.check_init(init) if rank.rank == 0 else {}
        manifests = {str(path): hash_manifest(path) for path in [*data, *validate]}
        made_with = {
            **versions.software(),
            "revision": versions.git_revision(),
            "ranks": rank.size,
            "accumulation steps": self.accumulation_steps,
            "data": manifests,
            **init_record,
        }
        if rank.rank == 0 and folder.path.exists():  # another run may hold it: fail early
            folder.lock()
        plan = RunPlan(recipe, training, validation, folder, made_with, init, self.accumulation_steps, self.backend)
        return {"recipe": recipe.to_yaml(), "data": " ".join(manifests.values())}, plan

    def check_batch(self, batch: int, ranks: int) -> None:
        """Raise UserError unless a global batch divides evenly among ranks and micro-batches."""
        if self.accumulation_steps < 1:
            raise UserError(f"--accumulation-steps is {self.accumulation_steps}; expected at least 1")
        passes = ranks * self.accumulation_steps
        if batch % passes:
            steps = f" with {self.accumulation_steps} accumulation steps each" if self.accumulation_steps > 1 else ""
            raise UserError(
                f"batch is {batch}, over {counted(ranks, 'rank')}{steps}; expected a multiple of {passes} "
                f"(batch={-(-batch // passes) * passes}), or use another mpirun -n"
            )


@contextlib.contextmanager
def start_trainer(config: RunConfig, device: str = "cpu", collective: str = "auto") -> Iterator["Trainer"]:
    """Check a run, start MindSpore on each rank, and yield a `Trainer` to call `fit` on.

    Works in a script that runs by itself or under mpirun; nothing may import MindSpore before. In a job of several
    ranks the processes exit at the end, as `launch.session.start` describes.

    Args:
        config: the run.
        device: "cpu" or "gpu".
        collective: "auto", "nccl" or "mpi"; see `launch.session.add_options`.

    Raises:
        UserError: as `RunConfig.prepare`, or MindSpore cannot use the device.
    """
    with session.start(config.prepare, device, collective, pathlib.Path(config.out) / LOGS) as (comm, plan):
        from train.trainer import Trainer

        yield Trainer(plan, comm)


def open_training(folder: pathlib.Path, recipe: Recipe) -> DatasetSplit:
    """Open the training split of a dataset; raises UserError unless it fits the recipe."""
    split = DatasetSplit.open(folder, "train")
    if not len(split):
        raise UserError(
            f"{folder}: has no training pairs; use it as --validate, or convert it again with another --split-file"
        )
    if len(split) < recipe.batch:
        raise UserError(
            f"{folder}: has {counted(len(split), 'training pair')}, fewer than one global batch of {recipe.batch}; "
            "choose a smaller batch=N or convert more pairs"
        )
    height, width = split.sizes.min(0).tolist()
    if height < recipe.crop[0] or width < recipe.crop[1]:
        raise UserError(
            f"{folder}: has pairs of {height}x{width}, but the recipe crops {recipe.crop[0]}x{recipe.crop[1]}; choose "
            "a smaller crop=[H,W]"
        )
    return split


def check_labelled(training: list[DatasetSplit]) -> None:
    """Raise UserError unless there are training pairs with ground truth, without which nothing can be learned."""
    if not any(split.labelled.any() for split in training):
        raise UserError(
            f"{', '.join(str(split.folder) for split in training)}: none of the {sum(map(len, training))} training "
            "pairs has ground truth; add a dataset that has (another --data), or list pairs with their flow "
            "(prep/convert.py pairs)"
        )


def open_validation(data: list[pathlib.Path], validate: list[pathlib.Path]) -> dict[str, DatasetSplit]:
    """Open the validation splits, those of --validate before those of --data.

    Returns:
        The splits by dataset name; datasets of --data without validation pairs, or without ground truth for any of
        them, are left out.

    Raises:
        UserError: the first dataset, which decides what is the best checkpoint, or one of --validate has no
            validation pairs, or two have the same name.
    """
    splits: dict[str, DatasetSplit] = {}
    folders = {folder.resolve(): folder for folder in [*validate, *data]}
    for number, (path, folder) in enumerate(folders.items()):
        split = DatasetSplit.open(path, "val")
        if path.name in splits:
            raise UserError(
                f"--data and --validate include several folders named {path.name}; curves are identified by folder "
                "name, so rename one of them"
            )
        if not split.labelled.any() and (number == 0 or folder in validate):
            raise UserError(
                f"{folder}: split val has no pairs{' with ground truth' if len(split) else ''}; convert the dataset "
                "with --split-file, or validate on another one, --validate DIR"
            )
        splits[path.name] = split
    return {name: split for name, split in splits.items() if split.labelled.any()}
