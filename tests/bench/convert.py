"""How fast prep/convert.py is, with one worker and with two: pairs/s, MB/s, size, memory.

python tests/bench/convert.py [--data real|synthetic] [--pairs N]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple

import material


class Measurement(NamedTuple):
    """Of one conversion."""

    total_s: float
    writing_s: float
    """From the start of the first shard."""
    peak_mb: float
    """Memory of a worker."""


def run(root: str, out: str, workers: int, codec: str) -> Measurement:
    """Convert once."""
    command = [sys.executable, os.path.join(material.ROOT, "prep", "convert.py"), "flyingchairs",
               "--root", root, "--out", out, "--shards", "8", "--workers", str(workers),
               "--codec", codec]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks: dict[str, int] = {}
    begun: list[float] = []

    def watch() -> None:
        while process.poll() is None:
            if not begun and any(".partial-" in name for name in listing(out + ".partial")):
                begun.append(time.perf_counter())
            for child in children(process.pid):
                peaks[child] = max(peaks.get(child, 0), private_bytes(child))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    errors = process.communicate()[1]
    end = time.perf_counter()
    watcher.join()
    if process.returncode:
        sys.exit(errors.decode())
    return Measurement(end - start, end - begun[0], max(peaks.values()) / 1e6)


def listing(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def children(pid: int | str) -> list[str]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def private_bytes(pid: int | str) -> int:
    """The memory that a process does not share with its parent."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(1024 * int(line.split()[1]) for line in file if line.startswith("Private"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast prep/convert.py is.")
    material.add_options(parser)
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.join(folder, "data")
        raw = material.write_release(root, options.data, options.pairs)
        cores = len(os.sched_getaffinity(0))
        print(f"{options.pairs} {options.data} pairs, {raw / 1e6:.0f} MB, {cores} cores\n")
        found: dict[tuple[str, int], list[tuple[float, ...]]] = {
            (codec, workers): [] for codec in ("zstd", "raw") for workers in (1, 2)
        }
        for _ in range(options.repeats):  # interleaved, so that a busy moment hits all alike
            for codec, workers in found:
                out = os.path.join(folder, "out")
                found[codec, workers].append((*run(root, out, workers, codec), material.stored(out)))
                material.free(out)
        rows = []
        for (codec, workers), runs in found.items():
            total, steady, memory, size = (statistics.median(column) for column in zip(*runs, strict=True))
            rows.append([
                f"{codec}, {workers} worker(s)",
                f"{options.pairs / steady:.0f}", f"{raw / steady / 1e6:.0f}",
                f"{size / raw:.3f}", f"{memory:.0f}", f"{options.pairs / total:.0f}",
            ])  # fmt: skip
        header = ["", "pairs/s", "raw MB/s", "size of raw", "MB a worker", "pairs/s with start"]
        material.print_table(header, rows)


if __name__ == "__main__":
    main()
