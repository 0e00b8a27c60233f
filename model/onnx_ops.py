"""The network's operators said with those that MindSpore 2.8.0 can write as ONNX.

It can't write a bilinear resize, `grid_sample` or `rsqrt`. Each function here stands for one of the
same name in `model.operators` or `model.pwcnet`; `model.export` puts it in its place.
"""

import numpy as np
from mindspore import Tensor, float32, int32, ops
from mindspore.ops import constexpr


def resize(x, size, align_corners=True):
    """Resize (N, C, H, W) bilinearly to a size (height, width).

    The sizes are fixed, so that each direction is a product with a constant matrix.
    """
    height, width = size
    if height != x.shape[2]:
        x = ops.matmul(interpolation(x.shape[2], height, align_corners), x)
    if width != x.shape[3]:
        x = ops.matmul(x, interpolation(x.shape[3], width, align_corners).transpose(1, 0))
    return x


@constexpr
def interpolation(before, after, align_corners):
    """The float32 (after, before) matrix of a linear interpolation along one side."""
    place = np.arange(after)
    if align_corners:
        place = place * ((before - 1) / max(after - 1, 1))
    else:
        place = np.clip((place + 0.5) * (before / after) - 0.5, 0, before - 1)
    distance = np.abs(place[:, None] - np.arange(before))
    return Tensor(np.maximum(0, 1 - distance), float32)


def warp(features, flow, mode="bilinear"):
    """`model.operators.warp`, by gathering the four pixels around each place, or the nearest one."""
    n, c, h, w = features.shape
    x = flow[:, 0:1] + Tensor(np.arange(w).reshape(1, 1, 1, w), float32)
    y = flow[:, 1:2] + Tensor(np.arange(h).reshape(1, 1, h, 1), float32)
    inside = ops.logical_and(ops.logical_and(x >= 0, x <= w - 1), ops.logical_and(y >= 0, y <= h - 1))
    x, y = ops.clip_by_value(x, 0, w - 1), ops.clip_by_value(y, 0, h - 1)
    pixels = features.reshape(n, c, h * w)
    if mode == "nearest":
        sampled = take(pixels, ops.floor(x + 0.5), ops.floor(y + 0.5), w)
    else:
        left, top = ops.floor(x), ops.floor(y)
        right, bottom = ops.clip_by_value(left + 1, 0, w - 1), ops.clip_by_value(top + 1, 0, h - 1)
        share_x, share_y = x - left, y - top
        above = take(pixels, left, top, w) * (1 - share_x) + take(pixels, right, top, w) * share_x
        below = take(pixels, left, bottom, w) * (1 - share_x) + take(pixels, right, bottom, w) * share_x
        sampled = above * (1 - share_y) + below * share_y
    return sampled * inside.astype(float32)


def take(pixels, x, y, width):
    """Of (N, C, H * W), the pixels at whole places x and y, (N, 1, H, W); (N, C, H, W)."""
    n, c, _ = pixels.shape
    _, _, h, w = x.shape
    index = (y * width + x).astype(int32).reshape(n, 1, h * w)
    return ops.GatherD()(pixels, 2, ops.tile(index, (1, c, 1))).reshape(n, c, h, w)


def normalize_pair(features1, features2):
    """`model.pwcnet.normalize_pair`, with a division by the square root."""
    both = ops.concat((features1, features2), 1)
    mean = mean_of_all(both)
    deviation = ops.sqrt(mean_of_all((both - mean).square()) + 1e-12)
    return (features1 - mean) / deviation, (features2 - mean) / deviation


def mean_of_all(x):
    """Mean of each sample of (N, C, H, W), one axis after the other; (N, 1, 1, 1).

    ONNX Runtime sums a million numbers at once in float32 with an error that is seen in the flow,
    2e-3 pixels.
    """
    return x.mean(3, keep_dims=True).mean(2, keep_dims=True).mean(1, keep_dims=True)
