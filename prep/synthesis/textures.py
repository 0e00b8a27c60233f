"""Textures for version 2: photographs, or procedural images with the statistics of natural ones.

A texture is drawn once for a block of pairs, which use it in many places, colours and sizes.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from launch import progress
from launch.errors import UserError
from launch.logs import print_note
from prep.datasets.frames import IMAGE_SUFFIXES, find_files, is_image
from prep.formats.image import parse_image
from prep.synthesis.common import FIXED_POINT, draw_palette, to_fixed_point

BLOCK = 64  # consecutive pairs that share textures: drawing one takes as long as rendering a pair
PER_BLOCK = 12
MAX_SIDE = 1024
DETAIL = 2  # texture pixels per pixel of a frame: with one, interpolation would blur frames more than cameras do


@dataclass(frozen=True)
class Photographs:
    """A folder of photographs."""

    paths: tuple[Path, ...]
    """Their paths, in the order of their names relative to the folder."""
    sha256: str
    """SHA-256 of all names and contents, which pairs made from them depend on."""

    @classmethod
    def load(cls, folder: Path) -> "Photographs":
        """Find the photographs in a folder and its subfolders.

        Raises:
            UserError: there are none, or one is a broken link.
        """
        if not folder.is_dir():
            raise UserError(f"--textures {folder}: is not a folder; expected a folder of photographs")
        found = find_photographs(folder)
        if not found:
            raise UserError(
                f"--textures {folder}: contains no images; expected files in {', '.join(IMAGE_SUFFIXES)}; of a "
                "video, extract frames first (ffmpeg -i VIDEO FOLDER/%06d.jpg)"
            )
        digest = hashlib.sha256()
        for name in sorted(found):
            line = f"{name}\n{hashlib.sha256(found[name].read_bytes()).hexdigest()}\n"
            digest.update(line.encode(errors="surrogateescape"))  # names need not be UTF-8
        return cls(tuple(found[name] for name in sorted(found)), digest.hexdigest())

    def draw(self, rng: np.random.Generator, side: int) -> np.ndarray:
        """A random square part of a random photograph, mirrored or not, as uint8 (side, side, 3)."""
        path = self.paths[rng.integers(len(self.paths))]
        photograph = read_photograph(path, side)
        height, width = photograph.shape[:2]
        part = max(1, int(min(height, width) * rng.uniform(0.6, 1.0)))
        top, left = rng.integers(height - part + 1), rng.integers(width - part + 1)
        method = cv2.INTER_AREA if part > side else cv2.INTER_CUBIC
        texture = cv2.resize(photograph[top : top + part, left : left + part], (side, side), interpolation=method)
        return cv2.flip(texture, 1) if rng.random() < 0.5 else texture


def find_photographs(folder: Path) -> dict[str, Path]:
    """The images that `prep/convert.py frames` finds, by their names relative to the folder."""
    found = find_files(folder, print_note)
    return {name: Path(path) for files in found for name, path in files.items() if is_image(name)}


def read_photograph(path: Path, side: int) -> np.ndarray:
    """Read a photograph, uint8 (H, W, 3) RGB, possibly reduced, but not below `side` pixels."""
    data = path.read_bytes()
    if data and path.suffix.lower() in (".jpg", ".jpeg"):
        # Decoding a reduced JPEG takes a fraction of the time.
        for factor in (cv2.IMREAD_REDUCED_COLOR_4, cv2.IMREAD_REDUCED_COLOR_2):
            image = cv2.imdecode(np.frombuffer(data, np.uint8), factor | cv2.IMREAD_IGNORE_ORIENTATION)
            if image is not None and min(image.shape[:2]) >= 1.25 * side:
                return image[..., ::-1]
    return parse_image(data, path)


class Textures:
    """The textures of a dataset, each a pure function of the seed, its block and its number in the block.

    Args:
        seed: the seed of the dataset.
        side: side of a procedural texture, in pixels. Photographs are larger by DETAIL, so that they cover a frame.
        photographs: what to make textures of; without them, textures are procedural.
        share: share of photographs among the textures.
    """

    def __init__(self, seed: int, side: int, photographs: Photographs | None = None, share: float = 1.0) -> None:
        self.seed, self.side, self.photographs, self.share = seed, side, photographs, share
        self.block = -1
        self.drawn: dict[int, np.ndarray] = {}

    def check(self, workers: int) -> None:
        """Read all photographs as `draw` would, in threads; UserError for the first that cannot be used."""
        if not self.photographs:
            return

        def read(path: Path) -> None:
            read_photograph(path, DETAIL * self.side)

        paths = self.photographs.paths
        with ThreadPoolExecutor(workers) as pool:
            checked = pool.map(read, paths)
            for _ in progress.bar(checked, total=len(paths), desc="checking", unit="photograph", delay=2, leave=False):
                pass

    def pick(self, rng: np.random.Generator, block: int) -> np.ndarray:
        """One of a block's textures: uint8 (S, S, 3)."""
        if block != self.block:
            self.block, self.drawn = block, {}
        number = int(rng.integers(PER_BLOCK))
        if number not in self.drawn:
            self.drawn[number] = self.draw(np.random.default_rng([2, self.seed, block, number, 1]))
        return self.drawn[number]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a texture."""
        if self.photographs and rng.random() < self.share:
            return self.photographs.draw(rng, DETAIL * self.side)
        return draw_procedural(rng, self.side)


def recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Random gain, contrast and gamma of each channel, and random order of channels: uint8 (H, W, 3)."""
    gamma = np.exp(rng.normal(0, 0.25) + rng.normal(0, 0.08, 3))
    gain = np.exp(rng.normal(0, 0.2) + rng.normal(0, 0.08, 3))
    base = np.linspace(0, 1, 256)[:, None]
    table = np.clip(np.rint(255 * gain * base**gamma), 0, 255).astype(np.uint8)
    recoloured = cv2.LUT(image, table[None])
    return recoloured if rng.random() < 0.7 else recoloured[..., rng.permutation(3)]


def draw_procedural(rng: np.random.Generator, side: int) -> np.ndarray:
    """Dead leaves, patterns, gradients of light and grain of varying strength: uint8 (side, side, 3)."""
    palette = draw_palette(rng)
    image = np.empty((side, side, 3), np.uint8)
    image[:] = palette[0]
    draw_leaves(rng, image, palette)
    texture = image.astype(np.float32)
    if rng.random() < 0.3:
        add_pattern(rng, texture)
    # Light varies over a surface, and so does its roughness: much of a real image is almost flat.
    texture *= np.exp(0.35 * upsample(rng, 3, side))
    grain = draw_grain(rng, side) * np.exp(rng.uniform(np.log(0.5), np.log(18)))
    texture += grain * np.exp(0.8 * upsample(rng, 5, side))
    # Surfaces are not equally sharp.
    texture = cv2.GaussianBlur(texture, (0, 0), np.exp(rng.uniform(np.log(0.4), np.log(0.8))))
    return np.clip(np.rint(texture), 0, 255).astype(np.uint8)


def draw_leaves(rng: np.random.Generator, image: np.ndarray, palette: np.ndarray) -> None:
    """Cover an image, uint8 (S, S, 3), with overlapping leaves whose radii follow r^-3.

    Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001: this distribution makes edges and contrast
    the same at all scales, as in natural images. The number of leaves is limited, because their drawing takes the time.
    """
    side = len(image)
    smallest = np.exp(rng.uniform(np.log(1.2), np.log(0.1 * side + 2)))
    largest = max(0.4 * side, 2 * smallest)
    mean_area = 2 * np.pi * 0.6 * smallest**2 * np.log(largest / smallest)
    count = int(min(rng.uniform(0.5, 2.5) * side**2 / mean_area, 2000))
    radius = (smallest**-2 - rng.random((count, 1)) * (smallest**-2 - largest**-2)) ** -0.5
    # Sixteen points around an ellipse; in leaves with fewer corners, several points coincide.
    corners = rng.choice([3, 4, 5, 16], (count, 1))
    angle = np.floor(np.arange(16) * corners / 16) / corners * 2 * np.pi + rng.uniform(0, 2 * np.pi, (count, 1))
    leaf = radius * np.exp(1j * angle)
    leaf = leaf.real + 1j * leaf.imag * rng.uniform(0.25, 1.0, (count, 1))
    leaf = leaf * np.exp(1j * rng.uniform(0, 2 * np.pi, (count, 1)))
    leaf += rng.uniform(0, side, (count, 1)) + 1j * rng.uniform(0, side, (count, 1))
    points = to_fixed_point(np.stack([leaf.real, leaf.imag], -1))
    colour = palette[rng.integers(0, len(palette), count)]
    colour = np.clip(colour * rng.uniform(0.7, 1.3, (count, 1)) + rng.normal(0, 8, (count, 3)), 0, 255)
    for contour, shade in zip(points, colour.tolist(), strict=True):
        cv2.fillConvexPoly(image, contour, shade, cv2.LINE_AA, FIXED_POINT)


def add_pattern(rng: np.random.Generator, texture: np.ndarray) -> None:
    """Add stripes or a grid to a part of a texture, float32 (S, S, 3), in place."""
    side = len(texture)
    period = side * np.exp(rng.uniform(np.log(0.015), np.log(0.1)))
    angle = rng.uniform(0, np.pi)
    wave = plane_wave(side, angle, period)
    if rng.random() < 0.5:
        wave = np.maximum(wave, plane_wave(side, angle + np.pi / 2, period * rng.uniform(0.5, 3)))
    sharp = np.float32(np.exp(rng.uniform(0, 2)))
    wave = np.clip(wave * sharp, -1, 1)
    part = np.clip(3 * upsample(rng, 4, side), 0, 1)
    texture += (wave[..., None] * part) * rng.normal(0, 40, 3).astype(np.float32)


def plane_wave(side: int, angle: float, period: float) -> np.ndarray:
    """A sine wave of a direction in radians and a period in pixels: float32 (S, S)."""
    phase = np.arange(side) * (2 * np.pi / period)
    across, along = np.exp(1j * np.cos(angle) * phase), np.exp(1j * np.sin(angle) * phase)
    # sin(a + b) for all pairs of a row and a column, from the sines and cosines of both.
    parts = np.stack([along.imag, along.real], 1), np.stack([across.real, across.imag])
    return parts[0].astype(np.float32) @ parts[1].astype(np.float32)


def upsample(rng: np.random.Generator, points: int, side: int) -> np.ndarray:
    """Smooth noise from points x points normal numbers: float32 (S, S, 1)."""
    grid = rng.standard_normal((points, points), np.float32)
    return cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)[..., None]


def draw_grain(rng: np.random.Generator, side: int) -> np.ndarray:
    """Noise with equal power in every octave (1/f), more in brightness than in colour: float32 (S, S, 3)."""
    half = -(-side // 2)  # the finest octave is left to the noise of the camera
    noise = np.zeros((half, half), np.float32)
    steps = [2**octave for octave in range(int(np.log2(half)))]
    for step in steps:
        grid = rng.standard_normal((half // step + 2, half // step + 2), np.float32)
        noise += cv2.resize(grid, (half, half), interpolation=cv2.INTER_CUBIC)
    noise = cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC) * np.float32(len(steps) ** -0.5)
    return noise[..., None] * (1 + rng.normal(0, 0.15, 3)).astype(np.float32)
