"""One rank of scaling.py: times training steps and all-reduces; rank 0 prints them as JSON.

python tests/bench/scaling_child.py BATCH HEIGHT WIDTH STEPS
"""

import json
import os
import statistics
import sys
import time

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from launch import cluster

SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 8_639_230)
"""Numbers in an all-reduce; the last is as many as PWC-Net has weights."""
REPEATS = 7


def main():
    began = time.time()
    batch, height, width, steps = map(int, sys.argv[1:])
    with cluster.joined(lambda: ({}, None)) as (here, _):
        import mindspore
        from mindspore import Tensor, nn, ops

        from model.losses import MultiScaleLoss
        from model.pwcnet import PWCNet
        from train.step import TrainStep

        class Reduce(nn.Cell):
            """All-reduce of several tensors, one after the other in one graph."""

            def __init__(self):
                super().__init__()
                self.sum = ops.AllReduce()
                self.each = ops.HyperMap()

            def construct(self, *tensors):
                return self.each(self.sum, tensors)

        def median(function):
            function()
            times = []
            for _ in range(REPEATS):
                cluster.barrier()
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
            return statistics.median(times)

        mindspore.set_seed(1)
        network = PWCNet(normalize_features=True)
        found = {}
        if here.ranks > 1:
            cluster.all_reduce(np.ones(1, np.float32))
            found["first_collective"] = time.time() - began
            for size in SIZES:
                graph, vector = Reduce(), Tensor(np.ones(size, np.float32))
                found[f"all_reduce {size}"] = median(lambda g=graph, v=vector: g(v)[0].asnumpy())
            weights = [Tensor(weight.asnumpy()) for weight in network.trainable_params()]
            graph = Reduce()
            found["all_reduce apart"] = median(lambda: graph(*weights)[-1].asnumpy())
        step = TrainStep(network, MultiScaleLoss(), ranks=here.ranks, clip_norm=1.0)
        rng = np.random.default_rng(here.rank)
        images = rng.integers(0, 255, (2, batch, height, width, 3)).astype(np.uint8)
        flow = rng.normal(0, 5, (batch, height, width, 2)).astype(np.float32)
        sample = (*images, flow, np.ones(flow.shape[:3], np.uint8))
        step.compile(*sample)
        cluster.barrier()
        times = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            step(*sample, 1e-4)[0].asnumpy()
            times.append(time.perf_counter() - start)
        found["step"] = statistics.median(times[2:])
        if here.rank == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
