"""Image files: read images as 8-bit RGB, bit for bit unless they have 16 bits, and write PPM."""

import io
import logging
import os
import re
import struct
import warnings

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from launch.errors import UserError, one_line
from launch.files import write_bytes
from launch.logs import print_note
from prep.archive import file_length, open_file, read_file
from prep.formats import MAX_EXPANSION, MAX_PIXELS, StrPath, npy

FORMATS = ("PNG", "PPM", "JPEG", "WEBP", "TIFF", "BMP")
HEADER = 4096
"""Bytes that contain the header of a PPM or WebP image."""

# "P6" (binary RGB; P5 is greyscale, P3 and P2 are the same as text), width, height and the maximum value, each after
# white space or comments, then one white-space character and the pixels.
PPM_HEADER = re.compile(rb"P([2356])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,5})\s")
PPM_CHANNELS = {b"5": 1, b"6": 3}

# A WebP file: RIFF, a length, WEBP, the kind of its first chunk, that chunk's length and its data.
# Source: https://developers.google.com/speed/webp/docs/riff_container
WEBP_HEADER = re.compile(rb"RIFF.{4}WEBP(VP8[ LX]).{4}(.{10})", re.DOTALL)

TIFF_BITS = 258  # the tag of BitsPerSample

# Pillow also warns about damaged or huge files. Here these are errors, so its warnings would only be noise.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

_noted_reduction = False


def read_image(path: StrPath) -> np.ndarray:
    """Read an image: uint8 (H, W, 3) RGB. Raises UserError if it is damaged."""
    return parse_image(read_file(path), path)


def image_size(path: StrPath, *, lossless: bool = False) -> tuple[int, int]:
    """(H, W) of an image from its header; UserError if it has none, or if it is lossy but must be lossless."""
    with open_file(path) as file:
        start = file.read(HEADER)
        if lossless:
            check_lossless(start, path)
        size = ppm_size(start, path) or webp_size(start)
        if size:
            return size
        if not start:
            raise unreadable(path, "it is empty")
        try:
            image = Image.open(file, formats=FORMATS)
            note_reduction(path, bit_depth(image, start))
            return image.height, image.width
        except Exception as error:  # as in parse_image
            raise unreadable(path, error) from None


def read_mask(path: StrPath) -> np.ndarray:
    """Read a mask, an image or an .npy file (H, W) of uint8 or bool: uint8 (H, W), 1 where it is not 0
    (in an image: not black).

    Raises:
        UserError: the file is damaged or no mask, such as an image of 16 bits or with lossy compression.
    """
    data = read_file(path)
    if is_array(path):
        check_mask(npy.parse_header(data[: npy.HEADER_START + npy.MAX_HEADER], path), path)
        return (npy.parse_array(data, path) != 0).astype(np.uint8)
    check_lossless(data, path)
    return parse_image(data, path, reduce=False).any(axis=2).astype(np.uint8)


def mask_size(path: StrPath) -> tuple[int, int]:
    """(H, W) of a mask from its header; UserError if it has none."""
    if not is_array(path):
        return image_size(path, lossless=True)
    with open_file(path) as file:
        return check_mask(npy.read_header(file, file_length(path), path), path)


def check_lossless(start: bytes, name: StrPath) -> None:
    """Raise UserError if the first bytes of a mask are those of a lossy format, in which 0 beside an edge may be 1."""
    if start[:3] == b"\xff\xd8\xff" or start[8:16] == b"WEBPVP8 ":
        kind = "WebP" if start[8:12] == b"WEBP" else "JPEG"
        raise UserError(f"{name}: a mask with {kind}'s lossy compression, which changes its edges; save it as PNG")


def is_array(path: StrPath) -> bool:
    """Whether a mask is an array rather than an image."""
    return os.path.splitext(path)[1].lower() == ".npy"


def check_mask(header: npy.Header, name: StrPath) -> tuple[int, int]:
    """(H, W) of an array; UserError unless it is a mask."""
    shape = header.shape
    if header.dtype.itemsize != 1 or len(shape) != 2 or not 0 < shape[0] * shape[1] <= MAX_PIXELS:
        raise UserError(f"{name}: contains {header.dtype} {shape}, expected a mask: uint8 or bool (H, W)")
    return shape[0], shape[1]


def parse_image(data: bytes, name: StrPath, *, reduce: bool = True) -> np.ndarray:
    """Parse the bytes of an image file: uint8 (H, W, 3) RGB; `name` is for errors.

    Greyscale and palette images become RGB without loss. Of 16 bits per channel, the upper 8 are kept, with a note,
    or with `reduce` false these are an error. Transparency would be lost: it is an error.
    """
    if not data:
        raise unreadable(name, "it is empty")
    ppm = PPM_HEADER.match(data[:HEADER])
    if ppm and (ppm[1] == b"6" or (ppm[1] == b"5" and int(ppm[4]) > 255)):
        # FlyingChairs: parsed here without a copy, because Pillow takes several times longer.
        return parse_ppm(data, ppm, name, reduce)
    if ppm and int(ppm[4]) != 255:  # Pillow would rescale it silently
        raise unsupported_maximum(name, int(ppm[4]))
    height, width = webp_size(data[:HEADER]) or (0, 0)
    try:
        if height * width > MAX_PIXELS:  # before Pillow, which allocates it at once
            raise too_large(name, height, width, len(data))
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        bands, depth = len(image.getbands()), bit_depth(image, data)
        pixels = image.width * image.height
        # WebP has no limit: a black frame takes a few bytes.
        fits = image.format == "WEBP" or pixels * bands <= MAX_EXPANSION * len(data)
        if pixels > MAX_PIXELS or not fits:
            raise too_large(name, image.height, image.width, len(data))
        if depth > (16 if reduce else 8) or image.mode == "F":
            raise UserError(
                f"{name}: an image with {depth} bits per channel, expected 8{' or 16' if reduce else ''}; convert it "
                "first"
            )
        note_reduction(name, depth)
        if image.format == "TIFF":
            if image.mode in ("LA", "La", "PA"):  # OpenCV would drop the transparency
                raise UserError(f"{name}: a greyscale or palette TIFF with an alpha channel; remove it, or use PNG")
            return parse_tiff(data, image.size, name)
        image.load()
        return to_rgb(image, name)
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen types of exceptions for damaged files
        raise unreadable(name, error) from None


def ppm_size(start: bytes, name: StrPath) -> tuple[int, int] | None:
    """(H, W) of a PPM image from its first `HEADER` bytes; None if it is of another format."""
    header = PPM_HEADER.match(start)
    if not header:
        return None
    note_reduction(name, int(header[4]).bit_length())
    return int(header[3]), int(header[2])


def parse_ppm(data: bytes, header: re.Match[bytes], name: StrPath, reduce: bool) -> np.ndarray:
    """Parse a binary PPM or PGM image: uint8 (H, W, 3), a read-only view of `data` if it has 8 bits and colours."""
    channels, width, height, largest = PPM_CHANNELS[header[1]], *map(int, header.groups()[1:])
    if largest < 255 or largest >= 1 << 16 or (largest > 255 and not reduce):
        raise unsupported_maximum(name, largest)
    samples = np.dtype(np.uint8 if largest == 255 else ">u2")
    expected = header.end() + channels * samples.itemsize * width * height
    if len(data) != expected or not width or not height:
        raise UserError(
            f"{name}: {len(data)} bytes, expected {expected} for a {width}x{height} PPM image; "
            "the file is damaged, copy or unpack it again"
        )
    pixels = np.frombuffer(data, samples, offset=header.end()).reshape(height, width, channels)
    if largest > 255:
        note_reduction(name, largest.bit_length())
        pixels = np.minimum(pixels.astype(np.uint32) * 256 // (largest + 1), 255).astype(np.uint8)
    return pixels if channels == 3 else np.repeat(pixels, 3, axis=2)


def parse_tiff(data: bytes, size: tuple[int, int], name: StrPath) -> np.ndarray:
    """Decode a TIFF image of this (W, H), of 8 or 16 bits: uint8 (H, W, 3).

    OpenCV does it, because Pillow's libtiff prints its errors itself.
    """
    cv2.setLogLevel(0)  # silent
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.shape[1::-1] != size or pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError("damaged, or of a kind that OpenCV does not read")
    if pixels.dtype == np.uint16:
        pixels = np.right_shift(pixels, 8).astype(np.uint8)
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] == 4 and pixels[..., 3].min() < 255:
        raise transparent(name)
    return np.ascontiguousarray(pixels[..., 2::-1])


def webp_size(start: bytes) -> tuple[int, int] | None:
    """(H, W) of a WebP image from its first bytes; None if it is of another format."""
    header = WEBP_HEADER.match(start)
    if not header:
        return None
    kind, fields = header.groups()
    if kind == b"VP8 ":  # a frame tag and a start code before
        width, height = (side & 0x3FFF for side in struct.unpack("<6x2H", fields))
    elif kind == b"VP8L":  # a signature before, then 14 bits each
        bits = int.from_bytes(fields[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:  # flags before, then 24 bits each
        width, height = (1 + int.from_bytes(side, "little") for side in (fields[4:7], fields[7:10]))
    return height, width


def note_reduction(name: StrPath, depth: int) -> None:
    """Say once, on the first rank, that images are reduced, if this one has more than 8 bits per channel."""
    global _noted_reduction
    if depth > 8 and not _noted_reduction:
        _noted_reduction = True
        print_note(f"{name}: {depth} bits per channel; of such images, the upper 8 bits are used")


def unsupported_maximum(name: StrPath, largest: int) -> UserError:
    """The UserError for a PPM image whose values do not end at 255."""
    return UserError(f"{name}: image with values up to {largest}, expected 255 (8 bits per channel); convert it first")


def transparent(name: StrPath) -> UserError:
    """The UserError for an image with transparency."""
    return UserError(f"{name}: parts of the image are transparent; expected an opaque image, remove its alpha channel")


def too_large(name: StrPath, height: int, width: int, length: int) -> UserError:
    """The UserError for an image whose pixels do not fit in its bytes."""
    return UserError(
        f"{name}: its header says {width}x{height} pixels, too many for its {length} bytes; the file is damaged, copy "
        "or unpack it again"
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


def bit_depth(image: Image.Image, start: bytes) -> int:
    """Bits per channel of an image opened from a file that begins with `start`, which Pillow's modes do not tell."""
    if image.format == "PNG":
        return start[24]  # in the IHDR chunk, which is the first
    if image.format == "TIFF":
        bits = image.tag_v2.get(TIFF_BITS, (1,))  # type: ignore[attr-defined]
        return max(bits)
    return 8


def to_rgb(image: Image.Image, name: StrPath) -> np.ndarray:
    """uint8 (H, W, 3) of a loaded Pillow image; UserError if it has transparency."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise transparent(name)
    if image.mode.startswith("I"):  # a PNG of 16-bit greyscale; of 16-bit colours, Pillow itself takes the upper bits
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def write_ppm(path: StrPath, image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) RGB as a binary PPM (P6) file, bit for bit."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
    height, width, _ = image.shape
    write_bytes(path, b"P6\n%d %d\n255\n" % (width, height) + image.tobytes())
