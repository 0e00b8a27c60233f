#!/usr/bin/env python3
"""Training: the loop from a recipe and a converted data set to checkpoints, curves and figures.

mpirun -n RANKS launch/train.sh --config RECIPE --data DIR --out RUN [key=value ...]
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import hashlib
import importlib.metadata
import pathlib
import signal
import subprocess
import time

import numpy as np

from launch import cluster
from prep.errors import UserError, run
from prep.flowio import write_whole
from prep.shards import write_json
from train import recipe as recipes
from train.schedule import learning_rate

LEVELS = ("level6", "level5", "level4", "level3", "level2")
"""Names of the loss vector's elements: pyramid levels, coarse to fine."""
PICTURES = 4
"""Validation pairs drawn each time."""


def prepare(args, ranks):
    """Check all that can be checked before MindSpore is there, on every rank.

    Returns:
        (settings, (recipe, training, validation, versions)): settings are what must be the same on all ranks, as a dict of
        strings, training and validation the opened splits.
    """
    from prep import reader

    recipe = recipes.load(args.config, args.overrides)
    if recipe.batch % ranks:
        raise UserError(f"batch is {recipe.batch}, over {ranks} ranks: take a multiple of {ranks} "
                        f"(batch={-(-recipe.batch // ranks) * ranks}) or another mpirun -n")
    training, validation = (reader.Split.open(args.data, name) for name in ("train", "val"))
    if len(training) < recipe.batch:
        raise UserError(f"{args.data}: {len(training)} training pairs are fewer than one global "
                        f"batch of {recipe.batch}; choose a smaller batch=N or convert more pairs")
    if not len(validation):
        raise UserError(f"{args.data}: split val has no pair; convert the set with --split-file")
    size = training.sizes.min(0).tolist()  # of the lowest and of the narrowest
    if any(side < part for side, part in zip(size, recipe.crop)):
        raise UserError(f"{args.data}: has pairs of {size[0]}x{size[1]}, the recipe crops "
                        f"{recipe.crop[0]}x{recipe.crop[1]}; choose a smaller crop=[H,W]")
    check_folder(args.out, recipe)
    if args.init and not args.init.is_file() and cluster.place().rank == 0:
        raise UserError(f"{args.init}: no such checkpoint file")
    manifest = (args.data / "manifest.json").read_bytes()
    settings = {"recipe": recipe.to_yaml(), "data": hashlib.sha256(manifest).hexdigest()}
    about = versions()
    return settings | about, (recipe, training, validation, about)


def check_folder(out, recipe):
    """Raise UserError unless a run can start in `out` or the same run go on there."""
    saved = out / "recipe.yaml"
    if saved.exists():
        if saved.read_text() != recipe.to_yaml():
            raise UserError(f"{out}: holds a run with another recipe ({saved}); give another --out, "
                            "or the same recipe to go on with that run")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a folder")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty and not a run of this trainer; give another --out")


def versions():
    """What a run was made with: package versions and the revision of this code."""
    root = pathlib.Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], text=True,
                         capture_output=True, check=False)
    found = {name: importlib.metadata.version(name) for name in ("mindspore", "numpy")}
    return {"python": sys.version.split()[0], **found, "revision": git.stdout.strip() or "unknown"}


class StopRequest:
    """Notes SIGTERM and Ctrl-C, so that the training leaves after the step that it is in.

    A context manager. A second signal ends the process at once.
    """

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.note)
                       for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def train(recipe, training, validation, out, here, about, init=None):
    """Run a recipe to its end, from the newest checkpoint in `out` if there is one.

    Args:
        recipe: a `train.recipe.Recipe`.
        training, validation: opened splits (`prep.reader.Split`).
        out: folder of the run; rank 0 writes there.
        here: this rank's `launch.cluster.Place`.
        about: dict of strings to keep with the run.
        init: a checkpoint whose weights a new run begins with, or None.

    Returns:
        The final figures, a dict (the same on every rank).

    Raises:
        UserError: the training diverged.
        KeyboardInterrupt: SIGTERM or Ctrl-C on any rank; a checkpoint of the last step was written.
    """
    import mindspore
    from mindspore import Tensor, nn

    from model.losses import MultiScaleLoss
    from model.pwcnet import PWCNet, start_from_coarser_flow
    from prep import reader
    from prep.picture import strip
    from train.augment import Augment
    from train.checkpoint import Checkpoints, start_from
    from train.evaluate import evaluate, summarize
    from train.monitor import Clock, Monitor
    from train.step import TrainStep, use_float16

    mindspore.set_seed(recipe.seed)  # the same first weights on every rank
    options = {"variant": recipe.variant, "dense": recipe.dense,
               "normalize_features": recipe.normalize_features, "warp_mode": recipe.warp_mode}
    network = PWCNet(**options)
    if recipe.start_from_coarser_flow:
        start_from_coarser_flow(network)
    half = recipe.precision == "float16"
    if half:
        use_float16(network)
    decoupled = recipe.optimizer == "adamw"
    optimizer = nn.Adam(network.trainable_params(), learning_rate=recipe.learning_rate,
                        weight_decay=0.0 if decoupled else recipe.weight_decay)
    step = TrainStep(network, MultiScaleLoss(recipe.loss == "robust"), optimizer,
                     ranks=here.ranks, clip_norm=recipe.clip_norm, loss_scaling=half,
                     decoupled_decay=recipe.weight_decay if decoupled else 0.0)
    checkpoints = Checkpoints(out / "checkpoints", options, enabled=here.rank == 0)
    first = checkpoints.restore(step)
    if init and not first:
        start_from(init, network)

    batches = ()
    if first < recipe.steps:
        batches = reader.training_batches(
            training, batch=recipe.batch // here.ranks, rank=here.rank, ranks=here.ranks,
            seed=recipe.seed, first_step=first, steps=recipe.steps - first,
            transform=Augment.from_recipe(recipe))
    # Rank 0 draws the pictures, so they are of pairs that it evaluates.
    shown = range(0, len(validation), here.ranks)[:PICTURES]
    clock, overflows, rates, validations = Clock(), 0, [], []

    def validate(done):
        result = evaluate(network, validation, batch=recipe.validation_batch, rank=here.rank,
                          ranks=here.ranks, pictures=shown)
        summary = summarize(result)
        validations.append({"step": done, **summary})
        monitor.scalars(done, {"validation/epe": summary["epe"],
                               "validation/zero_flow_epe": summary["zero_epe"]})
        if rows := [strip(*result["samples"][i]) for i in sorted(result["samples"])]:
            monitor.picture(done, "validation/flow", np.concatenate(rows))
        checkpoints.save_if_best(network, summary["epe"])
        monitor.say(f"step {done}: validation EPE {summary['epe']:.3f} px, of a flow of zero "
                    f"{summary['zero_epe']:.3f} px")

    with (Monitor(out, first, recipe.steps, enabled=here.rank == 0) as monitor, checkpoints,
          StopRequest() as stop):
        monitor.text("recipe", recipe.to_yaml())
        monitor.text("made_with", "\n".join(f"{key}: {value}" for key, value in about.items()))
        if first:
            monitor.say(f"going on after step {first}, with {here.ranks} rank(s)")
        for done, sample in enumerate(clock.waiting(batches), first + 1):
            rate = learning_rate(recipe, done - 1)
            inputs = [*map(Tensor, sample[:4]), Tensor(rate, mindspore.float32)]
            if done == first + 1:
                step.compile(*inputs)
                cluster.barrier()
            losses, norm, finite = step(*inputs)
            finite = bool(finite)
            overflows += not finite
            if not finite and not half:
                names = [training.names[index] for index in sample[4]]
                names = ", ".join(sum(cluster.gather(names), []))
                cluster.stop_together(UserError(
                    f"step {done}: the loss or its gradient is no finite number, with the pairs "
                    f"{names}; the checkpoints are of the steps before. Look at these pairs "
                    "(prep/inspect.py), or take a smaller learning_rate or a clip_norm"))
            if done % recipe.log_every == 0:
                losses = losses.asnumpy()
                rates.append(clock.lap(done, recipe.batch))
                monitor.scalars(done, {
                    "train/loss": float(losses.sum()),
                    **{f"train/{level}": float(loss) for level, loss in zip(LEVELS, losses)},
                    "train/gradient_norm": float(norm), "train/learning_rate": rate,
                    "train/loss_scale": float(step.loss_scale), "train/overflows": overflows,
                    **rates[-1]})
                speed = rates[-1].get("speed/pairs_per_second", float("nan"))
                monitor.advance(done, loss=f"{losses.sum():.3f}", pairs_per_s=f"{speed:.2f}")
            last = done == recipe.steps
            stopping = any(cluster.gather(stop.asked))
            if last or stopping or done % recipe.checkpoint_every == 0:
                checkpoints.save(done, step)
            if stopping and not last:
                checkpoints.wait()
                cluster.stop_together(KeyboardInterrupt(
                    f"stopped after step {done}, which is kept; the same command goes on from there"))
            if last or is_validation_due(recipe, done, len(training)):
                validate(done)
                clock.restart(done)
        if not validations:  # the run was whole already
            validate(first)
    speeds = [lap["speed/pairs_per_second"] for lap in rates if lap]
    return {**validations[-1], "best_epe": min(entry["epe"] for entry in validations),
            "ranks": here.ranks, "overflows": overflows,
            "pairs_per_second": float(np.median(speeds)) if speeds else None,
            "validations": validations, "made_with": about}


def is_validation_due(recipe, done, pairs):
    """Whether to validate after this many steps: once an epoch, unless the recipe says when."""
    if recipe.validate_every:
        return done % recipe.validate_every == 0
    return done * recipe.batch // pairs > (done - 1) * recipe.batch // pairs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="With an --out that holds a run of the same recipe, that run goes on.")
    parser.add_argument("--config", required=True, metavar="RECIPE",
                        help="a recipe's name (example, chairs, ...) or a YAML file")
    parser.add_argument("--data", required=True, type=pathlib.Path, metavar="DIR",
                        help="a folder that prep/convert.py made")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="RUN",
                        help="folder of the run")
    parser.add_argument("--init", type=pathlib.Path, metavar="CKPT",
                        help="a checkpoint or imported file whose weights to begin with")
    parser.add_argument("--device", default="CPU", type=str.upper, choices=("CPU", "GPU"))
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="values that win over the recipe's")
    args = parser.parse_args()

    ranks = cluster.place().ranks
    joined = cluster.joined(lambda: prepare(args, ranks), args.device)
    with joined as (here, (recipe, training, validation, about)):
        if here.rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            write_whole(args.out / "recipe.yaml", recipe.to_yaml().encode())
        start = time.monotonic()
        result = train(recipe, training, validation, args.out, here, about, args.init)
        if here.rank == 0:
            result["seconds"] = round(time.monotonic() - start, 1)
            write_json(args.out / "result.json", result)
            print(f"validation EPE {result['epe']:.3f} px, {result['ratio']:.3f} of a flow of zero; "
                  f"figures: {args.out / 'result.json'}")


if __name__ == "__main__":
    run(main)
