"""Flow and image files: what is written comes back, and no bytes get more than their own error."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from prep import flowio, images
from prep.errors import UserError

flows = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9).map(lambda s: (*s, 2)),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)  # fmt: skip
pictures = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9).map(lambda s: (*s, 3))
)
VALID_FLO = struct.pack("<4sii", b"PIEH", 2, 1) + bytes(16)


def encoded(array, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, **options)
    return file.getvalue()


@given(flows)
def test_flo_round_trip_is_bit_for_bit(tmp_path_factory, flow):
    path = tmp_path_factory.mktemp("flo") / "é x.flo"
    flowio.write_flo(path, flow)
    assert flowio.read_flo(path).tobytes() == flow.tobytes()
    assert flowio.flow_size(path) == flow.shape[:2]


def test_flo_is_what_the_middlebury_page_says(tmp_path):
    (tmp_path / "a.flo").write_bytes(
        struct.pack("<fii", 202021.25, 2, 1) + struct.pack("<4f", 1, 2, 3, 4)
    )
    assert flowio.read_flo(tmp_path / "a.flo").tolist() == [[[1, 2], [3, 4]]]


@pytest.mark.parametrize("data,message", [
    (b"", "0 bytes, expected a .flo file"),
    (b"PIEH\x01", "5 bytes, expected a .flo file"),
    (b"HEIP" + VALID_FLO[4:], "begins with b'HEIP'"),
    (VALID_FLO[:-1], "27 bytes, expected 28 for 2x1 flow; the file is cut short"),
    (VALID_FLO + b"x", "29 bytes, expected 28 for 2x1 flow; the file is too long"),
    (struct.pack("<4sii", b"PIEH", -2, -1) + bytes(16), "-2 wide and -1 high"),
    (struct.pack("<4sii", b"PIEH", 2**31 - 1, 2**31 - 1), "cut short"),
])  # fmt: skip
def test_damaged_flo(tmp_path, data, message):
    path = tmp_path / "a.flo"
    path.write_bytes(data)
    for read in (flowio.read_flo, flowio.flow_size):
        with pytest.raises(UserError) as raised:
            read(path)
        assert message in str(raised.value) and str(path) in str(raised.value)


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda b: b"PIEH" + b))
def test_any_bytes_are_a_flow_or_an_error(data):
    try:
        assert flowio.parse_flo(data, "f").nbytes == len(data) - 12
    except UserError:
        pass


def test_unknown_flow_is_nan_or_beyond_1e9():
    flow = np.zeros((1, 6, 2), np.float32)
    flow[0, 1, 0], flow[0, 2, 1], flow[0, 3, 0], flow[0, 4, 1] = np.nan, 1e10, -np.inf, 1e9
    assert flowio.known(flow).tolist() == [[1, 0, 0, 0, 1, 1]]
    assert flowio.known(flow[:, 4:]).tolist() == [[1, 1]]


@given(pictures)
def test_ppm_and_png_come_back_bit_for_bit(tmp_path_factory, image):
    folder = tmp_path_factory.mktemp("image")
    images.write_ppm(folder / "a b.ppm", image)
    Image.fromarray(image).save(folder / "ü.png")
    for path in folder.iterdir():
        assert np.array_equal(images.read_image(path), image)
        assert images.image_size(path) == image.shape[:2]


def test_grey_and_palette_pictures_become_rgb():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    rgb = np.repeat(grey[..., None], 3, 2)
    palette = Image.fromarray(grey).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG")
    opaque = np.concatenate([rgb, np.full((3, 4, 1), 255, np.uint8)], 2)
    for data in (encoded(grey, format="PNG"), encoded(grey, format="PPM"), file.getvalue(),
                 encoded(opaque, format="PNG")):  # fmt: skip
        assert np.array_equal(images.parse_image(data, "f"), rgb)
    assert images.parse_image(encoded(grey > 99, format="PNG"), "f").max() == 255


def sixteen_bit_rgb():
    """A 16-bit RGB PNG, which Pillow can't write and shows as an 8-bit one."""
    import cv2

    return cv2.imencode(".png", np.full((3, 4, 3), 1000, np.uint16))[1].tobytes()


@pytest.mark.parametrize("data,message", [
    (b"", "not a readable image"),
    (b"P6\n2 2\n255\n" + bytes(11), "22 bytes, expected 23 for a 2x2 PPM"),
    (b"P6\n2 2\n255\n" + bytes(13), "24 bytes, expected 23"),
    (b"P6\n0 2\n255\n", "for a 0x2 PPM"),
    (encoded(np.zeros((64, 64, 3), np.uint8), format="PNG")[:-40], "not a readable image"),
    (b"P6\n90000 90000\n65535\n12", "not a readable image"),
    (encoded(np.zeros((4, 4), np.uint16), format="PNG"), "16 bits per channel, expected 8"),
    (sixteen_bit_rgb(), "16 bits per channel, expected 8"),
    (encoded(np.zeros((4, 4, 4), np.uint8), format="PNG"), "transparent"),
    (b"GIF89a not this kind either", "not a readable image"),
])  # fmt: skip
def test_pictures_that_cannot_be_taken(data, message):
    with pytest.raises(UserError, match=message):
        images.parse_image(data, "file.png")


def test_a_picture_that_claims_to_be_huge_gets_no_memory():
    data = bytearray(encoded(np.zeros((4, 4, 3), np.uint8), format="PNG"))
    data[16:24] = struct.pack(">II", 9000, 9000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UserError, match="9000x9000, far more than"):
        images.parse_image(bytes(data), "f")


SEEDS = [encoded(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), format=f)
         for f in ("PNG", "PPM", "JPEG", "BMP")]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_bytes_are_a_picture_or_an_error(data):
    """Damaged copies of every format: cut, or with some bytes overwritten."""
    seed = bytearray(data.draw(st.sampled_from(SEEDS) | st.binary(max_size=80)))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)))):
        if place < len(seed):
            seed[place] = value
    seed = bytes(seed[: data.draw(st.integers(0, len(seed)))])
    try:
        image = images.parse_image(seed, "f")
        assert image.dtype == np.uint8 and image.ndim == 3 and image.nbytes <= 4000 * len(seed)
    except UserError:
        pass
