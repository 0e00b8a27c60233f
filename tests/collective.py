"""A program for the tests: one rank of a job of a few collectives.

python tests/collective.py LOGS SECONDS: sums ones over all ranks for so many seconds, with a line of rank 0 for
each sum. What goes wrong is said by the environment: RAISE=RANK and CRASH=RANK fail there after the first sum,
HANG=RANK does nothing any more while it trains, DRIFT=RANK changes the last bit of a weight there, LATE=RANK:SECONDS begins later, DIFFERENT=RANK has another setting
there, BROKEN=RANK cannot prepare.
"""

import os
import pathlib
import sys
import time

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from launch import ranks, session
from launch.errors import UserError, run
from launch.watchdog import Phase


def make_weights(drift):
    """A Parameter; with `drift`, the last bit of one number differs."""
    import mindspore

    array = np.linspace(-1, 1, 1000, dtype=np.float32)
    array.view(np.uint32)[500] ^= int(drift)
    return mindspore.Parameter(mindspore.Tensor(array), name="weights")


def check_weights(*arguments) -> None:
    from train import trainer

    trainer.check_weights(*arguments)


def main() -> None:
    logs, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
    rank = str(ranks.current().rank)
    late, _, delay = os.environ.get("LATE", ":0").partition(":")
    if late == rank:
        time.sleep(float(delay))

    def prepare():
        if os.environ.get("BROKEN") == rank:
            raise UserError(f"data/shard-{rank}: missing")
        return {"data": "other" if os.environ.get("DIFFERENT") == rank else "one"}, None

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
                check_weights(comm, number, [make_weights(number == 3 and drifting == rank)])
            time.sleep(0.2)
        print(f"rank {comm.rank} says goodbye", flush=True)


if __name__ == "__main__":
    run(main)
