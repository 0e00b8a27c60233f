"""PWC-Net: the network, its operators and losses, and what is done with it.

import model

net = model.load("weights.ckpt")
flow = net.flow(image1, image2)  # uint8 (H, W, 3) RGB twice to float32 (H, W, 2), pixels right and down
"""

from __future__ import annotations

import os
import typing

if typing.TYPE_CHECKING:
    import pathlib

    from model.backend import Backend
    from model.inference import FlowPredictor


def load(
    weights: str | pathlib.Path, *, device: str = "cpu", backend: Backend = "native", precision: str = "float32"
) -> FlowPredictor:
    """Load a trained network; starts MindSpore in graph mode on a device.

    Args:
        weights: a checkpoint of the trainer, a file of network weights, or a published network's file of PyTorch, such
            as pwc_net.pth.tar, which needs PyTorch.
        device: "cpu" or "gpu".
        backend: the operators to compute with, see model/backend.py.
        precision: number format of the convolutions: "float32", "float16", "bfloat16" or "auto", the fastest one on
            this device; see model/precision.py.

    Raises:
        launch.errors.UserError: the file is damaged or holds another network's weights, or MindSpore cannot use the
            device.
    """
    from launch import ranks, session

    os.environ.setdefault("GLOG_v", "3")  # MindSpore's log: errors alone, as the commands have it
    session.start_mindspore(ranks.Rank(), device)
    from model.inference import load_predictor

    return load_predictor(weights, backend, precision)
