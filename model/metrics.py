"""Error measures of optical flow."""

import numpy as np


def end_point_error(prediction, flow):
    """End-point error (EPE) of each pixel.

    Args:
        prediction, flow: (..., 2) in pixels.

    Returns:
        (...) float32 in pixels: the Euclidean distance of the two.
    """
    difference = np.asarray(prediction, np.float32) - flow
    return np.sqrt(np.square(difference).sum(-1))


def mean_epe(prediction, flow, valid):
    """Mean EPE of one pair over its known pixels, summed in float64.

    Args:
        prediction, flow: (H, W, 2) in pixels.
        valid: (H, W), non-zero where the flow is known.

    Returns:
        float in pixels; nan if no pixel is known.
    """
    known = np.asarray(valid) > 0
    if not known.any():
        return float("nan")
    return float(end_point_error(prediction, flow)[known].mean(dtype=np.float64))
