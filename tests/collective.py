"""A program for the tests: one rank of a job of a few collectives.

python tests/collective.py LOGS SECONDS [key=value ...]: sums ones over all ranks for so many seconds,
with a line of rank 0 for each sum. A key=value is a setting of this rank's. What goes wrong is said
by the environment: RAISE=RANK and CRASH=RANK fail there after the first sum, LATE=RANK:SECONDS begins
later, DIFFERENT=RANK has another setting there.
"""

import os
import pathlib
import sys
import time

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import numpy as np

from launch import cluster
from prep.errors import UserError, run


def main():
    logs, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
    rank = str(cluster.place().rank)
    late, _, delay = os.environ.get("LATE", ":0").partition(":")
    if late == rank:
        time.sleep(float(delay))

    def prepare():
        if os.environ.get("BROKEN") == rank:
            raise UserError(f"data/shard-{rank}: missing")
        return {"data": "other" if os.environ.get("DIFFERENT") == rank else "one"}, None

    with cluster.joined(prepare, logs=logs) as (here, _):
        began, number = time.monotonic(), 0
        while not all(cluster.gather(time.monotonic() - began > seconds)) or not number:
            number += 1
            total = cluster.all_reduce(np.ones(3, np.float32))
            if here.rank == 0:
                print(f"sum {number} is {total[0]:.0f}", file=sys.stderr)
            if os.environ.get("RAISE") == rank:
                raise ValueError("as asked")
            if os.environ.get("CRASH") == rank:
                os.write(2, b"terminate called\n")
                os.abort()
            time.sleep(0.2)
        print(f"rank {here.rank} says goodbye", flush=True)


if __name__ == "__main__":
    run(main)
