"""The training loop: the same on every rank, with rank 0 writing what is kept and shown."""

import signal

import mindspore
import numpy as np

from launch import cluster
from model.losses import MultiScaleLoss
from model.pwcnet import FlowPredictor, PWCNet, start_from_coarser_flow
from prep import reader
from prep.errors import UserError
from train.augment import Augment
from train.checkpoint import Checkpoints, start_from
from train.evaluate import draw_pairs, evaluate, gather_strips, summarize
from train.goodput import Goodput
from train.monitor import STOP_SIGNALS, Clock, Monitor, resident_memory, survived
from train.recipe import NETWORK_OPTIONS
from train.schedule import learning_rate
from train.step import TrainStep, use_float16

LEVELS = ("level6", "level5", "level4", "level3", "level2")
"""Names of the loss vector's elements: pyramid levels, coarse to fine."""
PICTURES = 4
"""Validation pairs drawn each time."""


class StopRequest:
    """Notes SIGTERM, Ctrl-C and SIGUSR1, so that the training leaves after the step that it is in.

    mpirun passes SIGUSR1 on and goes on waiting; of the others it lets no rank take notice for long.
    A context manager. A second signal ends the process at once.
    """

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.note)
                       for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def train(recipe, training, validation, out, here, *, parts=1, init=None, enter, started):
    """Run a recipe to its end, from the newest checkpoint in `out` if there is one.

    Args:
        recipe: a `train.recipe.Recipe`.
        training: list of opened training splits (`prep.reader.Split`).
        validation: list of (name, opened split) to validate on; the first decides which weights are the
            best.
        out: folder of the run; rank 0 writes there.
        here: this rank's `launch.cluster.Place`.
        parts: in how many parts a rank's share of the batch goes through.
        init: a checkpoint whose weights a new run begins with, or None.
        enter: called on rank 0 before anything is written, with the number of steps done; returns
            texts that say what is not as it was at the last start.
        started: when this process started, by `train.goodput.now`.

    Returns:
        The final figures, a dict (the same on every rank).

    Raises:
        UserError: the training diverged, a file does not fit, or the run is past `recipe.steps`.
        OSError: a checkpoint cannot be written.
        KeyboardInterrupt: SIGTERM or Ctrl-C on any rank; a checkpoint of the last step was written.
    """
    mindspore.set_seed(recipe.seed)  # the same first weights on every rank
    options = {key: getattr(recipe, key) for key in NETWORK_OPTIONS}
    network = PWCNet(**options)
    if recipe.start_from_coarser_flow:
        start_from_coarser_flow(network)
    half = recipe.precision == "float16"
    if half:
        use_float16(network)
    step = TrainStep(network, MultiScaleLoss(recipe.loss == "robust"), ranks=here.ranks, parts=parts,
                     clip_norm=recipe.clip_norm, loss_scaling=half,
                     weight_decay=recipe.weight_decay, decoupled=recipe.optimizer == "adamw",
                     average=recipe.average)
    checkpoints = Checkpoints(out / "checkpoints", options, recipe.checkpoint_every,
                              enabled=here.rank == 0, validation=validation[0][0])
    first = checkpoints.restore(step.state)
    if init and not first:
        start_from(init, network)
    if first > recipe.steps:
        cluster.stop_together(UserError(
            f"{out}: has done {first} steps, the recipe says {recipe.steps}; give steps={first} or more"))
    changed = enter(first) if here.rank == 0 else []
    goodput = Goodput(out / "goodput.json" if here.rank == 0 else None, started, first)

    batches, pairs = (), sum(map(len, training))
    if first < recipe.steps:
        batches = reader.training_batches(
            list(zip(training, recipe.mixture or map(len, training))),
            batch=recipe.batch // here.ranks, rank=here.rank, ranks=here.ranks, seed=recipe.seed,
            first_step=first, steps=recipe.steps - first, workers=min(8, here.threads),
            transform=Augment.from_recipe(recipe))
    clock, speeds = Clock(first), []

    with (Monitor(out, first, recipe.steps, enabled=here.rank == 0) as monitor, checkpoints,
          StopRequest() as stop):
        validator = Validator(recipe, validation, here, network, step, checkpoints, monitor)
        if not first:
            monitor.text("recipe", recipe.to_yaml())
        else:
            monitor.say("; ".join([f"going on after step {first}, with {here.ranks} rank(s)",
                                   *changed]))
        for done, sample in enumerate(clock.waiting(batches), first + 1):
            rate = learning_rate(recipe, done - 1)
            if done == first + 1:
                with goodput.spending("compilation"):
                    step.compile(*sample[:4])
                    cluster.barrier()
                goodput.record(first)
                clock.restart(first)
            losses, norm, finite = step(*sample[:4], rate)
            # In float16 the next step has a smaller loss scale, until that is 1.
            if not bool(finite) and not (half and step.loss_scale > 1):
                stop_diverged(done, training, sample[4])
            if done % recipe.log_every == 0:
                losses = losses.asnumpy()
                speed, wait = clock.lap(done, recipe.batch)
                by_rank = cluster.gather({"data_wait": wait, "memory_gb": resident_memory() / 1e9})
                monitor.scalars(done, {
                    "train/loss": float(losses.sum()),
                    **{f"train/{level}": float(loss) for level, loss in zip(LEVELS, losses)},
                    "train/gradient_norm": float(norm), "train/learning_rate": rate,
                    "train/loss_scale": step.loss_scale, "train/overflows": step.overflows,
                    "speed/pairs_per_second": speed,
                    **{f"{key}/rank-{rank}": value for rank, values in enumerate(by_rank)
                       for key, value in values.items()}})
                monitor.advance(done, loss=f"{losses.sum():.3f}", pairs_per_s=f"{speed:.2f}")
                speeds.append(speed)
                goodput.record(done, at_once=False)
            last = done == recipe.steps
            stopping = any(cluster.gather(stop.asked)) and not last
            if last or not stopping and is_validation_due(recipe, done, pairs):
                with goodput.spending("validation"):
                    validator.run(done)
                clock.restart(done)
            if last or stopping or checkpoints.is_due(done):
                with goodput.spending("checkpoints"):
                    checkpoints.save(done, step.state)
                    if last or stopping:
                        checkpoints.wait()
                goodput.record(done)
            if stopping:
                cluster.stop_together(KeyboardInterrupt(
                    f"stopped after step {done}, which is kept; the same command goes on from there"))
        if not validator.history:  # the run was whole already
            with goodput.spending("validation"):
                validator.run(first)
            goodput.record(first)
    return {**validator.history[-1], "best_epe": checkpoints.best, "ranks": here.ranks,
            "goodput": goodput.summary(),
            "overflows": step.overflows, "pairs_per_second": float(np.median(speeds)) if speeds else None,
            "validations": validator.history}


def stop_diverged(step, training, indices):
    """End the run on all ranks with the names of the pairs in the batch of a step."""
    names = [name for split in training for name in split.names]
    names = ", ".join(sum(cluster.gather([names[index] for index in indices]), []))
    cluster.stop_together(UserError(
        f"step {step}: the loss or its gradient is no finite number, with the pairs {names}; the "
        "checkpoints are of the steps before. Look at these pairs (prep/inspect.py), or take a "
        "smaller learning_rate or a clip_norm"))


def is_validation_due(recipe, done, pairs):
    """Whether to validate after this many steps: once an epoch, unless the recipe says when."""
    if recipe.validate_every:
        return done % recipe.validate_every == 0
    return done * recipe.batch // pairs > (done - 1) * recipe.batch // pairs


class Validator:
    """Validates on each set, with the weights and, where there is one, with their average.

    Attributes:
        history: a dict of figures for each time; those of the first set and of the weights as
            `evaluate.summarize` gives them, beside them `average_epe`, and `sets` of the others.
    """

    def __init__(self, recipe, validation, here, network, step, checkpoints, monitor):
        self.recipe = recipe
        self.sets = validation
        self.here = here
        self.network = network
        self.predictor = FlowPredictor(network)
        self.step = step
        self.checkpoints = checkpoints
        self.monitor = monitor
        self.history = []

    def run(self, done):
        """Validate after so many steps; add to the curves and keep the best weights."""
        figures = self.evaluate_sets(done, "")
        if self.recipe.average:
            with self.step.averaged_weights():
                figures["average_epe"] = self.evaluate_sets(done, "_average")["epe"]
        self.history.append({"step": done, **figures})

    def evaluate_sets(self, done, suffix):
        """Figures with the weights that the network has now; `suffix` is added to the tags."""
        figures = {}
        for number, (name, split) in enumerate(self.sets):
            shown = range(len(split))[:0 if number or suffix else PICTURES]
            result = evaluate(self.predictor, split, batch=self.recipe.validation_batch,
                              rank=self.here.rank, ranks=self.here.ranks, pictures=shown)
            summary = summarize(result)
            tag = f"validation/{name}/" if number else "validation/"
            self.monitor.scalars(done, {f"{tag}epe{suffix}": summary["epe"]})
            if not suffix:
                self.monitor.scalars(done, {f"{tag}zero_flow_epe": summary["zero_epe"]})
            self.monitor.say(
                f"step {done}: validation EPE {summary['epe']:.3f} px"
                f"{' with averaged weights' if suffix else ''}, of a flow of zero "
                f"{summary['zero_epe']:.3f} px{f' ({name})' if len(self.sets) > 1 else ''}")
            if number:
                figures["sets"][name] = summary
                continue
            figures = {**summary, "sets": {}}
            if shown:
                self.draw(done, split, result)
            self.checkpoints.save_if_best(done, self.network, summary["epe"])
        return figures

    def draw(self, done: int, split: reader.Split, result: dict) -> None:
        """Show the wanted pairs of a result of `evaluate`, whichever rank had them. All ranks call
        this; what goes wrong with a picture does not end the run."""
        strips = gather_strips(result, survived)
        if strips and self.here.rank == 0:
            with survived("drawing the validation pairs"):
                self.monitor.picture(done, "validation/flow",
                                     draw_pairs(split, result, strips, sorted(strips)))
