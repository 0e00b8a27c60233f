"""Augmentation of a training pair: crop, flips, colour jitter."""

import numpy as np


class Augment:
    """A random view of a pair. Its randomness comes from the generator that it is handed alone.

    Args:
        crop: (height, width) of the result in pixels; the pair must be at least as large.
        flip: mirror half of the pairs horizontally and half vertically.
        jitter: gains of contrast and of each colour channel are drawn from 1 +- jitter, and gamma
            from 1 / (1 + jitter) to 1 + jitter, the same for both images.
    """

    def __init__(self, crop, flip=False, jitter=0.0):
        self.crop, self.flip, self.jitter = crop, flip, jitter

    def __call__(self, sample, rng):
        """Transform image1, image2 (H, W, 3) uint8, flow (H, W, 2) float32, valid (H, W) uint8."""
        height, width = self.crop
        full_height, full_width = sample["flow"].shape[:2]
        top = rng.integers(full_height - height + 1)
        left = rng.integers(full_width - width + 1)
        window = np.s_[top:top + height, left:left + width]
        image1, image2, flow, valid = (
            sample[key][window] for key in ("image1", "image2", "flow", "valid"))
        if self.flip and rng.random() < 0.5:
            image1, image2, valid = image1[:, ::-1], image2[:, ::-1], valid[:, ::-1]
            flow = flow[:, ::-1] * np.float32([-1, 1])
        if self.flip and rng.random() < 0.5:
            image1, image2, valid = image1[::-1], image2[::-1], valid[::-1]
            flow = flow[::-1] * np.float32([1, -1])
        if self.jitter:
            table = self.draw_colours(rng)
            channels = np.arange(3)
            image1, image2 = table[image1, channels], table[image2, channels]
        views = {"image1": image1, "image2": image2, "flow": flow, "valid": valid}
        return sample | {key: np.ascontiguousarray(value) for key, value in views.items()}

    def draw_colours(self, rng):
        """A look-up table (256, 3) uint8: new value of each old one, by channel."""
        gamma = (1 + self.jitter) ** rng.uniform(-1, 1)
        gains = rng.uniform(1 - self.jitter, 1 + self.jitter, 3) ** 0.5
        gains = gains * rng.uniform(1 - self.jitter, 1 + self.jitter)
        curve = (np.arange(256)[:, None] / 255) ** gamma * gains * 255
        return np.clip(np.rint(curve), 0, 255).astype(np.uint8)
