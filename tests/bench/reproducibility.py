"""Whether training is bit-reproducible: the same run idle, on a loaded machine, and killed and resumed.

python tests/bench/reproducibility.py [--steps N] [--option-steps N] [--only NAME ...] [--folder DIR]

Each case runs on two ranks under mpirun: once as it is, once beside processes that keep every core busy, and once
killed (kill -9 on rank 1) after two fifths of its steps and resumed. The example recipe runs for --steps in all three
ways; every recipe option that changes the graph runs for --option-steps on small crops, without the loaded machine.
Compared are all arrays of the last checkpoint, the losses of every step, and the validation EPE.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import psutil

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

SMALL = ("crop=[64,64]", "batch=8", "validation_batch=8")
CASES = {
    "example recipe": (),
    "plain estimators": (*SMALL, "dense=false", "start_from_coarser_flow=false"),
    "variant nvlabs": (*SMALL, "variant=nvlabs"),
    "features not normalised": (*SMALL, "normalize_features=false"),
    "nearest warping": (*SMALL, "warp_mode=nearest"),
    "loss robust": (*SMALL, "loss=robust"),
    "loss sparse": (*SMALL, "loss=sparse"),
    "float16": (*SMALL, "precision=float16"),
    "bfloat16": (*SMALL, "precision=bfloat16"),
    "accumulation": (*SMALL, "--accumulation-steps", "2"),
    "moving average": (*SMALL, "ema_decay=0.99"),
    "AdamW with decay": (*SMALL, "optimizer=adamw", "weight_decay=1e-4"),
    "mixture of two datasets": (*SMALL, "mixture=[2,1]"),
}
"""Name to what is added to the command line of the example recipe."""
BUSY = "while True: pass"


@dataclasses.dataclass
class Result:
    """What a run ended with."""

    arrays: dict[str, bytes]
    losses: dict[int, float]
    epe: float


def run(command: list[str], kill_at: pathlib.Path | None = None) -> None:
    """Run a command to its end, or kill rank 1 once a file exists; SystemExit if that does not go as expected."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with tempfile.TemporaryFile("w+") as log:
        job = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **root}, stdout=log, stderr=log)
        while kill_at and not kill_at.exists() and job.poll() is None:
            time.sleep(0.05)
        if kill_at and job.poll() is None:
            (rank,) = (
                process
                for process in psutil.Process(job.pid).children(recursive=True)
                if process.environ().get("OMPI_COMM_WORLD_RANK") == "1"
                and process.ppid() != job.pid
                and (parent := process.parent())
                and process.cmdline() == parent.cmdline()
            )
            rank.kill()
        status = job.wait()
        if bool(status) != bool(kill_at):
            log.seek(0)
            sys.exit(f"error: {' '.join(command)} ended with status {status}\n{log.read()[-2000:]}")


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with another process."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def read_result(out: pathlib.Path, steps: int) -> Result:
    """Read what a run has left in its folder."""
    from model import weights  # before TensorBoard, which brings a protobuf that MindSpore cannot follow

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # isort: skip

    values = weights.read(out / "checkpoints" / f"step-{steps:08}.ckpt")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return Result(
        {name: value.asnumpy().tobytes() for name, value in values.items() if not isinstance(value, str)},
        {point.step: point.value for point in events.Scalars("train/loss")},
        json.loads((out / "result.json").read_text())["epe"],
    )


def make_data(folder: pathlib.Path) -> list[pathlib.Path]:
    """Two converted datasets of synthetic pairs."""
    made = []
    for number, pairs in enumerate((600, 40)):
        raw, converted = folder / f"raw-{number}", folder / f"data-{number}"
        if not converted.exists():
            numbers = ["--seed", str(number), "--pairs", str(pairs), "--profile", "1"]
            run([sys.executable, "prep/synthesize.py", "--out", str(raw), *numbers])
            run(
                [
                    sys.executable,
                    "prep/convert.py",
                    "flyingchairs",
                    "--root",
                    str(raw),
                    "--out",
                    str(converted),
                    "--split-file",
                    str(raw / "validation.txt"),
                    "--shards",
                    "4",
                ]
            )
        made.append(converted)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Check whether training is bit-reproducible.")
    parser.add_argument("--steps", type=int, default=450, help="of the example recipe (default 450)")
    parser.add_argument("--option-steps", type=int, default=100, help="of each option (default 100)")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help="some of: " + ", ".join(CASES))
    parser.add_argument("--folder", type=pathlib.Path, help="for data and runs (default: a temporary one)")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = (options.folder or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        first, second = make_data(folder)
        print("| case | steps | run | arrays equal | losses equal | validation EPE, px | s |")
        print("| --- | ---: | --- | --- | --- | ---: | ---: |", flush=True)
        equal = True
        for name in options.only or CASES:
            whole = name == "example recipe"
            steps = options.steps if whole else options.option_steps
            data = ["--data", str(first)] + (["--data", str(second)] if "mixture" in name else [])
            reference = None
            for kind in ("idle", "loaded", "killed, resumed") if whole else ("idle", "killed, resumed"):
                out = folder / f"{name}, {kind}".replace(",", "").replace(" ", "-")
                command = [
                    "mpirun",
                    "--oversubscribe",
                    "-n",
                    "2",
                    "launch/train.sh",
                    "--config",
                    "example",
                    *data,
                    "--out",
                    str(out),
                    f"steps={steps}",
                    "log_every=1",
                    f"validate_every={steps}",
                    f"checkpoint_every={max(1, steps // 5)}",
                    *CASES[name],
                ]
                start = time.monotonic()
                with busy_cores() if kind == "loaded" else contextlib.nullcontext():
                    if "killed" in kind:
                        run(command, out / "checkpoints" / f"step-{2 * max(1, steps // 5):08}.ckpt")
                    run(command)
                result = read_result(out, steps)
                reference = reference or result
                same = result.arrays == reference.arrays, result.losses == reference.losses
                equal = equal and all(same)
                print(
                    f"| {name} | {steps} | {kind} | {'yes' if same[0] else 'NO'} | {'yes' if same[1] else 'NO'} | "
                    f"{result.epe:.6f} | {time.monotonic() - start:.0f} |",
                    flush=True,
                )
    sys.exit(not equal)


if __name__ == "__main__":
    main()
