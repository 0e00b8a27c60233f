"""Visualisation of optical flow and its errors, for TensorBoard, reports and inspection of data.

All images are uint8 (H, W, 3) RGB; flow is float32 (H, W, 2) in pixels, x then y.
"""

import functools
import io
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from launch import files
from prep.formats import StrPath
from prep.formats import flow as flow_format

# The colour wheel: its six main colours, and the number of steps to the next one.
WHEEL = [
    ((255, 0, 0), 15),  # red to yellow
    ((255, 255, 0), 6),  # yellow to green
    ((0, 255, 0), 4),  # green to cyan
    ((0, 255, 255), 11),  # cyan to blue
    ((0, 0, 255), 13),  # blue to magenta
    ((255, 0, 255), 6),  # magenta to red
]

# The colours of the KITTI flow benchmark's error images: up to 0.19 px, then doubling to 48 px; blue below 3 px, the
# benchmark's threshold for outliers, yellow to red above.
ERROR_BOUNDS = 3.0 * 2.0 ** np.arange(-4, 5)
ERROR_COLOURS = np.array(
    [
        (49, 54, 149),
        (69, 117, 180),
        (116, 173, 209),
        (171, 217, 233),
        (224, 243, 248),
        (254, 224, 144),
        (253, 174, 97),
        (244, 109, 67),
        (215, 48, 39),
        (165, 0, 38),
    ],
    np.uint8,
)

NOTE_KEY = "pwcnet"  # of a note in a PNG file

TEXT_SIZE = 12  # pixels
MARGIN = 3  # pixels around a text


def colour_wheel() -> np.ndarray:
    """The 55 colours of the Middlebury wheel, float64 (55, 3) RGB in [0, 1]."""
    colours = [start for start, _ in WHEEL] + [WHEEL[0][0]]
    parts = []
    for (start, steps), end in zip(WHEEL, colours[1:], strict=True):
        step = np.arange(steps)[:, None]
        change = np.subtract(end, start)
        # Rounded as in the published code: in integers, before the subtraction.
        parts.append(start + np.sign(change) * np.floor(np.abs(change) * step / steps))
    return np.concatenate(parts) / 255


def flow_to_color(flow: np.ndarray, max_flow: float | None = None) -> np.ndarray:
    """Flow in the Middlebury colour code: hue is the direction, saturation the magnitude.

    Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011, and its published colorcode.cpp.
    Zero is white, right red, down yellow, left cyan, up blue-violet. Unknown flow (NaN, or 1e9 and more) is black.

    Args:
        max_flow: the magnitude in pixels with full saturation, beyond which colours get darker; None takes the maximum.
    """
    known = flow_format.find_known(flow).astype(bool)
    flow = np.where(known[..., None], flow, 0)
    length = np.hypot(flow[..., 0], flow[..., 1])
    longest = float(length.max(initial=0)) if max_flow is None else max_flow
    length = length / (longest if longest > 0 else 1)
    wheel = colour_wheel()
    position = (np.arctan2(-flow[..., 1], -flow[..., 0]) / np.pi + 1) / 2 * (len(wheel) - 1)
    lower = np.floor(position).astype(int)
    part = (position - lower)[..., None]
    colour = (1 - part) * wheel[lower] + part * wheel[(lower + 1) % len(wheel)]
    length = length[..., None]
    colour = np.where(length <= 1, 1 - length * (1 - colour), 0.75 * colour)
    return np.where(known[..., None], np.floor(255 * colour), 0).astype(np.uint8)


def error_map(epe: np.ndarray) -> np.ndarray:
    """End-point errors (H, W) in pixels as an image in the KITTI benchmark's colours.

    The colours have a fixed scale: blue is less than 3 px, red much more. Where the error is NaN (unknown flow) the map
    is black.
    """
    colour = ERROR_COLOURS[np.searchsorted(ERROR_BOUNDS, epe, side="right")]
    colour[np.isnan(epe)] = 0
    return colour


def draw_prediction(image: np.ndarray, true_flow: np.ndarray, predicted_flow: np.ndarray) -> np.ndarray:
    """One row: image, true flow, predicted flow, end-point error; uint8 (H, 4W, 3) RGB.

    Both flows have the scale of the true one: full saturation at its 99th percentile, because with the maximum, one
    small fast object would leave everything else white. Without any true flow, the predicted one has its own scale.
    Panels are labelled where a label fits.
    """
    known = flow_format.find_known(true_flow).astype(bool)
    if not known.any():
        longest = typical_max_flow(predicted_flow)
        nothing = np.zeros_like(image)
        return np.concatenate(
            [
                draw_label(image, "image"),
                draw_label(nothing, "no ground truth"),
                draw_label(flow_to_color(predicted_flow, longest), f"predicted, max {longest:.1f} px"),
                nothing,
            ],
            axis=1,
        )
    length = np.hypot(true_flow[..., 0], true_flow[..., 1])[known]
    longest = float(np.percentile(length, 99))
    epe = np.where(flow_format.find_known(true_flow), np.linalg.norm(predicted_flow - true_flow, axis=2), np.nan)
    mean = epe[known].mean()
    return np.concatenate(
        [
            draw_label(image, "image"),
            draw_label(flow_to_color(true_flow, longest), f"ground truth, max {longest:.1f} px"),
            draw_label(flow_to_color(predicted_flow, longest), "predicted"),
            draw_label(error_map(epe), f"error, mean {mean:.2f} px"),
        ],
        axis=1,
    )


def draw_label(image: np.ndarray, text: str) -> np.ndarray:
    """The image with a small text in its top left corner, or unchanged if the text does not fit."""
    text_height, text_width = text_size(text)
    height, width = image.shape[:2]
    if text_width > width or 4 * text_height > height:
        return image
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, text_width, text_height), fill="black")
    draw.text((MARGIN, MARGIN), text, fill="white", font=font())
    return np.asarray(canvas)


@functools.cache
def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that images look the same everywhere."""
    return ImageFont.load_default(TEXT_SIZE)


def text_size(text: str) -> tuple[int, int]:
    """(H, W) of a text with its margin, in pixels."""
    width = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text, font=font())
    return TEXT_SIZE + 2 * MARGIN + 2, int(width) + 2 * MARGIN


def contact_sheet(rows: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Images of any sizes below one another, each under its caption; as wide as the widest image or caption.

    Raises:
        ValueError: the numbers of rows and captions differ, or there are none.
    """
    if len(rows) != len(captions) or not len(rows):
        raise ValueError(f"{len(rows)} rows and {len(captions)} captions, expected equal numbers, at least one")
    sizes = [text_size(caption) for caption in captions]
    width = max([row.shape[1] for row in rows] + [text_width for _, text_width in sizes])
    parts = []
    for row, caption, (text_height, _) in zip(rows, captions, sizes, strict=True):
        title = Image.new("RGB", (width, text_height), "white")
        ImageDraw.Draw(title).text((MARGIN, MARGIN), caption, fill="black", font=font())
        padding = ((0, 0), (0, width - row.shape[1]), (0, 0))
        parts += [np.asarray(title), np.pad(row, padding, constant_values=255)]
    return np.concatenate(parts)


def typical_max_flow(flow: np.ndarray) -> float:
    """The 99th percentile of the flow's magnitude in pixels, at least 1.

    A good value for full saturation: a small fast object does not leave everything else white, and an almost still
    scene does not look as if it moved.
    """
    return max(1.0, float(np.percentile(np.hypot(flow[..., 0], flow[..., 1]), 99)))


def overlay_flow(image: np.ndarray, flow: np.ndarray, max_flow: float | None = None) -> np.ndarray:
    """The first image in grey, tinted with the colours of its flow (`flow_to_color`)."""
    grey = image @ np.array([0.299, 0.587, 0.114], np.float32)
    light = 0.3 + 0.7 / 255 * grey  # dark parts must show their colour too
    return (light[..., None] * flow_to_color(flow, max_flow)).astype(np.uint8)


def draw_warp_check(image1: np.ndarray, image2: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Image 1, image 2 warped by the flow, and the differences without and with warping; uint8 (2H, 2W, 3) RGB.

    Where the flow is correct, the last panel is black, except for occluded pixels. Panels are labelled where a label
    fits.
    """
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    target = (flow + np.stack([x, y], 2)).astype(np.float32)
    warped = cv2.remap(image2, target[..., 0], target[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    panels = [
        draw_label(image1, "image 1"),
        draw_label(warped, "image 2 warped by the flow"),
        draw_label(cv2.absdiff(image1, image2), "|image 1 - image 2|"),
        draw_label(cv2.absdiff(image1, warped), "|image 1 - warped image 2|"),
    ]
    return np.concatenate([np.concatenate(panels[:2], 1), np.concatenate(panels[2:], 1)])


def save_png(path: StrPath, image: np.ndarray, note: str | None = None) -> None:
    """Write a PNG file, whole or not at all, with an optional note in its metadata (`png_note`)."""
    data, info = io.BytesIO(), PngInfo()
    if note is not None:
        info.add_text(NOTE_KEY, note)
    Image.fromarray(image).save(data, "PNG", pnginfo=info)
    files.write_bytes(path, data.getvalue())


def png_note(path: StrPath) -> str | None:
    """The note that `save_png` stored in a file; None if there is no such file or note."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(NOTE_KEY)
    except (OSError, SyntaxError):  # missing, or not a PNG file
        return None
