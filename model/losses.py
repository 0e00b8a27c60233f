"""Multi-scale training losses of PWC-Net, for dense and for sparse ground truth."""

import numpy as np
from mindspore import Tensor, float32, nn, ops

from model.pwcnet import DIV_FLOW
from model.reductions import ordered_sum

LEVEL_WEIGHTS = (0.32, 0.08, 0.02, 0.01, 0.005)
"""Weight of each flow in the loss, coarse to fine (Sun et al. 2018, section 4)."""
ROBUST_EPSILON, ROBUST_EXPONENT = 0.01, 0.4


def downsample_flow(flow, valid, height, width):
    """Average a full-resolution flow over the blocks of a pyramid level.

    Args:
        flow: (N, 2, H, W) float32 in pixels.
        valid: (N, 1, H, W) float32, 1 where the flow is known.
        height, width: size of the level; they divide H and W.

    Returns:
        The mean over each block's known pixels, (N, 2, height, width), and (N, 1, height, width)
        float32, 1 where the block has any.
    """
    n, _, full_height, full_width = flow.shape
    blocks = (height, full_height // height, width, full_width // width)
    total = (flow * valid).reshape(n, 2, *blocks).sum((3, 5))
    count = valid.reshape(n, 1, *blocks).sum((3, 5))
    return total / ops.maximum(count, 1.0), (count > 0).astype(float32)


class MultiScaleLoss(nn.Cell):
    """Weighted sum over the pyramid of a per-pixel distance summed over the pixels.

    Args:
        robust: False, the Euclidean norm (equation 3); True, the fine-tuning loss
            (|d|_1 + 0.01)^0.4 (equation 4).
    """

    length = len(LEVEL_WEIGHTS)
    """Of the loss vector."""

    def __init__(self, robust=False) -> None:
        super().__init__()
        self.robust = robust

    def construct(self, flows, flow, valid):
        """Losses of a batch.

        Args:
            flows: the network's flows, coarse to fine, (N, 2, h, w) float32.
            flow: (N, 2, H, W) float32 ground truth in pixels; its values matter only where valid.
            valid: (N, 1, H, W) float32, 1 where it is known and 0 elsewhere.

        Returns:
            (5,) float32: weighted loss of each level, summed over pixels and divided by N. The
            loss to minimise is their sum.
        """
        known = ops.select(ops.broadcast_to(valid, flow.shape) > 0, flow, ops.zeros_like(flow))
        losses = ()
        for weight, prediction in zip(LEVEL_WEIGHTS, flows):
            n, _, height, width = prediction.shape
            target, present = downsample_flow(known, valid, height, width)
            difference = prediction - target * DIV_FLOW
            distance = robust_norm(difference) if self.robust else norm(difference)
            losses = losses + (ordered_sum(distance * present[:, 0]) * (weight / n),)
        return ops.stack(losses)


class UpsampledLoss(nn.Cell):
    """Weighted sum over the pyramid of the robust distance at full resolution, for sparse flow.

    No average of the few known pixels in a block is the flow of the block, so every prediction is
    upsampled bilinearly instead, and the distance (|d|_1 + 0.01)^0.4 (Sun et al. 2018, equation 4)
    is summed over the known pixels. With `LEVEL_WEIGHTS` and equal distances the levels contribute
    74, 18, 5, 2 and 1 %, coarse to fine; where targets are averaged, a level has four times the
    blocks of the coarser one, and the finest contributes most.

    The loss is that of mmflow's KITTI fine-tuning of PWC-Net (`MultiLevelEPE`, resize_flow
    "upsample"). IRR's (`MultiScaleEPE_PWC_Bi_Occ_upsample_KITTI`) has other weights, for a network
    with seven outputs, divides by each sample's share of known pixels, and takes the Euclidean norm.

    Args:
        align_corners: of the upsampling, as the network upsamples its result: IRR yes, mmflow no.
    """

    length = len(LEVEL_WEIGHTS)
    """Of the loss vector."""

    def __init__(self, align_corners: bool = True) -> None:
        super().__init__()
        self.align_corners = align_corners

    def construct(self, flows, flow, valid):
        """Losses of a batch; arguments and result are those of `MultiScaleLoss.construct`."""
        n, _, height, width = flow.shape
        known = ops.select(ops.broadcast_to(valid, flow.shape) > 0, flow, ops.zeros_like(flow))
        target = known * DIV_FLOW
        losses = ()
        for weight, prediction in zip(LEVEL_WEIGHTS, flows):
            difference = upsample(prediction, height, width, self.align_corners) - target
            losses = losses + (ordered_sum(robust_norm(difference) * valid[:, 0]) * (weight / n),)
        return ops.stack(losses)


def make_loss(name: str, align_corners: bool = True) -> nn.Cell:
    """The loss that a recipe names: "multiscale", "robust" or "sparse".

    Args:
        name: the recipe's `loss`.
        align_corners: the network's attribute of that name.

    Raises:
        ValueError: no such loss.
    """
    if name == "multiscale":
        return MultiScaleLoss()
    if name == "robust":
        return MultiScaleLoss(robust=True)
    if name == "sparse":
        return UpsampledLoss(align_corners)
    raise ValueError(f"loss is {name!r}, expected multiscale, robust or sparse")


def upsample(flow, height, width, align_corners):
    """Resize a flow (N, 2, h, w) bilinearly to (N, 2, height, width), its values unchanged.

    As two matrix products, which on the CPU take a fifth less time for the whole loss and its gradient
    than MindSpore's bilinear resizing (416 in place of 523 ms, batch 4 at 320x896 on two cores).
    """
    n, channels, low_height, low_width = flow.shape
    rows = interpolation_matrix(low_height, height, align_corners)
    columns = interpolation_matrix(low_width, width, align_corners)
    wide = ops.MatMul(transpose_b=True)(flow.reshape(-1, low_width), columns)
    rows = ops.broadcast_to(rows.expand_dims(0), (n * channels, height, low_height))
    tall = ops.BatchMatMul()(rows, wide.reshape(n * channels, low_height, width))
    return tall.reshape(n, channels, height, width)


@ops.constexpr
def interpolation_matrix(low: int, high: int, align_corners: bool) -> Tensor:
    """What linear interpolation from `low` to `high` pixels multiplies a line by, (high, low)."""
    pixels = np.arange(high)
    if align_corners:
        place = pixels * ((low - 1) / max(high - 1, 1))
    else:
        place = np.clip((pixels + 0.5) * (low / high) - 0.5, 0, low - 1)
    return Tensor(np.maximum(1 - np.abs(place[:, None] - np.arange(low)), 0), float32)


def robust_norm(vectors):
    """(|v|_1 + 0.01)^0.4 over axis 1."""
    return ops.pow(vectors.abs().sum(1) + ROBUST_EPSILON, ROBUST_EXPONENT)


def norm(vectors):
    """Euclidean norm over axis 1 whose gradient at zero is zero, not infinite."""
    squares = vectors.square().sum(1)
    nonzero = squares > 0
    safe = ops.select(nonzero, squares, ops.ones_like(squares))
    return ops.select(nonzero, safe.sqrt(), ops.zeros_like(squares))
