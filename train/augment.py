"""Augmentation of a training pair: affine motion, flips, crop, colours, noise, erased rectangles.

The ranges are those of mmflow's training of PWC-Net on FlyingChairs (configs/_base_/datasets/flyingchairs_384x448.py).
They follow "Iterative Residual Refinement" (IRR; Hur and Roth, CVPR 2019), except that IRR rotates by up to 11.5
degrees and, between the frames, by 0.9. IRR follows FlowNet 2.0 (Ilg et al., CVPR 2017) and PWC-Net (Sun et al., CVPR
2018).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

if TYPE_CHECKING:
    from prep.datasets import Sample
    from train.recipe import Recipe

# mmflow's ranges, those at a strength of 1.
ROTATION = np.deg2rad(10)
SQUEEZE = (0.86, 1.16)  # wider by this factor, and lower by the same
RELATIVE_ROTATION = np.deg2rad(1)
RELATIVE_ZOOM = 0.015
RELATIVE_SHIFT = 0.00375  # of the frame's width and height

# RGB to luma and two chroma axes (YIQ of the NTSC standard), in which a change of hue is a rotation and one of
# saturation a scaling.
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = np.linalg.inv(TO_YIQ)

# Sides of erased rectangles, relative to the shorter side of the crop. RAFT (Teed and Deng, ECCV 2020) erases one or
# two of 50 to 100 pixels in crops of 368 to 400 rows.
ERASED_SIDES = (1 / 8, 1 / 4)

NO_MAP: Any = None  # second map of cv2.remap, whose types do not allow None

POOL_SIGMA = 32  # standard deviation of the noise pool: int8 then holds four on each side


@dataclass
class Augment:
    """Makes a random view of a pair, a pure function of the pair and the random generator.

    Args:
        crop: (height, width) of the result in pixels. Without an affine option or a scale the pair must be at least
            as large.
        flip: mirror half of the pairs left to right.
        vertical_flip: mirror half of the pairs upside down.
        scale: (smallest, largest) zoom of both frames. Where that would show what lies beyond the border of a frame,
            the zoom is larger, by as much as necessary.
        affine: strength of the motion that both frames share; at 1, rotation by up to 10 degrees and squeeze by 0.86
            to 1.16. The position is uniform over where the crop fits.
        relative_affine: strength of the motion of the second frame relative to the first; at 1, rotation by up to 1
            degree, zoom by up to 1.5 % and translation by up to 0.375 % of the frame's size.
        exposure: the gain of all channels and that of each are drawn from 1 +- exposure, gamma from 1 / (1 +
            exposure) to 1 + exposure; the same for both images.
        jitter: brightness, contrast and saturation are drawn from 1 +- jitter, the hue is rotated by up to that share
            of the full circle (0.5: any hue); the same for both images.
        relative_jitter: as jitter, for the second image relative to the first.
        gamma: (smallest, largest) exponent; the same for both images.
        noise: largest standard deviation of Gaussian noise, for values in [0, 1]; the deviation is drawn for each
            pair, the noise for each value of each image.
        eraser: probability that one or two rectangles of the second image are filled with its mean colour. The flow
            there stays valid, as it does at occlusions.
    """

    crop: tuple[int, int]
    flip: bool = False
    vertical_flip: bool = False
    scale: tuple[float, float] = (1.0, 1.0)
    affine: float = 0.0
    relative_affine: float = 0.0
    exposure: float = 0.0
    jitter: float = 0.0
    relative_jitter: float = 0.0
    gamma: tuple[float, float] = (1.0, 1.0)
    noise: float = 0.0
    eraser: float = 0.0

    def __post_init__(self) -> None:
        # Drawing normal numbers takes longer than everything else together, so each pair takes a slice of a pool, at a
        # random offset.
        values = 2 * 3 * self.crop[0] * self.crop[1]
        self.pool = normal_numbers(2 * values) if self.noise else None
        self.warps = tuple(self.scale) != (1, 1) or self.affine > 0 or self.relative_affine > 0

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Augment:
        """The augmentation of a recipe, whose keys are the arguments."""
        return cls(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(cls)})

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Make a view of a pair.

        Args:
            sample: the pair, which stays as it is; its flow is 0 where unknown.
            rng: the only source of randomness.

        Returns:
            The view, of the crop's size, in new arrays; flow is 0 where unknown. Other entries pass through.

        Raises:
            ValueError: the pair is smaller than the crop, and there is no affine option or scale.
        """
        pair, flow, valid = self.warp(sample, rng) if self.warps else self.cut(sample, rng)
        image1, image2 = self.change_colours(pair, rng)
        return sample | {"image1": image1, "image2": image2, "flow": flow, "valid": valid}

    def cut(self, sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Crop and flip without interpolation.

        Returns:
            Both images (2, height, width, 3) uint8, flow (height, width, 2) float32, valid (height, width) uint8.
        """
        height, width = self.crop
        full_height, full_width = sample["flow"].shape[:2]
        if height > full_height or width > full_width:
            raise ValueError(
                f"a pair of {full_height}x{full_width} is smaller than the crop of {height}x{width}; use a smaller "
                "crop, or an affine or scale option"
            )
        top = rng.integers(full_height - height + 1)
        left = rng.integers(full_width - width + 1)
        mirrored = self.flip and rng.random() < 0.5, self.vertical_flip and rng.random() < 0.5
        window = np.s_[top : top + height, left : left + width]
        pair = np.empty((2, height, width, 3), np.uint8)
        mirror(sample["image1"][window], mirrored, pair[0])
        mirror(sample["image2"][window], mirrored, pair[1])
        flow = mirror(sample["flow"][window], mirrored, np.empty((height, width, 2), np.float32))
        for axis, turned in enumerate(mirrored):
            if turned:
                flow[..., axis] *= -1
        valid = mirror(sample["valid"][window], mirrored, np.empty((height, width), np.uint8))
        return pair, flow, valid

    def warp(self, sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Affine motion, flip and crop in one step; returns as `cut`."""
        height, width = self.crop
        first, second = self.draw_motion(rng, *sample["flow"].shape[:2])
        pair = np.empty((2, height, width, 3), np.uint8)
        for image, motion, result in ((sample["image1"], first, pair[0]), (sample["image2"], second, pair[1])):
            cv2.warpAffine(image, motion[:2], (width, height), result, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
        flow, valid = warp_flow(sample["flow"], sample["valid"], first, second, self.crop)
        return pair, flow, valid

    def draw_motion(self, rng: np.random.Generator, full_height: int, full_width: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the motions of the two frames, of a size in pixels.

        Returns:
            Two (3, 3) float64 matrices that map pixels (x, y, 1) of the first and of the second frame to pixels of
            the crop. All of the crop comes from inside both frames.
        """
        turn = rotation(self.affine * ROTATION * rng.uniform(-1, 1))
        squeeze = rng.uniform(*np.power(SQUEEZE, self.affine))
        signs = [-1 if on and rng.random() < 0.5 else 1 for on in (self.flip, self.vertical_flip)]
        shape = np.diag(signs) @ turn @ np.diag([squeeze, 1 / squeeze])
        relative = self.draw_relative(rng, full_height, full_width)

        # The corners of both crops in the first frame before the zoom, relative to the point that becomes the centre.
        # The zoom is drawn from the range in which both crops fit, the position from where they fit.
        half = (np.array(self.crop[::-1]) - 1) / 2
        corners = half * [[-1, -1], [1, -1], [-1, 1], [1, 1]]
        corners = np.concatenate([corners, apply(inverse(relative), corners)])
        corners = corners @ inverse(shape).T
        low, high = corners.min(0), corners.max(0)
        room = np.array([full_width - 1, full_height - 1])
        needed = ((high - low) / room).max()
        zoom = rng.uniform(*np.maximum(self.scale, needed))
        slack = np.maximum(room - (high - low) / zoom, 0)
        middle = slack * rng.random(2) - low / zoom

        common = affine_matrix(zoom * shape, -zoom * shape @ middle)
        to_corner = affine_matrix(np.eye(2), half)
        return to_corner @ common, to_corner @ relative @ common

    def draw_relative(self, rng: np.random.Generator, full_height: int, full_width: int) -> np.ndarray:
        """Draw the second frame's own motion: (3, 3) float64, in pixels relative to the centre of the crop."""
        strength = self.relative_affine
        angle, zoom, *shift = strength * rng.uniform(-1, 1, 4)
        return affine_matrix(
            (1 + RELATIVE_ZOOM * zoom) * rotation(RELATIVE_ROTATION * angle),
            RELATIVE_SHIFT * np.multiply(shift, [full_width, full_height]),
        )

    def change_colours(self, pair: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Change the colours of both images, (2, height, width, 3) uint8, erase rectangles and add noise.

        All linear changes are one matrix and all curves one table, so two passes over the images suffice.
        """
        shape, pair = pair.shape, pair.reshape(-1, *pair.shape[2:])  # stacked to one image, for one pass
        image2 = np.s_[shape[1] :]
        if self.jitter:
            pair = cv2.transform(pair, draw_colours(rng, self.jitter, mean_colour(pair)))
        if self.relative_jitter:
            colours = draw_colours(rng, self.relative_jitter, mean_colour(pair[image2]))
            pair[image2] = cv2.transform(pair[image2], colours)
        if self.exposure or tuple(self.gamma) != (1, 1):
            pair = cv2.LUT(pair, self.draw_curves(rng))
        if self.eraser and rng.random() < self.eraser:
            erase_rectangles(pair[image2], rng)
        if self.pool is not None:
            strength = rng.uniform(-self.noise, self.noise) * 255 / POOL_SIGMA
            start = rng.integers(len(self.pool) - pair.size + 1)
            noise = self.pool[start : start + pair.size].reshape(pair.shape)
            pair = cv2.addWeighted(pair, 1, noise, strength, 0, dtype=cv2.CV_8U)
        return pair.reshape(shape)

    def draw_curves(self, rng: np.random.Generator) -> np.ndarray:
        """Draw exposure and gamma as a lookup table, (1, 256, 3) uint8."""
        exponent, gains = 1.0, np.ones(3)
        if self.exposure:
            exponent = (1 + self.exposure) ** rng.uniform(-1, 1)
            gains = rng.uniform(1 - self.exposure, 1 + self.exposure, 3) ** 0.5
            gains = gains * rng.uniform(1 - self.exposure, 1 + self.exposure)
        curves = (np.arange(256)[:, None] / 255) ** exponent * gains
        curves = np.minimum(curves, 1) ** rng.uniform(*self.gamma)
        return np.rint(255 * curves).astype(np.uint8)[None]


# --- Geometry -------------------------------------------------------------------------------------


def rotation(angle: float) -> np.ndarray:
    """(2, 2) matrix that rotates by an angle in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def affine_matrix(linear: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(3, 3) matrix of x -> linear @ x + shift."""
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, shift
    return matrix


def inverse(matrix: np.ndarray) -> np.ndarray:
    """The inverse of a small matrix.

    Not by numpy.linalg: OpenBLAS wakes a thread on each core for it, and these then spin for tens of milliseconds on
    cores that the network needs (measured with 0.3.23).
    """
    return cv2.invert(matrix)[1]


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map points (N, 2) by a (3, 3) affine matrix."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def mirror(source: np.ndarray, mirrored: tuple[bool, bool], result: np.ndarray) -> np.ndarray:
    """Copy `source` to `result`, which is contiguous, and return that; mirrored (left to right, upside down)."""
    if any(mirrored):
        return cv2.flip(source, {(True, False): 1, (False, True): 0, (True, True): -1}[mirrored], result)
    np.copyto(result, source)
    return result


def warp_flow(
    flow: np.ndarray, valid: np.ndarray, first: np.ndarray, second: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Flow and validity after an affine motion of each frame.

    What was at x in the first frame and at x + f(x) in the second moves to p = A1 x and to A2 (x + f(x)), so with
    x = A1^-1 p the new flow is

        f'(p) = A2 (x + f(x)) - p = (A2 A1^-1 - 1) p + L2 f(x),    L2 the linear part of A2.

    f is interpolated between four known pixels. Where one of them is unknown, f' is the flow of the nearest pixel, or
    unknown if that is. So unknown flow never leaks into the result, and a sparse field keeps its density.

    Args:
        flow: (H, W, 2) float32 in pixels.
        valid: (H, W) uint8, non-zero where the flow is known.
        first: A1, a (3, 3) matrix from pixels (x, y, 1) of the first frame to new ones.
        second: A2, the same for the second frame.
        size: (height, width) of the result.

    Returns:
        Flow (height, width, 2) float32, 0 where unknown, and validity (height, width) uint8, 0 or 1.
    """
    if not valid.any():  # a pair without ground truth
        return np.zeros((*size, 2), np.float32), np.zeros(size, np.uint8)
    back = inverse(first)
    x, y = affine_planes(back, size)
    # Rounding can put a position on the border outside.
    np.clip(x, 0, flow.shape[1] - 1, x)
    np.clip(y, 0, flow.shape[0] - 1, y)

    moved, known = interpolate(flow, x, y), None
    if not valid.all():
        known = (valid != 0).astype(np.uint8)
        whole = known[:-1, :-1] & known[:-1, 1:] & known[1:, :-1] & known[1:, 1:]
        whole = gather(whole, *lower_taps(flow, x, y))
        nearest = np.rint(x).astype(np.int16), np.rint(y).astype(np.int16)
        known = gather(known, *nearest)
        moved = cv2.copyTo(moved, whole, gather(flow, *nearest))
    moved = cv2.transform(moved, second[:2, :2])
    moved += cv2.merge(affine_planes(second @ back - np.eye(3), size))
    if known is None:
        return moved, np.ones(size, np.uint8)
    return cv2.copyTo(moved, known), known


def affine_planes(matrix: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """Where a (3, 3) affine matrix maps each pixel of a plane of `size` (H, W): x and y, each (H, W) float32."""
    column = np.arange(size[1], dtype=np.float32)
    row = np.arange(size[0], dtype=np.float32)[:, None]
    matrix = matrix.astype(np.float32)  # or the planes would become float64
    return [matrix[i, 0] * column + (matrix[i, 1] * row + matrix[i, 2]) for i in (0, 1)]


def interpolate(flow: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sample flow (H, W, 2) float32 bilinearly at positions x, y (h, w) inside it; returns (h, w, 2).

    cv2.remap would round the positions to 1/32 pixel, an error of hundredths of a pixel under a strong zoom or
    rotation; here it only fetches the four neighbours.
    """
    left, top = lower_taps(flow, x, y)
    right, down = x - left, y - top
    right, down = cv2.merge([right, right]), cv2.merge([down, down])
    upper, lower = (blend(gather(flow[rows:], left, top), gather(flow[rows:, 1:], left, top), right) for rows in (0, 1))
    return blend(upper, lower, down)


def blend(start: np.ndarray, end: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """start + fraction * (end - start), in the memory of `end`."""
    end -= start
    end *= fraction
    end += start
    return end


def lower_taps(flow: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and row, int16, of the upper left of the four pixels around each position x, y."""
    height, width = flow.shape[:2]
    return (np.minimum(x.astype(np.int16), width - 2), np.minimum(y.astype(np.int16), height - 2))


def gather(array: np.ndarray, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """array[row, column] for indices (h, w) int16, without holding the interpreter lock."""
    return cv2.remap(array, cv2.merge([column, row]), NO_MAP, cv2.INTER_NEAREST)


# --- Colours --------------------------------------------------------------------------------------


def mean_colour(image: np.ndarray) -> np.ndarray:
    """The mean colour of an image (H, W, 3): (3,) float64."""
    return np.array(cv2.mean(image)[:3])


def draw_colours(rng: np.random.Generator, strength: float, mean: np.ndarray) -> np.ndarray:
    """Draw brightness, contrast, saturation and hue as one (3, 4) float64 matrix on (R, G, B, 1).

    Each is defined as in torchvision's ColorJitter, except the hue: it is rotated about the grey axis at constant
    luma, not around the hexagon of HSV. The order does not matter, because contrast is relative to the mean luma, and
    neither saturation nor hue changes luma.

    Args:
        rng: random generator.
        strength: as `Augment.jitter`.
        mean: (3,) mean colour of the image.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    turn = 2 * np.pi * min(strength, 0.5) * rng.uniform(-1, 1)
    chroma = np.eye(3)
    chroma[1:, 1:] = saturation * rotation(turn)
    linear = contrast * FROM_YIQ @ chroma @ TO_YIQ
    offset = np.full((3, 1), (1 - contrast) * TO_YIQ[0] @ mean)
    return brightness * np.hstack([linear, offset])


def erase_rectangles(image: np.ndarray, rng: np.random.Generator) -> None:
    """Fill one or two random rectangles of an image (H, W, 3) with its mean colour, in place."""
    height, width = image.shape[:2]
    colour = np.rint(mean_colour(image)).astype(np.uint8)
    for _ in range(rng.integers(1, 3)):
        rows, columns = (min(height, width) * rng.uniform(*ERASED_SIDES, 2)).astype(int)
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        image[top : top + rows, left : left + columns] = colour


def normal_numbers(count: int) -> np.ndarray:
    """`count` standard normal numbers times POOL_SIGMA, int8, always the same."""
    numbers = np.random.Generator(np.random.Philox(0)).standard_normal(count, np.float32)
    return np.clip(np.rint(POOL_SIGMA * numbers), -127, 127).astype(np.int8)
