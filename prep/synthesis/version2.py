"""Version 2 of the synthetic pairs: a moving camera before textured layers that move, bend and tilt, seen through air.

What transfers to real images, after "The Devil in the Details" (arXiv 2308.07378) and AutoFlow (CVPR 2021): layers
composited from back to front, a wide range of displacements, motion blur, fog, photographs as textures.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np

from prep.synthesis import effects, shapes
from prep.synthesis.common import CHAIRS_WIDTH
from prep.synthesis.layers import Frame, Layer, find_occluded
from prep.synthesis.motion import Box, Deformation, Motion, about, limit_strain, similarity, smooth_field
from prep.synthesis.textures import BLOCK, DETAIL, MAX_SIDE, Photographs, Textures, recolour


def ingredient(default: float, help: str) -> Any:
    """A field of Ingredients; `help` completes "probability ..."."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Ingredients:
    """How often each ingredient appears: probabilities from 0 to 1."""

    nonrigid: float = ingredient(
        0.5, "of a layer to bend, and of a scene to have depth, which the camera's motion reveals"
    )
    perspective: float = ingredient(0.4, "of a layer to tilt")
    thin: float = ingredient(0.2, "of a pair to have thin structures: branches, fences, wires, outlines")
    soft_edges: float = ingredient(0.2, "of a layer to have a soft edge")
    motion_blur: float = ingredient(0.15, "of a pair to be blurred by its motion")
    shadow: float = ingredient(0.1, "of a pair to have shadows, which move on their own")
    fog: float = ingredient(0.05, "of a pair to have fog")
    exposure: float = ingredient(0.2, "of the second frame to have a different exposure from the first")
    noise: float = ingredient(0.25, "of a pair to have noise, independent in each frame")
    photographs: float = ingredient(0.8, "of a texture to be a photograph, if there are any")


class SyntheticPair(NamedTuple):
    """An image pair with its flow in both directions."""

    image1: np.ndarray
    """uint8 (H, W, 3) RGB."""
    image2: np.ndarray
    flow: np.ndarray
    """float32 (H, W, 2) in pixels, from image 1 to image 2."""
    occluded: np.ndarray
    """bool (H, W): whether a pixel of image 1 is hidden in image 2 by another layer or has left the frame."""
    flow_back: np.ndarray
    """The flow from image 2 to image 1, like `flow`."""
    occluded_back: np.ndarray
    """The occluded pixels of image 2, like `occluded`."""


@dataclass(frozen=True)
class Camera:
    """The motion that all layers share, the more the nearer they are."""

    centre: tuple[float, float]
    shift: np.ndarray
    """Shift of the background in pixels, (2,)."""
    zoom: float
    """Relative change of size, at the background."""
    turn: float
    """Rotation in radians."""
    pace: float
    """Scale of all motions of the pair."""

    def matrix(self, nearness: float) -> np.ndarray:
        """3x3 matrix of the motion of what is nearer than the background by a factor."""
        shift = tuple(nearness * self.shift)
        return about(self.centre, similarity(self.turn, 1 + nearness * self.zoom, shift))


class PairMaker:
    """Makes the pairs of a dataset.

    Args:
        seed: the seed of the dataset.
        height, width: size of the frames in pixels; displacements scale with the width.
        ingredients: how often each appears.
        photographs: what textures are made of; without them, textures are procedural.
    """

    def __init__(
        self,
        seed: int,
        height: int,
        width: int,
        ingredients: Ingredients | None = None,
        photographs: Photographs | None = None,
    ) -> None:
        self.seed, self.height, self.width = seed, height, width
        self.ingredients = ingredients or Ingredients()
        side = min(max(height, width), MAX_SIDE)
        self.textures = Textures(seed, side, photographs, self.ingredients.photographs)
        self.texture_scale = max(height, width) / side / DETAIL  # frame pixels per texture pixel
        self.scale = width / CHAIRS_WIDTH

    def make(self, number: int) -> SyntheticPair:
        """Make pair `number`, a pure function of it and the arguments of the dataset."""
        rng = np.random.default_rng([2, self.seed, number, 2])
        block = number // BLOCK
        layers = self.draw_layers(rng, block)
        shutter = rng.uniform(0.1, 0.7) if rng.random() < self.ingredients.motion_blur else 0.0
        frames = [Frame.empty(self.height, self.width) for _ in range(2)]
        for index, layer in enumerate(layers):
            for number_of_frame, frame in enumerate(frames, 1):
                frame.add(layer, index, number_of_frame, shutter)
        first, second = frames
        image1, image2 = self.photograph(rng, first.image, second.image)
        return SyntheticPair(
            image1,
            image2,
            first.flow,
            find_occluded(first.flow, first.label, second.label),
            second.flow,
            find_occluded(second.flow, second.label, first.label),
        )

    def photograph(self, rng: np.random.Generator, *frames: np.ndarray) -> list[np.ndarray]:
        """Two frames, uint8 (H, W, 3), as the camera records them."""
        chances = self.ingredients
        air = effects.draw_air(rng, self.height, self.width, chances.shadow, chances.fog)
        tables = effects.draw_exposures(rng, chances.exposure)
        noisy = rng.random() < chances.noise
        sigma = np.exp(rng.uniform(0, np.log(8)))
        grain = rng.choice([0, 0.6, 1.0])
        images = []
        for number, (frame, table) in enumerate(zip(frames, tables, strict=True), 1):
            image = cv2.LUT(air.apply(frame, number) if air else frame, table)
            if noisy:
                image = effects.add_noise(rng, image, sigma * rng.uniform(0.7, 1.3), grain)
            images.append(image)
        return images

    def draw_layers(self, rng: np.random.Generator, block: int) -> list[Layer]:
        """The background and the layers in front of it, from back to front."""
        camera = self.draw_camera(rng)
        layers = [self.draw_background(rng, block, camera)]
        count = int(rng.integers(0, 7))
        thin = int(rng.integers(1, 3)) if rng.random() < self.ingredients.thin else 0
        # Near layers cover far ones and follow the camera more.
        nearness = np.sort(np.exp(rng.uniform(0, np.log(2.5), count + thin)))
        kinds = rng.permutation(np.arange(count + thin) < thin)
        for near, is_thin in zip(nearness, kinds, strict=True):
            layers.append(self.draw_layer(rng, block, camera, near, bool(is_thin)))
        return layers

    def draw_camera(self, rng: np.random.Generator) -> Camera:
        """The camera's motion: none in some pairs, in the others of a wide range of speeds."""
        pace = np.exp(rng.normal(0, 0.6))
        moves = rng.random() < 0.85
        shift = np.clip(rng.normal(0, 1, 2) * (7, 5.5) * pace * self.scale, -0.15 * self.width, 0.15 * self.width)
        zoom = float(np.clip(rng.normal(0, 0.02) * pace, -0.2, 0.25))
        turn = float(np.deg2rad(np.clip(rng.normal(0, 0.8) * pace, -12, 12)))
        return Camera(((self.width - 1) / 2, (self.height - 1) / 2), moves * shift, moves * zoom, moves * turn, pace)

    def draw_background(self, rng: np.random.Generator, block: int, camera: Camera) -> Layer:
        """The layer at the back, which fills the frame; beyond its edges, the texture is mirrored."""
        texture = recolour(rng, self.textures.pick(rng, block))
        scale = self.texture_scale * rng.uniform(1.0, 1.25)
        middle = ((len(texture) - 1) / 2, (len(texture) - 1) / 2)
        pose = about(camera.centre, similarity(rng.uniform(-0.15, 0.15), scale))
        pose[:2, 2] = np.array(camera.centre) - pose[:2, :2] @ middle
        margin_x, margin_y = self.width // 4, self.height // 4
        box = (-margin_x, -margin_y, self.width + margin_x, self.height + margin_y)
        motion = self.bend(rng, camera.matrix(1.0), camera, box, depth=True)
        return Layer(texture, pose, motion)

    def draw_layer(self, rng: np.random.Generator, block: int, camera: Camera, near: float, thin: bool) -> Layer:
        """A layer in front of the background, with the camera's motion and, mostly, its own."""
        radius = self.width * np.exp(rng.uniform(np.log(0.12 if thin else 0.06), np.log(0.35)))
        side = max(int(2 * radius), 16)
        softness = 0.0
        if rng.random() < self.ingredients.soft_edges:
            softness = max(0.5, self.scale * np.exp(rng.uniform(np.log(0.7), np.log(1.5 if thin else 4))))
        margin = 2 + 2 * softness
        if thin:
            mask = shapes.draw_thin(rng, side, margin, self.scale * np.exp(rng.uniform(np.log(1.5), np.log(7))))
        else:
            mask = shapes.draw_solid(rng, side, margin)
        if softness:
            mask = cv2.GaussianBlur(mask, (0, 0), softness, borderType=cv2.BORDER_CONSTANT)
        patch = cv2.merge([self.cut(rng, self.textures.pick(rng, block), side), mask])
        centre = (rng.uniform(0, self.width), rng.uniform(0, self.height))
        pose = similarity(rng.uniform(0, 2 * np.pi), 1.0)
        pose[:2, 2] = centre - pose[:2, :2] @ ((side - 1) / 2, (side - 1) / 2)
        matrix = camera.matrix(near)
        if rng.random() < 0.85:
            matrix = matrix @ about(centre, self.draw_own_motion(rng, camera.pace))
        x, y = np.array(centre)
        reach = int(1.5 * radius) + 8
        box = (int(x) - reach, int(y) - reach, int(x) + reach, int(y) + reach)
        return Layer(patch, pose, self.bend(rng, matrix, camera, box, depth=False))

    def cut(self, rng: np.random.Generator, texture: np.ndarray, side: int) -> np.ndarray:
        """A random part of a texture, in a random scale and random colours, as uint8 (side, side, 3).

        Where the part is larger than the texture, that is mirrored.
        """
        scale = self.texture_scale * np.exp(rng.uniform(np.log(0.6), np.log(1.3)))
        room = max(0, len(texture) - side / scale)
        matrix = np.array([[1 / scale, 0, rng.uniform(0, room)], [0, 1 / scale, rng.uniform(0, room)]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        part = cv2.warpAffine(texture, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        return recolour(rng, part)

    def draw_own_motion(self, rng: np.random.Generator, pace: float) -> np.ndarray:
        """3x3 matrix of an object's motion, about the origin."""
        shift = np.clip(rng.standard_t(3, 2) * 7 * pace * self.scale, -0.25 * self.width, 0.25 * self.width)
        turn = np.deg2rad(np.clip(rng.standard_t(3) * 2.5 * pace, -35, 35))
        zoom = np.exp(np.clip(rng.standard_t(3) * 0.02 * pace, -0.25, 0.25))
        stretch = np.exp(np.clip(rng.standard_t(3) * 0.015 * pace, -0.15, 0.15))
        axis = similarity(rng.uniform(0, np.pi), 1.0)
        return similarity(turn, zoom, tuple(shift)) @ axis @ np.diag([stretch, 1 / stretch, 1]) @ axis.T

    def bend(self, rng: np.random.Generator, matrix: np.ndarray, camera: Camera, box: Box, depth: bool) -> Motion:
        """A motion that, with the ingredients' probabilities, also tilts and bends.

        Args:
            box: the part of frame 1 in which the layer is, and what it bends in.
            depth: whether the layer is a scene whose points are not equally far away.
        """
        width, height = box[2] - box[0], box[3] - box[1]
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        if rng.random() < self.ingredients.perspective:
            tilt = np.eye(3)
            # Points at the edge of the box move apart or together by this share of their distance from its middle.
            tilt[2, :2] = np.clip(rng.normal(0, 0.02 * camera.pace, 2), -0.12, 0.12) / (width / 2, height / 2)
            matrix = matrix @ about(middle, tilt)
        if rng.random() >= self.ingredients.nonrigid:
            return Motion(matrix)
        amplitude = rng.uniform(0.2, 1.5) * min(0.03 * width, 8 * self.scale) * camera.pace
        bend = smooth_field(rng, box, int(rng.integers(2, 7)), 2) * np.float32(amplitude)
        if depth:
            relief = smooth_field(rng, box, int(rng.integers(2, 6)), 1) * np.float32(rng.uniform(0, 0.5))
            x = np.arange(box[0], box[2], dtype=np.float32)[None] - np.float32(camera.centre[0])
            y = np.arange(box[1], box[3], dtype=np.float32)[:, None] - np.float32(camera.centre[1])
            bend[..., 0] += relief[..., 0] * (np.float32(camera.zoom) * x + np.float32(camera.shift[0]))
            bend[..., 1] += relief[..., 0] * (np.float32(camera.zoom) * y + np.float32(camera.shift[1]))
        return Motion(matrix, Deformation(box, limit_strain(bend)))
