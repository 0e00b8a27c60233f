"""What happens between scene and camera in version 2: shadow, fog, exposure, noise. None of it changes the flow."""

from dataclasses import dataclass

import cv2
import numpy as np

from prep.synthesis.common import FIXED_POINT, draw_contours, to_fixed_point

COARSE = 8  # pixels per point of the fields of shadow and fog, which are smooth


@dataclass(frozen=True)
class Air:
    """Shadow and fog, as fields over the frame, coarser by COARSE: image * gain + light."""

    gain: np.ndarray
    """float32 (h, w)."""
    light: np.ndarray
    """float32 (h, w, 3)."""
    shift: tuple[float, float]
    """How far the fields have moved in frame 2, in coarse pixels."""

    def apply(self, image: np.ndarray, frame: int) -> np.ndarray:
        """Frame 1 or 2, uint8 (H, W, 3), seen through the air."""
        height, width = image.shape[:2]
        gain, light = self.gain, self.light
        if frame == 2:
            matrix = np.array([[1, 0, self.shift[0]], [0, 1, self.shift[1]]], np.float64)
            gain, light = (
                cv2.warpAffine(field, matrix, field.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
                for field in (gain, light)
            )
        gain = cv2.resize(cv2.merge([gain, gain, gain]), (width, height), interpolation=cv2.INTER_LINEAR)
        light = cv2.resize(light, (width, height), interpolation=cv2.INTER_LINEAR)
        return cv2.add(cv2.multiply(gain, image, dtype=cv2.CV_32F), light, dtype=cv2.CV_8U)


def draw_air(rng: np.random.Generator, height: int, width: int, shadow: float, fog: float) -> Air | None:
    """Shadow and fog with the given probabilities; None if there is neither."""
    with_shadow, with_fog = rng.random(2) < (shadow, fog)
    if not (with_shadow or with_fog):
        return None
    rows, columns = -(-height // COARSE), -(-width // COARSE)
    gain, light = np.ones((rows, columns), np.float32), np.zeros((rows, columns, 3), np.float32)
    if with_shadow:
        for _ in range(rng.integers(1, 4)):
            mask = np.zeros((rows, columns), np.uint8)
            centre, radius = rng.uniform(0, 1, 2) * (columns, rows), columns * rng.uniform(0.1, 0.5)
            contour = to_fixed_point(centre + radius * draw_contours(rng)[0])
            cv2.fillPoly(mask, [contour], (255,), cv2.LINE_AA, FIXED_POINT)
            soft = cv2.GaussianBlur(mask, (0, 0), rng.uniform(0.4, 2.5)).astype(np.float32)
            gain *= 1 - soft * np.float32(rng.uniform(0.2, 0.6) / 255)
    if with_fog:
        grid = rng.standard_normal((4, 5), np.float32)
        cloud = cv2.resize(grid, (columns, rows), interpolation=cv2.INTER_CUBIC)
        density = np.clip(rng.uniform(0.1, 0.5) + rng.uniform(0, 0.2) * cloud, 0, 0.8).astype(np.float32)
        colour = rng.uniform(120, 240) + rng.normal(0, 10, 3)
        gain *= 1 - density
        light += density[..., None] * colour.astype(np.float32)
    shift = rng.normal(0, 0.01 * columns, 2)
    return Air(gain, light, (float(shift[0]), float(shift[1])))


def draw_exposures(rng: np.random.Generator, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Lookup tables (1, 256, 3) uint8 for both frames; they differ with the given probability."""
    base = np.linspace(0, 1, 256)[:, None]
    gain, gamma = rng.uniform(0.75, 1.0) * np.ones(3), np.exp(rng.normal(0, 0.25)) * np.ones(3)
    change = np.zeros((2, 3))
    if rng.random() < share:
        change[0] = rng.normal(0, 0.1) + rng.normal(0, 0.03, 3)
        change[1] = rng.normal(0, 0.08) + rng.normal(0, 0.02, 3)
    first, second = (
        np.clip(np.rint(255 * gain * np.exp(side * change[0]) * base ** (gamma * np.exp(side * change[1]))), 0, 255)
        for side in (-0.5, 0.5)
    )
    return first.astype(np.uint8)[None], second.astype(np.uint8)[None]


def add_noise(rng: np.random.Generator, image: np.ndarray, sigma: float, grain: float) -> np.ndarray:
    """Add Gaussian noise to uint8 (H, W, 3).

    Args:
        sigma: standard deviation in grey levels.
        grain: standard deviation in pixels of the blur that correlates neighbours; 0 for white noise.
    """
    # OpenCV draws normal numbers several times faster than NumPy, of one mean and deviation per channel.
    cv2.setRNGSeed(int(rng.integers(2**31)))
    noise = cv2.randn(np.empty(image.shape, np.float32), np.zeros(3), np.full(3, sigma))
    if grain:
        # Blurring divides the deviation by about 2 sqrt(pi) times that of the blur.
        noise = cv2.GaussianBlur(noise, (0, 0), grain) * np.float32(max(1, 2 * np.sqrt(np.pi) * grain))
    return cv2.add(image, noise, dtype=cv2.CV_8U)
