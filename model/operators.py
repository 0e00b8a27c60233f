"""The two operators that make PWC-Net more than its convolutions: cost volume and warping.

`CostVolume` and `Warp` are what a network is built of: the project's own operators (model/native)
where they can be had, else the functions `cost_volume` and `warp`, which say the same with MindSpore's.
"""

import numpy as np
from mindspore import Tensor, float32, nn, ops

from model import native

SEARCH_RANGE = 4
"""Displacements searched in each direction by PWC-Net, in pixels of the pyramid level."""


def cost_volume(features1, features2, search_range=SEARCH_RANGE):
    """Correlate each feature vector of image 1 with its neighbourhood in image 2.

    Sun et al., "PWC-Net", CVPR 2018, equation (2), over a square of (2 r + 1)^2 displacements; the
    mean over channels, zeros outside the image.

    Args:
        features1, features2: (N, C, H, W) float32.
        search_range: r, in pixels of this level.

    Returns:
        (N, (2 r + 1)^2, H, W) float32; channel (dy + r) * (2 r + 1) + (dx + r) holds
        mean_c features1[n, c, y, x] * features2[n, c, y + dy, x + dx].
    """
    n, c, h, w = features1.shape
    side = 2 * search_range + 1
    padded = w + 2 * search_range
    pad = ops.Pad(((0, 0), (search_range, search_range), (search_range, search_range), (0, 0)))
    rows2 = pad(features2.transpose(0, 2, 3, 1))
    # One unused pixel at the end of each row of image 1 makes room for the reshape below.
    rows1 = ops.Pad(((0, 0), (0, 0), (0, 1), (0, 0)))(features1.transpose(0, 2, 3, 1) / c)
    multiply = ops.BatchMatMul(transpose_b=True)
    bands = []
    for dy in range(side):
        # All products of a row of image 1 with a row of image 2, as one matrix product. Of pixel
        # x only columns x to x + 2 r are wanted; a row length that is one longer turns this
        # diagonal band into a straight one. No temporary of (2 r + 1)^2 x C x H x W is ever made.
        products = multiply(rows1, rows2[:, dy : dy + h])
        skewed = products.reshape(n, h, (w + 1) * padded)[:, :, : w * (padded + 1)]
        bands.append(skewed.reshape(n, h, w, padded + 1)[:, :, :, :side])
    return ops.concat(bands, 3).transpose(0, 3, 1, 2)


def warp(features, flow, mode="bilinear"):
    """Sample features at the places that the flow points to.

    Args:
        features: (N, C, H, W) float32.
        flow: (N, 2, H, W) float32, horizontal and vertical displacement in pixels of this level.
        mode: "bilinear" or "nearest".

    Returns:
        (N, C, H, W) float32: features[n, c, y + flow_y, x + flow_x], zero wherever one of the four
        pixels around that place (those that bear weight) lies outside.
    """
    _, _, h, w = features.shape
    x = flow[:, 0] + Tensor(np.arange(w).reshape(1, 1, w), float32)
    y = flow[:, 1] + Tensor(np.arange(h).reshape(1, h, 1), float32)
    inside = ops.logical_and(ops.logical_and(x >= 0, x <= w - 1), ops.logical_and(y >= 0, y <= h - 1))
    # A side of one pixel has no extent to normalise by: its only place inside is 0.
    grid = ops.stack([x * (2 / max(w - 1, 1)) - 1, y * (2 / max(h - 1, 1)) - 1], 3)
    sampled = ops.grid_sample(features, grid, mode, "zeros", True)
    return sampled * inside.astype(features.dtype).expand_dims(1)


class CostVolume(nn.Cell):
    """`cost_volume` followed by LeakyReLU 0.1; the sums over channels are in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.LeakyReLU(0.1)
        gradients = native.operator("CostVolumeGradient", lambda a, b, costs, dy: (a, b), lambda *_: (float32, float32))

        def bprop(features1, features2, costs, gradient):
            return gradients(features1, features2, costs, gradient)

        self.fused = native.operator(
            "CostVolume", lambda a, b: [a[0], (2 * SEARCH_RANGE + 1) ** 2, a[2], a[3]], lambda *_: float32, bprop
        )

    def construct(self, features1, features2):
        """(N, C, H, W) float32 twice to (N, 81, H, W) float32."""
        if self.fused is not None:
            return self.fused(features1, features2)
        return self.activation(cost_volume(features1, features2))


class Warp(nn.Cell):
    """`warp` in one of its modes."""

    def __init__(self, mode="bilinear") -> None:
        super().__init__()
        self.mode = mode
        gradients = native.operator(
            "WarpGradient", lambda features, flow, dy: (features, flow), lambda *_: (float32, float32)
        )

        def bprop(features, flow, warped, gradient):
            return gradients(features, flow, gradient)

        self.fused = None
        if mode == "bilinear":
            self.fused = native.operator("Warp", lambda features, flow: features, lambda *_: float32, bprop)

    def construct(self, features, flow):
        """(N, C, H, W) float32 and flow (N, 2, H, W) float32 to (N, C, H, W) float32."""
        if self.fused is not None:
            return self.fused(features, flow)
        return warp(features, flow, self.mode)
