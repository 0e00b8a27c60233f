"""Field payloads: encode an image, flow or mask to bytes and back, bit for bit, with a checksum.

A payload is a header (CRC-32, codec, type, channels, height, width) and a body. The CRC covers the rest of the header
and the body, and is seeded with the names of the pair and the field, so it detects flipped bits, swapped fields and
records of other pairs. The header names the codec, so old datasets stay readable when the default changes.
"""

import math
import struct
import threading
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
import zstandard
from numpy.typing import DTypeLike

from launch.errors import UserError
from prep.formats import StrPath

HEADER = struct.Struct("<IBcHII")  # CRC-32, codec, numpy type, channels, height, width
TYPES = {b"B": np.dtype(np.uint8), b"f": np.dtype(np.float32)}
RAW, GRADIENT_ZSTD, PLANES_ZSTD, CONSTANT = range(4)

CODECS = ("zstd", "raw")
"""The choices when writing; the default comes first."""

Payload = bytes | memoryview
"""A payload or record as it is read."""

# The residuals hardly ever repeat, so zstd gains only by its entropy coding. Higher levels and a wider search make the
# result larger and take longer; a hash table of 1,024 entries, which fits in the L1 cache, halves the time
# (tests/bench/codecs.py).
PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, window_log=16, hash_log=10, chain_log=6, min_match=7)

# The memory that zstd may use beside its output for a truncated frame; every decoder supports this much.
MAX_WINDOW = 1 << 23

# Compressors and decompressors of zstandard are not thread-safe.
_local = threading.local()


def encode(array: np.ndarray, codec: str, *, pair: str, field: str) -> bytes:
    """Encode uint8 (H, W), uint8 (H, W, 3) or float32 (H, W, 2) as a payload.

    `codec` is one of `CODECS`; `pair` and `field` are the names that seed the checksum.
    """
    array = np.ascontiguousarray(array)
    kind = {dtype: kind for kind, dtype in TYPES.items()}[array.dtype]
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


def check(payload: memoryview, *, pair: str, field: str, source: StrPath) -> None:
    """Raise UserError, naming the file `source`, unless the payload matches its checksum."""
    if len(payload) < HEADER.size or struct.unpack_from("<I", payload)[0] != zlib.crc32(
        payload[4:], _seed(pair, field)
    ):
        raise UserError(
            f"{source}: {field} of pair {pair} is damaged (its checksum does not match); restore the file from a copy "
            "or remove the dataset and convert it again"
        )


def decode(
    payload: Payload, *, shape: tuple[int, ...], dtype: DTypeLike, pair: str, field: str, source: StrPath
) -> np.ndarray:
    """Decode a payload to exactly the array that was given to `encode`.

    Anyone can forge a checksum, so the header is never trusted, only compared: nothing larger than `shape` is
    allocated.

    Raises:
        UserError: a bit is wrong, or the array is of another shape or dtype. The message names the file `source`.
    """
    payload, dtype = memoryview(payload), np.dtype(dtype)
    check(payload, pair=pair, field=field, source=source)
    _, number, kind, channels, height, width = HEADER.unpack_from(payload)
    found = (height, width) if channels == 1 else (height, width, channels)
    if found != shape or TYPES.get(kind) != dtype:
        raise UserError(
            f"{source}: {field} of pair {pair} is {width}x{height} ({channels} of {kind!r}), but the manifest says "
            f"{shape[1]}x{shape[0]} {dtype}; restore both from a copy, or remove the dataset and convert it again"
        )
    body, size = payload[HEADER.size :], math.prod(shape) * dtype.itemsize
    if number > CONSTANT:
        raise UserError(
            f"{source}: unknown codec {number}; reading this dataset requires a newer version of this toolkit"
        )
    try:
        if number == CONSTANT:
            (value,) = np.frombuffer(body, dtype)
            return np.full(shape, value)
        if number == RAW:
            return np.frombuffer(body, dtype).reshape(shape)
        if zstandard.frame_content_size(body) != size:  # checked before any memory is allocated
            raise ValueError("its frame has another size")
        planes = np.frombuffer(_decompress(body), dtype).reshape(channels, height, width)
        if number == PLANES_ZSTD:
            return planes[0] if channels == 1 else cv2.merge(tuple(planes))
        if found != (height, width, 3) or dtype != np.uint8:
            raise ValueError("its codec is for RGB images")
        return _from_gradient(planes)
    except (ValueError, zstandard.ZstdError) as error:
        raise UserError(
            f"{source}: {field} of pair {pair} cannot be decoded ({error}); restore the file from a copy or convert "
            "the dataset again"
        ) from None


def pack(payloads: Sequence[bytes]) -> bytes:
    """Join payloads to a record: their lengths (uint32), then the payloads."""
    return b"".join([struct.pack(f"<{len(payloads)}I", *map(len, payloads)), *payloads])


def unpack(record: Payload, number: int, *, pair: str, source: StrPath) -> list[memoryview]:
    """Split a record into its payloads; UserError unless `number` of them fill it exactly."""
    record, start = memoryview(record), 4 * number
    lengths = struct.unpack_from(f"<{number}I", record) if len(record) >= start else [0]
    if start + sum(lengths) != len(record):
        raise UserError(
            f"{source}: the record of pair {pair} is damaged (wrong lengths of its fields); restore the file from a "
            "copy, or remove the dataset and convert it again"
        )
    payloads = []
    for length in lengths:
        payloads.append(record[start : start + length])
        start += length
    return payloads


def _seed(pair: str, field: str) -> int:
    return zlib.crc32(f"{pair}\0{field}".encode())


def _compress(array: np.ndarray) -> bytes:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=PARAMETERS)
    return _local.compressor.compress(np.ascontiguousarray(array).data)


def _decompress(body: memoryview) -> bytes:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    return _local.decompressor.decompress(body)


def _to_gradient(image: np.ndarray) -> np.ndarray:
    """Residuals (3, H, W) of an image (H, W, 3), both uint8.

    Green is subtracted from red and blue, then from each pixel its prediction left + above - above left. All
    arithmetic is modulo 256, so nothing is lost.
    """
    red, green, blue = cv2.split(image)
    planes = np.stack([red - green, green, blue - green])
    planes[:, 1:] -= planes[:, :-1].copy()
    planes[:, :, 1:] -= planes[:, :, :-1].copy()
    return planes


def _from_gradient(residuals: np.ndarray) -> np.ndarray:
    """The inverse of `_to_gradient`.

    The inverse of the prediction is a running sum over rows and columns: OpenCV's integral image, five times as fast
    as NumPy's accumulate. Its int32 sums may wrap, which is harmless modulo 256.
    """
    red, green, blue = (cv2.integral(plane)[1:, 1:].astype(np.uint8) for plane in residuals)
    red += green
    blue += green
    return cv2.merge((red, green, blue))
