#!/usr/bin/env python3
"""Convert a data set to a folder of MindRecord shards and a manifest."""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import collections
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import platform
import shlex
import shutil
import signal
import time
import traceback
from importlib.metadata import version

from launch import files, progress, ranks
from launch.arguments import Parser
from launch.errors import UserError, describe_os_error, run
from prep import codec, memory, schema, shards
from prep.datasets import (
    flyingchairs,
    flyingthings3d,
    flyingthings3d_subset,
    hd1k,
    kitti2012,
    kitti2015,
    pair_size,
    sintel,
    split,
    spring,
)

DATASETS = {
    "flyingchairs": flyingchairs,
    "flyingthings3d": flyingthings3d,
    "flyingthings3d-subset": flyingthings3d_subset,
    "hd1k": hd1k,
    "kitti2012": kitti2012,
    "kitti2015": kitti2015,
    "sintel": sintel,
    "spring": spring,
}
PLAN = "plan.json"


def main() -> None:
    options = parse_options()
    if options.shards < 1 or options.workers < 1:
        raise UserError("--shards and --workers: expected numbers of at least 1")
    for path in filter(None, (options.root, options.out, options.split_file)):
        # MindRecord takes text, and so do the manifest's readers.
        if not shards.TEXT.allows(os.path.abspath(path)):
            raise UserError(f"{path!a}: the path is not UTF-8 or has control characters; rename it")
    out = os.path.normpath(options.out)
    partial = out + ".partial"
    here = ranks.current()
    if here.rank != 0:  # rank 0 says it for all
        sys.stdout = open(os.devnull, "w")
    plan = make_plan(options)
    if is_whole(out, plan):
        print(f"{out}: this set is already whole, nothing to do")
        return
    layout = shards.Layout.fitting(largest_image(plan), max(len(pairs) for _, pairs in plan.tasks))
    if here.rank == 0:
        lock = open_partial(partial, out, plan)  # noqa: F841 - held until this process ends
    else:
        # Rank 0 may also have ended already, when no shard of this rank was left to write.
        wait_for(lambda: read_plan(partial) == plan.description or is_whole(out, plan))
        if is_whole(out, plan):
            return
    try:
        write_shards(partial, plan.tasks[here.rank :: here.size], options, layout, here)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; run the same command again to go on") from None
    if here.rank == 0:
        wait_for(lambda: all(find_shard(partial, file) for file, _ in plan.tasks))
        finish(partial, out, plan, options)


def parse_options():
    parser = Parser(
        prog="convert.py",
        description="Convert an optical-flow data set to MindRecord shards. Work goes to "
        "OUT.partial, which becomes OUT when it is whole; a run that was cut short goes on where "
        "it stopped. Under mpirun the shards are spread over the ranks.",
    )
    parser.add_argument("dataset", choices=sorted(DATASETS), help="the layout of the files under --root")
    parser.add_argument("--root", required=True, metavar="DIR", help="the unpacked release")
    parser.add_argument("--out", required=True, metavar="DIR", help="the new set's folder")
    parser.add_argument(
        "--shards", type=int, default=16, metavar="N",
        help="shards of the training split, and of each of its parts (default %(default)s); "
        "several times the number of worker processes is good",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=min(len(os.sched_getaffinity(0)), ranks.current().share),
        metavar="W", help="worker processes of each rank, each writing one shard at a time "
        "(default: together one per core)",
    )  # fmt: skip
    parser.add_argument(
        "--codec", choices=codec.CODECS, default=codec.CODECS[0],
        help="lossless compression (default %(default)s, a fifth of the bytes) or none",
    )  # fmt: skip
    parser.add_argument(
        "--split-file", metavar="FILE",
        help="the validation pairs' 0-based indices, one a line (default: the data set's fixed "
        "list, or those that it holds out itself)",
    )  # fmt: skip
    return parser.parse_args()


@dataclasses.dataclass
class Plan:
    """What is to be written: tasks are (shard file, its pairs), splits the files of each one's
    shards, validation the name and hash of the split file (None: the data set itself holds pairs
    out). description tells this conversion from others."""

    pairs: list
    tasks: list
    splits: dict
    validation: dict
    description: dict


def make_plan(options):
    """List the pairs, split them and deal them out to shards; tell when the release isn't whole."""
    dataset = DATASETS[options.dataset]
    path, indices, digest = options.split_file, None, None
    if dataset.VALIDATION:
        path = path or os.path.join(split.FOLDER, dataset.VALIDATION)
    if path:
        indices, digest = split.read_list(path)
    pairs, tasks, splits = [], [], {"train": [], "val": []}
    for part in dataset.PARTS:
        listed = dataset.list_pairs(options.root, part)
        if not listed:
            continue  # a part that was not downloaded
        pairs += listed
        if options.split_file and max(indices, default=0) >= len(listed):
            raise UserError(
                f"{path}: has index {max(indices)}, but there are {len(listed)} pairs, from 0 to "
                f"{len(listed) - 1}; it is not for these files"
            )
        train, val = split.divide(listed, split.held_out(listed) if indices is None else indices)
        share = -(-options.shards * len(val) // max(1, len(train)))
        for name, chosen, wanted in (
            ("train", train, options.shards),
            ("val", val, min(share, options.shards)),
        ):
            stem = f"{name}-{part}" if part else name
            dealt = deal(stem, chosen, wanted)
            tasks += dealt
            files = [file for file, _ in dealt]
            splits[name] += files
            if part:
                splits[stem] = files
        tell_sizes(dataset, part, listed, train, val, options)
    check_names(pairs)
    description = {
        "dataset": options.dataset,
        "schema_version": shards.SCHEMA_VERSION,
        "codec": options.codec,
        "inputs": fingerprint(pairs),
        "validation": digest,
        "shards": [file for file, _ in tasks],
    }
    validation = {"file": os.path.basename(path) if path else None, "sha256": digest}
    return Plan(pairs, tasks, splits, validation, description)


def fingerprint(pairs):
    """SHA-256 over the pairs' names and their files' sizes and times: changed input is seen."""
    digest = hashlib.sha256()
    for pair in pairs:
        for path in pair.files():
            found = os.stat(path)
            digest.update(f"{pair.name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def deal(stem, pairs, wanted):
    """The (file, pairs) of at most `wanted` shards that share `pairs` out in order and evenly."""
    count = min(wanted, len(pairs))
    ends = [len(pairs) * i // count for i in range(count + 1)] if count else []
    return [(f"{stem}-{i:05}-of-{count:05}.mindrecord", pairs[ends[i] : ends[i + 1]]) for i in range(count)]


def tell_sizes(dataset, part, pairs, train, val, options) -> None:
    """Say how the pairs are split, and whether that is not the whole release or a part is empty."""
    title = f"{dataset.TITLE} {part}".strip()
    print(f"{title}: {len(pairs)} pairs, {len(train)} for training and {len(val)} for validation")
    if dataset.PAIRS not in (None, len(pairs)) and not options.split_file:
        print(
            f"note: the release has {dataset.PAIRS} pairs; these {len(pairs)} are split as it is "
            "all the same (--split-file takes another list)"
        )
    for name, chosen in (("training", train), ("validation", val)):
        if not chosen:
            print(f"note: no pair is for {name}; --split-file takes another list", file=sys.stderr)


def check_names(pairs) -> None:
    """UserError if two pairs have one name, or a name that can't be written as text."""
    for name, times in collections.Counter(pair.name for pair in pairs).items():
        if times > 1:
            raise UserError(f"{name}: {times} pairs have this name; rename or remove all but one")
        if not shards.TEXT.allows(name):
            raise UserError(f"{name!a}: the file name is not UTF-8 or has control characters; rename the files")


def is_whole(out, plan) -> bool:
    """True if `out` holds just what `plan` would write; UserError if it holds anything else."""
    if not os.path.lexists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return False
    if not os.path.exists(os.path.join(out, shards.MANIFEST)):
        raise UserError(f"{out}: is there and not empty; choose another folder for --out or remove it")
    manifest = shards.Manifest.load(out)
    if manifest.made["plan"] != plan.description:
        raise UserError(
            f"{out}: holds another set ({manifest.dataset}, made by `{manifest.made['command']}`, "
            "or from other files); choose another folder for --out or remove it"
        )
    for shard in manifest.shards.values():
        shard.check_files(out)
    return True


def largest_image(plan):
    """Pixels of the largest image. Checks every file's header before the work begins; UserError for the
    first that is wrong."""
    pairs = progress.bar(plan.pairs, desc="checking", unit="pair", disable=len(plan.pairs) < 5000, leave=False)
    return max(height * width for height, width in map(pair_size, pairs))


def wait_for(condition) -> None:
    """Wait for what other ranks do; mpirun ends this one if one of them fails."""
    while not condition():
        time.sleep(0.2)


def read_plan(partial):
    """The description of the plan that `partial` was begun with, None if there is none."""
    try:
        with open(os.path.join(partial, PLAN), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}


def open_partial(partial, out, plan):
    """Make the work folder, or go on with one of the same plan; returns the file that locks it."""
    if os.path.lexists(partial) and (not os.path.isdir(partial) or os.listdir(partial)):
        found = read_plan(partial)
        if found is None:
            raise UserError(f"{partial}: is there and not from a conversion; move it away")
        if found != plan.description:
            raise UserError(
                f"{partial}: an unfinished conversion of other files or with other options; remove "
                "it, or finish it with the command that began it"
            )
    else:
        os.makedirs(partial, exist_ok=True)
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        files.write_json(os.path.join(partial, PLAN), plan.description)
    lock = open(os.path.join(partial, PLAN), "r+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{partial}: another conversion is writing it; wait for its end") from None
    except OSError:
        pass  # some shared file systems have no locks; two runs would only do the work twice
    return lock


def find_shard(partial, file):
    """The whole shard `file` of an earlier run, or None."""
    try:
        with open(os.path.join(partial, file + ".json"), encoding="utf-8") as described:
            shard = schema.read(shards.Shard, json.load(described))
        shard.check_files(partial)
        return shard
    except (OSError, ValueError, RecursionError, UserError):
        return None


def write_shards(partial, tasks, options, layout, here) -> None:
    """Write those of `tasks` that are not whole yet, in worker processes, with a progress bar."""
    remaining = [task for task in tasks if not find_shard(partial, task[0])]
    clear(partial, [file for file, _ in tasks])  # they take space that may be needed
    total, to_do = (sum(len(pairs) for _, pairs in some) for some in (tasks, remaining))
    if not remaining:
        return
    import mindspore.mindrecord  # noqa: F401 - here once, for all the workers forked below

    context = multiprocessing.get_context("fork")
    workers = {}
    for _ in range(min(options.workers, len(remaining))):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, partial, options.codec, layout, os.getpid()))
        process.start()
        theirs.close()
        workers[ours] = process
    share = "converting" if here.size == 1 else f"converting, rank 0 of {here.size}"
    bar = progress.bar(
        total=total, initial=total - to_do, desc=share, unit="pair", smoothing=0.1,
        disable=here.rank != 0,
    )  # fmt: skip
    whole = False
    try:
        with bar:
            drive(workers, remaining, bar)
        whole = True
    finally:
        for process in workers.values():
            process.terminate()
            process.join()
        if not whole:  # else rank 0 may have given the folder its final name by now
            clear(partial, [file for file, _ in tasks])


def clear(partial, files) -> None:
    """Remove what killed processes left of the unfinished shards `files`."""
    for left in os.listdir(partial):
        if ".partial-" in left and left.startswith(tuple(files)):
            path = os.path.join(partial, left)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def drive(workers, tasks, bar) -> None:
    """Hand out tasks to idle workers and count the pairs that they report, until all is done."""
    queue, busy = collections.deque(tasks), 0
    for connection in workers:
        connection.send(queue.popleft())
        busy += 1
    while busy:
        for connection in multiprocessing.connection.wait(list(workers)):
            try:
                kind, value = connection.recv()
                if kind == "done" and queue:
                    connection.send(queue.popleft())
                elif kind == "done":
                    busy -= 1
            except (EOFError, ConnectionError):
                raise UserError(
                    f"worker process {workers[connection].pid} was killed (out of memory?); run "
                    "the same command again to go on, perhaps with fewer --workers"
                ) from None
            if kind == "pairs":
                bar.update(value)
            elif kind == "error":
                raise UserError(value)
            elif kind == "bug":
                raise RuntimeError(value)


def work(connection, partial, codec_name, layout, parent) -> None:
    """A worker process: write the shards that come through `connection`, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent ends the workers
    memory.keep_freed_blocks()

    def progress() -> None:
        if os.getppid() != parent:  # killed; forked neighbours keep its pipes open, so none breaks
            os._exit(1)
        connection.send(("pairs", 1))

    try:
        while True:
            while not connection.poll(1):
                if os.getppid() != parent:
                    return
            file, pairs = connection.recv()
            shards.write_shard(partial, file, pairs, codec_name=codec_name, layout=layout, progress=progress)
            connection.send(("done", file))
    except EOFError:
        pass
    except UserError as error:
        connection.send(("error", str(error)))
    except OSError as error:
        connection.send(("error", describe_os_error(error)))
    except Exception:
        connection.send(("bug", traceback.format_exc()))


def finish(partial, out, plan, options) -> None:
    """Write the manifest and give the set its final name."""
    found = [find_shard(partial, file) for file, _ in plan.tasks]
    words = ["prep/convert.py", options.dataset, "--root", options.root]
    words += ["--shards", str(options.shards), "--codec", options.codec]
    words += ["--split-file", options.split_file] if options.split_file else []
    manifest = shards.Manifest(
        dataset=options.dataset,
        schema_version=shards.SCHEMA_VERSION,
        splits=plan.splits,
        shards={shard.file: shard for shard in found},
        validation=plan.validation,
        made={
            "command": shlex.join(words),
            "plan": plan.description,
            "versions": {"mindspore": version("mindspore"), "python": platform.python_version()},
        },
    )
    manifest.save(partial)
    files.sync(partial)
    os.rename(partial, out)
    files.sync(os.path.dirname(os.path.abspath(out)))
    # Only now, as until then they are what a run that goes on would need.
    for file in [PLAN] + [shard.file + ".json" for shard in found]:
        os.remove(os.path.join(out, file))
    # MindRecord's pages end in holes, which no disk stores, so blocks say more than lengths.
    size = sum(512 * os.stat(os.path.join(out, shard.file)).st_blocks for shard in found)
    raw = sum(os.path.getsize(path) for pair in plan.pairs for path in pair.files())
    print(f"{out}: {len(plan.pairs)} pairs in {len(found)} shards, {size / 1e6:.1f} MB for {raw / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
