#!/usr/bin/env python3
"""Training: from a recipe and converted data sets to checkpoints, curves and figures.

mpirun -n RANKS launch/train.sh --config RECIPE --data DIR --out RUN [key=value ...]
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import hashlib
import json
import pathlib
import time

from launch import ranks, session, versions
from launch.arguments import Parser
from launch.errors import UserError, run
from launch.files import write_bytes, write_json
from launch.lock import Lock
from model.backend import add_backend_option
from train import goodput, plain_yaml
from train import recipe as recipes

LOGS = "logs"
"""Folder in that of the run for each rank's log file."""
LOCK = "lock"
"""File in the folder of the run that its writer holds."""
FORMAT = 1
"""Version of what the files in a run's folder mean; folders that name none are older."""


def prepare(args):
    """Check all that can be checked before MindSpore is there, on every rank.

    Returns:
        (settings, (recipe, training, validation, about)): settings are what must be the same on all
        ranks, as a dict of strings; training are opened splits, validation (name, opened split), the
        first being the one that decides what is best; about is what the run is made with, as a dict.
    """
    count = ranks.current().size
    recipe = recipes.load(args.config, args.overrides)
    passes = count * args.accumulate
    if recipe.batch % passes:
        parts = f" in {args.accumulate} parts each" if args.accumulate > 1 else ""
        raise UserError(
            f"batch is {recipe.batch}, over {count} ranks{parts}: take a multiple of "
            f"{passes} (batch={-(-recipe.batch // passes) * passes}) or another mpirun -n"
        )
    if recipe.mixture and len(recipe.mixture) != len(args.data):
        raise UserError(
            f"mixture has {len(recipe.mixture)} shares, --data names {len(args.data)} "
            "set(s): give one share for each, in their order"
        )
    training = [open_training(folder, recipe) for folder in args.data]
    validation = open_validation(args.data, args.validate)
    check_folder(args.out, recipe)
    new = not (args.out / "recipe.yaml").exists()
    if new and args.init and not args.init.is_file() and ranks.current().rank == 0:
        raise UserError(f"{args.init}: no such checkpoint file")
    manifests = {
        str(folder): hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        for folder in [*args.data, *args.validate]
    }
    settings = {"recipe": recipe.to_yaml(), "data": " ".join(manifests.values())}
    about = {
        **versions.software(),
        "revision": versions.git_revision(),
        "ranks": count,
        "parts of a rank's batch": args.accumulate,
        "data": manifests,
    }
    if ranks.current().rank == 0 and args.out.exists():  # another run may be there: look now
        lock(args)
    return settings, (recipe, training, validation, about)


def open_training(folder: pathlib.Path, recipe: recipes.Recipe):
    """The training split (`prep.reader.DatasetSplit`) of a converted dataset that fits the recipe."""
    from prep import reader

    training = reader.DatasetSplit.open(folder, "train")
    if not len(training):
        raise UserError(
            f"{folder}: has no training pairs; give it as --validate, or convert it again with another --split-file"
        )
    if len(training) < recipe.batch:
        raise UserError(
            f"{folder}: {len(training)} training pairs are fewer than one global batch of "
            f"{recipe.batch}; choose a smaller batch=N or convert more pairs"
        )
    size = training.sizes.min(0).tolist()  # of the lowest and of the narrowest
    if any(side < part for side, part in zip(size, recipe.crop)):
        raise UserError(
            f"{folder}: has pairs of {size[0]}x{size[1]}, the recipe crops "
            f"{recipe.crop[0]}x{recipe.crop[1]}; choose a smaller crop=[H,W]"
        )
    return training


def open_validation(data: list[pathlib.Path], validate: list[pathlib.Path]) -> list[tuple]:
    """(name, validation split) of the datasets to validate on, those of --validate before those of
    --data, of which those without validation pairs are left out.

    Raises:
        UserError: the first, which decides what is best, or one of --validate has no validation pair;
            two have one name, by which the curves are told apart.
    """
    from prep import reader

    folders = {folder.resolve(): folder for folder in [*validate, *data]}
    splits = [(path, reader.DatasetSplit.open(folder, "val")) for path, folder in folders.items()]
    for number, (path, split) in enumerate(splits):
        if not len(split) and (number == 0 or folders[path] in validate):
            raise UserError(
                f"{folders[path]}: split val has no pair; convert the set with --split-file, "
                "or validate on another one, --validate DIR"
            )
    names = [path.name for path, _ in splits]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--data and --validate name several folders {name}; the curves of the sets "
                "are told apart by these names"
            )
    return [(path.name, split) for path, split in splits if len(split)]


def check_folder(out: pathlib.Path, recipe: recipes.Recipe) -> None:
    """Raise UserError unless a run can start in `out` or the same run go on there."""
    saved = out / "recipe.yaml"
    if saved.exists():
        starts = read_starts(out)
        if starts and (version := starts[-1].get("format", 0)) > FORMAT:
            raise UserError(
                f"{out}: a run of format {version}, but this version knows formats up to "
                f"{FORMAT}; use the version that wrote it, or a newer one"
            )
        stored, source = network_options(out, None)
        stored = {key: value for key, value in stored.items() if key not in recipe.sources}
        effective = recipes.adopt_network_options(recipe, stored, source)
        for key, old, new in recipes.differences(saved, effective):
            if key not in recipes.CHANGEABLE:
                old, new = (recipes.to_text(list(value) if isinstance(value, tuple) else value) for value in (old, new))
                raise UserError(
                    f"{out}: holds a run with another recipe: there {key} is {old}, here {new}; give "
                    f"another --out, or {key}={old} to go on with that run (only "
                    f"{', '.join(recipes.CHANGEABLE)} may change)"
                )
    elif out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out takes a folder")
    elif out.exists() and any(path.name not in (LOGS, LOCK) for path in out.iterdir()):
        raise UserError(f"{out}: not empty and not a run of this trainer; give another --out")


def read_starts(out: pathlib.Path) -> list[dict]:
    """What earlier starts wrote into a run's folder; none if there were none."""
    path = out / "starts.json"
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        raise UserError(
            f"{path}: no JSON; restore it from a copy, or remove it and what the run was made with is no longer known"
        ) from None


def network_options(out: pathlib.Path, init: pathlib.Path | None) -> tuple[dict, str]:
    """The options of the network that a run goes on with, or begins with.

    Args:
        out: its folder.
        init: a checkpoint whose weights it begins with, or None.

    Returns:
        Options by their keys in a recipe, and the file that they are from.
    """
    saved = out / "recipe.yaml"
    if saved.exists():
        stored = plain_yaml.read_file(saved)
        return {key: stored[key].value for key in recipes.NETWORK_OPTIONS if key in stored}, str(saved)
    if init:
        from model import weights

        return weights.network_options(init), str(init)
    return {}, ""


held = None
"""The `launch.lock.Lock` on the run's folder, on rank 0."""


def lock(args) -> None:
    """Keep other runs out of the folder until this process ends; UserError if one is in there."""
    global held
    if not held:
        args.out.mkdir(parents=True, exist_ok=True)
        held = Lock(args.out / LOCK, "training run")


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
    saved = out / "recipe.yaml"
    changed = [
        f"{key} {recipes.to_text(new)} (was {recipes.to_text(old)})"
        for key, old, new in (recipes.differences(saved, recipe) if saved.exists() else [])
    ]
    write_bytes(saved, recipe.to_yaml().encode())
    starts = read_starts(out)
    last = starts[-1] if starts else about
    changed += [f"{key} {value} (was {last.get(key)})" for key, value in about.items() if value != last.get(key)]
    write_json(out / "starts.json", [*starts, {"after_step": first, "format": FORMAT, **about}])
    return changed


def main() -> None:
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog="With an --out that holds a run of the same recipe, that run goes on. "
        f"{', '.join(recipes.CHANGEABLE)} may have changed: a larger steps=N extends a run.",
    )
    parser.add_argument(
        "--config", required=True, metavar="RECIPE", help="a recipe's name (example, chairs, ...) or a YAML file"
    )
    parser.add_argument(
        "--data",
        required=True,
        type=pathlib.Path,
        metavar="DIR",
        action="append",
        help="a folder that prep/convert.py made; once more for each further set of a mixture",
    )
    parser.add_argument(
        "--validate",
        type=pathlib.Path,
        metavar="DIR",
        action="append",
        default=[],
        help="a further such folder, to validate on alone: it needs no training pairs; may "
        "be given again. The first --validate, or without one the first --data, decides "
        "what is the best checkpoint (best.ckpt) and has the curves validation/..., the "
        "others validation/NAME/...",
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--init", type=pathlib.Path, metavar="CKPT", help="a checkpoint or imported file whose weights to begin with"
    )
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="PARTS",
        help="take each rank's share of the batch in this many parts, to need less "
        "memory; the result is the same but for rounding",
    )
    session.add_options(parser)
    add_backend_option(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the recipe's")
    args = parser.parse_args()
    if args.accumulate < 1:
        parser.error(f"--accumulate is {args.accumulate}, expected at least 1")

    started = goodput.process_start()
    job = session.start(lambda: prepare(args), args.device, args.collective, args.out / LOGS)
    with job as (comm, (recipe, training, validation, about)):
        from train.trainer import train

        start = time.monotonic()

        def claim():
            lock(args)
            return network_options(args.out, args.init)

        # Those of the file where the recipe says nothing; the other ranks may not have the file.
        recipe = recipes.adopt_network_options(recipe, *comm.from_rank_0(claim))
        result = train(
            recipe,
            training,
            validation,
            args.out,
            comm,
            parts=args.accumulate,
            init=args.init,
            backend=args.backend,
            enter=lambda first: enter(args.out, recipe, about, first),
            started=started,
        )
        if comm.rank == 0:
            result |= {"made_with": about, "seconds": round(time.monotonic() - start, 1)}
            write_json(args.out / "result.json", result)
            print(
                f"validation EPE {result['epe']:.3f} px, {result['ratio']:.3f} of a flow of zero; "
                f"{goodput.describe(result['goodput'])}; figures: {args.out / 'result.json'}"
            )
            held.release()


if __name__ == "__main__":
    run(main)
