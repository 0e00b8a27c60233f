#!/usr/bin/env python3
"""Training: from a recipe and converted data sets to checkpoints, curves and figures.

mpirun -n RANKS launch/train.sh --config RECIPE --data DIR --out RUN [key=value ...]
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import hashlib
import json
import pathlib
import time

from launch import cluster
from launch.arguments import Parser
from launch.doctor import git_revision
from prep.errors import UserError, run
from prep.flowio import write_whole
from prep.shards import write_json
from train import recipe as recipes

LOGS = "logs"
"""Folder in that of the run for each rank's log file."""


def prepare(args):
    """Check all that can be checked before MindSpore is there, on every rank.

    Returns:
        (settings, (recipe, data, about)): settings are what must be the same on all ranks, as a dict
        of strings; data are (name, training split, validation split) of each set, opened; about is
        what the run is made with, as a dict.
    """
    ranks = cluster.place().ranks
    recipe = recipes.load(args.config, args.overrides)
    passes = ranks * args.accumulate
    if recipe.batch % passes:
        parts = f" in {args.accumulate} parts each" if args.accumulate > 1 else ""
        raise UserError(f"batch is {recipe.batch}, over {ranks} ranks{parts}: take a multiple of "
                        f"{passes} (batch={-(-recipe.batch // passes) * passes}) or another mpirun -n")
    if recipe.mixture and len(recipe.mixture) != len(args.data):
        raise UserError(f"mixture has {len(recipe.mixture)} shares, --data names {len(args.data)} "
                        "set(s): give one share for each, in their order")
    data = [open_set(folder, recipe) for folder in args.data]
    if not len(data[0][2]):
        raise UserError(f"{args.data[0]}: split val has no pair; convert the set with --split-file")
    if len({name for name, *_ in data}) < len(data):
        raise UserError(f"--data names a folder {data[0][0]} twice; the curves of the sets are told "
                        "apart by these names")
    check_folder(args.out, recipe)
    if args.init and not args.init.is_file() and cluster.place().rank == 0:
        raise UserError(f"{args.init}: no such checkpoint file")
    manifests = {str(folder): hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
                 for folder in args.data}
    settings = {"recipe": recipe.to_yaml(), "data": " ".join(manifests.values())}
    about = {**cluster.software(), "revision": git_revision(), "ranks": ranks,
             "parts of a rank's batch": args.accumulate, "data": manifests}
    return settings, (recipe, data, about)


def open_set(folder, recipe):
    """(name, training split, validation split) of a converted set that fits the recipe."""
    from prep import reader

    training, validation = (reader.Split.open(folder, name) for name in ("train", "val"))
    if len(training) < recipe.batch:
        raise UserError(f"{folder}: {len(training)} training pairs are fewer than one global batch of "
                        f"{recipe.batch}; choose a smaller batch=N or convert more pairs")
    size = training.sizes.min(0).tolist()  # of the lowest and of the narrowest
    if any(side < part for side, part in zip(size, recipe.crop)):
        raise UserError(f"{folder}: has pairs of {size[0]}x{size[1]}, the recipe crops "
                        f"{recipe.crop[0]}x{recipe.crop[1]}; choose a smaller crop=[H,W]")
    return folder.resolve().name, training, validation


def check_folder(out, recipe):
    """Raise UserError unless a run can start in `out` or the same run go on there."""
    saved = out / "recipe.yaml"
    if saved.exists():
        if saved.read_text() != recipe.to_yaml():
            raise UserError(f"{out}: holds a run with another recipe ({saved}); give another --out, "
                            "or the same recipe to go on with that run")
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a folder")
    elif out.exists() and any(path.name != LOGS for path in out.iterdir()):
        raise UserError(f"{out}: not empty and not a run of this trainer; give another --out")


def enter(out, recipe, about, first):
    """Write into the run's folder what this start is made with, beside that of earlier starts.

    Args:
        out: the folder.
        recipe: the Recipe.
        about: of `prepare`.
        first: how many steps lie behind.

    Returns:
        What is not as it was at the last start, as texts.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "recipe.yaml", recipe.to_yaml().encode())
    path = out / "starts.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    last = starts[-1] if starts else about
    changed = [f"{key} {value} (was {last.get(key)})" for key, value in about.items()
               if value != last.get(key)]
    write_json(path, [*starts, {"after_step": first, **about}])
    return changed


def main():
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog="With an --out that holds a run of the same recipe, that run goes on.")
    parser.add_argument("--config", required=True, metavar="RECIPE",
                        help="a recipe's name (example, chairs, ...) or a YAML file")
    parser.add_argument("--data", required=True, type=pathlib.Path, metavar="DIR", action="append",
                        help="a folder that prep/convert.py made; once more for each further set of "
                        "a mixture, of which the first decides what is the best checkpoint")
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="RUN",
                        help="folder of the run")
    parser.add_argument("--init", type=pathlib.Path, metavar="CKPT",
                        help="a checkpoint or imported file whose weights to begin with")
    parser.add_argument("--accumulate", type=int, default=1, metavar="PARTS",
                        help="take each rank's share of the batch in this many parts, to need less "
                        "memory; the result is the same but for rounding")
    cluster.add_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="values that win over the recipe's")
    args = parser.parse_args()
    if args.accumulate < 1:
        parser.error(f"--accumulate is {args.accumulate}, expected at least 1")

    joined = cluster.joined(lambda: prepare(args), args.device, args.out / LOGS,
                            args.dynamic_cluster)
    with joined as (here, (recipe, data, about)):
        from train.loop import train

        start = time.monotonic()
        result = train(recipe, data, args.out, here, parts=args.accumulate, init=args.init,
                       enter=lambda first: enter(args.out, recipe, about, first))
        if here.rank == 0:
            result |= {"made_with": about, "seconds": round(time.monotonic() - start, 1)}
            write_json(args.out / "result.json", result)
            print(f"validation EPE {result['epe']:.3f} px, {result['ratio']:.3f} of a flow of zero; "
                  f"figures: {args.out / 'result.json'}")


if __name__ == "__main__":
    run(main)
