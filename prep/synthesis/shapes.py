"""Outlines of layers for version 2: masks of solid shapes and of thin structures."""

import cv2
import numpy as np

from prep.synthesis.common import FIXED_POINT, draw_contours, to_fixed_point


def draw_solid(rng: np.random.Generator, side: int, margin: float) -> np.ndarray:
    """A shape, perhaps with a hole, in the circle that leaves a margin: uint8 (side, side), anti-aliased."""
    mask = np.zeros((side, side), np.uint8)
    radius = max(2.0, side / 2 - margin)
    contours = [to_fixed_point(side / 2 + radius * contour) for contour in draw_contours(rng)]
    cv2.fillPoly(mask, contours, (255,), cv2.LINE_AA, FIXED_POINT)
    return mask


def draw_thin(rng: np.random.Generator, side: int, margin: float, thickness: float) -> np.ndarray:
    """Branches, a fence, a wire or an outline, in the circle that leaves a margin: uint8 (side, side), anti-aliased.

    Args:
        margin, thickness: widths in pixels.
    """
    mask = np.zeros((side, side), np.uint8)
    lines = [line_branches, line_fence, line_wire, line_outline][rng.integers(4)](rng)
    thickness = max(1.0, thickness)
    radius = max(2.0, side / 2 - margin - thickness)
    largest = np.sqrt(max((line**2).sum(1).max() for line in lines))
    for line in lines:
        width = max(1, round(thickness * rng.uniform(0.7, 1.3)))
        points = to_fixed_point(side / 2 + radius / largest * line)
        cv2.polylines(mask, [points], False, (255,), width, cv2.LINE_AA, FIXED_POINT)
    return mask


def line_branches(rng: np.random.Generator) -> list[np.ndarray]:
    """A stem with branches: lines (N, 2)."""
    stem = np.stack([np.linspace(-1, 1, 12), np.cumsum(rng.normal(0, 0.06, 12))], 1)
    lines = [stem]
    for _ in range(rng.integers(2, 8)):
        start = stem[rng.integers(len(stem))]
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.8)
        steps = np.linspace(0, length, 6)
        bent = angle + np.cumsum(rng.normal(0, 0.15, 6))
        lines.append(start + steps[:, None] * np.stack([np.cos(bent), np.sin(bent)], 1))
    return lines


def line_fence(rng: np.random.Generator) -> list[np.ndarray]:
    """Parallel bars, perhaps with cross bars: lines (2, 2)."""
    bars = [np.array([[place, -1], [place, 1]]) for place in np.linspace(-0.95, 0.95, rng.integers(3, 12))]
    if rng.random() < 0.6:
        bars += [np.array([[-1, place], [1, place]]) for place in np.linspace(-0.8, 0.8, rng.integers(1, 8))]
    return bars


def line_wire(rng: np.random.Generator) -> list[np.ndarray]:
    """Long curves: lines (N, 2)."""
    x = np.linspace(-1, 1, 40)
    lines = []
    for _ in range(rng.integers(1, 4)):
        y = rng.uniform(-0.7, 0.7) + rng.normal(0, 0.25) * x**2 + rng.normal(0, 0.08) * np.sin(rng.uniform(2, 12) * x)
        lines.append(np.stack([x, y], 1))
    return lines


def line_outline(rng: np.random.Generator) -> list[np.ndarray]:
    """Outlines of a solid shape: closed lines (N, 2)."""
    return [np.concatenate([contour, contour[:1]]) for contour in draw_contours(rng)]
