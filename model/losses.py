"""Multi-scale training losses of PWC-Net, for dense and for sparse ground truth."""

from mindspore import Tensor, float32, nn, ops

from model.pwcnet import DIV_FLOW
from model.reductions import ordered_sum
from model.resizing import upsample

LEVEL_WEIGHTS = (0.32, 0.08, 0.02, 0.01, 0.005)
"""Weight of each flow in the loss, coarse to fine (Sun et al. 2018, section 4)."""
ROBUST_EPSILON, ROBUST_EXPONENT = 0.01, 0.4


def sum_blocks(values: Tensor, height: int, width: int) -> Tensor:
    """Sum over the blocks of a pyramid level: (N, C, H, W) to (N, C, height, width), which divide H and W."""
    n, c, full_height, full_width = values.shape
    return values.reshape(n, c, height, full_height // height, width, full_width // width).sum((3, 5))


class MultiScaleLoss(nn.Cell):
    """Weighted sum over the pyramid of a per-pixel distance summed over the pixels.

    The target of a level's pixel is the mean over its block's known pixels; a block without any does not count.

    Args:
        robust: False, the Euclidean norm (equation 3); True, the fine-tuning loss
            (|d|_1 + 0.01)^0.4 (equation 4).
    """

    length = len(LEVEL_WEIGHTS)
    """Length of the loss vector."""

    def __init__(self, robust: bool = False) -> None:
        super().__init__()
        self.robust = robust

    def construct(self, flows: tuple[Tensor, ...], flow: Tensor, valid: Tensor) -> Tensor:
        """Losses of a batch.

        Args:
            flows: the network's flows, coarse to fine, (N, 2, h, w) float32.
            flow: (N, 2, H, W) float32 ground truth in pixels; values matter only where valid.
            valid: (N, 1, H, W) float32, 1 where it is known and 0 elsewhere.

        Returns:
            (5,) float32: weighted loss of each level, summed over pixels and divided by N. The
            loss to minimise is their sum.
        """
        total = ops.select(ops.broadcast_to(valid, flow.shape) > 0, flow, ops.zeros_like(flow))
        count = valid
        losses = ()
        for level in range(len(flows) - 1, -1, -1):  # from the finest, of whose blocks the coarser ones are made
            prediction = flows[level]
            n, _, height, width = prediction.shape
            total, count = sum_blocks(total, height, width), sum_blocks(count, height, width)
            difference = prediction - total / ops.maximum(count, 1.0) * DIV_FLOW
            distance = robust_norm(difference) if self.robust else norm(difference)
            present = (count[:, 0] > 0).astype(float32)
            losses = (ordered_sum(distance * present) * (LEVEL_WEIGHTS[level] / n),) + losses
        return ops.stack(losses)


class UpsampledLoss(nn.Cell):
    """Weighted sum over the pyramid of the robust distance at full resolution, for sparse flow.

    An average over the few known pixels of a block is not the flow of the block, so every prediction is
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
    """Length of the loss vector."""

    def __init__(self, align_corners: bool = True) -> None:
        super().__init__()
        self.align_corners = align_corners

    def construct(self, flows: tuple[Tensor, ...], flow: Tensor, valid: Tensor) -> Tensor:
        """Losses of a batch; arguments and result are those of `MultiScaleLoss.construct`."""
        n, _, height, width = flow.shape
        known = ops.select(ops.broadcast_to(valid, flow.shape) > 0, flow, ops.zeros_like(flow))
        target = known * DIV_FLOW
        losses = ()
        for level, prediction in enumerate(flows):
            difference = upsample(prediction, height, width, self.align_corners) - target
            losses = losses + (ordered_sum(robust_norm(difference) * valid[:, 0]) * (LEVEL_WEIGHTS[level] / n),)
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


def robust_norm(vectors: Tensor) -> Tensor:
    """(|v|_1 + 0.01)^0.4 over axis 1."""
    return ops.pow(vectors.abs().sum(1) + ROBUST_EPSILON, ROBUST_EXPONENT)


def norm(vectors: Tensor) -> Tensor:
    """Euclidean norm over axis 1 whose gradient at zero is zero, not infinite."""
    squares = vectors.square().sum(1)
    nonzero = squares > 0
    safe = ops.select(nonzero, squares, ops.ones_like(squares))
    return ops.select(nonzero, safe.sqrt(), ops.zeros_like(squares))
