"""How fast the network is compared with PyTorch and with the processor: inference, training step, start-up and memory.

python tests/bench/model.py [--torch-python PY] [--size H W] [--batch N] [--repeats N] [--compile] [--floor] [--stock]

Each row is a process of its own; they are asked in turn. Those that wait are stopped, as idle threads of some of these
libraries spin. "of PyTorch" compares with PyTorch's fastest row of the same precision. "of peak" is the time that the
convolutions alone would take at the speed that oneDNN reaches where it is fastest, divided by the time measured. It may
exceed 1: Winograd's filtering needs fewer operations.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys

import material

KINDS = {
    "this toolkit": "here",
    "this toolkit, bfloat16": "here+bfloat16",
    "without cost volume and warp": "here+floor",
    "with MindSpore's operators": "here+mindspore",
    "PyTorch": "torch",
    "PyTorch, channels last": "torch+channels_last",
    "PyTorch, channels last, bfloat16": "torch+channels_last+bfloat16",
    "PyTorch, compiled": "torch+compile",
}
WHAT = ("inference", "step")


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
        """Seconds for one "inference" or "step"; "memory" in bytes, "flops" of inference, "peak" in FLOP/s."""
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
    for option, meaning in (
        ("compile", "also measure torch.compile, which takes minutes"),
        ("floor", "also measure the network without cost volume and warping"),
        ("stock", "also measure MindSpore's own operators, which need 10 GB"),
    ):
        parser.add_argument(f"--{option}", action="store_true", help=f"{meaning} (default: off)")
    options = parser.parse_args()
    left_out = {"torch+compile": options.compile, "here+floor": options.floor, "here+mindspore": options.stock}
    kinds = {name: kind for name, kind in KINDS.items() if left_out.get(kind, True)}
    if subprocess.run([options.torch_python, "-c", "import torch"], capture_output=True).returncode:
        print(f"note: {options.torch_python} has no PyTorch, which is skipped; see --torch-python")
        kinds = {name: kind for name, kind in kinds.items() if not kind.startswith("torch")}
    children, rows = {}, {}
    for name, kind in kinds.items():
        python = options.torch_python if kind.startswith("torch") else sys.executable
        children[name] = Child(python, kind, options)
        # One after the other, as the first call of each compiles its graph.
        rows[name] = {"step": [], "inference": [], "first": children[name].ask("step")}
        children[name].ask("inference")
    for _ in range(options.repeats):
        for what in WHAT:
            for name, child in children.items():
                rows[name][what].append(child.ask(what))
    flops, peaks = children["this toolkit"].ask("flops"), {}
    for precision, name in (("float32", "this toolkit"), ("bfloat16", "this toolkit, bfloat16")):
        peaks[precision] = children[name].ask("peak")
        bounds = [flops * factor / peaks[precision] for factor in (1, 3)]
        print(
            f"{precision}: {peaks[precision] / 1e9:.0f} GFLOP/s at best, with which the convolutions of inference take "
            f"{bounds[0]:.2f} s and those of a step {bounds[1]:.2f} s"
        )
    for name, child in children.items():
        rows[name]["memory"] = child.ask("memory")
        child.end()
    print(
        f"batch {options.batch}, {options.size[0]}x{options.size[1]}, {len(os.sched_getaffinity(0))} cores, "
        f"{options.repeats} repeats, medians of seconds\n"
    )

    def precision_of(name: str) -> str:
        return "bfloat16" if "bfloat16" in kinds[name] else "float32"

    def of_torch(name: str, what: str) -> str:
        peers = [
            rows[peer][what]
            for peer, kind in kinds.items()
            if kind.startswith("torch") and precision_of(peer) == precision_of(name)
        ]
        if not peers or kinds[name].startswith("torch"):
            return "-"
        best = min(peers, key=statistics.median)
        return f"{statistics.median(a / b for a, b in zip(rows[name][what], best, strict=True)):.2f}"

    def of_peak(name: str, what: str) -> str:
        bound = flops * (1 if what == "inference" else 3) / peaks[precision_of(name)]
        return f"{bound / statistics.median(rows[name][what]):.2f}"

    header = [""]
    for what in WHAT:
        header += [what, "of PyTorch", "of peak"]
    table = []
    for name, row in rows.items():
        cells = [name]
        for what in WHAT:
            cells += [f"{statistics.median(row[what]):.2f}", of_torch(name, what), of_peak(name, what)]
        table.append([*cells, f"{row['first']:.1f}", f"{row['memory'] / 1e9:.1f}"])
    material.print_table([*header, "first step", "peak GB"], table)
    half, single = (rows[name] for name in ("this toolkit, bfloat16", "this toolkit"))
    for what in WHAT:
        ratio = statistics.median(a / b for a, b in zip(half[what], single[what], strict=True))
        print(f"{what}: bfloat16 takes {ratio:.2f} of float32's time")


if __name__ == "__main__":
    main()
