#!/usr/bin/env python3
"""Check a converted dataset: quickly, its files and sizes, or completely, every byte and every pair."""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import argparse
import concurrent.futures
import shlex
from collections.abc import Iterator
from pathlib import Path

import tqdm

from launch import progress
from launch.arguments import Parser
from launch.errors import UserError, counted, run
from prep.shards import FIELDS, Manifest, Shard, decode_record, suggest_training


def main() -> None:
    options = parse_options()
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: expected 1 or more")
    manifest = Manifest.load(options.folder)
    problems = list(find_problems(manifest, options.folder, deep=options.deep, workers=options.workers))
    for path in unlisted_files(manifest, options.folder):
        print(f"note: {path}: not in the manifest; a renamed shard?")  # on stdout, as the problem that it may explain
    for problem in problems:
        print(problem)
    title = f"{options.folder}: {counted(len(manifest), 'pair')} in {counted(len(manifest.shards), 'shard')}"
    if problems:
        raise UserError(f"{title}, {counted(len(problems), 'problem')} (above)")
    folder = shlex.quote(str(options.folder))
    if options.deep:
        print(f"{title}, every byte and pair is correct; {suggest_training({options.folder: manifest})}")
    else:
        print(f"{title}, all present; next: python prep/verify.py {folder} --deep, which reads everything")


def parse_options() -> argparse.Namespace:
    parser = Parser(
        description="Check a converted dataset: the manifest, and each shard's presence, size, header and index. "
        "Prints all problems; exits with status 1 if there are any.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the dataset")
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also read every byte (SHA-256) and decode every pair, which finds any flipped bit (default: off)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="threads, each checking one shard at a time (default: one per core, here %(default)s)",
    )
    return parser.parse_args()


def find_problems(manifest: Manifest, folder: Path, *, deep: bool, workers: int) -> Iterator[str]:
    """Yield a line for each problem, in the order of the shards, with a progress bar."""
    shards = list(manifest.shards.values())
    check = check_deeply if deep else check_quickly
    # Threads suffice: hashing, zstd and OpenCV all release the interpreter.
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        progress.bar(total=sum(shard.bytes for shard in shards), desc="verifying", unit="B", unit_scale=True) as bar,
    ):
        for problems in pool.map(lambda shard: check(shard, folder, bar), shards):
            yield from problems


def check_quickly(shard: Shard, folder: Path, bar: tqdm.tqdm) -> list[str]:
    """Problems with a shard's files, sizes, header and index."""
    try:
        shard.check_structure(folder)
    except (UserError, OSError) as error:
        return [str(error)]
    finally:
        bar.update(shard.bytes)
    return []


def check_deeply(shard: Shard, folder: Path, bar: tqdm.tqdm) -> list[str]:
    """Problems anywhere in a shard, and with which of its pairs."""
    try:
        shard.check_structure(folder)
    except (UserError, OSError) as error:
        bar.update(shard.bytes)
        return [str(error)]  # its records can only be found with an intact header and index
    path, problems, position = folder / shard.file, [], 0
    try:
        for name, size, record in zip(shard.names, shard.pair_sizes(), shard.records(folder), strict=True):
            try:
                decode_record(record.data, FIELDS, size=size, pair=name, source=path)
            except UserError as error:
                problems.append(str(error))
            bar.update(record.offset - position)
            position = record.offset
        shard.check_bytes(folder)
    except (UserError, OSError) as error:  # the file as a whole, after its pairs
        problems.append(str(error))
    bar.update(shard.bytes - position)
    return problems


def unlisted_files(manifest: Manifest, folder: Path) -> list[Path]:
    """The MindRecord files in the folder that the manifest does not list."""
    known = {file + suffix for file in manifest.shards for suffix in ("", ".db")}
    return [path for path in sorted(folder.iterdir()) if ".mindrecord" in path.name and path.name not in known]


if __name__ == "__main__":
    run(main)
