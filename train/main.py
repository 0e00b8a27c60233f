#!/usr/bin/env python3
"""Train a network: from a recipe and converted datasets to checkpoints, curves and metrics.

mpirun -n RANKS launch/train.sh --config RECIPE --data DIR --out RUN [key=value ...]
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import argparse
import functools
import pathlib
import re

from launch import session
from launch.arguments import Parser
from launch.errors import run
from model.backend import add_backend_option
from train import goodput
from train.recipe import CHANGEABLE, Recipe
from train.run import RunConfig, start_trainer


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description="Train a network on one or several datasets.",
        epilog="If --out holds a run of the same recipe, that run resumes. These keys may change then: "
        f"{', '.join(CHANGEABLE)}; a larger steps=N extends a run. train/recipes/README.md explains every key.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="RECIPE",
        help="name of a built-in recipe (example, chairs, ...) or a YAML file (required)",
    )
    parser.add_argument(
        "--data",
        required=True,
        type=pathlib.Path,
        metavar="DIR",
        action="append",
        help="dataset converted by prep/convert.py (required); repeat it to train on a mixture",
    )
    parser.add_argument(
        "--validate",
        type=pathlib.Path,
        metavar="DIR",
        action="append",
        default=[],
        help="converted dataset to validate on only, which needs no training pairs; may be repeated (default: validate "
        "on --data only). The first --validate, or without any the first --data, decides which checkpoint is the best "
        "(best.ckpt); its curves are validation/..., those of the others validation/NAME/...",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=pathlib.Path,
        metavar="RUN",
        help="folder of the run, created or resumed (required)",
    )
    parser.add_argument(
        "--init",
        type=pathlib.Path,
        metavar="CKPT",
        help="checkpoint or imported file whose weights a new run starts from (default: random weights)",
    )
    parser.add_argument(
        "--accumulation-steps",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches in which each rank computes its share of the batch, to need less memory; the result is "
        "the same up to rounding",
    )
    parser.rename_option("--accumulate", "--accumulation-steps")
    session.add_options(parser)
    add_backend_option(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys, which take precedence over the recipe"
    )
    args, unknown = parser.parse_known_args()
    if unknown:  # argparse takes keys in one place only
        advice = (
            "; all recipe keys go last, after the options" if any(re.match(r"\w+=", word) for word in unknown) else ""
        )
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    return args


def main() -> None:
    args = parse_arguments()
    recipe = functools.partial(Recipe.load, args.config, args.overrides)
    config = RunConfig(recipe, args.data, args.out, args.validate, args.init, args.accumulation_steps, args.backend)
    with start_trainer(config, args.device, args.collective) as trainer:
        results = trainer.fit()
        if trainer.is_writer:
            data, folder = (args.validate or args.data)[0], trainer.folder
            print(
                f"validation EPE {results.metrics.epe:.3f} px, {results.metrics.ratio:.3f} of the zero-flow EPE; "
                f"{goodput.describe(results.goodput)}\n"
                f"results: {folder.result}, checkpoints and curves beside it; to evaluate: "
                f"python train/evaluate.py --data {data} --ckpt {folder.best_checkpoint}"
            )


if __name__ == "__main__":
    run(main)
