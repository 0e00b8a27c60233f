"""Pictures of optical flow and of its errors, for TensorBoard, reports and looking at data."""

import functools
import io

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from launch import files
from prep.formats import flow as flow_format

# The colour wheel: how many steps from one of its six colours to the next.
WHEEL = [
    ((255, 0, 0), 15),  # red to yellow
    ((255, 255, 0), 6),  # yellow to green
    ((0, 255, 0), 4),  # green to cyan
    ((0, 255, 255), 11),  # cyan to blue
    ((0, 0, 255), 13),  # blue to magenta
    ((255, 0, 255), 6),  # magenta to red
]

# The colours of the KITTI flow benchmark's error pictures: up to 0.19 px, then doubling to 48 px;
# blue below 3 px, the benchmark's bound for an outlier, yellow to red above.
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

NOTE = "pwcnet"  # the key under which a PNG file holds a note

TEXT_SIZE = 12  # pixels
MARGIN = 3  # pixels round a text


def colour_wheel():
    """The 55 colours of the Middlebury wheel, float64 55 x 3 RGB in [0, 1]."""
    colours = [start for start, _ in WHEEL] + [WHEEL[0][0]]
    parts = []
    for (start, steps), end in zip(WHEEL, colours[1:]):
        step = np.arange(steps)[:, None]
        change = np.subtract(end, start)
        # Rounded as the published code does, in integers and before the subtraction.
        parts.append(start + np.sign(change) * np.floor(np.abs(change) * step / steps))
    return np.concatenate(parts) / 255


def flow_to_color(flow, max_flow=None):
    """Flow in the Middlebury colour code: hue is the direction, saturation the length.

    Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011, and its
    published colorcode.cpp. Zero is white, right red, down yellow, left cyan, up blue-violet.

    Args:
        flow: float32 H x W x 2 in pixels, x then y. Unknown flow (NaN, or beyond 1e9) is black.
        max_flow: the length in pixels that has full saturation, longer is darkened;
            None takes the longest known vector.

    Returns:
        uint8 H x W x 3, RGB.
    """
    known = flow_format.known(flow).astype(bool)
    flow = np.where(known[..., None], flow, 0)
    length = np.hypot(flow[..., 0], flow[..., 1])
    if max_flow is None:
        max_flow = length.max(initial=0)
    length = length / (max_flow if max_flow > 0 else 1)
    wheel = colour_wheel()
    place = (np.arctan2(-flow[..., 1], -flow[..., 0]) / np.pi + 1) / 2 * (len(wheel) - 1)
    lower = np.floor(place).astype(int)
    part = (place - lower)[..., None]
    colour = (1 - part) * wheel[lower] + part * wheel[(lower + 1) % len(wheel)]
    length = length[..., None]
    colour = np.where(length <= 1, 1 - length * (1 - colour), 0.75 * colour)
    return np.where(known[..., None], np.floor(255 * colour), 0).astype(np.uint8)


def error_map(epe):
    """End-point errors (H x W, pixels) in the KITTI benchmark's colours, uint8 H x W x 3, RGB.

    The colours stand for pixels, whatever the picture: blue is under 3 px, red far over. Where
    the error is NaN (unknown flow) the map is black.
    """
    colour = ERROR_COLOURS[np.searchsorted(ERROR_BOUNDS, epe, side="right")]
    colour[np.isnan(epe)] = 0
    return colour


def draw_prediction(image, true_flow, predicted_flow):
    """One row: image, true flow, predicted flow, end-point error; uint8 H x 4W x 3, RGB.

    Both flows (H x W x 2, pixels) have the true one's scale: full saturation at the length that 99
    percent stay under, as one small fast shape would leave all else white. The panels are labelled
    where a label fits.

    Args:
        image: uint8 H x W x 3, RGB.
    """
    known = flow_format.known(true_flow).astype(bool)
    length = np.hypot(true_flow[..., 0], true_flow[..., 1])[known]
    longest = float(np.percentile(length, 99)) if length.size else 0.0
    epe = np.where(flow_format.known(true_flow), np.linalg.norm(predicted_flow - true_flow, axis=2), np.nan)
    mean = epe[known].mean() if known.any() else np.nan
    return np.concatenate(
        [
            draw_label(image, "image"),
            draw_label(flow_to_color(true_flow, longest), f"true, to {longest:.1f} px"),
            draw_label(flow_to_color(predicted_flow, longest), "predicted"),
            draw_label(error_map(epe), f"error, mean {mean:.2f} px"),
        ],
        axis=1,
    )


def draw_label(image, text):
    """`image` with a small text in its top left corner, or as it is if the text does not fit."""
    left, top, right, bottom = text_box(text)
    height, width = image.shape[:2]
    if right > width or 4 * bottom > height:
        return image
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, top, right, bottom), fill="black")
    draw.text((MARGIN, MARGIN), text, fill="white", font=font())
    return np.asarray(canvas)


@functools.cache
def font():
    """Pillow's own font, so that a picture looks alike everywhere."""
    return ImageFont.load_default(TEXT_SIZE)


def text_box(text):
    """Left, top, right and bottom of a text with its margin, in pixels, in the top left corner."""
    right = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text, font=font())
    return 0, 0, int(right) + 2 * MARGIN, TEXT_SIZE + 2 * MARGIN + 2


def contact_sheet(rows, captions):
    """Pictures (uint8 H x W x 3, of any sizes) under one another, each below its caption.

    Returns uint8 H x W x 3, RGB, as wide as the widest picture or caption.
    Raises ValueError if there are not as many captions as rows, or none.
    """
    if len(rows) != len(captions) or not len(rows):
        raise ValueError(f"{len(rows)} rows and {len(captions)} captions, expected as many, one at least")
    boxes = [text_box(caption) for caption in captions]
    width = max([row.shape[1] for row in rows] + [box[2] for box in boxes])
    parts = []
    for row, caption, box in zip(rows, captions, boxes):
        title = Image.new("RGB", (width, box[3]), "white")
        ImageDraw.Draw(title).text((MARGIN, MARGIN), caption, fill="black", font=font())
        padding = ((0, 0), (0, width - row.shape[1]), (0, 0))
        parts += [np.asarray(title), np.pad(row, padding, constant_values=255)]
    return np.concatenate(parts)


def typical_max_flow(flow):
    """The length in pixels that 99 percent of a flow (H x W x 2) stay under, 1 at least.

    A good full saturation for a picture of one flow: a small fast shape does not leave all else
    white, and what hardly moves at all does not look as if it did.
    """
    return max(1.0, float(np.percentile(np.hypot(flow[..., 0], flow[..., 1]), 99)))


def overlay_flow(image, flow, max_flow=None):
    """Image 1 (uint8 H x W x 3, RGB) in grey, painted with the colours of its flow; the same type.

    What stands still keeps its grey; `flow` and `max_flow` as of `flow_to_color`.
    """
    grey = image @ np.float32([0.299, 0.587, 0.114])
    light = 0.3 + 0.7 / 255 * grey  # the darkest parts must show their colour too
    return (light[..., None] * flow_to_color(flow, max_flow)).astype(np.uint8)


def draw_warp_check(image1, image2, flow):
    """Image 1, image 2 brought back by the flow, and what differs without and with the flow.

    Where the flow is right the last panel is black, but for what is hidden in image 2.

    Args:
        image1, image2: uint8 H x W x 3, RGB.
        flow: float32 H x W x 2 in pixels.

    Returns:
        uint8 2H x 2W x 3, RGB; labelled where a label fits.
    """
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    place = (flow + np.stack([x, y], 2)).astype(np.float32)
    back = cv2.remap(image2, place, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    panels = [
        draw_label(image1, "image 1"),
        draw_label(back, "image 2 brought back by the flow"),
        draw_label(cv2.absdiff(image1, image2), "|image 1 - image 2|"),
        draw_label(cv2.absdiff(image1, back), "|image 1 - image 2 brought back|"),
    ]
    return np.concatenate([np.concatenate(panels[:2], 1), np.concatenate(panels[2:], 1)])


def save_png(path, image, note=None) -> None:
    """Write uint8 H x W x 3, RGB, as a PNG file that appears when it is whole.

    A text given as `note` goes into the file too, unseen; `png_note` gets it back.
    """
    data, info = io.BytesIO(), PngInfo()
    if note is not None:
        info.add_text(NOTE, note)
    Image.fromarray(image).save(data, "PNG", pnginfo=info)
    files.write_bytes(path, data.getvalue())


def png_note(path):
    """The note that `save_png` put into a file; None if there is no such file or note."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(NOTE)
    except (OSError, SyntaxError):  # absent, or no PNG file
        return None
