"""A program for the tests: one rank of a job of a few collectives.

python tests/collective.py LOGS SECONDS sums ones over all ranks for some seconds; rank 0 prints each sum. Environment
variables name the rank on which something goes wrong: RAISE and CRASH fail after the first sum, HANG stops making
progress, DRIFT changes the last bit of a weight, LATE=RANK:SECONDS starts later, SLOW=RANK:SECONDS takes longer to
prepare, DIFFERENT has another setting, and BROKEN cannot prepare.
"""

import os
import pathlib
import sys
import time
import typing

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

if typing.TYPE_CHECKING:
    import mindspore

from launch import ranks, session
from launch.errors import UserError, run
from launch.watchdog import Phase


def make_weights(drift: bool) -> "mindspore.Parameter":
    """A Parameter; with `drift`, the last bit of one number differs."""
    import mindspore

    array = np.linspace(-1, 1, 1000, dtype=np.float32)
    array.view(np.uint32)[500] ^= int(drift)
    return mindspore.Parameter(mindspore.Tensor(array), name="weights")


def main() -> None:
    logs, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
    rank = str(ranks.current().rank)

    def delay(variable: str) -> None:
        """Wait if the variable names this rank."""
        slow, _, seconds = os.environ.get(variable, "").partition(":")
        if slow == rank:
            time.sleep(float(seconds))

    def prepare() -> tuple[dict[str, str], None]:
        delay("SLOW")
        if os.environ.get("BROKEN") == rank:
            raise UserError(f"data/shard-{rank}: missing")
        return {"data": "other" if os.environ.get("DIFFERENT") == rank else "one"}, None

    delay("LATE")
    with session.start(prepare, log_folder=logs) as (comm, _):
        began, number = time.monotonic(), 0
        while not all(comm.gather(time.monotonic() - began > seconds)) or not number:
            number += 1
            total = np.ones(3, np.float32)
            comm.progress(Phase.TRAINING, number)
            comm.sum(total)
            if comm.rank == 0:
                print(f"sum {number} is {total[0]:.0f}", file=sys.stderr)
            if os.environ.get("RAISE") == rank:
                raise ValueError("as asked")
            if os.environ.get("CRASH") == rank:
                os.write(2, b"terminate called\n")
                os.abort()
            while os.environ.get("HANG") == rank:
                time.sleep(1)
            if drifting := os.environ.get("DRIFT"):
                from train import trainer

                trainer.check_weights(comm, number, [make_weights(number == 3 and drifting == rank)])
            time.sleep(0.2)
        print(f"rank {comm.rank} says goodbye", flush=True)


if __name__ == "__main__":
    run(main)
