"""Version 1 of the synthetic pairs: stacks of textured shapes, each with its own affine motion.

The same seed gives the same bytes as in release 0.9, so do not change what this draws.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from prep.synthesis.common import CHAIRS_WIDTH, FIXED_POINT, draw_contours, draw_palette, to_fixed_point


@dataclass(frozen=True)
class MotionParameter:
    """The distribution of one number of a motion.

    By the rule of FlyingChairs (FlowNet, ICCV 2015), it is clip(sign(g) |g|^power, low, high) with g ~ N(0, sigma) and
    the given probability, else 0. The powers make the tail heavy: most motions are small, a few very large.
    """

    power: int
    sigma: float
    low: float
    high: float
    probability: float

    def draw(self, rng: np.random.Generator) -> float:
        """Draw a number."""
        value = rng.normal(0, self.sigma)
        if rng.random() >= self.probability:
            return 0.0
        return float(np.clip(np.sign(value) * abs(value) ** self.power, self.low, self.high))


@dataclass(frozen=True)
class MotionParameters:
    """The distribution of affine motions."""

    shift: MotionParameter
    """Shift in pixels of a frame of CHAIRS_WIDTH, horizontally and vertically."""
    turn: MotionParameter
    """Rotation in degrees."""
    zoom: MotionParameter
    """Relative change of size."""
    squeeze: MotionParameter
    """Logarithm of the stretch along a random axis."""


# Chosen for a mean displacement of about 11 pixels at 384x512, as in FlyingChairs.
BACKGROUND_MOTION = MotionParameters(
    shift=MotionParameter(2, 1.8, -40, 40, 1.0),
    turn=MotionParameter(2, 1.2, -10, 10, 0.3),
    zoom=MotionParameter(2, 0.1, -0.07, 0.07, 0.6),
    squeeze=MotionParameter(2, 0.1, -0.07, 0.07, 0.3),
)
SHAPE_MOTION = MotionParameters(
    shift=MotionParameter(3, 2.0, -120, 120, 1.0),
    turn=MotionParameter(2, 2.3, -30, 30, 0.7),
    zoom=MotionParameter(2, 0.18, -0.2, 0.2, 0.7),
    squeeze=MotionParameter(2, 0.18, -0.2, 0.2, 0.5),
)


class SyntheticPair(NamedTuple):
    """An image pair with its flow."""

    image1: np.ndarray
    """uint8 (H, W, 3) RGB."""
    image2: np.ndarray
    flow: np.ndarray
    """float32 (H, W, 2) in pixels, from image 1 to image 2."""
    occluded: np.ndarray
    """bool (H, W): whether a pixel of image 1 is hidden in image 2 by another layer or has left the frame."""


@dataclass(frozen=True)
class Layer:
    """A textured patch and its motion. Matrices are 3x3, for homogeneous coordinates (x, y, 1) in pixels."""

    patch: np.ndarray
    """uint8 (h, w, 4) RGB and alpha."""
    border: int
    """OpenCV's border mode: how the patch continues outside."""
    pose: np.ndarray
    """Matrix from the patch to frame 1."""
    motion: np.ndarray
    """Matrix from frame 1 to frame 2."""


def make_pair(rng_or_seed: Any, height: int, width: int) -> SyntheticPair:
    """Make one image pair with its flow.

    Args:
        rng_or_seed: a numpy Generator, or what numpy.random.default_rng accepts as a seed.
        height, width: size of the frames in pixels; displacements scale with the width.
    """
    rng = np.random.default_rng(rng_or_seed)
    background = draw_background(rng, height, width)
    layers = [background]
    for _ in range(rng.integers(3, 9)):
        layers.append(draw_shape(rng, height, width, background.motion))
    image1, label1 = render(layers, [layer.pose for layer in layers], height, width)
    image2, label2 = render(layers, [layer.motion @ layer.pose for layer in layers], height, width)
    flow = flow_from_labels(label1, [layer.motion for layer in layers])
    # The exposure is that of the scene, the same in both frames.
    gain, gamma = rng.uniform(0.75, 1.0), np.exp(rng.normal(0, 0.25))
    exposed = np.rint(255 * gain * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return SyntheticPair(exposed[image1], exposed[image2], flow, find_occluded(flow, label1, label2))


def draw_background(rng: np.random.Generator, height: int, width: int) -> Layer:
    """The layer at the back: an opaque texture that extends beyond the frame on all sides."""
    rows, columns = int(1.25 * height), int(1.25 * width)
    alpha = np.full((rows, columns), 255, np.uint8)
    centre = ((width - 1) / 2, (height - 1) / 2)
    pose = place_patch(rng.uniform(-0.15, 0.15), (columns, rows), centre)
    motion = draw_motion(rng, BACKGROUND_MOTION, centre, width)
    return Layer(np.dstack([draw_texture(rng, rows, columns), alpha]), cv2.BORDER_REFLECT_101, pose, motion)


def draw_shape(rng: np.random.Generator, height: int, width: int, background_motion: np.ndarray) -> Layer:
    """A layer in front: a textured shape on a transparent patch, with the background's motion and its own."""
    radius = width * np.exp(rng.uniform(np.log(0.07), np.log(0.3)))
    side = int(2 * radius) + 8
    alpha = np.zeros((side, side), np.uint8)
    contours = [side / 2 + radius * contour for contour in draw_contours(rng)]
    cv2.fillPoly(alpha, [to_fixed_point(contour) for contour in contours], (255,), cv2.LINE_AA, FIXED_POINT)
    centre = (rng.uniform(0, width), rng.uniform(0, height))
    pose = place_patch(rng.uniform(0, 2 * np.pi), (side, side), centre)
    motion = background_motion @ draw_motion(rng, SHAPE_MOTION, centre, width)
    return Layer(np.dstack([draw_texture(rng, side, side), alpha]), cv2.BORDER_CONSTANT, pose, motion)


def place_patch(angle: float, patch_size: tuple[int, int], centre: tuple[float, float]) -> np.ndarray:
    """3x3 matrix that rotates a patch of (W, H) by an angle in radians and puts its middle on `centre` (x, y)."""
    middle = (np.array(patch_size) - 1) / 2
    matrix = np.eye(3)
    matrix[:2, :2] = rotation(angle)
    matrix[:2, 2] = centre - matrix[:2, :2] @ middle
    return matrix


def draw_motion(
    rng: np.random.Generator, parameters: MotionParameters, centre: tuple[float, float], width: int
) -> np.ndarray:
    """3x3 matrix of a random affine motion about `centre` (x, y), from frame 1 to frame 2, in pixels."""
    shift = [parameters.shift.draw(rng) * width / CHAIRS_WIDTH for _ in range(2)]
    turn = np.deg2rad(parameters.turn.draw(rng))
    zoom = 1 + parameters.zoom.draw(rng)
    # Wider by this factor along a random axis, and narrower across it.
    squeeze = np.exp(parameters.squeeze.draw(rng))
    axis = rotation(rng.uniform(0, np.pi))
    matrix = np.eye(3)
    matrix[:2, :2] = zoom * rotation(turn) @ axis @ np.diag([squeeze, 1 / squeeze]) @ axis.T
    matrix[:2, 2] = centre + np.array(shift) - matrix[:2, :2] @ centre
    return matrix


def rotation(angle: float) -> np.ndarray:
    """2x2 matrix of a rotation by an angle in radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def draw_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A texture with the statistics of natural images: dead leaves with 1/f noise; uint8 (H, W, 3)."""
    palette = draw_palette(rng)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = palette[0]
    draw_dead_leaves(rng, image, palette)
    grain = draw_pink_noise(rng, height, width) * rng.uniform(4, 24)
    texture = cv2.add(image, grain, dtype=cv2.CV_32F)
    # Blur detail that resampling would lose: warped frames must agree to a few grey levels.
    texture = cv2.GaussianBlur(texture, (0, 0), rng.uniform(0.6, 0.8))
    return np.clip(np.rint(texture), 0, 255).astype(np.uint8)


def draw_dead_leaves(rng: np.random.Generator, image: np.ndarray, palette: np.ndarray) -> None:
    """Cover an image, uint8 (H, W, 3), with overlapping leaves whose radii follow r^-3.

    Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001: this distribution makes edges and contrast
    the same at all scales, as in natural images.
    """
    height, width = image.shape[:2]
    smallest = np.exp(rng.uniform(np.log(1.2), np.log(5)))
    largest = max(0.4 * max(height, width), 2 * smallest)
    mean_area = 2 * np.pi * 0.6 * smallest**2 * np.log(largest / smallest)
    count = int(rng.uniform(0.5, 2.5) * height * width / mean_area)
    uniform = rng.random((count, 1))
    radius = (smallest**-2 - uniform * (smallest**-2 - largest**-2)) ** -0.5
    # Sixteen points around an ellipse; in leaves with fewer corners, several points coincide.
    corners = rng.choice([3, 4, 5, 16], (count, 1))
    angle = np.floor(np.arange(16) * corners / 16) / corners * 2 * np.pi
    angle += rng.uniform(0, 2 * np.pi, (count, 1))
    x = radius * np.cos(angle)
    y = radius * np.sin(angle) * rng.uniform(0.25, 1.0, (count, 1))
    turn = rng.uniform(0, 2 * np.pi, (count, 1))
    points = np.stack(
        [
            x * np.cos(turn) - y * np.sin(turn) + rng.uniform(0, width, (count, 1)),
            x * np.sin(turn) + y * np.cos(turn) + rng.uniform(0, height, (count, 1)),
        ],
        -1,
    )
    colour = palette[rng.integers(0, len(palette), count)]
    colour = colour * rng.uniform(0.7, 1.3, (count, 1)) + rng.normal(0, 8, (count, 3))
    for leaf, shade in zip(to_fixed_point(points), np.clip(colour, 0, 255).tolist(), strict=True):
        cv2.fillConvexPoly(image, leaf, shade, cv2.LINE_AA, FIXED_POINT)


def draw_pink_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise of about unit variance with equal power in every octave (1/f): float32 (H, W, 3)."""
    noise = np.zeros((height, width, 3), np.float32)
    steps = [2**octave for octave in range(int(np.log2(min(height, width))))]
    for step in steps:
        grid = rng.standard_normal((height // step + 2, width // step + 2, 3), np.float32)
        noise += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    noise /= np.sqrt(len(steps))
    grey = noise[..., :1] + noise[..., 1:2]
    return 0.6 * grey + 0.4 * noise  # more in brightness than in colour, as in natural images


def render(layers: list[Layer], poses: list[np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint layers from back to front, each under its pose (3x3, patch to frame).

    Returns:
        The image, uint8 (H, W, 3), and the index of each pixel's frontmost layer, int64 (H, W).
    """
    image = np.zeros((height, width, 3), np.float32)
    label = np.zeros((height, width), np.int64)
    for index, (layer, pose) in enumerate(zip(layers, poses, strict=True)):
        rows, columns = layer.patch.shape[:2]
        left, top, right, bottom = 0, 0, width, height
        if index > 0:  # only the part of the frame that the patch covers
            corners = np.array([[0, columns, columns, 0], [0, 0, rows, rows], [1, 1, 1, 1]])
            x, y, _ = pose @ corners
            left, right = np.clip([np.floor(x.min()), np.ceil(x.max()) + 1], 0, width).astype(int)
            top, bottom = np.clip([np.floor(y.min()), np.ceil(y.max()) + 1], 0, height).astype(int)
            if left == right or top == bottom:
                continue
        local = pose[:2] - [[0, 0, left], [0, 0, top]]
        warped = cv2.warpAffine(
            layer.patch,
            local,
            (int(right - left), int(bottom - top)),
            flags=cv2.INTER_CUBIC,
            borderMode=layer.border,
        )
        alpha = warped[..., 3:].astype(np.float32) / 255
        view = image[top:bottom, left:right]
        view += alpha * (warped[..., :3] - view)
        label[top:bottom, left:right][warped[..., 3] >= 128] = index
    return np.rint(image).astype(np.uint8), label


def flow_from_labels(label: np.ndarray, motions: list[np.ndarray]) -> np.ndarray:
    """The flow, float32 (H, W, 2), of a frame whose pixels move by the motion (3x3) of their label (H, W)."""
    y, x = np.indices(label.shape)
    change = np.stack(motions) - np.eye(3)
    return np.stack(
        [change[label, row, 0] * x + change[label, row, 1] * y + change[label, row, 2] for row in (0, 1)], -1
    ).astype(np.float32)


def find_occluded(flow: np.ndarray, label1: np.ndarray, label2: np.ndarray) -> np.ndarray:
    """Where the flow leads to another layer or out of the frame: bool (H, W)."""
    height, width = label1.shape
    y, x = np.indices(label1.shape)
    x, y = x + flow[..., 0], y + flow[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    column = np.rint(np.clip(x, 0, width - 1)).astype(int)
    row = np.rint(np.clip(y, 0, height - 1)).astype(int)
    return ~inside | (label2[row, column] != label1)
