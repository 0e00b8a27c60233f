#!/usr/bin/env python3
"""Check a converted set: quickly, its files and sizes, or deeply, every byte and every pair."""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import concurrent.futures

from launch import progress
from launch.arguments import Parser
from launch.errors import UserError, run
from prep.shards import FIELDS, Manifest, decode_record


def main() -> None:
    options = parse_options()
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: expected 1 or more")
    manifest = Manifest.load(options.folder)
    problems = []
    for _, found in check_set(manifest, options.folder, options.deep, options.workers):
        problems += found
    for stranger in strangers(manifest, options.folder):
        print(f"note: {stranger}: not in the set's manifest; a shard under another name?")
    for problem in problems:
        print(problem)
    pairs = sum(len(shard.names) for shard in manifest.shards.values())
    title = f"{options.folder}: {pairs} pairs in {len(manifest.shards)} shards"
    if problems:
        raise UserError(f"{title}, {len(problems)} problems (above)")
    print(f"{title}, " + ("every byte and pair is right" if options.deep else "all there (--deep reads it all)"))


def parse_options():
    parser = Parser(
        prog="verify.py",
        description="Check a converted set: the manifest, and each shard's presence, size, header "
        "and index. Prints all that is wrong; the exit status is 1 if anything is.",
    )
    parser.add_argument("folder", metavar="DIR", help="the set's folder")
    parser.add_argument(
        "--deep", action="store_true",
        help="read every byte (SHA-256) and decode every pair too, which finds a single flipped "
        "bit",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="W",
        help="threads, each checking one shard at a time (default: one per core)",
    )  # fmt: skip
    return parser.parse_args()


def check_set(manifest, folder, deep, workers):
    """Yield (shard, its problems as lines) for every shard, in order, with a progress bar."""
    check = check_deeply if deep else check_quickly
    total = sum(shard.bytes for shard in manifest.shards.values())
    # Threads do: hashing, zstd and OpenCV all run with the interpreter released.
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        progress.bar(total=total, desc="verifying", unit="B", unit_scale=True) as bar,
    ):
        shards = list(manifest.shards.values())
        yield from zip(shards, pool.map(lambda shard: check(shard, folder, bar), shards))


def check_quickly(shard, folder, bar):
    """What is wrong with a shard's files, sizes, header and index, as a list of lines."""
    try:
        shard.check_structure(folder)
    except (UserError, OSError) as error:
        return [str(error)]
    finally:
        bar.update(shard.bytes)
    return []


def check_deeply(shard, folder, bar):
    """What is wrong with a shard anywhere, and with which of its pairs, as a list of lines."""
    try:
        shard.check_structure(folder)
    except (UserError, OSError) as error:
        bar.update(shard.bytes)
        return [str(error)]  # without a sound header and index its records can't be found
    path, problems, position = os.path.join(folder, shard.file), [], 0
    sizes = [size for number, *size in shard.sizes for _ in range(number)]
    try:
        for name, size, (start, record) in zip(shard.names, sizes, shard.records(folder), strict=True):
            try:
                decode_record(record, FIELDS, size=size, pair=name, source=path)
            except UserError as error:
                problems.append(str(error))
            bar.update(start - position)
            position = start
        shard.check_bytes(folder)
    except (UserError, OSError) as error:  # the file as a whole, after its pairs
        problems.append(str(error))
    bar.update(shard.bytes - position)
    return problems


def strangers(manifest, folder):
    """The paths of MindRecord files in the folder that the manifest does not name."""
    known = {file + suffix for file in manifest.shards for suffix in ("", ".db")}
    return [
        os.path.join(folder, file) for file in sorted(os.listdir(folder)) if ".mindrecord" in file and file not in known
    ]


if __name__ == "__main__":
    run(main)
