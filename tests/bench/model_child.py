"""One process of model.py: builds a network and answers each line of stdin with a number.

python tests/bench/model_child.py LIBRARY[+WAY...] BATCH HEIGHT WIDTH, as in model.py
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mindspore import Tensor

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
RATE = 1e-4
"""Learning rate."""


class Actions(NamedTuple):
    """What is measured."""

    infer: Callable[[], None]
    train: Callable[[], None]
    flops: Callable[[], float] = lambda: 0
    """Of inference."""
    peak: Callable[[], float] = lambda: 0
    """Operations in a second."""


def in_mindspore(images: np.ndarray, flow: np.ndarray, ways: list[str]) -> Actions:
    """Functions that infer and train once; `ways` names what is switched on: floor, mindspore, bfloat16.

    The floor is a network without cost volume and warping.
    """
    sys.path.insert(0, ROOT)
    from launch import session
    from launch.ranks import Rank

    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    os.environ.setdefault("GLOG_v", "3")
    session.start_mindspore(Rank(), "cpu")
    from mindspore import nn, ops

    from model.flops import count_flops, measure_peak
    from model.inference import FlowPredictor
    from model.losses import MultiScaleLoss
    from model.precision import set_precision
    from model.pwcnet import PWCNet
    from prep.reader import Batch
    from train.step import TrainStep
    from train.update import StepOptions

    class NoCostVolume(nn.Cell):
        def construct(self, first: "Tensor", second: "Tensor") -> "Tensor":
            return ops.tile(first[:, :1], (1, 81, 1, 1)) + second[:, :1]

    class NoWarp(nn.Cell):
        def construct(self, features: "Tensor", flow: np.ndarray) -> "Tensor":
            return features + flow[:, :1]

    network = PWCNet(backend="mindspore" if "mindspore" in ways else "native")
    if "bfloat16" in ways:
        set_precision(network, "bfloat16")
    if "floor" in ways:
        network.cost_volume, network.warp = NoCostVolume(), NoWarp()
    step = TrainStep(network, MultiScaleLoss(), StepOptions(clip_norm=1.0))
    valid, index = np.ones(flow.shape[:3], np.uint8), np.arange(len(flow), dtype=np.int32)
    predictor = FlowPredictor(network)

    def infer() -> None:
        network.set_train(False)
        predictor.flow_batch(images[0], images[1])

    def train() -> None:
        network.set_train()
        step(Batch(images[0], images[1], flow, valid, index), RATE).losses.asnumpy()

    pairs, height, width, _ = flow.shape
    return Actions(
        infer,
        train,
        lambda: pairs * count_flops(network, height, width),
        lambda: measure_peak("bfloat16" if "bfloat16" in ways else "float32") or 0,
    )


def in_torch(images: np.ndarray, flow: np.ndarray, ways: list[str]) -> Actions:
    """The same with PyTorch's layers; `ways` names what is switched on: channels_last, bfloat16, compile."""
    sys.path.insert(0, os.path.join(ROOT, "tests"))
    import torch
    from torch.nn import functional
    from torch_pwcnet import IRR

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    memory_format = torch.channels_last if "channels_last" in ways else torch.contiguous_format
    network: Any = IRR().to(memory_format=memory_format)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    inputs = [torch.from_numpy(image).permute(0, 3, 1, 2) for image in images]
    truth = torch.from_numpy(flow).permute(0, 3, 1, 2)
    size = truth.shape[2:]

    if "compile" in ways:
        network = torch.compile(network)

    def forward() -> list[Any]:
        pair = [(image.float() / 255).to(memory_format=memory_format) for image in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in ways):
            flows = network(*pair)
        return [flow.float() for flow in flows]

    def infer() -> None:
        with torch.no_grad():
            functional.interpolate(forward()[-1] / 0.05, size, mode="bilinear", align_corners=True)

    def train() -> None:
        loss = torch.zeros(())
        for weight, found in zip((0.32, 0.08, 0.02, 0.01, 0.005), forward(), strict=True):
            target = functional.adaptive_avg_pool2d(truth, found.shape[2:]) * 0.05
            loss = loss + weight * ((found - target).square().sum(1) + 1e-12).sqrt().sum()
        optimizer.zero_grad()
        (loss / len(truth)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return Actions(infer, train)


def main() -> None:
    kind = sys.argv[1]
    batch, height, width = map(int, sys.argv[2:])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, batch, height, width, 3)).astype(np.uint8)
    flow = rng.normal(0, 5, (batch, height, width, 2)).astype(np.float32)
    library, *ways = kind.split("+")
    if library == "torch":
        actions = in_torch(images, flow, ways)
    else:
        actions = in_mindspore(images, flow, ways)
    for line in sys.stdin:
        what = line.strip()
        if what == "memory":
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        elif what in ("flops", "peak"):
            answer = getattr(actions, what)()
        else:
            start = time.perf_counter()
            {"inference": actions.infer, "step": actions.train}[what]()
            answer = time.perf_counter() - start
        print(answer, flush=True)


if __name__ == "__main__":
    main()
