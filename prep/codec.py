"""Field payloads: encode an image, flow or mask to bytes and back, bit for bit, with a checksum.

A payload is a header (CRC-32, codec, type, channels, height, width) and a body. The CRC covers the
rest of the header and the body and starts from the pair's and the field's name, so a flipped byte,
a swapped field and a record in another pair's place are all found. The body's codec is in the
header: the default may change and old sets still read.
"""

import math
import struct
import threading
import zlib

import cv2
import numpy as np
import zstandard

from launch.errors import UserError

HEADER = struct.Struct("<IBcHII")  # CRC-32, codec, numpy type, channels, height, width
TYPES = {b"B": np.uint8, b"f": np.float32}
RAW, GRADIENT_ZSTD, PLANES_ZSTD, CONSTANT = range(4)

# What a conversion may be asked for.
CODECS = ("zstd", "raw")

# These residuals repeat almost nowhere, and what zstd gains comes from its entropy coding. A higher
# level or a wider search for repeats makes them larger, not smaller, and takes longer; a table of
# 1,024 places, which stays in the processor's nearest cache, halves the time (tests/bench/codecs.py).
PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, window_log=16, hash_log=10, chain_log=6, min_match=7)

# What zstd may keep beside its output for a frame that is cut short; every decoder takes that much.
MAX_WINDOW = 1 << 23

# A zstandard (de)compressor must not be used by two threads at once.
_local = threading.local()


def encode(array, codec, *, pair, field):
    """Payload of `array`, uint8 (H, W), uint8 (H, W, 3) or float32 (H, W, 2), as bytes.

    `codec` is "zstd" or "raw"; `pair` and `field` are the names that the checksum starts from.
    """
    array = np.ascontiguousarray(array)
    kind = {np.dtype(t): k for k, t in TYPES.items()}[array.dtype]
    height, width, channels = array.shape if array.ndim == 3 else (*array.shape, 1)
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r}, expected one of {CODECS}")
    if array.ndim == 2 and (array == array[0, 0]).all():
        number, body = CONSTANT, array[0, :1].tobytes()
    elif codec == "raw":
        number, body = RAW, array.tobytes()
    elif array.dtype == np.uint8 and channels == 3:
        number, body = GRADIENT_ZSTD, _compress(_to_gradient(array))
    else:
        number, body = PLANES_ZSTD, _compress(np.moveaxis(array.reshape(height, width, -1), 2, 0))
    rest = HEADER.pack(0, number, kind, channels, height, width)[4:]
    return struct.pack("<I", zlib.crc32(body, zlib.crc32(rest, _seed(pair, field)))) + rest + body


def check(payload, *, pair, field, source) -> None:
    """UserError with the name of the file `source` unless every bit of `payload` is as it was."""
    if len(payload) < HEADER.size or struct.unpack_from("<I", payload)[0] != zlib.crc32(
        payload[4:], _seed(pair, field)
    ):
        raise UserError(
            f"{source}: {field} of pair {pair} is damaged (its checksum does not match); restore "
            "the file from a copy or convert the set again"
        )


def decode(payload, *, shape, dtype, pair, field, source):
    """The array in `payload` (bytes or uint8 array), exactly as it was given to `encode`.

    Raises UserError with the name of the file `source` when one bit of it is not what was written,
    or it does not hold an array of this `shape` and `dtype`. A checksum can be made to match
    anything, so the header is compared and never believed: nothing larger is allocated.
    """
    payload = memoryview(payload)
    check(payload, pair=pair, field=field, source=source)
    _, number, kind, channels, height, width = HEADER.unpack_from(payload)
    found = (height, width) if channels == 1 else (height, width, channels)
    if found != shape or TYPES.get(kind) != dtype:
        raise UserError(
            f"{source}: {field} of pair {pair} is {width}x{height} ({channels} of {kind!r}), but "
            f"{shape[1]}x{shape[0]} {np.dtype(dtype)} in the manifest; restore both from a copy or "
            "convert the set again"
        )
    body, size = payload[HEADER.size :], math.prod(shape) * np.dtype(dtype).itemsize
    if number > CONSTANT:
        raise UserError(f"{source}: unknown codec {number}; the set needs a newer version of this toolkit")
    try:
        if number == CONSTANT:
            (value,) = np.frombuffer(body, dtype)
            return np.full(shape, value)
        if number == RAW:
            return np.frombuffer(body, dtype).reshape(shape)
        if zstandard.frame_content_size(body) != size:  # else it would get what it asks for
            raise ValueError("its frame is of another size")
        planes = np.frombuffer(_decompress(body), dtype).reshape(channels, height, width)
        if number == PLANES_ZSTD:
            return planes[0] if channels == 1 else cv2.merge(tuple(planes))
        if found != (height, width, 3) or dtype != np.uint8:
            raise ValueError("its codec is for RGB pictures")
        return _from_gradient(planes)
    except (ValueError, zstandard.ZstdError) as error:
        raise UserError(
            f"{source}: {field} of pair {pair} can't be decoded ({error}); restore the file from a "
            "copy or convert the set again"
        ) from None


def pack(payloads):
    """One record of several payloads, as bytes: their lengths (uint32), then they themselves."""
    return b"".join([struct.pack(f"<{len(payloads)}I", *map(len, payloads)), *payloads])


def unpack(record, number, *, pair, source):
    """The `number` payloads of a record, memoryviews; UserError unless they fill it."""
    record, start = memoryview(record), 4 * number
    lengths = struct.unpack_from(f"<{number}I", record) if len(record) >= start else [0]
    if start + sum(lengths) != len(record):
        raise UserError(
            f"{source}: the record of pair {pair} is damaged (its parts don't fill it); restore "
            "the file from a copy or convert the set again"
        )
    payloads = []
    for length in lengths:
        payloads.append(record[start : start + length])
        start += length
    return payloads


def _seed(pair, field):
    return zlib.crc32(f"{pair}\0{field}".encode())


def _compress(array):
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=PARAMETERS)
    return _local.compressor.compress(np.ascontiguousarray(array))


def _decompress(body):
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    return _local.decompressor.decompress(body)


def _to_gradient(image):
    """Residuals (3, H, W) of an image (H, W, 3): red and blue less green, then each pixel less its
    prediction left + above - above left. All modulo 256, so nothing is lost."""
    red, green, blue = cv2.split(image)
    planes = np.stack([red - green, green, blue - green])
    planes[:, 1:] -= planes[:, :-1].copy()
    planes[:, :, 1:] -= planes[:, :, :-1].copy()
    return planes


def _from_gradient(residuals):
    """The image (H, W, 3) of its residuals (3, H, W).

    The prediction's inverse is a running sum over rows and columns, which is OpenCV's integral
    image: five times as fast as numpy's accumulate. Its int32 sums may wrap, which modulo 256 is no
    harm.
    """
    red, green, blue = (cv2.integral(plane)[1:, 1:].astype(np.uint8) for plane in residuals)
    red += green
    blue += green
    return cv2.merge((red, green, blue))
