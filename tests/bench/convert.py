"""How fast prep/convert.py is, with one worker and with two: pairs/s, MB/s, size, memory.

python tests/bench/convert.py [--data real|synthetic] [--pairs N] [--archives]

With --archives, it compares unpacked files with archives instead: each conversion's pairs/s, and CPU time.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from typing import NamedTuple

import material


class Measurement(NamedTuple):
    """Of one conversion."""

    total_s: float
    cpu_s: float
    """Of all of its processes."""
    writing_s: float
    """From the start of the first shard."""
    peak_mb: float
    """Memory of a worker."""


def run(root: str, out: str, workers: int, codec: str) -> Measurement:
    """Convert once."""
    command = [sys.executable, os.path.join(material.ROOT, "prep", "convert.py"), "flyingchairs",
               "--root", root, "--out", out, "--shards", "8", "--workers", str(workers),
               "--codec", codec]  # fmt: skip
    start, cpu = time.perf_counter(), children_cpu()
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
    return Measurement(end - start, children_cpu() - cpu, end - begun[0], max(peaks.values()) / 1e6)


def children_cpu() -> float:
    """CPU time in seconds of all processes that this one has waited for, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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
    parser.add_argument("--workers", type=int, default=1, help="with --archives (default: %(default)s)")
    parser.add_argument("--archives", action="store_true", help="compare unpacked files with archives")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.join(folder, "data")
        raw = material.write_release(root, options.data, options.pairs)
        cores = len(os.sched_getaffinity(0))
        print(f"{options.pairs} {options.data} pairs, {raw / 1e6:.0f} MB, {cores} cores\n")
        (compare_archives if options.archives else compare_codecs)(options, folder, root, raw)


def compare_codecs(options: argparse.Namespace, folder: str, root: str, raw: int) -> None:
    """Print a table of codecs and numbers of workers."""
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
        total, _, steady, memory, size = (statistics.median(column) for column in zip(*runs, strict=True))
        rows.append([
            f"{codec}, {workers} worker(s)",
            f"{options.pairs / steady:.0f}", f"{raw / steady / 1e6:.0f}",
            f"{size / raw:.3f}", f"{memory:.0f}", f"{options.pairs / total:.0f}",
        ])  # fmt: skip
    header = ["", "pairs/s", "raw MB/s", "size of raw", "MB a worker", "pairs/s with start"]
    material.print_table(header, rows)


def compare_archives(options: argparse.Namespace, folder: str, root: str, raw: int) -> None:
    """Print a table of the ways to store a release."""
    roots = {"unpacked": root} | {
        name: os.path.join(folder, name) for name in ("stored.zip", "deflated.zip", "a.tar", "a.tar.gz")
    }
    names = sorted(os.listdir(root))
    for name, method in (("stored.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(roots[name], "w", method) as packed:
            for file in names:
                packed.write(os.path.join(root, file), f"data/{file}")
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        with tarfile.open(roots[name], mode) as packed:  # type: ignore[call-overload]
            for file in names:
                packed.add(os.path.join(root, file), f"data/{file}")
    found: dict[str, list[Measurement]] = {name: [] for name in roots}
    for _ in range(options.repeats):  # interleaved, so that a busy moment hits all alike
        for name, path in roots.items():
            out = os.path.join(folder, "out")
            found[name].append(run(path, out, options.workers, "zstd"))
            material.free(out)
    rows, base = [], found["unpacked"]
    for name, runs in found.items():
        size = raw if name == "unpacked" else os.path.getsize(roots[name])
        row = [name, f"{size / raw:.2f}"]
        for field in ("writing_s", "total_s", "cpu_s"):
            values = [getattr(one, field) for one in runs]
            pairs = zip(values, (getattr(one, field) for one in base), strict=True)
            row += [
                f"{options.pairs / statistics.median(values):.0f}",
                f"{statistics.median(a / b for a, b in pairs):.2f}",
            ]
        rows.append(row)
    header = ["", "size", "pairs/s", "time", "pairs/s with start", "time", "pairs per s of CPU", "CPU time"]
    print(f"{options.workers} worker(s); times relative to unpacked files\n")
    material.print_table(header, rows)


if __name__ == "__main__":
    main()
