"""The training loop: the same on every rank, with rank 0 writing what is kept and shown."""

import collections
import hashlib
import signal
import socket
from typing import NoReturn

import mindspore
import numpy as np

from launch import session
from launch.watchdog import Phase
from model.inference import FlowPredictor
from model.losses import make_loss
from model.pwcnet import PWCNet, start_from_coarser_flow
from prep import reader
from train.augment import Augment
from train.checkpoint import Checkpoints, start_from
from train.evaluate import draw_pairs, evaluate, gather_strips, summarize
from train.goodput import Goodput
from train.monitor import STOP_SIGNALS, Clock, Monitor, resident_memory, survived
from train.recipe import NETWORK_OPTIONS
from train.schedule import learning_rate
from train.step import StepOptions, TrainStep, use_float16

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
        self.before = {number: signal.signal(number, self.note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def train(recipe, training, validation, out, comm, *, parts=1, init=None, backend="native", enter, started):
    """Run a recipe to its end, from the newest checkpoint in `out` if there is one.

    Args:
        recipe: a `train.recipe.Recipe`.
        training: list of opened training splits (`prep.reader.DatasetSplit`).
        validation: list of (name, opened split) to validate on; the first decides which weights are the
            best.
        out: folder of the run; rank 0 writes there.
        comm: the ranks, a `launch.communicator.Communicator`.
        parts: in how many parts a rank's share of the batch goes through.
        init: a checkpoint whose weights a new run begins with, or None.
        backend: operators of the network, see `model.backend`.
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
    network = PWCNet(**options, backend=backend)
    if recipe.start_from_coarser_flow:
        start_from_coarser_flow(network)
    half = recipe.precision == "float16"
    if half:
        use_float16(network)
    step_options = StepOptions(
        accumulation_steps=parts,
        clip_norm=recipe.clip_norm,
        loss_scaling=half,
        weight_decay=recipe.weight_decay,
        decoupled_decay=recipe.optimizer == "adamw",
        ema_decay=recipe.average,
    )
    step = TrainStep(network, make_loss(recipe.loss, network.align_corners), step_options, comm)
    checkpoints = Checkpoints(
        out / "checkpoints", options, recipe.checkpoint_every, enabled=comm.rank == 0, validation=validation[0][0]
    )
    first = checkpoints.restore(step.state, comm)
    if init and not first:
        start_from(init, network, comm)
    if first > recipe.steps:
        raise session.JobError(
            f"{out}: has done {first} steps, the recipe says {recipe.steps}; give steps={first} or more"
        )
    changed = enter(first) if comm.rank == 0 else []
    goodput = Goodput(out / "goodput.json" if comm.rank == 0 else None, started, first)

    batches, pairs = (), sum(map(len, training))
    if first < recipe.steps:
        batches = reader.training_batches(
            list(zip(training, recipe.mixture or map(len, training))),
            batch=recipe.batch // comm.size,
            rank=comm.rank,
            ranks=comm.size,
            seed=recipe.seed,
            first_step=first,
            steps=recipe.steps - first,
            workers=min(8, comm.threads),
            transform=Augment.from_recipe(recipe),
        )
    clock, speeds = Clock(first), []

    with Monitor(out, first, recipe.steps, enabled=comm.rank == 0) as monitor, checkpoints, StopRequest() as stop:
        validator = Validator(recipe, validation, comm, network, step, checkpoints, monitor)
        if not first:
            monitor.text("recipe", recipe.to_yaml())
        else:
            monitor.say("; ".join([f"going on after step {first}, with {comm.size} rank(s)", *changed]))
        comm.progress(Phase.COMPILING, first)  # the first step, too, may take long
        for done, batch in enumerate(clock.waiting(batches), first + 1):
            rate = learning_rate(recipe, done - 1)
            if done == first + 1:
                with goodput.spending("compilation"):
                    step.compile(batch)
                    comm.barrier()
                goodput.record(first)
                clock.restart(first)
            if done > first + 1:
                comm.progress(Phase.TRAINING, done - 1)
            losses, norm, finite = step(batch, rate)
            # In float16 the next step has a smaller loss scale, until that is 1.
            if not bool(finite) and not (half and step.loss_scale > 1):
                stop_diverged(comm, done, training, batch.index)
            if done % recipe.log_every == 0:
                losses = losses.asnumpy()
                speed, wait = clock.lap(done, recipe.batch)
                by_rank = comm.gather({"data_wait": wait, "memory_gb": resident_memory() / 1e9})
                monitor.scalars(
                    done,
                    {
                        "train/loss": float(losses.sum()),
                        **{f"train/{level}": float(loss) for level, loss in zip(LEVELS, losses)},
                        "train/gradient_norm": float(norm),
                        "train/learning_rate": rate,
                        "train/loss_scale": step.loss_scale,
                        "train/overflows": step.overflows,
                        "speed/pairs_per_second": speed,
                        **{
                            f"{key}/rank-{rank}": value
                            for rank, values in enumerate(by_rank)
                            for key, value in values.items()
                        },
                    },
                )
                monitor.advance(done, loss=f"{losses.sum():.3f}", pairs_per_s=f"{speed:.2f}")
                speeds.append(speed)
                goodput.record(done, at_once=False)
            last = done == recipe.steps
            # One of each for all ranks: whether a checkpoint is due depends on rank 0's clock.
            signals = comm.gather([stop.asked, checkpoints.is_due(done)])
            stopping = any(asked for asked, _ in signals) and not last
            saving = last or stopping or signals[0][1]
            validating = last or (not stopping and is_validation_due(recipe, done, pairs))
            if validating or saving:
                check_weights(comm, done, step.weights)
            if validating:
                comm.progress(Phase.VALIDATING, done)
                with goodput.spending("validation"):
                    validator.run(done)
                clock.restart(done)
            if saving:
                comm.progress(Phase.SAVING, done)
                with goodput.spending("checkpoints"):
                    checkpoints.save(done, step.state)
                    if last or stopping:
                        checkpoints.wait()
                goodput.record(done)
            if stopping:
                raise session.JobInterrupt(
                    f"stopped after step {done}, which is kept; the same command goes on from there"
                )
            comm.progress(Phase.LOADING, done)
        comm.progress(Phase.RUNNING, max(first, recipe.steps))
        if not validator.history:  # the run was whole already
            comm.progress(Phase.VALIDATING, first)
            with goodput.spending("validation"):
                validator.run(first)
            goodput.record(first)
    return {
        **validator.history[-1],
        "best_epe": checkpoints.best,
        "ranks": comm.size,
        "goodput": goodput.summary(),
        "overflows": step.overflows,
        "pairs_per_second": float(np.median(speeds)) if speeds else None,
        "validations": validator.history,
    }


def stop_diverged(comm, step, training, indices) -> NoReturn:
    """End the run on all ranks with the names of the pairs in the batch of a step."""
    names = [name for split in training for name in split.names]
    names = ", ".join(sum(comm.gather([names[index] for index in indices]), []))
    raise session.JobError(
        f"step {step}: the loss or its gradient is no finite number, with the pairs {names}; the "
        "checkpoints are of the steps before. Look at these pairs (prep/inspect.py), or take a "
        "smaller learning_rate or a clip_norm"
    )


def check_weights(comm, step, weights) -> None:
    """Raise JobError unless all ranks have bit for bit the same weights after a step.

    Ranks that drift apart train different networks without anything to show for it.
    """
    digest = hashlib.blake2b()
    for weight in weights:
        digest.update(weight.asnumpy())
    by_rank = comm.gather([socket.gethostname(), digest.hexdigest()])
    most, count = collections.Counter(digest for _, digest in by_rank).most_common(1)[0]
    if count == comm.size:
        return
    different = [f"{rank} on {host}" for rank, (host, digest) in enumerate(by_rank) if digest != most]
    if count <= comm.size / 2:  # no majority to be right
        different = [f"{rank} on {host}" for rank, (host, _) in enumerate(by_rank)]
    raise session.JobError(
        f"after step {step} the weights of ranks differ: rank {', rank '.join(different)}"
        f"{'' if count <= comm.size / 2 else f' against {count} others'}; the last checkpoint is of a step at which "
        "all were equal, and the same command resumes from it. If it happens again on that host, check its memory "
        "and GPU"
    )


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

    def __init__(self, recipe, validation, comm, network, step, checkpoints, monitor) -> None:
        self.recipe = recipe
        self.sets = validation
        self.comm = comm
        self.network = network
        self.predictor = FlowPredictor(network)
        self.step = step
        self.checkpoints = checkpoints
        self.monitor = monitor
        self.history = []

    def run(self, done) -> None:
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
            shown = range(len(split))[: 0 if number or suffix else PICTURES]
            result = evaluate(self.predictor, split, self.comm, batch=self.recipe.validation_batch, pictures=shown)
            summary = summarize(result)
            tag = f"validation/{name}/" if number else "validation/"
            self.monitor.scalars(done, {f"{tag}epe{suffix}": summary["epe"]})
            if not suffix:
                self.monitor.scalars(done, {f"{tag}zero_flow_epe": summary["zero_epe"]})
            self.monitor.say(
                f"step {done}: validation EPE {summary['epe']:.3f} px"
                f"{' with averaged weights' if suffix else ''}, of a flow of zero "
                f"{summary['zero_epe']:.3f} px{f' ({name})' if len(self.sets) > 1 else ''}"
            )
            if number:
                figures["sets"][name] = summary
                continue
            figures = {**summary, "sets": {}}
            if shown:
                self.draw(done, split, result)
            self.checkpoints.save_if_best(done, self.network, summary["epe"])
        return figures

    def draw(self, done: int, split: reader.DatasetSplit, result: dict) -> None:
        """Show the wanted pairs of a result of `evaluate`, whichever rank had them. All ranks call
        this; what goes wrong with a picture does not end the run."""
        strips = gather_strips(result, self.comm, survived)
        if strips and self.comm.rank == 0:
            with survived("drawing the validation pairs"):
                self.monitor.picture(done, "validation/flow", draw_pairs(split, result, strips, sorted(strips)))
