"""A plan for half an hour on a bare GPU machine, tried on a folder of this machine that stands in for it.

python tests/bench/gpu_rehearsal.py BUNDLE [--machine DIR] [--rate MB/S] [--minutes N]

The machine has Python and a driver, but no network. It takes files in pieces of at most 60 MB with each command, runs a
command for ten minutes at most, and disappears when it is idle for 30 seconds. BUNDLE is a folder made before by

    launch/bundle.sh --python VERSION --gpu 90 --strip --split 60M --extras test --out BUNDLE

Each step copies this checkout and one piece into the stand-in, runs the step's command there in a network namespace
without routes (as root; else with the network) and times it. The table adds what the transfer would take at --rate.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LARGEST_PIECE = 60_000_000
"""Bytes that go with one command."""
LONGEST_COMMAND = 600
"""Seconds that a command may take."""
OFFLINE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""Runs a command in a network namespace with a loopback interface only."""
CONVERT = "python prep/convert.py flyingchairs --root data/a --out data/b --split-file data/a/validation.txt --shards 2"
TRAIN = (
    "device=cpu; launch/doctor.sh --driver >/dev/null 2>&1 && device=gpu; "
    "launch/train.sh --config example --data data/b --out runs/a --device $device steps=4 validate_every=4"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A command on the machine, and the files that go with it into its folder `carried`."""

    name: str
    command: str
    files: tuple[pathlib.Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self.files)


def plan(bundle: pathlib.Path) -> list[Step]:
    """The steps until training can start."""
    manifest = bundle / "bundle.json"
    if not manifest.exists():
        sys.exit(f"error: {manifest}: missing; make the bundle by the command that --help shows")
    pieces = [bundle / piece["name"] for file in json.loads(manifest.read_text())["files"] for piece in file["pieces"]]
    groups: list[list[pathlib.Path]] = [[manifest]]
    for piece in sorted(pieces, key=lambda path: -path.stat().st_size):
        size = piece.stat().st_size
        if size > LARGEST_PIECE:
            sys.exit(
                f"error: {piece}: {size / 1e6:.0f} MB, expected at most {LARGEST_PIECE / 1e6:.0f}; use --split 60M"
            )
        # The first group with room: few, full commands.
        for group in groups:
            if sum(file.stat().st_size for file in group) + size <= LARGEST_PIECE:
                group.append(piece)
                break
        else:
            groups.append([piece])
    keep = "mkdir -p ../kept && mv carried/* ../kept/"
    steps = [Step(f"piece {number} of {len(groups)}", keep, tuple(group)) for number, group in enumerate(groups, 1)]
    return [
        *steps,
        Step("install", "launch/bundle.sh --install ../kept && rm -r ../kept"),
        Step("doctor", "launch/doctor.sh"),
        Step("example data", ". .venv/bin/activate && python prep/synthesize.py --out data/a --pairs 40 && " + CONVERT),
        Step("first training steps", TRAIN),
    ]


def run(step: Step, machine: pathlib.Path) -> float:
    """Do a step in the stand-in; returns the seconds that its command took."""
    checkout = machine / "checkout"
    checkout.mkdir(exist_ok=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x"], input=archive, cwd=checkout, check=True)
    carried = checkout / "carried"
    shutil.rmtree(carried, ignore_errors=True)
    carried.mkdir()
    for file in step.files:
        shutil.copy2(file, carried)
    inside = ["env", "-i", f"HOME={machine}", f"PATH={os.environ['PATH']}", "bash", "-c", step.command]
    offline = OFFLINE if os.geteuid() == 0 and shutil.which("unshare") and shutil.which("ip") else []
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*offline, *inside], cwd=checkout, stdout=sys.stderr, timeout=LONGEST_COMMAND, check=False
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"error: step '{step.name}' took longer than {LONGEST_COMMAND} s: {step.command}")
    if done.returncode:
        sys.exit(f"error: step '{step.name}' ended with status {done.returncode}: {step.command}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=pathlib.Path, help="folder made by launch/bundle.sh --out")
    parser.add_argument(
        "--machine", type=pathlib.Path, metavar="DIR", help="folder that stands in (default: a temporary one)"
    )
    parser.add_argument(
        "--rate", type=float, default=20, metavar="MB/S", help="assumed rate of transfers (default: 20)"
    )
    parser.add_argument(
        "--minutes", type=float, default=30, metavar="N", help="minutes for which the machine is there (default: 30)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        machine = (options.machine or pathlib.Path(folder)).resolve()
        machine.mkdir(parents=True, exist_ok=True)
        print("| step | MB | transfer, s | command, s | command |\n| --- | ---: | ---: | ---: | --- |")
        total = 0.0
        for step in plan(options.bundle):
            seconds, transfer = run(step, machine), step.size / 1e6 / options.rate
            total += seconds + transfer
            print(
                f"| {step.name} | {step.size / 1e6:.1f} | {transfer:.0f} | {seconds:.1f} | `{step.command}` |",
                flush=True,
            )
    print(f"\n{total / 60:.1f} of {options.minutes:g} minutes; {options.minutes - total / 60:.1f} are left for running")


if __name__ == "__main__":
    main()
