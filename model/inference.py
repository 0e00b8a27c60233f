"""A trained network ready to use: NumPy images in, NumPy flow out."""

import pathlib
from collections.abc import Callable

import numpy as np
from mindspore import Tensor, nn, ops

from model import exportable
from model.backend import Backend
from model.precision import resolve_precision, set_precision
from model.pwcnet import DIV_FLOW, round_up, to_network
from model.resizing import resize
from model.weights import load_network


def choose_resize(network: nn.Cell) -> Callable[[Tensor, tuple[int, int], bool], Tensor]:
    """The bilinear resizing of a network's backend."""
    return exportable.resize if getattr(network, "backend", "") == "exportable" else resize


class ImagePreparation(nn.Cell):
    """An image of any size as the network's input.

    Sides that are not multiples of 64 are resized, not padded: padding adds an edge that moves with neither image, and
    published results of this network were made by resizing, with corners aligned ("irr") or not ("nvlabs").

    Args:
        network: a `PWCNet`, or any Cell from two images to flows; one without `align_corners` aligns them.
    """

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.align_corners = getattr(network, "align_corners", True)
        self.resize = choose_resize(network)

    def construct(self, image: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 RGB to (N, 3, H', W') float32 in [0, 1]; H' and W' are multiples of 64."""
        _, height, width, _ = image.shape
        padded = (round_up(height), round_up(width))
        image = to_network(image)
        if padded != (height, width):
            image = self.resize(image, padded, self.align_corners)
        return image


class FlowConversion(nn.Cell):
    """The network's finest flow as pixels of the original images.

    Args:
        network: as of `ImagePreparation`.
    """

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.align_corners = getattr(network, "align_corners", True)
        self.resize = choose_resize(network)

    def construct(self, flow: Tensor, height: int, width: int) -> Tensor:
        """(N, 2, H' / 4, W' / 4) float32 to (N, H, W, 2) float32 in pixels of images of (H, W)."""
        flow = self.resize(flow, (height, width), self.align_corners) / DIV_FLOW
        u, v = flow[:, 0] * (width / round_up(width)), flow[:, 1] * (height / round_up(height))
        return ops.stack((u, v), 3)


class PredictionGraph(nn.Cell):
    """All that `FlowPredictor` computes as one graph, for export; it is compiled for each image size.

    Args:
        network: as of `ImagePreparation`.
    """

    def __init__(self, network: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.prepare = ImagePreparation(network)
        self.convert = FlowConversion(network)

    def construct(self, image1: Tensor, image2: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 RGB images to flow (N, H, W, 2) float32 in pixels."""
        _, height, width, _ = image1.shape
        flow = self.network(self.prepare(image1), self.prepare(image2))[-1]
        return self.convert(flow, height, width)


class FlowPredictor:
    """Computes the flow of image pairs of any size.

    MindSpore compiles the network once for each batch and size in multiples of 64 pixels, not for each image size: what
    depends on the image size are two small graphs around it. The first call at a size takes seconds, others do not.

    Args:
        network: a `model.pwcnet.PWCNet`, or any Cell from two images to flows.
    """

    def __init__(self, network: nn.Cell) -> None:
        self.network = network
        self.prepare = ImagePreparation(network)
        self.convert = FlowConversion(network)

    def flow(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        """The flow from image 1 to image 2.

        Args:
            image1, image2: (H, W, 3) uint8, RGB.

        Returns:
            (H, W, 2) float32: pixels to the right, then down.

        Raises:
            ValueError: the images are not two RGB images of one size.
        """
        return self.flow_batch(image1[None], image2[None])[0]

    def flow_batch(self, images1: np.ndarray, images2: np.ndarray) -> np.ndarray:
        """`flow` of several pairs at once: (N, H, W, 3) uint8 twice to (N, H, W, 2) float32."""
        for images in (images1, images2):
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
                raise ValueError(f"images are {images.dtype} {images.shape[1:]}, expected uint8 (H, W, 3)")
        if images1.shape != images2.shape:
            raise ValueError(f"image 1 is {images1.shape[1:]} and image 2 {images2.shape[1:]}; expected one size")
        _, height, width, _ = images1.shape
        flows = self.network(self.prepare(Tensor(images1)), self.prepare(Tensor(images2)))
        return self.convert(flows[-1], height, width).asnumpy()


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
