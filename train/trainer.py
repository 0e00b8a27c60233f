"""The trainer: sets up a run, trains step by step, validates, saves. Every rank has one; rank 0 writes and shows."""

import collections
import hashlib
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import mindspore
import numpy as np

from launch import session
from launch.communicator import ALONE, Communicator
from launch.errors import counted
from launch.files import write_json
from launch.watchdog import Phase
from model.flops import TRAINING_FACTOR, count_flops, measure_peak
from model.inference import FlowPredictor
from model.losses import make_loss
from model.precision import Precision, resolve_precision, set_precision
from model.pwcnet import PWCNet, start_from_coarser_flow
from prep import reader
from train import goodput
from train import recipe as recipes
from train.augment import Augment
from train.checkpoint import Checkpoints, load_initial_weights
from train.evaluation import EvaluationOptions, count_share, evaluate
from train.metrics import Evaluation, Metrics
from train.monitor import Monitor, Stopwatch, resident_memory, survived
from train.recipe import Recipe
from train.report import draw_pairs, gather_strips
from train.results import Results, Validation
from train.run import RunPlan
from train.schedule import learning_rate
from train.step import TrainStep
from train.stop import StopRequest
from train.update import StepOptions, StepResult

LEVELS = ("level6", "level5", "level4", "level3", "level2")
"""Names of the loss vector's elements: pyramid levels, coarse to fine."""
PICTURES = 4
"""Validation pairs drawn each time."""
MAX_WORKERS = 8
"""Data loading threads per rank, at most."""


class Trainer:
    """Trains a network as a recipe says.

        results = Trainer(plan, comm).fit()

    Args:
        plan: the run, from `train.run.RunConfig.prepare`.
        comm: the ranks, from `launch.session.start`.

    Attributes:
        network: the `PWCNet` that is trained.
        steps_done: how many steps of the run are done, those of earlier starts included.

    Raises:
        UserError: another run holds the folder, a file does not fit, or more steps are done than the recipe asks for.
    """

    def __init__(self, plan: RunPlan, comm: Communicator = ALONE) -> None:
        self.plan = plan
        self.comm = comm
        self.folder = plan.folder
        self.created = time.monotonic()
        self.is_writer = comm.rank == 0
        self.recipe = self.claim_folder()
        self.step = self.build_step()
        self.predictor = FlowPredictor(self.network)
        self.checkpoints = Checkpoints(
            self.folder.checkpoints,
            self.recipe.network_options,
            self.recipe.checkpoint_every,
            enabled=self.is_writer,
            validation=next(iter(plan.validation)),
        )
        self.first_step = self.steps_done = self.restore()
        self.changes = self.record_start()
        self.goodput = goodput.Goodput(
            self.folder.goodput if self.is_writer else None, goodput.PROCESS_START, self.first_step
        )
        self.stopwatch = Stopwatch(self.first_step)
        self.speeds: list[float] = []
        self.flops_per_pair = count_flops(self.network, *self.recipe.crop)
        self.peak: float | None = None
        self.validations: list[Validation] = []
        self.monitor = Monitor(None, self.first_step, self.recipe.steps)

    # --- Setup ---

    def claim_folder(self) -> Recipe:
        """Lock the folder of the run; returns the recipe with the network options of the weights to start from."""

        def claim() -> tuple[dict[str, Any], str]:
            self.folder.lock()
            return self.folder.network_options(self.plan.init)

        options, source = self.comm.from_rank_0(claim)  # other ranks may not have these files
        return recipes.adopt_network_options(self.plan.recipe, options, source)

    def build_step(self) -> TrainStep:
        """Build the network and its training step."""
        recipe = self.recipe
        mindspore.set_seed(recipe.seed)  # the same initial weights on every rank
        self.network = PWCNet(**recipe.network_options, backend=self.plan.backend)
        if recipe.start_from_coarser_flow:
            start_from_coarser_flow(self.network)
        # One for all ranks, although their processors may differ.
        by_rank = self.comm.gather(resolve_precision(recipe.precision, self.network.backend))
        self.precision: Precision = by_rank[0] if len(set(by_rank)) == 1 else "float32"
        set_precision(self.network, self.precision)
        options = StepOptions(
            accumulation_steps=self.plan.accumulation_steps,
            clip_norm=recipe.clip_norm,
            loss_scaling=self.precision == "float16",
            weight_decay=recipe.weight_decay,
            decoupled_decay=recipe.optimizer == "adamw",
            ema_decay=recipe.ema_decay,
        )
        return TrainStep(self.network, make_loss(recipe.loss, self.network.align_corners), options, self.comm)

    def restore(self) -> int:
        """Load the newest checkpoint, or the initial weights of a new run; returns how many steps are done."""
        done = self.checkpoints.restore(self.step.state, self.comm)
        if self.plan.init and not done:
            load_initial_weights(self.plan.init, self.network, self.comm)
        if done > self.recipe.steps:
            raise session.JobError(
                f"{self.folder.path}: has done {done} steps, but the recipe's steps is {self.recipe.steps}; set "
                f"steps={done} or more"
            )
        return done

    def record_start(self) -> list[str]:
        """Write to the folder what this start is made with; returns what has changed since the last one."""
        if not self.is_writer:
            return []
        made_with = {**self.plan.made_with, "precision": self.precision}
        return self.folder.record_start(self.recipe, made_with, self.first_step)

    def batches(self) -> Iterable[reader.Batch]:
        """This rank's share of the batches of all remaining steps."""
        if self.first_step == self.recipe.steps:
            return ()
        weights = self.recipe.mixture or [len(split) for split in self.plan.training]
        return reader.training_batches(
            list(zip(self.plan.training, weights, strict=True)),
            batch=self.recipe.batch // self.comm.size,
            rank=self.comm.rank,
            ranks=self.comm.size,
            seed=self.recipe.seed,
            first_step=self.first_step,
            steps=self.recipe.steps - self.first_step,
            workers=min(MAX_WORKERS, self.comm.threads),
            transform=Augment.from_recipe(self.recipe),
        )

    # --- The loop ---

    def fit(self) -> Results:
        """Train until the recipe's last step, then write result.json.

        Raises:
            UserError: the training diverged, or the weights of the ranks differ.
            OSError: a checkpoint cannot be written.
            KeyboardInterrupt: SIGTERM, SIGUSR1 or Ctrl-C on any rank; a checkpoint of the last step was written.
        """
        try:
            batches = self.batches()
            folder = self.folder.path if self.is_writer else None
            self.monitor = Monitor(folder, self.first_step, self.recipe.steps)
            with self.monitor, self.checkpoints, StopRequest() as stop_request:
                self.announce()
                self.comm.progress(Phase.COMPILING, self.first_step)  # the first step may take long, too
                for batch in self.stopwatch.waiting(batches):
                    self.train_step(batch)
                    self.finish_step(stop_request)
                self.comm.progress(Phase.RUNNING, self.steps_done)
                self.monitor.advance(self.steps_done)  # steps since the last log
                if not self.validations:  # the run was complete already
                    self.validate()
                    self.goodput.record(self.steps_done)
            results = self.results()
            if self.is_writer:
                made_with = {"ranks": self.comm.size, "made_with": self.plan.made_with}
                write_json(self.folder.result, results.to_json() | made_with)
            return results
        finally:
            self.folder.release()

    def announce(self) -> None:
        """Show the recipe of a new run, or what a resumed one resumes from."""
        if self.first_step:
            resumed = f"resuming after step {self.first_step}, with {self.comm.size} rank(s)"
            self.monitor.say("; ".join([resumed, *self.changes]))
        else:
            self.monitor.text("recipe", self.recipe.to_yaml())
        labelled = np.concatenate([split.labelled for split in self.plan.training])
        if not labelled.all():
            self.monitor.say(
                f"{np.sum(~labelled):,} of {len(labelled):,} training pairs have no ground truth; they add nothing to "
                "the loss"
            )

    def train_step(self, batch: reader.Batch) -> None:
        """Do one step on this rank's share of the global batch."""
        if self.steps_done == self.first_step:
            with self.goodput.spending("compilation"):
                self.step.compile(batch, self.network.graph_key, self.recipe.loss)
                self.comm.barrier()
                self.peak = measure_peak(self.precision)  # while all ranks do the same
            self.goodput.record(self.first_step)
            self.stopwatch.restart(self.first_step)
        else:
            self.comm.progress(Phase.TRAINING, self.steps_done)
        rate = learning_rate(self.recipe, self.steps_done)
        result = self.step(batch, rate)
        self.steps_done += 1
        # In float16 the next step has a smaller loss scale, until that is 1.
        if not result.finite and not (self.precision == "float16" and self.step.loss_scale > 1):
            self.fail_diverged(batch)
        if self.steps_done % self.recipe.log_every == 0:
            self.log(result, rate)

    def finish_step(self, stop_request: StopRequest) -> None:
        """Validate and save if that is due after a step, and stop if that was requested."""
        done = self.steps_done
        last = done == self.recipe.steps
        # One decision for all ranks: whether a checkpoint is due depends on rank 0's clock.
        by_rank = self.comm.gather([stop_request.received, self.checkpoints.is_due(done)])
        stopping = any(stop for stop, _ in by_rank) and not last
        saving = last or stopping or by_rank[0][1]
        validating = last or (not stopping and self.is_validation_due())
        if validating or saving:
            check_weights(self.comm, done, self.step.weights)
        if validating:
            self.validate()
            self.stopwatch.restart(done)
        if saving:
            self.save(wait=last or stopping)
        if stopping:
            raise session.JobInterrupt(f"stopped after step {done}, which is saved; run the same command to resume")
        self.comm.progress(Phase.LOADING, done)

    def is_validation_due(self) -> bool:
        """Whether to validate after this step: once per epoch, unless the recipe sets an interval."""
        if self.recipe.validate_every:
            return self.steps_done % self.recipe.validate_every == 0
        pairs, batch = sum(map(len, self.plan.training)), self.recipe.batch
        return self.steps_done * batch // pairs > (self.steps_done - 1) * batch // pairs

    def save(self, wait: bool = False) -> None:
        """Write a checkpoint in the background; with `wait`, return when it is on the disk."""
        self.comm.progress(Phase.SAVING, self.steps_done)
        with self.goodput.spending("checkpoints"):
            self.checkpoints.save(self.steps_done, self.step.state)
            if wait:
                self.checkpoints.wait()
        self.goodput.record(self.steps_done, saved=self.checkpoints.on_disk)

    def log(self, result: StepResult, rate: float) -> None:
        """Add to the curves, and move the progress bar."""
        losses = result.losses.asnumpy()
        speed, wait = self.stopwatch.lap(self.steps_done, self.recipe.batch)
        by_rank = self.comm.gather({"data_wait": wait, "memory_gb": resident_memory() / 1e9})
        self.monitor.scalars(
            self.steps_done,
            {
                "train/loss": float(losses.sum()),
                **{f"train/{level}": float(loss) for level, loss in zip(LEVELS, losses, strict=True)},
                "train/gradient_norm": result.gradient_norm,
                "train/learning_rate": rate,
                "train/loss_scale": self.step.loss_scale,
                "train/overflows": self.step.overflows,
                "speed/pairs_per_second": speed,
                **self.utilization(speed),
                **{
                    f"{name}/rank-{rank}": value
                    for rank, values in enumerate(by_rank)
                    for name, value in values.items()
                },
            },
        )
        self.monitor.advance(self.steps_done, loss=f"{losses.sum():.3f}", pairs_per_s=f"{speed:.2f}")
        self.speeds.append(speed)
        self.goodput.record(self.steps_done, at_once=False, saved=self.checkpoints.on_disk)

    def utilization(self, speed: float) -> dict[str, float]:
        """Teraflops that a rank's convolutions reach at a speed in pairs per second, and their share of its peak."""
        flops = speed / self.comm.size * TRAINING_FACTOR * self.flops_per_pair
        return {"speed/teraflops": flops / 1e12} | ({"speed/mfu": flops / self.peak} if self.peak else {})

    def fail_diverged(self, batch: reader.Batch) -> NoReturn:
        """End the run on all ranks with the names of the pairs in the batch."""
        names = [name for split in self.plan.training for name in split.names]
        by_rank = self.comm.gather([names[position] for position in batch.index])
        pairs = ", ".join(itertools.chain(*by_rank))
        raise session.JobError(
            f"step {self.steps_done}: the loss or its gradient is not finite; pairs: {pairs}. "
            "The checkpoints are of earlier steps. Inspect these pairs (prep/inspect.py), or set a smaller "
            "learning_rate or a clip_norm"
        )

    # --- Validation ---

    def validate(self) -> None:
        """Validate the weights, and their moving average if there is one; keep the best in best.ckpt."""
        self.comm.progress(Phase.VALIDATING, self.steps_done)
        with self.goodput.spending("validation"):
            datasets = self.validate_weights()
            ema_epe = None
            if self.recipe.ema_decay:
                with self.step.averaged_weights():
                    ema_epe = next(iter(self.validate_weights(averaged=True).values())).epe
        self.validations.append(Validation(self.steps_done, datasets, ema_epe))

    def validate_weights(self, averaged: bool = False) -> dict[str, Metrics]:
        """Validate the network's present weights on every dataset; `averaged` says which these are."""
        found = {}
        for name, split in self.plan.validation.items():
            first = not found
            shown = range(min(PICTURES, len(split))) if first and not averaged else ()
            options = EvaluationOptions(self.recipe.validation_batch, shown)
            share = count_share(split, options.batch, self.comm)
            with self.monitor.validation_bar(name, share) as bar:
                evaluation = evaluate(self.predictor, split, self.comm, options, bar.update)
            found[name] = metrics = evaluation.metrics()
            self.show(name, metrics, first, averaged)
            if shown:
                self.draw(split, evaluation)
            if first:
                self.checkpoints.save_if_best(self.steps_done, self.network, metrics.epe)
        return found

    def show(self, name: str, metrics: Metrics, first: bool, averaged: bool) -> None:
        """Add the EPE on a dataset to the curves, and print it."""
        tag = "validation/" if first else f"validation/{name}/"
        self.monitor.scalars(self.steps_done, {f"{tag}epe{'_average' if averaged else ''}": metrics.epe})
        if not averaged:
            self.monitor.scalars(self.steps_done, {f"{tag}zero_flow_epe": metrics.zero_epe})
        weights = " with averaged weights" if averaged else ""
        dataset = f" ({name})" if len(self.plan.validation) > 1 else ""
        left_out = (
            f", {counted(metrics.unlabelled, 'pair')} without ground truth left out" if metrics.unlabelled else ""
        )
        self.monitor.say(
            f"step {self.steps_done}: validation EPE {metrics.epe:.3f} px{weights}, zero-flow EPE "
            f"{metrics.zero_epe:.3f} px{dataset}{left_out}"
        )

    def draw(self, split: reader.DatasetSplit, evaluation: Evaluation) -> None:
        """Show the samples of an evaluation; all ranks call this. An error does not end the run."""
        strips = gather_strips(evaluation, self.comm, survived)
        if strips and self.is_writer:
            with survived("drawing the validation pairs"):
                picture = draw_pairs(split, evaluation, strips, sorted(strips))
                self.monitor.picture(self.steps_done, "validation/flow", picture)

    def results(self) -> Results:
        """The results so far."""
        return Results(
            validations=self.validations,
            best_epe=self.checkpoints.best,
            goodput=self.goodput.summary(),
            pairs_per_second=float(np.median(self.speeds)) if self.speeds else None,
            overflows=self.step.overflows,
            seconds=time.monotonic() - self.created,
        )


def check_weights(comm: Communicator, step: int, weights: Sequence[mindspore.Parameter]) -> None:
    """Raise JobError unless all ranks have bit for bit the same weights after a step.

    Ranks that drift apart train different networks, which nothing else reveals.
    """
    digest = hashlib.blake2b()
    for weight in weights:
        digest.update(weight.asnumpy())
    by_rank = comm.gather([comm.name, digest.hexdigest()])
    most, count = collections.Counter(digest for _, digest in by_rank).most_common(1)[0]
    if count == comm.size:
        return
    majority = count > comm.size / 2
    different = [name for name, digest in by_rank if digest != most or not majority]
    raise session.JobError(
        f"after step {step} the weights of ranks differ: {', '.join(different)}"
        f"{f' against {count} others' if majority else ''}; the last checkpoint is of a step at which all were equal, "
        "and the same command resumes from it. If it happens again on that host, check its memory and GPU"
    )
