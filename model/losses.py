"""Multi-scale training losses of PWC-Net, for dense and for sparse ground truth."""

from mindspore import float32, nn, ops

from model.pwcnet import DIV_FLOW

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

    def __init__(self, robust=False):
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
            if self.robust:
                distance = ops.pow(difference.abs().sum(1) + ROBUST_EPSILON, ROBUST_EXPONENT)
            else:
                distance = norm(difference)
            losses = losses + ((distance * present[:, 0]).sum() * (weight / n),)
        return ops.stack(losses)


def norm(vectors):
    """Euclidean norm over axis 1 whose gradient at zero is zero, not infinite."""
    squares = vectors.square().sum(1)
    nonzero = squares > 0
    safe = ops.select(nonzero, squares, ops.ones_like(squares))
    return ops.select(nonzero, safe.sqrt(), ops.zeros_like(squares))
