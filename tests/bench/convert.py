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

import material


def run(root, out, workers, codec):
    """Convert once; returns (seconds in all, seconds from the first shard's start, peak MB)."""
    command = [sys.executable, os.path.join(material.ROOT, "prep", "convert.py"), "flyingchairs",
               "--root", root, "--out", out, "--shards", "8", "--workers", str(workers),
               "--codec", codec]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks, begun = {}, []

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
    return end - start, end - begun[0], max(peaks.values()) / 1e6


def listing(folder):
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def private_bytes(pid):
    """The memory that a process alone holds; what it shares with its parent is there once."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(1024 * int(line.split()[1]) for line in file if line.startswith("Private"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    material.add_options(parser)
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.join(folder, "data")
        raw = material.write_set(root, options.data, options.pairs)
        cores = len(os.sched_getaffinity(0))
        print(f"{options.pairs} {options.data} pairs, {raw / 1e6:.0f} MB, {cores} cores\n")
        found = {(codec, workers): [] for codec in ("zstd", "raw") for workers in (1, 2)}
        for _ in range(options.repeats):  # interleaved, so that a busy moment hits all alike
            for codec, workers in found:
                out = os.path.join(folder, "out")
                found[codec, workers].append((*run(root, out, workers, codec), material.stored(out)))
                material.free(out)
        rows = []
        for (codec, workers), runs in found.items():
            total, steady, memory, size = (statistics.median(column) for column in zip(*runs))
            rows.append([
                f"{codec}, {workers} worker(s)",
                f"{options.pairs / steady:.0f}", f"{raw / steady / 1e6:.0f}",
                f"{size / raw:.3f}", f"{memory:.0f}", f"{options.pairs / total:.0f}",
            ])  # fmt: skip
        header = ["", "pairs/s", "raw MB/s", "size of raw", "MB a worker", "pairs/s with start"]
        material.print_table(header, rows)


if __name__ == "__main__":
    main()
