"""How fast the network is compared with PyTorch: inference, training step, start-up and memory.

python tests/bench/model.py [--torch-python PY] [--size H W] [--batch N] [--repeats N] [--stock]

Each row is a process of its own; they are asked in turn. Those that wait are stopped, as idle threads of some of these
libraries spin.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys

import material

KINDS = {
    "this toolkit": "native",
    "the same without cost volume and warp": "floor",
    "the same with MindSpore's operators": "mindspore",
    "PyTorch, stock layers": "torch",
}
FLOOR, PEER = list(KINDS)[1], list(KINDS)[3]


class Child:
    """A row of the table: a process that does what it is asked and answers how long it took."""

    def __init__(self, python: str, kind: str, options: argparse.Namespace) -> None:
        here = os.path.dirname(os.path.abspath(__file__))
        words = [python, os.path.join(here, "model_child.py"), kind, options.batch, *options.size]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, what: str) -> float:
        """Seconds for one "inference" or "step"; bytes for "memory"."""
        assert self.process.stdin and self.process.stdout
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"error: the process of {self.process.args} has ended")
        os.kill(self.process.pid, signal.SIGSTOP)
        return float(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        metavar="PATH",
        help="Python interpreter with PyTorch (default: this one)",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(384, 448), metavar=("H", "W"), help="pixels (default: 384 448)"
    )
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="pairs at a time (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="calls that are timed (default: 5)")
    parser.add_argument(
        "--stock", action="store_true", help="also measure MindSpore's own operators, which need 10 GB (default: off)"
    )
    options = parser.parse_args()
    kinds = dict(KINDS)
    if not options.stock:
        kinds.pop("the same with MindSpore's operators")
    found = subprocess.run([options.torch_python, "-c", "import torch"], capture_output=True)
    if found.returncode:
        print(f"note: {options.torch_python} has no PyTorch, which is skipped; see --torch-python")
        kinds.pop(PEER)
    children, rows = {}, {}
    for name, kind in kinds.items():
        python = options.torch_python if kind == "torch" else sys.executable
        children[name] = Child(python, kind, options)
        # One after the other, as the first call of each compiles its graph.
        children[name].ask("inference")
        rows[name] = {"first": children[name].ask("step"), "inference": [], "step": []}
    for _ in range(options.repeats):
        for what in ("inference", "step"):
            for name, child in children.items():
                rows[name][what].append(child.ask(what))
    for name, child in children.items():
        rows[name]["memory"] = child.ask("memory")
        child.end()
    print(
        f"batch {options.batch}, {options.size[0]}x{options.size[1]}, float32, "
        f"{len(os.sched_getaffinity(0))} cores, {options.repeats} repeats, medians of seconds\n"
    )

    def share(name: str, what: str, base: str) -> str:
        if base not in rows:
            return "-"
        pairs = zip(rows[name][what], rows[base][what], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f}"

    header = [
        "",
        "inference",
        "of floor",
        "of PyTorch",
        "step",
        "of floor",
        "of PyTorch",
        "compile + first step",
        "peak GB",
    ]
    table = [
        [
            name,
            f"{statistics.median(row['inference']):.2f}",
            share(name, "inference", FLOOR),
            share(name, "inference", PEER),
            f"{statistics.median(row['step']):.2f}",
            share(name, "step", FLOOR),
            share(name, "step", PEER),
            f"{row['first']:.1f}",
            f"{row['memory'] / 1e9:.1f}",
        ]
        for name, row in rows.items()
    ]
    material.print_table(header, table)


if __name__ == "__main__":
    main()
