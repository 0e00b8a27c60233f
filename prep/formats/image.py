"""Image files: read any 8-bit image as RGB, bit for bit, and write PPM."""

import io
import os
import re
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from launch.errors import UserError, one_line
from launch.files import write_bytes
from prep.formats import StrPath
from prep.formats.flow import MAX_EXPANSION, MAX_PIXELS

FORMATS = ("PNG", "PPM", "JPEG", "BMP")

# "P6" (binary RGB; P5 is greyscale, P3 and P2 are the same as text), width, height and the maximum value, each after
# white space or comments, then one white-space character and the pixels.
PPM_HEADER = re.compile(rb"P([2356])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,5})\s")

# Pillow also warns about damaged or huge files. Here these are errors, so its warnings would only be noise.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_image(path: StrPath) -> np.ndarray:
    """Read an image: uint8 (H, W, 3) RGB. Raises UserError if it is damaged or not 8 bits per channel."""
    with open(path, "rb") as file:
        return parse_image(file.read(), path)


def image_size(path: StrPath) -> tuple[int, int]:
    """(H, W) of an image from its header; UserError if it has none."""
    with open(path, "rb") as file:
        header = PPM_HEADER.match(file.read(4096))
        if header:
            return int(header[3]), int(header[2])
        if not os.fstat(file.fileno()).st_size:
            raise unreadable(path, "it is empty")
        try:
            width, height = Image.open(file, formats=FORMATS).size
            return height, width
        except Exception as error:  # as in parse_image
            raise unreadable(path, error) from None


def parse_image(data: bytes, name: StrPath) -> np.ndarray:
    """Parse the bytes of an image file: uint8 (H, W, 3) RGB; `name` is for errors.

    Greyscale and palette images become RGB without loss. Transparency, or more than 8 bits per channel, would be lost:
    those are errors.
    """
    if not data:
        raise unreadable(name, "it is empty")
    header = PPM_HEADER.match(data[:4096])
    if header and int(header[4]) != 255:  # Pillow would rescale it silently
        raise UserError(
            f"{name}: image with values up to {int(header[4])}, expected 255 (8 bits per channel); convert it first"
        )
    if header and header[1] == b"6":
        # FlyingChairs: parsed here without a copy, because Pillow takes several times longer.
        width, height = int(header[2]), int(header[3])
        expected = header.end() + 3 * width * height
        if len(data) != expected or not width or not height:
            raise UserError(
                f"{name}: {len(data)} bytes, expected {expected} for a {width}x{height} PPM image; "
                "the file is damaged, copy or unpack it again"
            )
        return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width, 3)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        bands, depth = len(image.getbands()), bit_depth(image, data)
        pixels = image.width * image.height
        fits = pixels <= MAX_PIXELS and pixels * bands <= MAX_EXPANSION * len(data)
        if fits and depth <= 8:
            image.load()
            return to_rgb(image, name)
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen types of exceptions for damaged files
        raise unreadable(name, error) from None
    if depth > 8:
        raise UserError(f"{name}: an image with {depth} bits per channel, expected 8; convert it to 8 bits first")
    raise UserError(
        f"{name}: its header says {image.width}x{image.height} pixels, too many for its {len(data)} bytes; the file is "
        "damaged, copy or unpack it again"
    )


def unreadable(name: StrPath, error: str | Exception) -> UserError:
    """The UserError for a file that Pillow cannot read."""
    reason = "unknown format"
    if not isinstance(error, UnidentifiedImageError):
        reason = one_line(error)
    return UserError(
        f"{name}: not a readable image ({reason}); expected a complete {', '.join(FORMATS)} file; copy or "
        "unpack it again"
    )


def bit_depth(image: Image.Image, data: bytes) -> int:
    """Bits per channel of an opened image; Pillow presents 16-bit RGB PNG as if it had 8."""
    if image.format == "PNG":
        return data[24]  # in the IHDR chunk, which is the first
    return 8 if image.mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr") else 16


def to_rgb(image: Image.Image, name: StrPath) -> np.ndarray:
    """uint8 (H, W, 3) of a loaded 8-bit Pillow image; UserError if it has transparency."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise UserError(
                f"{name}: parts of the image are transparent; expected an opaque image, remove its alpha channel"
            )
    return np.asarray(image.convert("RGB"))


def write_ppm(path: StrPath, image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) RGB as a binary PPM (P6) file, bit for bit."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
    height, width, _ = image.shape
    write_bytes(path, b"P6\n%d %d\n255\n" % (width, height) + image.tobytes())
