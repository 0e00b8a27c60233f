"""A trained network ready to use: NumPy images in, NumPy flow out."""

import pathlib
import threading
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops

from model import exportable
from model.backend import Backend
from model.graph_cache import compile_graph
from model.precision import resolve_precision, set_precision
from model.pwcnet import DIV_FLOW, PWCNet, round_up, to_network
from model.resizing import resize, resize_array
from model.weights import load_network

LOCK = threading.Lock()
"""Held while MindSpore compiles or runs a network: it crashes or hangs if two threads do so at once."""


class PredictionGraph(nn.Cell):
    """All that `FlowPredictor` computes as one graph, for export; it is compiled for each image size.

    Args:
        network: a `model.pwcnet.PWCNet`.
    """

    def __init__(self, network: PWCNet) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.align_corners = network.align_corners
        self.resize = exportable.resize if network.backend == "exportable" else resize

    def construct(self, image1: Tensor, image2: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 RGB images to flow (N, H, W, 2) float32 in pixels."""
        _, height, width, _ = image1.shape
        flow = self.network(self.prepare(image1), self.prepare(image2))[-1]
        flow = self.resize(flow, (height, width), self.align_corners) / DIV_FLOW
        u, v = flow[:, 0] * (width / round_up(width)), flow[:, 1] * (height / round_up(height))
        return ops.stack((u, v), 3)

    def prepare(self, image: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 RGB to (N, 3, H', W') float32 in [0, 1]; H' and W' are multiples of 64."""
        _, height, width, _ = image.shape
        padded = (round_up(height), round_up(width))
        image = to_network(image)
        if padded != (height, width):
            image = self.resize(image, padded, self.align_corners)
        return image


class FlowPredictor:
    """Computes the flow of image pairs of any size.

    Sides that are not multiples of 64 are resized, not padded: padding adds an edge that moves with neither image, and
    published results of this network were made by resizing, with corners aligned ("irr") or not ("nvlabs").

    MindSpore compiles the network for each batch and each size in multiples of 64 pixels, which takes seconds the first
    time (see `model.graph_cache`). The resizing is not part of the graph, so that all image sizes that become the same
    one share it.

    Threads may share predictors or have their own; the networks compute one call after another.

    Args:
        network: a `model.pwcnet.PWCNet`, or any Cell from two images to flows; one without `align_corners` aligns them.
    """

    def __init__(self, network: nn.Cell) -> None:
        self.network = network
        self.align_corners = getattr(network, "align_corners", True)
        self.compiled: set[tuple[int, ...]] = set()

    def flow(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        """The flow from image 1 to image 2.

        Args:
            image1, image2: (H, W, 3) uint8, RGB.

        Returns:
            (H, W, 2) float32: pixels to the right, then down.

        Raises:
            ValueError: the images are not two RGB images of one size.
        """
        check_images(image1, image2, 3)
        return self.flow_batch(image1[None], image2[None])[0]

    def flow_batch(self, images1: np.ndarray, images2: np.ndarray) -> np.ndarray:
        """`flow` of several pairs at once: (N, H, W, 3) uint8 twice to (N, H, W, 2) float32."""
        check_images(images1, images2, 4)
        prepared = self.prepare(images1), self.prepare(images2)
        with LOCK:
            inputs = [Tensor(images) for images in prepared]
            if isinstance(self.network, PWCNet) and inputs[0].shape not in self.compiled:
                compile_graph(self.network, inputs, *self.network.graph_key)
                self.compiled.add(inputs[0].shape)
            flow = self.network(*inputs)[-1].asnumpy()
        _, height, width, _ = images1.shape
        scale = np.array([width / round_up(width), height / round_up(height)], np.float32) / np.float32(DIV_FLOW)
        flow = resize_array(flow * scale.reshape(2, 1, 1), (height, width), self.align_corners)
        return np.stack((flow[:, 0], flow[:, 1]), 3)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 RGB to the network's (N, 3, H', W') float32 in [0, 1]."""
        _, height, width, _ = images.shape
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)) / np.float32(255)
        return resize_array(planes, (round_up(height), round_up(width)), self.align_corners)


def check_images(image1: Any, image2: Any, axes: int) -> None:
    """Raise ValueError unless these are two RGB images, or batches of them, of one size.

    Args:
        image1, image2: whatever the caller gave.
        axes: 3 for images, 4 for batches.
    """
    shape = "(H, W, 3)" if axes == 3 else "(N, H, W, 3)"
    for number, image in enumerate((image1, image2), 1):
        if not isinstance(image, np.ndarray):
            raise ValueError(f"image {number} is of type {type(image).__name__}, expected a NumPy array, uint8 {shape}")
        if image.dtype != np.uint8 or image.ndim != axes or image.shape[-1] != 3 or 0 in image.shape:
            raise ValueError(f"image {number} is {image.dtype} {image.shape}, expected uint8 {shape}")
    if image1.shape != image2.shape:
        raise ValueError(f"image 1 is {image1.shape} and image 2 {image2.shape}; expected one shape")


def load_predictor(path: str | pathlib.Path, backend: Backend = "native", precision: str = "float32") -> FlowPredictor:
    """The network of a file of weights; MindSpore must be set up, as `launch.session.start` does.

    Args:
        path: a checkpoint of the trainer, a file of network weights, or a published network's file of PyTorch.
        backend: see `model.backend`.
        precision: see `model.precision`.

    Raises:
        UserError: the file is damaged, its weights are those of another network, or the device cannot compute in this
            precision.
    """
    network = load_network(path, backend)
    set_precision(network, resolve_precision(precision, network.backend))
    network.set_train(False)
    return FlowPredictor(network)
