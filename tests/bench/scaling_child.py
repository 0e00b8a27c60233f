"""One rank of scaling.py: times training steps, with and without the sum over ranks, and sums; rank 0 prints JSON.

python tests/bench/scaling_child.py BATCH HEIGHT WIDTH STEPS STARTED, the last in seconds since 1970
"""

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from launch import session
from prep.reader import Batch

SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 8_639_230)
"""Numbers in a sum; the last is as many as PWC-Net has weights."""
REPEATS = 15


def main() -> None:
    pairs, height, width, steps = map(int, sys.argv[1:5])
    started = float(sys.argv[5])
    with session.start(lambda: ({}, None)) as (comm, _):
        found = {}
        comm.sum(np.ones(1, np.float32))
        found["first_collective"] = time.time() - started

        from model.losses import MultiScaleLoss
        from model.pwcnet import PWCNet
        from train.step import TrainStep
        from train.update import StepOptions

        def median(function: Callable[[], object]) -> float:
            times = []
            for _ in range(REPEATS):
                comm.barrier()
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
            return statistics.median(times[1:])

        if comm.size > 1:
            from mpi4py import MPI

            for size in SIZES:
                vector = np.ones(size, np.float32)
                found[f"sum {size}"] = median(lambda v=vector: comm.sum(v))
                found[f"bare {size}"] = median(lambda v=vector: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, v))

        import mindspore

        mindspore.set_seed(1)
        step = TrainStep(PWCNet(normalize_features=True), MultiScaleLoss(), StepOptions(clip_norm=1.0), comm)
        rng = np.random.default_rng(comm.rank)
        images = rng.integers(0, 255, (2, pairs, height, width, 3)).astype(np.uint8)
        flow = rng.normal(0, 5, (pairs, height, width, 2)).astype(np.float32)
        batch = Batch(images[0], images[1], flow, np.ones(flow.shape[:3], np.uint8), np.arange(pairs, dtype=np.int32))
        step.compile(batch)
        comm.barrier()
        times, sums = [], []
        sum_over_ranks = step.sum_over_ranks

        def timed_sum(*parameters: mindspore.Parameter) -> None:
            comm.barrier()  # so that waiting for a slower rank is not counted
            start = time.perf_counter()
            sum_over_ranks(*parameters)
            sums.append(time.perf_counter() - start)

        step.sum_over_ranks = timed_sum
        for _ in range(steps + 2):
            start = time.perf_counter()
            step(batch, 1e-4).losses.asnumpy()
            times.append(time.perf_counter() - start)
        found["step"] = statistics.median(times[2:])
        found["sum in step"] = statistics.median(sums[2:])
        weights = b"".join(weight.asnumpy().tobytes() for weight in step.weights)
        found["equal weights"] = len(set(comm.gather(hashlib.sha256(weights).hexdigest()))) == 1
        step.sum_over_ranks = lambda *_: None
        times = []
        comm.barrier()
        for _ in range(steps):
            start = time.perf_counter()
            step(batch, 1e-4).losses.asnumpy()
            times.append(time.perf_counter() - start)
        found["step alone"] = statistics.median(times)
        comm.barrier()
        if comm.rank == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
