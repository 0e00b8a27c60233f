"""The operators that make PWC-Net more than its convolutions: cost volume, warping and feature normalisation.

The functions define them with MindSpore's operators. The Cells `CostVolume` and `Warp` compute them with those of a
backend (model/backend.py).
"""

import numpy as np
from mindspore import Tensor, float32, nn, ops

from model import exportable, native
from model.backend import Backend

SEARCH_RANGE = 4
"""Displacements searched in each direction by PWC-Net, in pixels of the pyramid level."""
COST_CHANNELS = (2 * SEARCH_RANGE + 1) ** 2
"""Channels of the cost volume, one per displacement."""


def cost_volume(features1: Tensor, features2: Tensor) -> Tensor:
    """Correlate each feature vector of image 1 with its neighbourhood in image 2.

    Sun et al., "PWC-Net", CVPR 2018, equation (2), over a square of (2 r + 1)^2 displacements, where r is
    `SEARCH_RANGE`; the mean over channels, with zeros outside the image.

    Args:
        features1, features2: (N, C, H, W) float32.

    Returns:
        (N, (2 r + 1)^2, H, W) float32; channel (dy + r) * (2 r + 1) + (dx + r) is
        mean_c features1[n, c, y, x] * features2[n, c, y + dy, x + dx].
    """
    n, c, h, w = features1.shape
    side = 2 * SEARCH_RANGE + 1
    padded = w + 2 * SEARCH_RANGE
    pad = ops.Pad(((0, 0), (SEARCH_RANGE, SEARCH_RANGE), (SEARCH_RANGE, SEARCH_RANGE), (0, 0)))
    rows2 = pad(features2.transpose(0, 2, 3, 1))
    # One unused pixel at the end of each row of image 1 makes room for the reshape below.
    rows1 = ops.Pad(((0, 0), (0, 0), (0, 1), (0, 0)))(features1.transpose(0, 2, 3, 1) / c)
    multiply = ops.BatchMatMul(transpose_b=True)
    bands = []
    for dy in range(side):
        # All products of a row of image 1 with a row of image 2, as one matrix product. Pixel x needs only columns x to
        # x + 2 r, a diagonal band, which a row length that is one longer turns into a straight one. This needs no
        # temporary of (2 r + 1)^2 x C x H x W.
        products = multiply(rows1, rows2[:, dy : dy + h])
        skewed = products.reshape(n, h, (w + 1) * padded)[:, :, : w * (padded + 1)]
        bands.append(skewed.reshape(n, h, w, padded + 1)[:, :, :, :side])
    return ops.concat(bands, 3).transpose(0, 3, 1, 2)


def warp(features: Tensor, flow: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample features at the positions that the flow points to.

    Args:
        features: (N, C, H, W) float32.
        flow: (N, 2, H, W) float32, horizontal and vertical displacement in pixels of this level.
        mode: "bilinear" or "nearest".

    Returns:
        (N, C, H, W) float32: features[n, c, y + flow_y, x + flow_x], zero wherever one of the four pixels around that
        position (those with a weight) lies outside.
    """
    _, _, h, w = features.shape
    x = flow[:, 0] + Tensor(np.arange(w).reshape(1, 1, w), float32)
    y = flow[:, 1] + Tensor(np.arange(h).reshape(1, h, 1), float32)
    inside = ops.logical_and(ops.logical_and(x >= 0, x <= w - 1), ops.logical_and(y >= 0, y <= h - 1))
    # A side of one pixel has no extent to normalise by: its only position inside is 0.
    grid = ops.stack([x * (2 / max(w - 1, 1)) - 1, y * (2 / max(h - 1, 1)) - 1], 3)
    sampled = ops.grid_sample(features, grid, mode, "zeros", True)
    return sampled * inside.astype(features.dtype).expand_dims(1)


def normalize_pair(features1: Tensor, features2: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both features, (N, C, H, W), to zero mean and unit variance, by one statistic per sample.

    The statistic runs over both images, all channels and pixels: R. Jonschkowski et al., "What Matters in Unsupervised
    Optical Flow", ECCV 2020, section 4.2. Without it an untrained network's cost volume is close to zero.
    """
    both = ops.concat((features1, features2), 1)
    mean = both.mean((1, 2, 3), keep_dims=True)
    variance = (both - mean).square().mean((1, 2, 3), keep_dims=True)
    scale = (variance + 1e-12).rsqrt()
    return (features1 - mean) * scale, (features2 - mean) * scale


class CostVolume(nn.Cell):
    """`cost_volume` followed by LeakyReLU 0.1; sums over channels are in float32."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.is_native = backend == "native"
        self.operator = native_cost_volume() if self.is_native else cost_volume
        self.activation = nn.LeakyReLU(0.1)

    def construct(self, features1: Tensor, features2: Tensor) -> Tensor:
        """(N, C, H, W) float32 twice to (N, 81, H, W) float32."""
        costs = self.operator(features1, features2)
        return costs if self.is_native else self.activation(costs)


class Warp(nn.Cell):
    """`warp` in one of its modes; the native operator has only the bilinear one."""

    def __init__(self, mode: str, backend: Backend) -> None:
        super().__init__()
        self.mode = mode
        self.is_native = backend == "native" and mode == "bilinear"
        if self.is_native:
            self.operator = native_warp()
        else:
            self.operator = exportable.warp if backend == "exportable" else warp

    def construct(self, features: Tensor, flow: Tensor) -> Tensor:
        """(N, C, H, W) float32 and flow (N, 2, H, W) float32 to (N, C, H, W) float32."""
        return self.operator(features, flow) if self.is_native else self.operator(features, flow, self.mode)


def native_cost_volume() -> ops.Custom:
    """The native cost volume with its activation and gradient: (features1, features2) to costs."""
    gradients = native.operator(
        "CostVolumeGradient",
        lambda features1, features2, costs, dy: (features1, features2),
        lambda *_: (float32, float32),
    )

    def bprop(features1: Tensor, features2: Tensor, costs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradients(features1, features2, costs, gradient)

    return native.operator(
        "CostVolume",
        lambda features1, features2: [features1[0], COST_CHANNELS, features1[2], features1[3]],
        lambda *_: float32,
        bprop,
    )


def native_warp() -> ops.Custom:
    """The native bilinear warping with its gradient: (features, flow) to warped features."""
    gradients = native.operator(
        "WarpGradient", lambda features, flow, dy: (features, flow), lambda *_: (float32, float32)
    )

    def bprop(features: Tensor, flow: Tensor, warped: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradients(features, flow, gradient)

    return native.operator("Warp", lambda features, flow: features, lambda *_: float32, bprop)
