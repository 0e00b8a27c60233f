"""Error measures of optical flow: per pixel, per pair and over a set.

A pair's measures are kept as sums and counts over its pixels, so that any set of pairs has its
figures from them, whichever rank had which pair. What the field means by each figure:

EPE      Chairs, Things, KITTI: mean over pairs of each pair's mean. Sintel: mean over all pixels
         of the set, the same where every pair has as many known pixels. (Its masks of invalid
         pixels are heeded here if they were converted; RAFT's evaluation, which many papers took
         over, counts those pixels too.)
Fl-all   KITTI: share of all known pixels of the set, of all pairs together, with an error of over
         3 px and over 5 % of the true flow's length. (M. Menze and A. Geiger, CVPR 2015.)
N px     share of all known pixels of the set with an error of over N px (KITTI 2012, Spring).
s0-10, s10-40, s40+; matched, unmatched
         Sintel (D. Butler et al., ECCV 2012): EPE over all pixels of the set whose true flow is
         below 10 px, of 10 to 40 px, above 40 px; that are seen in both frames, in the first alone.
"""

import numpy as np

REGIONS = ("s0_10", "s10_40", "s40_plus", "matched", "unmatched")
OUTLIERS = ("fl_all", "over_1px", "over_3px", "over_5px")
SUMS = (
    "pixels",
    "epe",
    "zero_epe",
    *OUTLIERS,
    *(f"{kind}_{region}" for region in REGIONS for kind in ("pixels", "epe")),
)
"""What `pair_sums` returns: numbers of pixels, and sums of EPE over pixels in pixels."""


def end_point_error(prediction, flow):
    """End-point error (EPE) of each pixel.

    Args:
        prediction, flow: (..., 2) in pixels.

    Returns:
        (...) float32 in pixels: the Euclidean distance of the two.
    """
    difference = np.asarray(prediction, np.float32) - flow
    return np.sqrt(np.square(difference).sum(-1))


def pair_sums(prediction, flow, valid, occluded):
    """Sums and counts over the known pixels of one pair, from which `figures` come.

    Args:
        prediction, flow: (H, W, 2) in pixels.
        valid: (H, W), non-zero where the flow is known.
        occluded: (H, W), non-zero where the second frame does not show what the first does.

    Returns:
        float64 (len(SUMS),), by the names `SUMS`. Where the prediction is nan the error is, too,
        and counts as an outlier.
    """
    known = np.asarray(valid) > 0
    flow, hidden = flow[known], occluded[known] > 0
    error = end_point_error(prediction[known], flow)
    length = end_point_error(np.zeros_like(flow), flow)
    slow, fast = length < 10, length > 40
    over = [~(error <= limit) for limit in (1, 3, 5)]
    sums = [
        error.size,
        error.sum(dtype=np.float64),
        length.sum(dtype=np.float64),
        (over[1] & ~(error <= 0.05 * length)).sum(),
        *(far.sum() for far in over),
    ]
    for region in (slow, ~(slow | fast), fast, ~hidden, hidden):
        sums += [region.sum(), error[region].sum(dtype=np.float64)]
    return np.array(sums, np.float64)


def pair_means(sums):
    """EPE of each pair and that of a flow of zero, by the sums of the pairs.

    Args:
        sums: float64 (pairs, len(SUMS)), a row of `pair_sums` for each pair.

    Returns:
        Two float64 arrays (pairs,) in pixels; nan for a pair of which no pixel is known.
    """
    pixels, epe, zero = sums[:, 0], sums[:, SUMS.index("epe")], sums[:, SUMS.index("zero_epe")]
    pixels = np.where(pixels > 0, pixels, np.nan)
    return epe / pixels, zero / pixels


def figures(sums):
    """The figures of a set of pairs; the top of this file says how they are formed.

    Args:
        sums: float64 (pairs, len(SUMS)), a row of `pair_sums` for each pair.

    Returns:
        A dict of `pairs`, `pixels` (those whose flow is known), in pixels `epe` (mean over pairs),
        `epe_pixels` (mean over pixels), `zero_epe` (as `epe`, of a flow of zero) and `epe_` with
        each of `REGIONS`, in percent `OUTLIERS`, and `ratio`, EPE to that of zero flow. Without a
        pixel to average, `epe`, `zero_epe` and `ratio` are nan and the others None.
    """
    total = dict(zip(SUMS, sums.sum(0)))
    pixels = total["pixels"]
    any_known = sums[:, 0] > 0
    epe, zero_epe = (float(means[any_known].mean()) if any_known.any() else float("nan") for means in pair_means(sums))
    result = {
        "pairs": len(sums),
        "pixels": int(pixels),
        "epe": epe,
        "epe_pixels": total["epe"] / pixels if pixels else None,
        "zero_epe": zero_epe,
        "ratio": epe / zero_epe if zero_epe else float("nan"),
    }
    for name in OUTLIERS:
        result[name] = 100 * total[name] / pixels if pixels else None
    for region in REGIONS:
        count = total[f"pixels_{region}"]
        result[f"epe_{region}"] = total[f"epe_{region}"] / count if count else None
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in result.items()}
