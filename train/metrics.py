"""Error metrics of optical flow: per pixel, per pair and over a dataset.

The metrics of a pair are kept as sums and counts over its pixels, so that those of any set of pairs follow from
them, whichever rank evaluated which pair. Definitions in the field:

EPE      Chairs, Things, KITTI: mean over pairs of each pair's mean. Sintel: mean over all pixels of the dataset,
         which is the same if every pair has as many known pixels. (Sintel's masks of invalid pixels are applied
         here if they were converted; RAFT's evaluation, which many papers use, counts those pixels too.)
Fl-all   KITTI: share of all known pixels of the dataset whose error exceeds 3 px and 5 % of the true flow's
         magnitude. (M. Menze and A. Geiger, CVPR 2015.)
N px     Share of all known pixels of the dataset whose error exceeds N px (KITTI 2012, Spring).
s0-10, s10-40, s40+; matched, unmatched
         Sintel (D. Butler et al., ECCV 2012): EPE over all pixels of the dataset whose true flow is below 10 px,
         from 10 to 40 px, above 40 px; that are visible in both frames, in the first only.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

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
"""The elements of `pair_sums`: numbers of pixels, and sums of EPE over pixels, in pixels."""


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The metrics of a set of pairs, as defined at the top of this file.

    EPEs are in pixels, outliers in percent. Without a pixel to average over, `epe`, `zero_epe` and `ratio` are nan
    and the others None.
    """

    pairs: int
    unlabelled: int
    """Pairs without known flow, which are left out of all metrics."""
    pixels: int
    """Pixels with known flow."""
    epe: float
    """Mean over pairs."""
    epe_pixels: float | None
    """Mean over pixels."""
    zero_epe: float
    """EPE of zero flow, mean over pairs."""
    ratio: float
    """EPE relative to that of zero flow."""
    fl_all: float | None
    over_1px: float | None
    over_3px: float | None
    over_5px: float | None
    epe_s0_10: float | None
    epe_s10_40: float | None
    epe_s40_plus: float | None
    epe_matched: float | None
    epe_unmatched: float | None


class Sample(NamedTuple):
    """What is drawn of a pair."""

    image1: np.ndarray
    """(H, W, 3) uint8 RGB."""
    flow: np.ndarray
    """(H, W, 2) float32, the true flow in pixels; nan where unknown."""
    prediction: np.ndarray
    """(H, W, 2) float32, the predicted flow in pixels."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The errors of a network on every pair of a split."""

    sums: np.ndarray
    """(pairs, len(SUMS)) float64, `pair_sums` of each pair in the order of the split."""
    worst: list[int] = dataclasses.field(default_factory=list)
    """Positions of the pairs with the largest EPE, in descending order."""
    samples: dict[int, Sample] = dataclasses.field(default_factory=dict)
    """The pairs to draw that this rank evaluated, by their position in the split."""

    @property
    def epe(self) -> np.ndarray:
        """(pairs,) float64: EPE of each pair in pixels; nan if none of its flow is known."""
        return mean_epe(self.sums)

    @property
    def zero_epe(self) -> np.ndarray:
        """(pairs,) float64: the same for zero flow."""
        return mean_epe(self.sums, "zero_epe")

    def metrics(self, positions: Sequence[int] | slice = slice(None)) -> Metrics:
        """Metrics of all pairs, or of those at some positions.

        `epe_matched` is None, as `epe_unmatched` is, if no pixel of the split is occluded: it has no masks.
        """
        metrics = compute_metrics(self.sums[positions])
        if not self.sums[:, SUMS.index("pixels_unmatched")].any():
            return dataclasses.replace(metrics, epe_matched=None)
        return metrics


def end_point_error(prediction: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """End-point error (EPE) of each pixel.

    Args:
        prediction: (..., 2) in pixels.
        flow: (..., 2) in pixels.

    Returns:
        (...) float32: Euclidean distance of the two, in pixels.
    """
    difference = np.asarray(prediction, np.float32) - flow
    return np.sqrt(np.square(difference).sum(-1))


def pair_sums(prediction: np.ndarray, flow: np.ndarray, valid: np.ndarray, occluded: np.ndarray) -> np.ndarray:
    """Sums and counts over the known pixels of one pair, from which `Metrics` are computed.

    Args:
        prediction: (H, W, 2) in pixels.
        flow: (H, W, 2) in pixels.
        valid: (H, W), non-zero where the flow is known.
        occluded: (H, W), non-zero where a pixel of the first frame is not visible in the second.

    Returns:
        (len(SUMS),) float64, in the order of `SUMS`. Where the prediction is nan, so is the error, which counts as
        an outlier.
    """
    known = np.asarray(valid) > 0
    flow, hidden = flow[known], occluded[known] > 0
    error = end_point_error(prediction[known], flow)
    magnitude = end_point_error(np.zeros_like(flow), flow)
    slow, fast = magnitude < 10, magnitude > 40
    over = [~(error <= limit) for limit in (1, 3, 5)]
    sums = [
        error.size,
        error.sum(dtype=np.float64),
        magnitude.sum(dtype=np.float64),
        (over[1] & ~(error <= 0.05 * magnitude)).sum(),
        *(outlier.sum() for outlier in over),
    ]
    for region in (slow, ~(slow | fast), fast, ~hidden, hidden):
        sums += [region.sum(), error[region].sum(dtype=np.float64)]
    return np.array(sums, np.float64)


def mean_epe(sums: np.ndarray, column: str = "epe") -> np.ndarray:
    """Mean EPE of each pair.

    Args:
        sums: (pairs, len(SUMS)) float64, a row of `pair_sums` for each pair.
        column: "epe", or "zero_epe" for that of zero flow.

    Returns:
        (pairs,) float64 in pixels; nan for a pair without known flow.
    """
    pixels = sums[:, SUMS.index("pixels")]
    return sums[:, SUMS.index(column)] / np.where(pixels > 0, pixels, np.nan)


def compute_metrics(sums: np.ndarray) -> Metrics:
    """The metrics of a set of pairs.

    Args:
        sums: (pairs, len(SUMS)) float64, a row of `pair_sums` for each pair.
    """
    total = dict(zip(SUMS, sums.sum(0).tolist(), strict=True))
    known = sums[:, SUMS.index("pixels")] > 0
    epe, zero_epe = (
        float(mean_epe(sums[known], column).mean()) if known.any() else float("nan") for column in ("epe", "zero_epe")
    )

    def share(numerator: str, denominator: str, scale: float = 1.0) -> float | None:
        return scale * total[numerator] / total[denominator] if total[denominator] else None

    return Metrics(
        pairs=len(sums),
        unlabelled=int((~known).sum()),
        pixels=int(total["pixels"]),
        epe=epe,
        epe_pixels=share("epe", "pixels"),
        zero_epe=zero_epe,
        ratio=epe / zero_epe if zero_epe else float("nan"),
        **{name: share(name, "pixels", 100) for name in OUTLIERS},
        **{f"epe_{region}": share(f"epe_{region}", f"pixels_{region}") for region in REGIONS},
    )


def find_worst(sums: np.ndarray, positions: Iterable[int], count: int) -> list[int]:
    """The positions of the `count` pairs with the largest EPE, in descending order.

    Pairs without known flow are left out; a prediction of nan is worst of all.

    Args:
        sums: (pairs, len(SUMS)) float64, a row of `pair_sums` for each pair.
        positions: of the pairs to choose from.
        count: how many to return at most.
    """
    epe = np.nan_to_num(mean_epe(sums), nan=np.inf)
    known = [position for position in positions if sums[position, SUMS.index("pixels")] > 0]
    return sorted(known, key=lambda position: (-epe[position], position))[:count]
