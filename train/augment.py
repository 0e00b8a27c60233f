"""Augmentation of a training pair: affine motion, flips, crop, colours, noise, hidden rectangles.

After the published training of "Iterative Residual Refinement" (Hur and Roth, CVPR 2019), which
follows FlowNet 2.0 (Ilg et al., CVPR 2017) and PWC-Net (Sun et al., CVPR 2018).
"""

import dataclasses
from dataclasses import dataclass

import cv2
import numpy as np

# The reference variant's ranges, those of a strength of 1.
ROTATION = np.deg2rad(10)
SQUEEZE = (0.86, 1.16)  # wider by this factor and lower by it
RELATIVE_ROTATION = np.deg2rad(1)
RELATIVE_ZOOM = 0.015
RELATIVE_SHIFT = 0.00375  # of the frame's width and height

# RGB to luma and two axes of colour (YIQ, the NTSC standard's), in which a change of hue is a
# rotation and of saturation a scale.
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = np.linalg.inv(TO_YIQ)

# Sides of the hidden rectangles, as parts of the crop's shorter side. RAFT (Teed and Deng, ECCV
# 2020) has one or two of 50 to 100 pixels in crops of 368 to 400 rows.
HIDDEN_SIDES = (1 / 8, 1 / 4)

POOL_SIGMA = 32  # of the pool of noise: int8 then holds four standard deviations on each side


@dataclass
class Augment:
    """A random view of a pair. Its randomness comes from the generator that it is handed alone.

    Args:
        crop: (height, width) of the result in pixels. Without the affine options the pair must be
            at least as large.
        flip, vertical_flip: mirror half of the pairs left to right, and half upside down.
        scale: (smallest, largest) enlargement of both frames. Where that would show what lies
            beyond a frame's border, larger ones are drawn, by as much as is needed.
        affine: strength of the motion that both frames have in common; at 1 rotation by up to 10
            degrees and squeeze by 0.86 to 1.16. The place is random wherever the crop fits.
        relative_affine: strength of the second frame's motion against the first; at 1 rotation by
            up to 1 degree, zoom by up to 1.5 % and a shift by up to 0.375 % of the frame's size.
        exposure: the gains of all channels and of each are drawn from 1 +- exposure, and gamma
            from 1 / (1 + exposure) to 1 + exposure, the same for both images.
        jitter: brightness, contrast and saturation are drawn from 1 +- jitter, the hue is turned by
            up to that part of the whole circle (0.5 is any hue), the same for both images.
        relative_jitter: as jitter, for the second image against the first.
        gamma: (smallest, largest) exponent of the grey curve, the same for both images.
        noise: largest standard deviation of Gaussian noise as a part of the range of the values;
            it is drawn for each pair, the noise for each value of each image.
        eraser: the chance that one or two rectangles of the second image are hidden under its mean
            colour; the flow there stays known, as it does where something is occluded.
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

    def __post_init__(self):
        # Numbers of the normal distribution take longer to draw than all else together, so each
        # pair gets a part of one long row of them, from a place of its own.
        values = 2 * 3 * self.crop[0] * self.crop[1]
        self.pool = normal_numbers(2 * values) if self.noise else None
        self.warps = tuple(self.scale) != (1, 1) or self.affine > 0 or self.relative_affine > 0

    @classmethod
    def from_recipe(cls, recipe):
        """The augmentation of a `train.recipe.Recipe`, whose keys are the arguments."""
        return cls(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(cls)})

    def __call__(self, sample, rng):
        """A view of a pair.

        Args:
            sample: a dict of image1, image2 (H, W, 3) uint8 RGB, flow (H, W, 2) float32 in pixels,
                0 where unknown, valid (H, W) uint8; other entries are passed on.
            rng: numpy Generator.

        Returns:
            The dict with arrays of their own, of the crop's size; flow is 0 where unknown.

        Raises:
            ValueError: the pair is smaller than the crop, and no affine option is on.
        """
        pair, flow, valid = self.warp(sample, rng) if self.warps else self.cut(sample, rng)
        image1, image2 = self.change_colours(pair, rng)
        return sample | {"image1": image1, "image2": image2, "flow": flow, "valid": valid}

    def cut(self, sample, rng):
        """Crop and flip alone: images (2, height, width, 3), flow and valid, none interpolated."""
        height, width = self.crop
        full_height, full_width = sample["flow"].shape[:2]
        if height > full_height or width > full_width:
            raise ValueError(
                f"a pair of {full_height}x{full_width} is smaller than the crop of "
                f"{height}x{width}; take a smaller crop, or an affine or scale option"
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

    def warp(self, sample, rng):
        """Affine motion, flip and crop in one step: images (2, height, width, 3), flow, valid."""
        height, width = self.crop
        first, second = self.draw_motion(rng, *sample["flow"].shape[:2])
        pair = np.empty((2, height, width, 3), np.uint8)
        for image, motion, result in ((sample["image1"], first, pair[0]), (sample["image2"], second, pair[1])):
            cv2.warpAffine(image, motion[:2], (width, height), result, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
        return pair, *warp_flow(sample["flow"], sample["valid"], first, second, self.crop)

    def draw_motion(self, rng, full_height, full_width):
        """Draw the motions of the two frames.

        Returns:
            Two 3 x 3 matrices, float64, from pixels (x, y, 1) of the first and of the second frame
            to pixels of the crop. All of the crop comes from inside of both frames.
        """
        turn = rotation(self.affine * ROTATION * rng.uniform(-1, 1))
        squeeze = rng.uniform(*np.power(SQUEEZE, self.affine))
        signs = [-1 if on and rng.random() < 0.5 else 1 for on in (self.flip, self.vertical_flip)]
        shape = np.diag(signs) @ turn @ np.diag([squeeze, 1 / squeeze])
        relative = self.draw_relative(rng, full_height, full_width)

        # How far the corners of both crops are in the first frame from what comes to the middle,
        # before the zoom. That is drawn from what lets both fit, and the place from where they do.
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

    def draw_relative(self, rng, full_height, full_width):
        """3 x 3 matrix of the second frame's own motion, in pixels from the crop's middle."""
        strength = self.relative_affine
        angle, zoom, *shift = strength * rng.uniform(-1, 1, 4)
        return affine_matrix(
            (1 + RELATIVE_ZOOM * zoom) * rotation(RELATIVE_ROTATION * angle),
            RELATIVE_SHIFT * np.multiply(shift, [full_width, full_height]),
        )

    def change_colours(self, pair, rng):
        """Colours, hidden rectangles and noise of images (2, height, width, 3) uint8, likewise.

        The linear changes are one matrix, the curves one table: two passes over the images.
        """
        shape, pair = pair.shape, pair.reshape(-1, *pair.shape[2:])  # one picture, for one pass
        image2 = np.s_[shape[1] :]
        if self.jitter:
            pair = cv2.transform(pair, draw_colours(rng, self.jitter, mean_colour(pair)))
        if self.relative_jitter:
            colours = draw_colours(rng, self.relative_jitter, mean_colour(pair[image2]))
            pair[image2] = cv2.transform(pair[image2], colours)
        if self.exposure or tuple(self.gamma) != (1, 1):
            pair = cv2.LUT(pair, self.draw_curves(rng))
        if self.eraser and rng.random() < self.eraser:
            hide_rectangles(pair[image2], rng)
        if self.noise:
            strength = rng.uniform(-self.noise, self.noise) * 255 / POOL_SIGMA
            start = rng.integers(len(self.pool) - pair.size + 1)
            noise = self.pool[start : start + pair.size].reshape(pair.shape)
            pair = cv2.addWeighted(pair, 1, noise, strength, 0, dtype=cv2.CV_8U)
        return pair.reshape(shape)

    def draw_curves(self, rng):
        """Exposure and gamma as a table: the new value of each old one, uint8 (1, 256, 3)."""
        exponent, gains = 1.0, np.ones(3)
        if self.exposure:
            exponent = (1 + self.exposure) ** rng.uniform(-1, 1)
            gains = rng.uniform(1 - self.exposure, 1 + self.exposure, 3) ** 0.5
            gains = gains * rng.uniform(1 - self.exposure, 1 + self.exposure)
        curves = (np.arange(256)[:, None] / 255) ** exponent * gains
        curves = np.minimum(curves, 1) ** rng.uniform(*self.gamma)
        return np.rint(255 * curves).astype(np.uint8)[None]


# --- Geometry -------------------------------------------------------------------------------------


def rotation(angle):
    """2 x 2 matrix that turns by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def affine_matrix(linear, shift):
    """3 x 3 matrix of x -> linear @ x + shift."""
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, shift
    return matrix


def inverse(matrix):
    """The inverse of a small matrix.

    Not numpy.linalg's: OpenBLAS wakes a thread on each core for it, which then wait for more by
    turning in a loop, tens of milliseconds that are the network's (measured with 0.3.23).
    """
    return cv2.invert(matrix)[1]


def apply(matrix, points):
    """Move points (N, 2) by a 3 x 3 affine matrix."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def mirror(source, mirrored, result):
    """Fill and return `result`, contiguous, with `source`; mirrored: left to right, upside down."""
    if any(mirrored):
        return cv2.flip(source, {(1, 0): 1, (0, 1): 0, (1, 1): -1}[mirrored], result)
    np.copyto(result, source)
    return result


def warp_flow(flow, valid, first, second, size):
    """Flow and validity after an affine motion of each frame.

    What was at x in the first frame and x + f(x) in the second is at p = A1 x and A2 (x + f(x))
    now, so with x = A1^-1 p the new flow is

        f'(p) = A2 (x + f(x)) - p = (A2 A1^-1 - 1) p + L2 f(x),    L2 the linear part of A2.

    f is interpolated between four known pixels. Where one of them is unknown, the nearest pixel
    alone decides: its flow is taken, or f' is unknown as it is. So nothing unknown is ever mixed
    in, and a sparse field keeps its density.

    Args:
        flow, valid: (H, W, 2) float32 in pixels, and (H, W) uint8, not 0 where the flow is known.
        first, second: A1, A2, 3 x 3 matrices from pixels (x, y, 1) of the frames to new ones.
        size: (height, width) of the result.

    Returns:
        flow (height, width, 2) float32, 0 where unknown, and valid (height, width) uint8, 0 or 1.
    """
    back = inverse(first)
    x, y = affine_planes(back, size)
    # A place on the border can be outside by a rounding error.
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


def affine_planes(matrix, size):
    """Where a 3 x 3 affine matrix brings each pixel: x and y, float32 of `size`."""
    column = np.arange(size[1], dtype=np.float32)
    row = np.arange(size[0], dtype=np.float32)[:, None]
    matrix = matrix.astype(np.float32)  # which float32 pixels must not turn into float64
    return [matrix[i, 0] * column + (matrix[i, 1] * row + matrix[i, 2]) for i in (0, 1)]


def interpolate(flow, x, y):
    """`flow` (H, W, 2) float32 at the places x, y (h, w) inside of it, bilinearly: (h, w, 2).

    cv2.remap would round the places to 1/32 pixel, which in a strong zoom or rotation is an error
    of hundredths of a pixel; here it only fetches the four neighbours.
    """
    left, top = lower_taps(flow, x, y)
    right, down = x - left, y - top
    right, down = cv2.merge([right, right]), cv2.merge([down, down])
    upper, lower = (
        interpolated(gather(flow[rows:], left, top), gather(flow[rows:, 1:], left, top), right) for rows in (0, 1)
    )
    return interpolated(upper, lower, down)


def interpolated(start, end, part):
    """start + part (end - start), in the memory of `end`."""
    end -= start
    end *= part
    end += start
    return end


def lower_taps(flow, x, y):
    """Column and row, int16, of the upper left of the four pixels round each place x, y."""
    height, width = flow.shape[:2]
    return (np.minimum(x.astype(np.int16), width - 2), np.minimum(y.astype(np.int16), height - 2))


def gather(array, column, row):
    """`array` at whole places (h, w), int16: array[row, column], in C without the interpreter."""
    return cv2.remap(array, cv2.merge([column, row]), None, cv2.INTER_NEAREST)


# --- Colours --------------------------------------------------------------------------------------


def mean_colour(image):
    """The mean of an image (H, W, 3), float64 (3,)."""
    return np.array(cv2.mean(image)[:3])


def draw_colours(rng, strength, mean):
    """Brightness, contrast, saturation and hue as one matrix on (R, G, B, 1), float64 3 x 4.

    Each is what is usual in the field (torchvision's ColorJitter), but the hue: it is turned about
    the grey axis, at the same luma, and not round the hexagon of HSV. As contrast is about the mean
    luma, and neither saturation nor hue changes a luma, the order does not matter.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    turn = 2 * np.pi * min(strength, 0.5) * rng.uniform(-1, 1)
    chroma = np.eye(3)
    chroma[1:, 1:] = saturation * rotation(turn)
    linear = contrast * FROM_YIQ @ chroma @ TO_YIQ
    offset = np.full((3, 1), (1 - contrast) * TO_YIQ[0] @ mean)
    return brightness * np.hstack([linear, offset])


def hide_rectangles(image, rng) -> None:
    """Fill one or two random rectangles of an image (H, W, 3) with its mean colour, in place."""
    height, width = image.shape[:2]
    colour = np.rint(mean_colour(image)).astype(np.uint8)
    for _ in range(rng.integers(1, 3)):
        rows, columns = (min(height, width) * rng.uniform(*HIDDEN_SIDES, 2)).astype(int)
        top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
        image[top : top + rows, left : left + columns] = colour


def normal_numbers(count):
    """`count` numbers of the normal distribution times POOL_SIGMA, int8, always the same."""
    numbers = np.random.Generator(np.random.Philox(0)).standard_normal(count, np.float32)
    return np.clip(np.rint(POOL_SIGMA * numbers), -127, 127).astype(np.int8)
