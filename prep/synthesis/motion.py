"""Motions of layers: a perspective transform after a smooth deformation, evaluated in both directions.

Boxes are (left, top, right, bottom) in pixels, right and bottom exclusive. Coordinates are float32 planes x and y.
"""

from dataclasses import dataclass

import cv2
import numpy as np

Box = tuple[int, int, int, int]
Planes = tuple[np.ndarray, np.ndarray]

MAX_STRAIN = 0.35  # of a deformation: below 1 it is invertible, and its inverse is found in a few iterations
COARSE = 8  # pixels between the points at which the inverse is found first


@dataclass(frozen=True)
class Deformation:
    """A smooth displacement d(x) of frame 1's pixels; outside its box, that of the nearest pixel inside."""

    box: Box
    field: np.ndarray
    """float32 (h, w, 2) in pixels."""

    def at(self, box: Box) -> np.ndarray:
        """The displacement of the pixels of a box: float32 (h, w, 2)."""
        left, top, right, bottom = self.box
        columns = np.clip(np.arange(box[0], box[2]), left, right - 1) - left
        rows = np.clip(np.arange(box[1], box[3]), top, bottom - 1) - top
        if columns[-1] - columns[0] == len(columns) - 1 and rows[-1] - rows[0] == len(rows) - 1:
            return self.field[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # inside: no copy
        return self.field[rows[:, None], columns]

    def sample(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The displacement at points (x, y), to 1/32 pixel: float32 (h, w, 2)."""
        left, top = np.float32(self.box[0]), np.float32(self.box[1])
        return cv2.remap(self.field, x - left, y - top, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    def largest(self) -> float:
        """The largest absolute coordinate of a displacement."""
        return float(max(self.field.max(), -self.field.min()))


@dataclass(frozen=True)
class Motion:
    """A motion from frame 1 to frame 2: x -> matrix (x + d(x))."""

    matrix: np.ndarray
    """3x3, for homogeneous coordinates (x, y, 1)."""
    deformation: Deformation | None = None

    def forward(self, box: Box) -> Planes:
        """Where the pixels of a box of frame 1 are in frame 2."""
        x, y = mesh(box)
        if self.deformation:
            shift = self.deformation.at(box)
            x, y = x + shift[..., 0], y + shift[..., 1]
        return transform(self.matrix, x, y)

    def backward(self, box: Box) -> Planes:
        """Where the pixels of a box of frame 2 were in frame 1."""
        to_first = inverse(self.matrix)
        x, y = transform(to_first, *mesh(box))
        if not self.deformation:
            return x, y
        # Solve p + d(p) = (x, y) by fixed-point iteration: on a coarse mesh, then twice at every pixel. The coarse
        # points are those at which cv2.resize assumes its input, and one more on each side.
        left, top, right, bottom = box
        columns, rows = (right - left) // COARSE + 3, (bottom - top) // COARSE + 3
        middle = (COARSE - 1) / 2
        coarse_x = np.float32(left + middle) + COARSE * np.arange(-1, columns - 1, dtype=np.float32)[None]
        coarse_y = np.float32(top + middle) + COARSE * np.arange(-1, rows - 1, dtype=np.float32)[:, None]
        coarse_x, coarse_y = transform(to_first, coarse_x, coarse_y)
        shift = self.deformation.sample(coarse_x, coarse_y)
        for _ in range(8):
            shift = self.deformation.sample(coarse_x - shift[..., 0], coarse_y - shift[..., 1])
        shift = cv2.resize(shift, (columns * COARSE, rows * COARSE), interpolation=cv2.INTER_LINEAR)
        shift = shift[COARSE : COARSE + bottom - top, COARSE : COARSE + right - left]
        for _ in range(2):
            shift = self.deformation.sample(x - shift[..., 0], y - shift[..., 1])
        return x - shift[..., 0], y - shift[..., 1]


def mesh(box: Box) -> Planes:
    """x (1, w) and y (h, 1) of a box's pixels, float32."""
    left, top, right, bottom = box
    return np.arange(left, right, dtype=np.float32)[None], np.arange(top, bottom, dtype=np.float32)[:, None]


def transform(matrix: np.ndarray, x: np.ndarray, y: np.ndarray) -> Planes:
    """Apply a 3x3 matrix to points; x and y may be broadcast against each other."""
    a = matrix.astype(np.float32)
    moved_x = (a[0, 0] * x + a[0, 2]) + a[0, 1] * y
    moved_y = (a[1, 0] * x + a[1, 2]) + a[1, 1] * y
    if a[2, 0] or a[2, 1]:
        scale = 1 / ((a[2, 0] * x + a[2, 2]) + a[2, 1] * y)
        moved_x *= scale
        moved_y *= scale
    return moved_x, moved_y


def inverse(matrix: np.ndarray) -> np.ndarray:
    """The inverse of a 3x3 matrix, twenty times faster than NumPy's."""
    return np.asarray(cv2.invert(matrix)[1], np.float64)


def smooth_field(rng: np.random.Generator, box: Box, points: int, channels: int) -> np.ndarray:
    """Smooth noise over a box, from points x points normal numbers: float32 (h, w, channels)."""
    grid = rng.standard_normal((points, points, channels), np.float32)
    size = (box[2] - box[0], box[3] - box[1])
    return cv2.resize(grid, size, interpolation=cv2.INTER_CUBIC).reshape(size[1], size[0], channels)


def limit_strain(field: np.ndarray) -> np.ndarray:
    """Scale a displacement (h, w, 2) down until none of its derivatives exceeds MAX_STRAIN."""
    coarse = field[::4, ::4]
    strain = max((float(np.abs(np.diff(coarse, axis=axis)).max(initial=0)) / 4 for axis in (0, 1)), default=0)
    return field * np.float32(MAX_STRAIN / strain) if strain > MAX_STRAIN else field


def about(centre: tuple[float, float], matrix: np.ndarray) -> np.ndarray:
    """A 3x3 matrix applied about `centre` (x, y) instead of the origin."""
    there, back = np.eye(3), np.eye(3)
    there[:2, 2] = -np.array(centre)
    back[:2, 2] = centre
    return back @ matrix @ there


def similarity(angle: float, scale: float, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """3x3 matrix of a rotation (radians), scaling and shift."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]], [0.0, 0.0, 1.0]])
