"""Compiles a graph for a GPU: the program of test_gpu_graphs.py.

python tests/gpu_graph.py training float16|float32  # forward and backward pass of a training step
python tests/gpu_graph.py convolutions              # two in float16, which MindSpore is free to change
"""

import os
import sys
from argparse import Namespace

sys.path[0] = os.path.dirname(sys.path[0])  # the checkout, instead of this file's folder

import mindspore
import numpy as np
from mindspore import Tensor, float16, float32, nn

from tests.bench import gpu_check


def main() -> None:
    """Compile the graph that the command line names."""
    name, *precision = sys.argv[1:]
    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="GPU")
    if name == "training":
        step = gpu_check.make_train_step(precision == ["float16"])
        assert step.state.network.backend == "native"
        step.add.compile(*next(step.micro_batches(gpu_check.make_batch(Namespace(batch=2, size=(64, 128))))))
    else:
        layers = nn.SequentialCell(*(nn.Conv2d(16, 16, 3, has_bias=True).to_float(float16) for _ in range(2)))
        layers.compile(Tensor(np.zeros((2, 16, 32, 32)), float32))


if __name__ == "__main__":
    main()
