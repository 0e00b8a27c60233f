#!/usr/bin/env python3
"""Example data: image pairs of moving textured shapes with exact flow, in the FlyingChairs layout.

A pair is a stack of layers: a textured background and several textured shapes over it, each with
an affine motion of its own. Both frames sample the same textures, so the flow is exact, and the
front-most layer of a pixel gives its flow.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    from launch import environment

    environment.check()

import functools
import json
import multiprocessing
import re
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import cv2
import numpy as np

from launch import errors, files, progress
from launch.arguments import Parser
from prep.formats import flow as flow_format
from prep.formats import image as image_format

CHAIRS_WIDTH = 512  # the lengths below are in pixels of a FlyingChairs frame, 384 x 512
SMALLEST_SIDE, LARGEST_SIDE = 32, 2048
MOST_PAIRS = 99999  # names have five digits, and name order must be number order
VERSION = 1  # of the pictures: one more whenever the same seed gives other bytes

# Motions are drawn by the rule of the FlyingChairs data set (FlowNet, ICCV 2015): a number is
# clip(sign(g) |g|^power, low, high) with g ~ N(0, sigma), drawn with `chance`, else 0. The powers
# give the heavy tail: most motions are small, a few very large. The parameters here were chosen
# for a mean displacement of about 11 pixels at 384 x 512, as FlyingChairs has.
BACKGROUND_MOTION = {
    "shift": {"power": 2, "sigma": 1.8, "low": -40, "high": 40, "chance": 1.0},
    "turn": {"power": 2, "sigma": 1.2, "low": -10, "high": 10, "chance": 0.3},
    "zoom": {"power": 2, "sigma": 0.1, "low": -0.07, "high": 0.07, "chance": 0.6},
    "squeeze": {"power": 2, "sigma": 0.1, "low": -0.07, "high": 0.07, "chance": 0.3},
}
SHAPE_MOTION = {
    "shift": {"power": 3, "sigma": 2.0, "low": -120, "high": 120, "chance": 1.0},
    "turn": {"power": 2, "sigma": 2.3, "low": -30, "high": 30, "chance": 0.7},
    "zoom": {"power": 2, "sigma": 0.18, "low": -0.2, "high": 0.2, "chance": 0.7},
    "squeeze": {"power": 2, "sigma": 0.18, "low": -0.2, "high": 0.2, "chance": 0.5},
}

FIXED_POINT = 4  # OpenCV draws at 1/16 pixel


def make_pair(rng_or_seed, height, width):
    """One image pair with its flow.

    Args:
        rng_or_seed: a numpy Generator, or what numpy.random.default_rng takes as a seed.
        height, width: size of the frames in pixels; displacements scale with the width.

    Returns:
        (image1, image2, flow, occluded): uint8 H x W x 3 RGB, the same, float32 H x W x 2
        (x then y, in pixels, from image1 to image2), and bool H x W, true where a pixel of image1
        is hidden in image2 by a layer in front of its own or has left the frame.
    """
    rng = np.random.default_rng(rng_or_seed)
    background = draw_background(rng, height, width)
    layers = [background]
    for _ in range(rng.integers(3, 9)):
        layers.append(draw_shape(rng, height, width, background["motion"]))
    image1, label1 = render(layers, [layer["pose"] for layer in layers], height, width)
    image2, label2 = render(layers, [layer["motion"] @ layer["pose"] for layer in layers], height, width)
    flow = flow_of_labels(label1, [layer["motion"] for layer in layers])
    # The exposure is the scene's: both frames have the same.
    gain, gamma = rng.uniform(0.75, 1.0), np.exp(rng.normal(0, 0.25))
    exposed = np.rint(255 * gain * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return exposed[image1], exposed[image2], flow, find_occluded(flow, label1, label2)


def draw_background(rng, height, width):
    """The layer at the back: an opaque texture that reaches beyond the frame on every side."""
    rows, columns = int(1.25 * height), int(1.25 * width)
    alpha = np.full((rows, columns), 255, np.uint8)
    centre = ((width - 1) / 2, (height - 1) / 2)
    pose = place(rng.uniform(-0.15, 0.15), (columns, rows), centre)
    motion = draw_motion(rng, BACKGROUND_MOTION, centre, width)
    return {
        "patch": np.dstack([draw_texture(rng, rows, columns), alpha]),
        "border": cv2.BORDER_REFLECT_101,
        "pose": pose,
        "motion": motion,
    }


def draw_shape(rng, height, width, background_motion):
    """A layer in front: a textured shape on a transparent patch, moving with the background and
    on its own."""
    radius = width * np.exp(rng.uniform(np.log(0.07), np.log(0.3)))
    side = int(2 * radius) + 8
    alpha = np.zeros((side, side), np.uint8)
    contours = [side / 2 + radius * contour for contour in draw_contours(rng)]
    cv2.fillPoly(alpha, [to_fixed_point(contour) for contour in contours], 255, cv2.LINE_AA, FIXED_POINT)
    centre = (rng.uniform(0, width), rng.uniform(0, height))
    pose = place(rng.uniform(0, 2 * np.pi), (side, side), centre)
    motion = background_motion @ draw_motion(rng, SHAPE_MOTION, centre, width)
    return {
        "patch": np.dstack([draw_texture(rng, side, side), alpha]),
        "border": cv2.BORDER_CONSTANT,
        "pose": pose,
        "motion": motion,
    }


def place(turn, patch_size, centre):
    """3 x 3 matrix that turns a patch by `turn` radians and puts its middle on `centre` (x, y)."""
    middle = (np.array(patch_size) - 1) / 2
    matrix = np.eye(3)
    matrix[:2, :2] = rotation(turn)
    matrix[:2, 2] = centre - matrix[:2, :2] @ middle
    return matrix


def draw_motion(rng, parameters, centre, width):
    """3 x 3 matrix of a random affine motion about `centre`, from frame 1 to frame 2, in pixels."""
    shift = [draw_skewed(rng, **parameters["shift"]) * width / CHAIRS_WIDTH for _ in range(2)]
    turn = np.deg2rad(draw_skewed(rng, **parameters["turn"]))
    zoom = 1 + draw_skewed(rng, **parameters["zoom"])
    # Wider by this factor along a direction of its own, and narrower across it.
    squeeze = np.exp(draw_skewed(rng, **parameters["squeeze"]))
    axis = rotation(rng.uniform(0, np.pi))
    matrix = np.eye(3)
    matrix[:2, :2] = zoom * rotation(turn) @ axis @ np.diag([squeeze, 1 / squeeze]) @ axis.T
    matrix[:2, 2] = centre + np.array(shift) - matrix[:2, :2] @ centre
    return matrix


def rotation(angle):
    """2 x 2 matrix that turns by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def draw_skewed(rng, power, sigma, low, high, chance):
    """A random number by the rule of the motion tables above."""
    value = rng.normal(0, sigma)
    return np.clip(np.sign(value) * abs(value) ** power, low, high) if rng.random() < chance else 0


def draw_contours(rng):
    """Closed contours (N x 2, inside the unit circle) of a random shape; a second one is a hole."""
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
    # Rings and frames show what is behind them, as the legs of FlyingChairs' chairs do.
    return [contour, contour * rng.uniform(0.4, 0.75)] if rng.random() < 0.2 else [contour]


def to_fixed_point(points):
    """Pixel coordinates as the int32 that OpenCV's drawing functions take."""
    return np.round(points * 2**FIXED_POINT).astype(np.int32)


def draw_texture(rng, height, width):
    """uint8 H x W x 3 texture like a natural picture: dead leaves over and under 1/f noise."""
    palette = draw_palette(rng)
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = palette[0]
    draw_dead_leaves(rng, picture, palette)
    grain = draw_pink_noise(rng, height, width) * rng.uniform(4, 24)
    texture = cv2.add(picture, grain, dtype=cv2.CV_32F)
    # No detail finer than resampling can carry: warped frames must agree to a few grey levels.
    texture = cv2.GaussianBlur(texture, (0, 0), rng.uniform(0.6, 0.8))
    return np.clip(np.rint(texture), 0, 255).astype(np.uint8)


def draw_palette(rng):
    """float32 P x 3 RGB colours that go together: near one hue or across the wheel."""
    count = rng.integers(3, 8)
    hue = rng.uniform(0, 360) + rng.normal(0, rng.choice([15, 40, 120]), count)
    saturation = rng.beta(1.5, 2.5, count) * rng.uniform(0.3, 1)
    value = np.clip(rng.normal(rng.uniform(0.25, 0.75), 0.25, count), 0.03, 1)
    hsv = np.stack([hue % 360, saturation, value], 1).astype(np.float32)
    return 255 * cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]


def draw_dead_leaves(rng, picture, palette) -> None:
    """Cover `picture` (uint8 H x W x 3) with overlapping leaves whose radii follow r^-3.

    Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001: that law makes edges
    and contrast alike at all scales, as in natural pictures.
    """
    height, width = picture.shape[:2]
    smallest = np.exp(rng.uniform(np.log(1.2), np.log(5)))
    largest = max(0.4 * max(height, width), 2 * smallest)
    mean_area = 2 * np.pi * 0.6 * smallest**2 * np.log(largest / smallest)
    count = int(rng.uniform(0.5, 2.5) * height * width / mean_area)
    uniform = rng.random((count, 1))
    radius = (smallest**-2 - uniform * (smallest**-2 - largest**-2)) ** -0.5
    # Sixteen points round an ellipse; leaves with fewer corners have several points on each.
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
    for leaf, shade in zip(to_fixed_point(points), np.clip(colour, 0, 255).tolist()):
        cv2.fillConvexPoly(picture, leaf, shade, cv2.LINE_AA, FIXED_POINT)


def draw_pink_noise(rng, height, width):
    """float32 H x W x 3 noise of about unit variance with equal power in every octave (1/f)."""
    noise = np.zeros((height, width, 3), np.float32)
    steps = [2**octave for octave in range(int(np.log2(min(height, width))))]
    for step in steps:
        grid = rng.standard_normal((height // step + 2, width // step + 2, 3), np.float32)
        noise += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    noise /= np.sqrt(len(steps))
    grey = noise[..., :1] + noise[..., 1:2]
    return 0.6 * grey + 0.4 * noise  # more in brightness than in colour, as in natural pictures


def render(layers, poses, height, width):
    """Paint the layers back to front, each under its pose (3 x 3, patch to frame).

    Returns (uint8 H x W x 3 image, int H x W index of the front-most layer of each pixel).
    """
    image = np.zeros((height, width, 3), np.float32)
    label = np.zeros((height, width), np.int64)
    for index, (layer, pose) in enumerate(zip(layers, poses)):
        rows, columns = layer["patch"].shape[:2]
        left, top, right, bottom = 0, 0, width, height
        if index > 0:  # only the part of the frame that the patch can reach
            corners = np.array([[0, columns, columns, 0], [0, 0, rows, rows], [1, 1, 1, 1]])
            x, y, _ = pose @ corners
            left, right = np.clip([np.floor(x.min()), np.ceil(x.max()) + 1], 0, width).astype(int)
            top, bottom = np.clip([np.floor(y.min()), np.ceil(y.max()) + 1], 0, height).astype(int)
            if left == right or top == bottom:
                continue
        local = pose[:2] - [[0, 0, left], [0, 0, top]]
        warped = cv2.warpAffine(
            layer["patch"],
            local,
            (int(right - left), int(bottom - top)),
            flags=cv2.INTER_CUBIC,
            borderMode=layer["border"],
        )
        alpha = warped[..., 3:].astype(np.float32) / 255
        view = image[top:bottom, left:right]
        view += alpha * (warped[..., :3] - view)
        label[top:bottom, left:right][warped[..., 3] >= 128] = index
    return np.rint(image).astype(np.uint8), label


def flow_of_labels(label, motions):
    """float32 H x W x 2 flow of a frame whose pixels move by the motion (3 x 3) of their label."""
    y, x = np.indices(label.shape)
    change = np.stack(motions) - np.eye(3)
    return np.stack(
        [change[label, row, 0] * x + change[label, row, 1] * y + change[label, row, 2] for row in (0, 1)], -1
    ).astype(np.float32)


def find_occluded(flow, label1, label2):
    """bool H x W: where the pixel that the flow leads to belongs to another layer or to none."""
    height, width = label1.shape
    y, x = np.indices(label1.shape)
    x, y = x + flow[..., 0], y + flow[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    column = np.rint(np.clip(x, 0, width - 1)).astype(int)
    row = np.rint(np.clip(y, 0, height - 1)).astype(int)
    return ~inside | (label2[row, column] != label1)


def write_pair(folder, number, seed, height, width) -> None:
    """Write pair `number` (from 1) of a set as NNNNN_img1.ppm, NNNNN_img2.ppm, NNNNN_flow.flo."""
    # One stream of random numbers for each pair, so that its bytes do not depend on which worker
    # makes it or on how many pairs there are.
    image1, image2, flow, _ = make_pair(np.random.SeedSequence([seed, number]), height, width)
    name = os.path.join(folder, f"{number:05d}")
    image_format.write_ppm(f"{name}_img1.ppm", image1)
    image_format.write_ppm(f"{name}_img2.ppm", image2)
    flow_format.write_flo(f"{name}_flow.flo", flow)


def write_set(folder, pairs, height, width, seed, workers) -> bool:
    """Write a whole set into a new `folder`; it appears there when finished, or not at all.

    Returns True, or False when the folder already holds the same finished set.
    Raises UserError when it holds anything else.
    """
    recipe = {
        "made by": "prep/synthesize.py",
        "version": VERSION,
        "pairs": pairs,
        "height": height,
        "width": width,
        "seed": seed,
    }
    if is_finished(folder, recipe):
        return False
    partial = folder + ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run has left
    os.makedirs(partial)
    try:
        write_pairs(partial, pairs, height, width, seed, workers)
        lines = [
            f"# 0-based index of the validation pairs among the {pairs} pairs of this set in name "
            "order (pair 00001 is index 0); every tenth",
            *validation_indices(pairs),
            "",
        ]
        files.write_bytes(os.path.join(partial, "validation.txt"), "\n".join(map(str, lines)).encode())
        files.write_bytes(os.path.join(partial, "synthesize.json"), json.dumps(recipe, indent=2).encode() + b"\n")
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def is_finished(folder, recipe) -> bool:
    """Whether `folder` holds the set that `recipe` describes; UserError if it holds another."""
    if not os.path.lexists(folder) or (os.path.isdir(folder) and not os.listdir(folder)):
        return False
    try:
        with open(os.path.join(folder, "synthesize.json")) as file:
            found = dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError):
        raise errors.UserError(
            f"{folder}: already there and not a set of this script's; "
            "expected a new or empty folder; choose another --out"
        ) from None
    if found != recipe:
        names = [name for name in recipe if found.get(name) != recipe[name]]
        seen = ", ".join(f"{name} {found.get(name)} instead of {recipe[name]}" for name in names)
        raise errors.UserError(f"{folder}: holds another set ({seen}); choose another --out or remove it first")
    return True


def validation_indices(pairs):
    """0-based indices of the validation pairs: every tenth, and one at least."""
    return range(min(9, pairs - 1), pairs, 10)


def write_pairs(folder, pairs, height, width, seed, workers) -> None:
    """Write all pairs of a set with `workers` processes and a progress bar."""
    # A fresh interpreter for each worker: forking a process that has threads can hang.
    pool = ProcessPoolExecutor(min(workers, pairs), multiprocessing.get_context("spawn"), cv2.setNumThreads, (1,))
    write = functools.partial(write_pair, folder, seed=seed, height=height, width=width)
    try:
        # Ctrl-C goes to every process of the terminal but is the parent's to handle: the workers,
        # which start with the first job, inherit that it is blocked.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        done = pool.map(write, range(1, pairs + 1), chunksize=4)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for _ in progress.bar(done, total=pairs, unit="pair", desc="synthesize"):
            pass
    except BrokenProcessPool:
        raise errors.UserError(
            "a worker process was killed, most likely for want of memory; try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def parse_size(text):
    """(height, width) of a text such as 128x192."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    size = tuple(map(int, match.groups())) if match else ()
    if not size or min(size) < SMALLEST_SIDE or max(size) > LARGEST_SIDE:
        raise errors.UserError(
            f"--size {text}: expected HEIGHTxWIDTH, each from {SMALLEST_SIDE} to {LARGEST_SIDE} pixels, such as 128x192"
        )
    return size


def main() -> None:
    """The command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the set")
    parser.add_argument("--pairs", type=int, default=1200, help="default: %(default)s")
    parser.add_argument("--size", default="128x192", metavar="HxW", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: one a core"
    )
    options = parser.parse_args()
    height, width = parse_size(options.size)
    if not 1 <= options.pairs <= MOST_PAIRS:
        raise errors.UserError(f"--pairs {options.pairs}: expected 1 to {MOST_PAIRS}")
    if options.seed < 0:
        raise errors.UserError(f"--seed {options.seed}: expected 0 or more")
    if options.workers < 1:
        raise errors.UserError(f"--workers {options.workers}: expected 1 or more")
    folder = os.path.abspath(options.out)
    made = write_set(folder, options.pairs, height, width, options.seed, options.workers)
    held_out = len(validation_indices(options.pairs))
    print(
        f"{options.out}: {options.pairs} pairs of {height}x{width}, seed {options.seed}, "
        f"{held_out} for validation (validation.txt)" + ("" if made else "; already there, nothing to do")
    )


if __name__ == "__main__":
    errors.run(main)
