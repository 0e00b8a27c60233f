"""What both versions of the synthetic pairs share.

The bytes of version 1 depend on it, so do not change what this draws.
"""

import cv2
import numpy as np

CHAIRS_WIDTH = 512
"""Width of a FlyingChairs frame, 384x512; lengths in `version1.py` and `version2.py` are in pixels of such a frame."""
FIXED_POINT = 4
"""Fractional bits of coordinates in OpenCV's drawing functions, which thus draw at 1/16 pixel."""


def to_fixed_point(points: np.ndarray) -> np.ndarray:
    """Pixel coordinates as int32 in units of 1/16 pixel, for OpenCV's drawing functions."""
    return np.round(points * 2**FIXED_POINT).astype(np.int32)


def draw_contours(rng: np.random.Generator) -> list[np.ndarray]:
    """Closed contours of a random shape, (N, 2) inside the unit circle; a second one is a hole."""
    kind = rng.choice(["ellipse", "polygon", "star", "blob"])
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    radius = np.ones_like(angle)
    if kind == "polygon":
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        radius = np.ones_like(angle)
    elif kind == "star":
        angle = np.linspace(0, 2 * np.pi, 2 * rng.integers(4, 9), endpoint=False)
        radius = np.ones_like(angle)
        radius[1::2] = rng.uniform(0.3, 0.75)
    elif kind == "blob":
        order = np.arange(2, 8)[:, None]
        waves = rng.normal(0, 1, (6, 1)) * np.cos(order * angle + rng.uniform(0, 6.3, (6, 1)))
        radius = np.exp(0.6 * (waves / order).sum(0))
        radius /= radius.max()
    contour = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    contour[:, 1] *= rng.uniform(0.3, 1.0)
    # Holes show what is behind, as between the legs of FlyingChairs' chairs.
    return [contour, contour * rng.uniform(0.4, 0.75)] if rng.random() < 0.2 else [contour]


def draw_palette(rng: np.random.Generator) -> np.ndarray:
    """Matching colours, near one hue or all around the wheel: float32 (P, 3) RGB."""
    count = rng.integers(3, 8)
    hue = rng.uniform(0, 360) + rng.normal(0, rng.choice([15, 40, 120]), count)
    saturation = rng.beta(1.5, 2.5, count) * rng.uniform(0.3, 1)
    value = np.clip(rng.normal(rng.uniform(0.25, 0.75), 0.25, count), 0.03, 1)
    hsv = np.stack([hue % 360, saturation, value], 1).astype(np.float32)
    return 255 * cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
