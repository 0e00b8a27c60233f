"""Compiles and runs a graph on a GPU: the program of test_gpu_graphs.py.

python tests/gpu_graph.py step float32|float16 OUT.npz  # a training step's losses and gradient
python tests/gpu_graph.py convolutions                 # two in float16, compiled only

PWCNET_TEST_DEVICE names the device, GPU unless set.
"""

import os
import sys
from argparse import Namespace

sys.path[0] = os.path.dirname(sys.path[0])  # the checkout, instead of this file's folder

import mindspore
import numpy as np
from mindspore import Tensor, float16, float32, nn

from tests.bench import gpu_check

LOSS_SCALE = 64.0


def main() -> None:
    """Compile the graph that the command line names, and run it."""
    device = os.environ.get("PWCNET_TEST_DEVICE", "GPU")
    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target=device, runtime_num_threads=1)
    if sys.argv[1] == "step":
        precision, out = sys.argv[2:]
        step = gpu_check.make_train_step(precision == "float16")
        assert step.state.network.backend == "native"
        step.state.loss_scale.set_data(Tensor(LOSS_SCALE))
        rng = np.random.default_rng(1)
        for weight in step.weights:
            deviation = 0.1 if weight.name.endswith("bias") else 2 / weight[0].size ** 0.5
            weight.set_data(Tensor(rng.normal(0, deviation, weight.shape), float32))
        (tensors,) = step.micro_batches(gpu_check.make_batch(Namespace(batch=1, size=(64, 64))))
        losses = step.add(*tensors)
        np.savez(out, losses=losses.asnumpy(), gradient=step.sums[1].asnumpy() / LOSS_SCALE)
    else:
        layers = nn.SequentialCell(*(nn.Conv2d(16, 16, 3, has_bias=True).to_float(float16) for _ in range(2)))
        layers.compile(Tensor(np.zeros((2, 16, 32, 32)), float32))


if __name__ == "__main__":
    main()
