"""The backend "exportable": operators made of those that MindSpore 2.8.0 can write as ONNX.

It cannot write a bilinear resize, `grid_sample` or `rsqrt`. Each function has the signature of its namesake in
`model.resizing` or `model.operators`.
"""

import numpy as np
from mindspore import Tensor, float32, int32, ops

from model.resizing import interpolation_matrix


def resize(x: Tensor, size: tuple[int, int], align_corners: bool = True) -> Tensor:
    """`model.resizing.resize` as one product with a constant matrix per direction."""
    height, width = size
    if height != x.shape[2]:
        x = ops.matmul(interpolation_matrix(x.shape[2], height, align_corners), x)
    if width != x.shape[3]:
        x = ops.matmul(x, interpolation_matrix(x.shape[3], width, align_corners).transpose(1, 0))
    return x


def warp(features: Tensor, flow: Tensor, mode: str = "bilinear") -> Tensor:
    """`model.operators.warp` by gathering the four pixels around each position, or the nearest one."""
    n, c, h, w = features.shape
    x = flow[:, 0:1] + Tensor(np.arange(w).reshape(1, 1, 1, w), float32)
    y = flow[:, 1:2] + Tensor(np.arange(h).reshape(1, 1, h, 1), float32)
    inside = ops.logical_and(ops.logical_and(x >= 0, x <= w - 1), ops.logical_and(y >= 0, y <= h - 1))
    x, y = ops.clip_by_value(x, 0, w - 1), ops.clip_by_value(y, 0, h - 1)
    pixels = features.reshape(n, c, h * w)
    if mode == "nearest":
        sampled = gather_pixels(pixels, ops.floor(x + 0.5), ops.floor(y + 0.5), w)
    else:
        left, top = ops.floor(x), ops.floor(y)
        right, bottom = ops.clip_by_value(left + 1, 0, w - 1), ops.clip_by_value(top + 1, 0, h - 1)
        weight_x, weight_y = x - left, y - top
        top_left, top_right = gather_pixels(pixels, left, top, w), gather_pixels(pixels, right, top, w)
        bottom_left, bottom_right = gather_pixels(pixels, left, bottom, w), gather_pixels(pixels, right, bottom, w)
        above = top_left * (1 - weight_x) + top_right * weight_x
        below = bottom_left * (1 - weight_x) + bottom_right * weight_x
        sampled = above * (1 - weight_y) + below * weight_y
    return sampled * inside.astype(float32)


def gather_pixels(pixels: Tensor, x: Tensor, y: Tensor, width: int) -> Tensor:
    """The pixels of (N, C, H * W) at integer positions x and y, (N, 1, H, W); (N, C, H, W)."""
    n, c, _ = pixels.shape
    _, _, h, w = x.shape
    index = (y * width + x).astype(int32).reshape(n, 1, h * w)
    return ops.GatherD()(pixels, 2, ops.tile(index, (1, c, 1))).reshape(n, c, h, w)


def normalize_pair(features1: Tensor, features2: Tensor) -> tuple[Tensor, Tensor]:
    """`model.operators.normalize_pair` with a division by the square root."""
    both = ops.concat((features1, features2), 1)
    mean = sample_mean(both)
    deviation = ops.sqrt(sample_mean((both - mean).square()) + 1e-12)
    return (features1 - mean) / deviation, (features2 - mean) / deviation


def sample_mean(x: Tensor) -> Tensor:
    """The mean of each sample of (N, C, H, W), one axis after the other; (N, 1, 1, 1).

    ONNX Runtime sums a million numbers at once in float32 with an error that shows in the flow, 2e-3 pixels.
    """
    return x.mean(3, keep_dims=True).mean(2, keep_dims=True).mean(1, keep_dims=True)
