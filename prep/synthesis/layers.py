"""Layers of version 2: how one is painted, with motion blur, and what it does to flow and labels."""

from dataclasses import dataclass

import cv2
import numpy as np

from prep.synthesis.motion import Box, Motion, Planes, inverse, mesh, transform

MAX_BLUR = 16  # pixels: as many as 2^4 samples, one per pixel, can cover


@dataclass(frozen=True)
class Layer:
    """A textured patch and its motion."""

    patch: np.ndarray
    """uint8 (h, w, 4) RGB and alpha, opaque only within a circle; for the background, which repeats, mirrored, outside,
    (h, w, 3)."""
    pose: np.ndarray
    """3x3 matrix from the patch to frame 1."""
    motion: Motion

    def box(self, height: int, width: int, frame: int) -> Box | None:
        """The part of frame 1 or 2 that the patch may cover; None if there is none."""
        if self.patch.shape[2] == 3:
            return 0, 0, width, height
        x, y = self.outline()
        if frame == 2:
            pad = self.motion.deformation.largest() + 1 if self.motion.deformation else 0
            x = np.array([x.min() - pad, x.max() + pad])[[0, 1, 1, 0]]
            y = np.array([y.min() - pad, y.max() + pad])[[0, 0, 1, 1]]
            x, y = transform(self.motion.matrix, x, y)
        left, right = np.clip([np.floor(x.min()), np.ceil(x.max()) + 1], 0, width).astype(int)
        top, bottom = np.clip([np.floor(y.min()), np.ceil(y.max()) + 1], 0, height).astype(int)
        return (int(left), int(top), int(right), int(bottom)) if left < right and top < bottom else None

    def outline(self) -> Planes:
        """x and y in frame 1 of the circle within the patch, beyond which it is transparent."""
        rows, columns = self.patch.shape[:2]
        angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        x, y = np.cos(angle) * columns / 2 + (columns - 1) / 2, np.sin(angle) * rows / 2 + (rows - 1) / 2
        return transform(self.pose, x, y)

    def paint(self, box: Box, frame: int, source: Planes) -> np.ndarray:
        """The layer in a box of frame 1 or 2, as uint8 (h, w, channels).

        Args:
            source: for frame 2, where its pixels were in frame 1.
        """
        border = cv2.BORDER_REFLECT_101 if self.patch.shape[2] == 3 else cv2.BORDER_CONSTANT
        to_patch = inverse(self.pose)
        if frame == 2 and self.motion.deformation:
            x, y = transform(to_patch, *source)
            return cv2.remap(self.patch, x, y, cv2.INTER_LINEAR, borderMode=border)
        if frame == 2:
            to_patch = to_patch @ inverse(self.motion.matrix)
        to_patch = to_patch @ np.array([[1, 0, box[0]], [0, 1, box[1]], [0, 0, 1]])
        size = (box[2] - box[0], box[3] - box[1])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        if to_patch[2, 0] == to_patch[2, 1] == 0:
            return cv2.warpAffine(self.patch, to_patch[:2] / to_patch[2, 2], size, flags=flags, borderMode=border)
        return cv2.warpPerspective(self.patch, to_patch, size, flags=flags, borderMode=border)


@dataclass
class Frame:
    """A frame under construction: layers are added from back to front."""

    image: np.ndarray
    """uint8 (H, W, 3)."""
    label: np.ndarray
    """uint8 (H, W): the index of the frontmost layer."""
    flow: np.ndarray
    """float32 (H, W, 2): its displacement to the other frame."""

    @classmethod
    def empty(cls, height: int, width: int) -> "Frame":
        """A black frame."""
        image, flow = np.zeros((height, width, 3), np.uint8), np.zeros((height, width, 2), np.float32)
        return cls(image, np.zeros((height, width), np.uint8), flow)

    def add(self, layer: Layer, index: int, frame: int, shutter: float) -> None:
        """Add a layer in front of the others.

        Args:
            index: its label.
            frame: 1 or 2, which this is.
            shutter: the share of the time between the frames during which the shutter is open.
        """
        height, width = self.label.shape
        box = layer.box(height, width, frame)
        if box is None:
            return
        window = np.s_[box[1] : box[3], box[0] : box[2]]
        other = layer.motion.forward(box) if frame == 1 else layer.motion.backward(box)
        painted = layer.paint(box, frame, other)
        x, y = mesh(box)
        flow = np.empty((*painted.shape[:2], 2), np.float32)
        np.subtract(other[0], x, out=flow[..., 0])
        np.subtract(other[1], y, out=flow[..., 1])
        if index == 0:
            self.flow[window] = flow
            self.image[window] = blur_motion(painted, flow, shutter)
            return
        covered = cv2.inRange(cv2.extractChannel(painted, 3), np.array(128), np.array(255))
        np.copyto(self.label[window], index, where=covered != 0)
        cv2.copyTo(flow, covered, self.flow[window])
        painted = blur_motion(painted, flow, shutter)
        alpha = cv2.extractChannel(painted, 3) * np.float32(1 / 255)
        colour = cv2.cvtColor(painted, cv2.COLOR_RGBA2RGB)
        self.image[window] = cv2.blendLinear(colour, np.ascontiguousarray(self.image[window]), alpha, 1 - alpha)


def blur_motion(painted: np.ndarray, flow: np.ndarray, shutter: float) -> np.ndarray:
    """Average a layer along its displacement while the shutter is open, half before the frame's instant, half after.

    The image, half the range earlier, is averaged with itself at one step later, two, four...: n passes make 2^n
    samples.

    Args:
        painted: uint8 (h, w, channels).
        flow: float32 (h, w, 2) in pixels, to the other frame.
        shutter: the share of the displacement.
    """
    length = shutter * float(np.abs(flow[::8, ::8]).max())
    if length < 1:
        return painted
    passes = max(1, int(np.ceil(np.log2(min(length, MAX_BLUR)))))
    step = shutter * min(1, MAX_BLUR / length) / 2**passes
    height, width = painted.shape[:2]
    x, y = mesh((0, 0, width, height))

    def shifted(image: np.ndarray, steps: float) -> np.ndarray:
        along = flow * np.float32(steps * step)
        return cv2.remap(image, x + along[..., 0], y + along[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    painted = shifted(painted, (1 - 2**passes) / 2)
    for number in range(passes):
        painted = cv2.addWeighted(painted, 0.5, shifted(painted, 2**number), 0.5, 0)
    return painted


def find_occluded(flow: np.ndarray, label: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Where the flow leads to behind a layer in front or out of the frame: bool (H, W).

    Args:
        flow: float32 (H, W, 2) in pixels.
        label: uint8 (H, W), the frontmost layer, of the same frame.
        other: uint8 (H, W), that of the other frame.
    """
    height, width = label.shape
    x, y = mesh((0, 0, width, height))
    x, y = flow[..., 0] + x, flow[..., 1] + y
    outside = (x < 0) | (x > width - 1) | (y < 0) | (y > height - 1)
    # A layer's own edge may fall to either side of a pixel, so a layer behind it there does not hide it.
    found = cv2.remap(other, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    return outside | (found > label)
