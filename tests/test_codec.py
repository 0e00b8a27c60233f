"""Payloads: every array comes back bit for bit, every flipped bit and every swap is detected."""

import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import tiny
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from launch.errors import UserError
from prep import codec, datasets
from prep.datasets import flyingchairs

sides = hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)
arrays = st.one_of(
    hnp.arrays(np.uint8, sides),
    hnp.arrays(np.uint8, sides.map(lambda s: (*s, 3))),
    hnp.arrays(np.float32, sides.map(lambda s: (*s, 2)), elements=st.floats(width=32)),
)
codecs = st.sampled_from(codec.CODECS)
FLOW = np.zeros((2, 3, 2), np.float32)
NAMES = {"pair": "clean/alley_1/frame_0001", "field": "flow"}


def encode(array: np.ndarray, name: str) -> bytes:
    return codec.encode(array, name, **NAMES)


def decode(payload: bytes, like: np.ndarray, **names: str) -> np.ndarray:
    return codec.decode(payload, shape=like.shape, dtype=like.dtype, **{**NAMES, **names}, source="f.mindrecord")


@given(arrays, codecs)
def test_every_array_comes_back_bit_for_bit(array: np.ndarray, name: str) -> None:
    found = decode(encode(array, name), array)
    assert found.dtype == array.dtype and found.shape == array.shape
    assert found.tobytes() == array.tobytes()


def test_nan_payloads_and_negative_zero_survive() -> None:
    bits = np.array([[[0x7FC00001, 0xFFC12345], [0x80000000, 0x7F800001]]], np.uint32)
    flow = bits.view(np.float32)
    assert decode(encode(flow, "zstd"), flow).tobytes() == bits.tobytes()


def test_sums_beyond_32_bits_wrap_back() -> None:
    """The decoder sums up to H * W residuals of up to 255 in int32."""
    rows, columns = np.indices((2900, 3000))
    green = (-(rows + 1) * (columns + 1)).astype(np.uint8)  # every residual of it is 255
    image = np.stack([green, green, green], 2)
    assert np.array_equal(decode(encode(image, "zstd"), image), image)


@given(arrays, codecs, st.integers(0, 10**9), st.integers(0, 7))
def test_one_flipped_bit_is_found(array: np.ndarray, name: str, place: int, bit: int) -> None:
    payload = bytearray(encode(array, name))
    payload[place % len(payload)] ^= 1 << bit
    with pytest.raises(UserError, match=r"f.mindrecord: flow of pair clean/alley_1/frame_0001"):
        decode(bytes(payload), array)


@given(st.binary(max_size=80))
def test_any_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(UserError):
        decode(data, FLOW)
    with pytest.raises(UserError):
        codec.unpack(data + b"\xff" * 80, 5, pair="p", source="f")


def test_another_pairs_or_fields_payload_is_found() -> None:
    payload = encode(FLOW, "raw")
    for names in ({"pair": "clean/alley_1/frame_0002"}, {"field": "image1"}):
        with pytest.raises(UserError):
            decode(payload, FLOW, **names)


def forged(number: int, kind: bytes, channels: int, height: int, width: int, body: bytes) -> bytes:
    """A payload with any header and a correct checksum."""
    rest = codec.HEADER.pack(0, number, kind, channels, height, width)[4:] + body
    seed = zlib.crc32("{pair}\0{field}".format(**NAMES).encode())
    return struct.pack("<I", zlib.crc32(rest, seed)) + rest


def zstd(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


SHORT = zstd(bytes(1 << 20))[:-9]
CLAIMS = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + zstd(bytes(48))[6:]
RGB = np.zeros((2, 3, 3), np.uint8)


@pytest.mark.parametrize("number,kind,channels,height,width,body,like", [
    (codec.CONSTANT, b"B", 1, 60000, 60000, b"1", RGB[..., 0]),
    (codec.CONSTANT, b"B", 1, 2, 3, b"", RGB[..., 0]),
    (codec.CONSTANT, b"f", 2, 2, 3, b"abc", FLOW),
    (codec.RAW, b"x", 2, 2, 3, bytes(48), FLOW),
    (codec.RAW, b"f", 2, 2, 3, bytes(47), FLOW),
    (codec.RAW, b"f", 2, 2, 3, bytes(52), FLOW),
    (codec.RAW, b"f", 2, 3, 2, bytes(48), FLOW),
    (codec.RAW, b"B", 2, 2, 3, bytes(12), FLOW),
    (codec.PLANES_ZSTD, b"f", 2, 40000, 40000, zstd(bytes(48)), FLOW),
    (codec.PLANES_ZSTD, b"f", 2, 2, 3, b"no zstd at all", FLOW),
    (codec.PLANES_ZSTD, b"f", 2, 2, 3, zstd(bytes(1 << 20)), FLOW),
    (codec.PLANES_ZSTD, b"f", 2, 2, 3, zstd(bytes(48), write_content_size=False), FLOW),
    (codec.PLANES_ZSTD, b"f", 2, 2, 3, CLAIMS, FLOW),
    (codec.PLANES_ZSTD, b"B", 3, 1 << 10, 1 << 10, SHORT, np.zeros((1 << 10, 1 << 10), np.uint8)),
    (codec.GRADIENT_ZSTD, b"f", 2, 2, 3, zstd(bytes(48)), FLOW),
    (codec.GRADIENT_ZSTD, b"B", 1, 2, 3, zstd(bytes(6)), RGB[..., 0]),
    (200, b"f", 2, 2, 3, bytes(48), FLOW),
])  # fmt: skip
def test_a_right_checksum_over_wrong_contents_is_an_error(
    number: int, kind: bytes, channels: int, height: int, width: int, body: bytes, like: np.ndarray
) -> None:
    """Anyone can compute a checksum, so it must not lead to other exceptions or large allocations."""
    payload = forged(number, kind, channels, height, width, body)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"^f.mindrecord: .*(the manifest says|decoded|codec 200)"):
            decode(payload, like)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(st.lists(st.binary(max_size=9), min_size=5, max_size=5))
def test_packed_payloads_come_back(payloads: list[bytes]) -> None:
    record = codec.pack(payloads)
    assert list(codec.unpack(record, 5, pair="p", source="f")) == payloads


def test_the_real_pair_takes_a_quarter_at_most() -> None:
    if not tiny.SAMPLES.exists():
        pytest.skip(f"{tiny.SAMPLES} does not exist")
    sample = datasets.read_pair(flyingchairs.list_pairs(tiny.SAMPLES, "")[0])
    raw = sum(sample[field].nbytes for field in ("image1", "image2", "flow"))
    assert sum(len(encode(array, "zstd")) for array in sample.values()) <= 0.25 * raw
