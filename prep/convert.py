#!/usr/bin/env python3
"""Convert a dataset to a folder of MindRecord shards and a manifest."""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import argparse
import collections
import hashlib
import importlib
import json
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from launch import files, progress, ranks
from launch.arguments import Parser
from launch.errors import UserError, counted, drop_output, run
from launch.lock import Lock
from launch.logs import print_note
from prep import codec, schema, shards
from prep.datasets import BadPair, Dataset, PairFiles, find_release, pair_size, splits
from prep.datasets.frames import FrameSequences
from prep.datasets.pairs import EXAMPLE, PairList, hash_list
from prep.datasets.registry import DATASETS
from prep.workers import WorkersKilled, run_in_workers

CUSTOM = {"pairs": ("list", "val_share", "nan_is_unknown", "example"), "frames": ("step", "stride")}
"""Your own data: the options that only these have."""
CORRECTIONS = ("nan_is_unknown",)
"""Those of them that an error about a pair may advise to add."""
PLAN = "plan.json"
"""The file in the work folder with the command that writes it."""
LOCK = "lock"
"""The file in the work folder that the conversion that writes it has locked."""


def main() -> None:
    options = parse_options()
    if options.example:
        print(EXAMPLE, end="")
        return
    out = find_out(options.out)
    check_options(options, out)
    partial = files.partial_of(out)
    rank = ranks.current()
    if rank.rank != 0:
        drop_output()  # rank 0 reports for all
    plan = make_plan(options)
    if is_complete(out, plan):
        report_complete(out)
        return
    layout = shards.PageLayout.fitting(
        largest_image(plan.pairs, options.codec), max(len(shard.pairs) for shard in plan.planned)
    )
    plan.planned = [shard._replace(inputs=hash_inputs(shard.pairs, layout)) for shard in plan.planned]
    lock = None
    if rank.rank == 0:
        try:
            lock = resume_partial(partial, out, plan)
        except FileNotFoundError:  # unless another conversion has just renamed the folder
            if not is_complete(out, plan):
                raise
        if is_complete(out, plan):  # another conversion has finished since the first look
            if lock:
                shutil.rmtree(partial)
                lock.release()
            report_complete(out)
            return
    else:
        # Rank 0 may even have finished, if no shard of this rank was left to write.
        wait_for(lambda: read_plan(partial) == plan.command or is_complete(out, plan))
        if is_complete(out, plan):
            return
    try:
        write_shards(partial, plan.planned[rank.rank :: rank.size], options, layout, rank)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; run the same command again to resume") from None
    except BadPair as error:
        raise BadPair(f"{error}; then run the same command again to resume from {partial}") from None
    if lock:
        wait_for(lambda: all(read_finished_shard(partial, shard) for shard in plan.planned))
        finish(partial, out, plan, options)
        lock.release()


def parse_options() -> argparse.Namespace:
    parser = Parser(
        description="Convert an optical-flow dataset to MindRecord shards. Shards are written to OUT.partial, which "
        "becomes OUT when it is complete; run the same command again to resume an interrupted conversion. Under "
        "mpirun, the shards are distributed over the ranks. prep/README.md lists the expected folder layouts.",
    )
    parser.add_argument(
        "dataset",
        choices=[*sorted(DATASETS), *CUSTOM],
        metavar="DATASET",
        help=f"the layout of the files under --root: {', '.join(sorted(DATASETS))}; or, for your own data, pairs (a "
        "list of files) or frames (folders and videos)",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of the release, its archive (.zip, .tar, .tar.gz), or a folder of its archives; for frames, a "
        "folder, archive or video; for pairs, the folder that paths in the list are relative to (required, except for "
        "pairs: default is the folder of the list)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the new folder (required)")
    parser.add_argument(
        "--shards",
        type=int,
        default=16,
        metavar="N",
        help="number of shards of the training split, and of each rendering pass if there are several; best several "
        "times the number of worker processes",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(len(os.sched_getaffinity(0)), ranks.current().share),
        metavar="N",
        help="worker processes per rank, each writing one shard at a time (default: one per core, here %(default)s)",
    )
    parser.add_argument(
        "--codec",
        choices=codec.CODECS,
        default=codec.CODECS[0],
        help="lossless compression to about a fifth, or none",
    )
    parser.add_argument(
        "--split-file",
        type=Path,
        metavar="FILE",
        help="0-based indices of the validation pairs, one per line (default: the dataset's fixed list in prep/splits, "
        "or the pairs that the release itself holds out)",
    )
    add_own_options(parser)
    options = parser.parse_args()
    check_own_options(parser, options)
    return options


def add_own_options(parser: Parser) -> None:
    """Add the options for the user's own data."""
    pairs = parser.add_argument_group("pairs", "Your own pairs, with flow or without:")
    pairs.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="CSV, TSV or JSON lines with the columns image1, image2 and optionally flow, valid and occluded (masks), "
        "split (train or val) and name (required)",
    )
    pairs.add_argument(
        "--val-share",
        type=float,
        metavar="SHARE",
        help="share of the pairs with flow to hold out for validation, for a list without a 'split' column (default: "
        "none)",
    )
    pairs.add_argument(
        "--nan-is-unknown",
        action="store_true",
        help="NaN in .flo, .pfm, .npy and .npz files means unknown flow (default: it is an error)",
    )
    pairs.add_argument("--example", action="store_true", help="print a list to start from, and exit")
    frames = parser.add_argument_group("frames", "Your own frames, which become pairs without ground truth:")
    frames.add_argument(
        "--step", type=int, default=1, metavar="N", help="the second frame of a pair is N frames after the first"
    )
    frames.add_argument(
        "--stride", type=int, default=1, metavar="N", help="a pair begins at every Nth frame of a folder or video"
    )


def check_own_options(parser: Parser, options: argparse.Namespace) -> None:
    """Exit with an error if an option does not belong to the dataset, or one is missing; complete `root`."""
    for dataset, names in CUSTOM.items():
        for name in names:
            given = name in parser.given or getattr(options, name) is True  # a flag takes no value
            if given and dataset != options.dataset:
                parser.error(f"--{name.replace('_', '-')} is an option of {dataset}, not of {options.dataset}")
    if options.example:
        return
    if options.list and not options.root:
        options.root = options.list.parent
    needed = ("list", "root", "out") if options.dataset == "pairs" else ("root", "out")
    if missing := [f"--{name}" for name in needed if not getattr(options, name)]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def check_options(options: argparse.Namespace, out: Path) -> None:
    """Raise UserError if an option is out of range, contradicts another one, or is a path that cannot be recorded."""
    if options.shards < 1 or options.workers < 1:
        raise UserError(f"--shards {options.shards} --workers {options.workers}: expected numbers of at least 1")
    if options.val_share is not None and not 0 < options.val_share < 1:
        raise UserError(f"--val-share {options.val_share:g}: expected a share between 0 and 1, such as 0.1")
    if min(options.step, options.stride) < 1:
        raise UserError(f"--step {options.step} --stride {options.stride}: expected numbers of at least 1")
    if options.split_file and options.val_share is not None:
        raise UserError("--split-file and --val-share both choose the validation pairs; leave one out")
    for path in filter(None, (options.root, out, options.split_file, options.list)):
        # The manifest and MindRecord store text.
        if not shards.PRINTABLE.allows(os.path.abspath(path)):
            raise UserError(f"{str(path)!a}: the path is not UTF-8 or has control characters; rename it")


def find_out(out: Path) -> Path:
    """`out` without a link at its end; UserError if it is an empty folder that cannot be replaced."""
    out = Path(os.path.normpath(out))
    if out.is_symlink():
        out = Path(os.path.realpath(out))
    files.check_replaceable(out)
    return out


# --- The plan: which pairs go into which shard ----------------------------------------------------


class PlannedShard(NamedTuple):
    """A shard to write."""

    file: str
    pairs: list[PairFiles]
    inputs: str = ""
    """Hash of what it is made from. A later run keeps a finished shard if this is still the same."""


@dataclass
class Plan:
    """What a conversion is to write."""

    pairs: list[PairFiles] = field(default_factory=list)
    planned: list[PlannedShard] = field(default_factory=list)
    splits: dict[str, list[str]] = field(default_factory=lambda: {"train": [], "val": []})
    """Shard files of each split."""
    validation: shards.Validation = field(default_factory=lambda: shards.Validation(file=None, sha256=None))
    description: dict[str, Any] = field(default_factory=dict)
    """What distinguishes the result from that of other conversions."""
    command: str = ""
    """What may resume this conversion: the command, without options that an error may advise to add."""


def make_plan(options: argparse.Namespace) -> Plan:
    """List the pairs, split them and assign them to shards; report the numbers."""
    dataset, plan = open_dataset(options), Plan(command=make_command(options, corrections=False))
    path = options.split_file or (splits.FOLDER / dataset.validation if dataset.validation else None)
    split_file = splits.read_split_file(path) if path else None
    if path and split_file:
        plan.validation = {"file": path.name, "sha256": split_file.sha256}
    root = find_release(dataset, options.root)
    for render_pass in dataset.passes:
        pairs = dataset.list_pairs(root, render_pass)
        if not pairs:
            continue  # a pass that was not downloaded
        plan.pairs += pairs
        check_names(plan.pairs)
        if split_file and options.split_file:
            indices = split_file.indices
            if max(indices, default=0) >= len(pairs):
                raise UserError(
                    f"{path}: contains index {max(indices)}, but {options.root} has {len(pairs)} pairs, indexed 0 to "
                    f"{len(pairs) - 1}; use a split file for this dataset"
                )
        elif split_file:
            indices = splits.fixed_indices(pairs, split_file.indices)
        else:
            indices = splits.held_out_indices(pairs)
        split = splits.divide(pairs, indices)
        add_pass(plan, render_pass, split, options.shards)
        report_split(dataset, render_pass, split, options)
    plan.description = {
        "dataset": options.dataset,
        "schema_version": schema_version(plan.pairs),
        "codec": options.codec,
        "inputs": fingerprint(plan.pairs),
        "validation": plan.validation["sha256"],
        "shards": [shard.file for shard in plan.planned],
    }
    if options.dataset in CUSTOM:
        own = {name: getattr(options, name) for name in CUSTOM[options.dataset]}
        plan.description["options"] = own | ({"list": hash_list(options.list)} if options.list else {})
    return plan


def make_command(options: argparse.Namespace, *, corrections: bool = True) -> str:
    """The command with the options that decide what is written, with or without `CORRECTIONS`."""
    words = ["prep/convert.py", options.dataset, "--root", str(options.root)]
    words += ["--shards", str(options.shards), "--codec", options.codec]
    words += ["--split-file", str(options.split_file)] if options.split_file else []
    for name in CUSTOM.get(options.dataset, ()):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if corrections or name not in CORRECTIONS:
            words += [option] if value is True else [option, str(value)] if value else []
    return shlex.join(words)


def open_dataset(options: argparse.Namespace) -> Dataset:
    """The dataset that the options name, or your own data."""
    if options.dataset == "pairs":
        own = PairList(options.list, options.val_share, options.nan_is_unknown, bool(options.split_file))
        return Dataset("Custom pairs", own.list_pairs)
    if options.dataset == "frames":
        return Dataset("Frames", FrameSequences(options.step, options.stride).list_pairs)
    return DATASETS[options.dataset]


def schema_version(pairs: list[PairFiles]) -> int:
    """The first version of the manifest that can describe these pairs, so that older toolkits read most datasets."""
    return 1 if all(pair.flow for pair in pairs) else shards.SCHEMA_VERSION


def add_pass(plan: Plan, render_pass: str, split: splits.Split, train_shards: int) -> None:
    """Add the shards of one rendering pass ("" if there is only one); pairs without ground truth get their own."""
    labelled, unlabelled = (
        splits.Split(*([pair for pair in pairs if bool(pair.flow) == flow] for pairs in split))
        for flow in (True, False)
    )
    for kind, part in (("", labelled), ("unlabelled", unlabelled)):
        proportional = -(-train_shards * len(part.val) // max(1, len(part.train)))
        numbers = {"train": train_shards, "val": min(proportional, train_shards)}
        for name, pairs in part._asdict().items():
            stem = "-".join(filter(None, (name, render_pass, kind)))
            planned = assign_to_shards(stem, pairs, numbers[name])
            names = [shard.file for shard in planned]
            plan.planned += planned
            plan.splits[name] += names
            if render_pass:
                plan.splits.setdefault(f"{name}-{render_pass}", []).extend(names)
            if kind and names:
                plan.splits[stem] = names


def fingerprint(pairs: list[PairFiles]) -> str:
    """SHA-256 over the pairs' names and their files' sizes and modification times, to detect changed input."""
    digest = hashlib.sha256()
    for pair in pairs:
        for path in pair.files():
            status = path.stat()
            digest.update(f"{pair.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def hash_inputs(pairs: list[PairFiles], layout: shards.PageLayout) -> str:
    """SHA-256 over everything that a shard is made from: the pairs' files, how they are read, the layout."""
    parts = [str(shards.SCHEMA_VERSION), fingerprint(pairs), repr(layout), *(pair.how_to_read() for pair in pairs)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def assign_to_shards(stem: str, pairs: list[PairFiles], number: int) -> list[PlannedShard]:
    """Divide pairs, in order and evenly, among at most `number` shards."""
    count = min(number, len(pairs))
    ends = [len(pairs) * i // count for i in range(count + 1)] if count else []
    return [PlannedShard(f"{stem}-{i:05}-of-{count:05}.mindrecord", pairs[ends[i] : ends[i + 1]]) for i in range(count)]


def report_split(dataset: Dataset, render_pass: str, split: splits.Split, options: argparse.Namespace) -> None:
    """Print how the pairs are split, and whether the release is incomplete or a split is empty."""
    pairs = len(split.train) + len(split.val)
    title = f"{dataset.title} {render_pass}".strip()
    unlabelled = sum(not pair.flow for pair in split.train + split.val)
    print(
        f"{title}: {counted(pairs, 'pair')}, {len(split.train)} for training and {len(split.val)} for validation"
        + (f"; {unlabelled} without ground truth" if unlabelled else "")
    )
    if dataset.pairs not in (None, pairs) and not options.split_file:
        print_note(
            f"found {pairs:,} of the release's {dataset.pairs:,} pairs; each stays on its side of the fixed "
            "split (to use a different split, give --split-file)"
        )
    if unlabelled == pairs:
        return  # nothing to validate on
    if options.split_file:
        remedy = "give a different --split-file"
    elif options.dataset != "pairs":
        remedy = "give --split-file to use a different split"
    elif options.val_share:
        remedy = f"--val-share {options.val_share:g} of {counted(pairs, 'pair')} leaves none"
    elif split.val:
        remedy = "mark some as train in the list's 'split' column"
    else:
        remedy = "mark some as val in a 'split' column of the list or, without one, give --val-share"
    for name, chosen in (("training", split.train), ("validation", split.val)):
        if not chosen:
            print_note(f"no pairs for {name}; {remedy}")


def check_names(pairs: list[PairFiles]) -> None:
    """Raise UserError if two pairs have the same name, or if a name cannot be written as text."""
    for name, times in collections.Counter(pair.name for pair in pairs).items():
        if times > 1:
            raise UserError(f"{name}: {times} pairs have this name; rename or remove all but one")
    for pair in pairs:
        if not shards.PRINTABLE.allows(pair.name):
            where, remedy = f"{pair.name!a}: the file name", "rename the files"
            if pair.row:
                where, remedy = f"{pair.row}: the pair's name {pair.name!a}", "give it another one in the column name"
            raise UserError(f"{where} is not UTF-8 or has control characters; {remedy}")


def largest_image(pairs: list[PairFiles], codec_name: str) -> int:
    """Number of pixels of the largest image. Checks the headers of all files; UserError for the first that is wrong."""
    bar = progress.bar(
        pairs, desc="checking", unit="pair", disable=len(pairs) < 5000 or ranks.current().rank != 0, leave=False
    )
    largest = 0
    for pair in bar:
        height, width = pair_size(pair)
        largest = max(largest, height * width)
        if codec_name == "raw":  # of zstd, only writing tells
            shards.check_record(pair, (height, width), shards.RAW_PIXEL_BYTES * height * width, codec_name)
    return largest


# --- The work folder ------------------------------------------------------------------------------


def is_complete(out: Path, plan: Plan) -> bool:
    """Whether `out` already contains exactly what is planned; UserError if it contains anything else."""
    if not os.path.lexists(out) or (out.is_dir() and not os.listdir(out)):
        return False
    if not (out / shards.MANIFEST).exists():
        raise UserError(f"{out}: already exists and is not empty; choose another --out or remove it")
    manifest = shards.Manifest.load(out)
    if manifest.made["plan"] != plan.description:
        raise UserError(
            f"{out}: contains another dataset ({manifest.dataset}, made by `{manifest.made['command']}`, or from "
            "files that have changed since); choose another --out or remove it"
        )
    for shard in manifest.shards.values():
        shard.check_files(out)
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for other ranks; mpirun ends this one if one of them fails."""
    while not condition():
        time.sleep(0.2)


def read_plan(partial: Path) -> str | None:
    """The command that writes the work folder `partial`, "" if that is unreadable, None if it is not a work folder."""
    try:
        return str(json.loads((partial / PLAN).read_text("utf-8"))["command"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def resume_partial(partial: Path, out: Path, plan: Plan) -> Lock:
    """Create the work folder, or reuse that of an interrupted run of the same command; return its lock."""
    if os.path.lexists(partial) and (not partial.is_dir() or os.listdir(partial)):
        found = read_plan(partial)
        if found is None:
            raise UserError(f"{partial}: already exists and is not an unfinished conversion; move it away")
        if not found:
            raise UserError(
                f"{partial}: an unfinished conversion, but its {PLAN} is damaged or of an old version; remove it"
            )
        if found != plan.command:
            raise UserError(
                f"{partial}: an unfinished conversion by another command; remove it, or finish it with "
                f"`python {found} --out {shlex.quote(str(out))}`"
            )
    else:
        partial.mkdir(parents=True, exist_ok=True)
        files.write_json(partial / PLAN, {"command": plan.command})
    lock = Lock(partial / LOCK, "conversion")
    # With other files, an earlier run may have divided them into other shards.
    planned = tuple(shard.file for shard in plan.planned)
    remove(path for path in partial.iterdir() if ".mindrecord" in path.name and not path.name.startswith(planned))
    return lock


def read_finished_shard(partial: Path, planned: PlannedShard) -> shards.Shard | None:
    """A shard that this or an earlier run has completed from the same inputs, or None."""
    try:
        found = json.loads((partial / f"{planned.file}.json").read_text("utf-8"))
        if found["inputs"] != planned.inputs:
            return None
        shard = schema.read(shards.Shard, found["shard"])
        shard.check_files(partial)
        return shard
    except (OSError, ValueError, KeyError, TypeError, RecursionError, UserError):
        return None


def remove_leftovers(partial: Path, planned: list[PlannedShard]) -> None:
    """Remove what killed processes left of unfinished shards."""
    names = tuple(shard.file for shard in planned)
    remove(path for path in partial.iterdir() if ".partial-" in path.name and path.name.startswith(names))


def remove(paths: Iterable[Path]) -> None:
    """Remove files, and folders with all that is in them."""
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- Writing --------------------------------------------------------------------------------------


def write_shards(
    partial: Path,
    planned: list[PlannedShard],
    options: argparse.Namespace,
    layout: shards.PageLayout,
    rank: ranks.Rank,
) -> None:
    """Write those shards that are not finished yet, in worker processes, with a progress bar."""
    remaining = [shard for shard in planned if not read_finished_shard(partial, shard)]
    remove_leftovers(partial, planned)  # the space may be needed
    if not remaining:
        return
    importlib.import_module("mindspore.mindrecord")  # once, before the workers are forked
    counter, done = os.pipe()  # gets a byte for each pair
    os.set_blocking(counter, False)

    def write(index: int) -> None:
        file, pairs, inputs = remaining[index]
        shard = shards.write_shard(
            partial / file,
            pairs,
            codec_name=options.codec,
            layout=layout,
            progress=lambda: os.write(done, b"."),
        )
        # Last: it tells later runs that the shard is complete.
        files.write_json(partial / f"{file}.json", {"inputs": inputs, "shard": shard.to_json()})

    total, to_do = (sum(len(shard.pairs) for shard in some) for some in (planned, remaining))
    title = "converting" if rank.size == 1 else f"converting, rank 0 of {rank.size}"
    finished = False
    try:
        with (
            open(counter, "rb", buffering=0) as pairs_done,
            progress.bar(
                total=total, initial=total - to_do, desc=title, unit="pair", smoothing=0.1, disable=rank.rank != 0
            ) as bar,
        ):
            run_in_workers(
                write,
                len(remaining),
                min(options.workers, len(remaining)),
                poll=lambda: bar.update(len(pairs_done.read(1 << 16) or b"")),
            )
        finished = True
    except WorkersKilled as killed:
        unfinished = [path for pid in killed.pids for path in partial.glob(f"*.mindrecord.partial-{pid}")]
        names = ", ".join(str(path).rpartition(".partial-")[0] for path in unfinished) or str(partial)
        raise UserError(
            f"{names}: the worker process writing it was killed (out of memory?); run the same command again to "
            "resume, perhaps with fewer --workers"
        ) from None
    finally:
        os.close(done)
        if not finished:  # otherwise rank 0 may already have renamed the folder
            remove_leftovers(partial, planned)


def finish(partial: Path, out: Path, plan: Plan, options: argparse.Namespace) -> None:
    """Write the manifest and rename the folder."""
    finished = [shard for planned in plan.planned if (shard := read_finished_shard(partial, planned))]
    manifest = shards.Manifest(
        dataset=options.dataset,
        schema_version=schema_version(plan.pairs),
        splits=plan.splits,
        shards={shard.file: shard for shard in finished},
        validation=plan.validation,
        made={
            "command": make_command(options),
            "plan": plan.description,
            "versions": {"mindspore": version("mindspore"), "python": platform.python_version()},
        },
    )
    manifest.save(partial)
    files.sync(partial)
    partial.rename(out)
    files.sync(out.absolute().parent)
    # Only now, because until then a resumed conversion would need them.
    for name in [PLAN, LOCK] + [f"{shard.file}.json" for shard in finished]:
        (out / name).unlink()
    raw = sum(path.stat().st_size for path in {path for pair in plan.pairs for path in pair.files()})
    print(
        f"{out}: {counted(len(manifest), 'pair')} in {counted(len(finished), 'shard')}, "
        f"{shards.stored_bytes(finished, out) / 1e6:.1f} MB "
        f"({raw / 1e6:.1f} MB before); {next_steps(out, manifest)}"
    )


def report_complete(out: Path) -> None:
    """Say that an earlier conversion has already finished."""
    print(f"{out}: already complete, nothing to do; {next_steps(out, shards.Manifest.load(out))}")


def next_steps(out: Path, manifest: shards.Manifest) -> str:
    """What to run after a conversion."""
    folder = shlex.quote(str(out))
    return f"next: python prep/inspect.py {folder} --html {folder}.html; {shards.suggest_training({out: manifest})}"


if __name__ == "__main__":
    run(main)
