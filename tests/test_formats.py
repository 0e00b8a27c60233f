"""Flow and image files: what is written comes back, and damaged files are one clear error."""

import contextlib
import io
import resource
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from launch import errors, files
from launch.errors import UserError
from prep import flow_viz
from prep.formats import flow as flow_format
from prep.formats import image as image_format

flows = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9).map(lambda s: (*s, 2)),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)  # fmt: skip
pictures = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9).map(lambda s: (*s, 3)))
VALID_FLO = struct.pack("<4sii", b"PIEH", 2, 1) + bytes(16)


def encoded(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, **options)
    return file.getvalue()


@given(flows)
def test_flo_round_trip_is_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, flow: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("flo") / "é x.flo"
    flow_format.write_flo(path, flow)
    assert flow_format.read_flo(path).tobytes() == flow.tobytes()
    assert flow_format.flow_size(path) == flow.shape[:2]


def test_flo_is_what_the_middlebury_page_says(tmp_path: Path) -> None:
    (tmp_path / "a.flo").write_bytes(struct.pack("<fii", 202021.25, 2, 1) + struct.pack("<4f", 1, 2, 3, 4))
    assert flow_format.read_flo(tmp_path / "a.flo").tolist() == [[[1, 2], [3, 4]]]


@pytest.mark.parametrize("data,message", [
    (b"", "0 bytes, expected a .flo file"),
    (b"PIEH\x01", "5 bytes, expected a .flo file"),
    (b"HEIP" + VALID_FLO[4:], "begins with b'HEIP'"),
    (VALID_FLO[:-1], "27 bytes, expected 28 for 2x1 flow; the file is truncated"),
    (VALID_FLO + b"x", "29 bytes, expected 28 for 2x1 flow; the file is too long"),
    (struct.pack("<4sii", b"PIEH", -2, -1) + bytes(16), "its header says -2x-1 pixels"),
    (struct.pack("<4sii", b"PIEH", 2**31 - 1, 2**31 - 1), "truncated"),
])  # fmt: skip
def test_a_damaged_flo_file_says_what_is_wrong(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.flo"
    path.write_bytes(data)
    for read in (flow_format.read_flo, flow_format.flow_size):
        with pytest.raises(UserError) as raised:
            read(path)
        assert message in str(raised.value) and str(path) in str(raised.value)


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda b: b"PIEH" + b))
def test_any_bytes_are_a_flow_or_an_error(data: bytes) -> None:
    with contextlib.suppress(UserError):
        assert flow_format.parse_flo(data, "f").nbytes == len(data) - 12


# --- .pfm, KITTI's and Kubric's .png, Spring's .flo5, .npy, .npz ----------------------------------


def pfm(flow: np.ndarray, order: str = "<", scale: bytes = b"-1.0") -> bytes:
    rows = np.dstack([flow, np.zeros(flow.shape[:2], np.float32)])[::-1]
    return b"PF\n%d %d\n%s\n" % (*flow.shape[1::-1], scale) + rows.astype(order + "f4").tobytes()


def kitti_png(flow: np.ndarray, valid: np.ndarray) -> bytes:
    return cv2.imencode(".png", tiny.kitti_pixels(flow, valid)[..., ::-1])[1].tobytes()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def flo5(data: np.ndarray | None, name: str = "flow", **options: Any) -> bytes:
    h5py = pytest.importorskip("h5py")
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened.create_dataset(name, data=data, **options)
    return file.getvalue()


def test_pfm_rows_run_from_the_bottom_up() -> None:
    data = b"PF\n2 2\n-1\n" + struct.pack("<12f", 5, 6, 0, 7, 8, 0, 1, 2, 0, 3, 4, 0)
    assert flow_format.parse_pfm(data, "f").tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]


@given(flows, st.sampled_from([("<", b"-1"), ("<", b"-1.000000"), (">", b"1"), (">", b"+1.0e0")]))
def test_pfm_is_read_bit_for_bit_in_both_byte_orders(
    tmp_path_factory: pytest.TempPathFactory, flow: np.ndarray, order: tuple[str, bytes]
) -> None:
    path = tmp_path_factory.mktemp("pfm") / "é x.pfm"
    path.write_bytes(pfm(flow, *order))
    found, valid = flow_format.read_flow(path)
    # Swapping the bytes of a NaN may set its quiet bit.
    assert np.array_equal(found, flow, equal_nan=True) and found.flags.c_contiguous
    assert np.array_equal(valid, flow_format.find_known(flow)) and flow_format.flow_size(path) == flow.shape[:2]


def test_kitti_png_is_what_the_development_kit_says(tmp_path: Path) -> None:
    """R and G are 64 times the flow plus 2^15, B is the validity."""
    pixels = np.array([[[2**15 + 64, 2**15 - 32, 1], [2**15, 0, 1]], [[0, 0, 0], [65535, 1, 255]]], np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
    flow, valid = flow_format.read_flow(path)
    assert flow[valid == 1].tolist() == [[1, -0.5], [0, -512], [511.984375, -511.984375]]
    assert valid.tolist() == [[1, 1], [0, 1]] and np.isnan(flow[1, 0]).all()
    assert flow_format.flow_size(path) == (2, 2)


def test_flo5_files_are_read_bit_for_bit_whatever_their_chunks(tmp_path: Path) -> None:
    flow = np.random.default_rng(0).normal(0, 9, (6, 8, 2)).astype(np.float32)
    flow[0, 0] = np.nan
    variants: list[dict[str, Any]] = [
        {},
        {"compression": "gzip", "compression_opts": 5},
        {"chunks": (4, 3, 1)},
        {"chunks": (4, 3, 2), "shuffle": True, "compression": 9},
        {"chunks": (9, 9, 2), "maxshape": (9, 9, 2)},
    ]
    for number, options in enumerate(variants):
        path = tmp_path / f"{number} é.flo5"
        path.write_bytes(flo5(flow, **options))
        found, valid = flow_format.read_flow(path)
        assert found.tobytes() == flow.tobytes() and flow_format.flow_size(path) == (6, 8)
        assert valid.sum() == 47


def test_flo5_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    path = tmp_path / "a.flo5"
    path.touch()
    with pytest.raises(UserError, match=r"a.flo5: reading HDF5 files requires h5py"):
        flow_format.read_flow(path)


def test_kubric_png_is_scaled_between_the_scenes_extremes(tmp_path: Path) -> None:
    """Green is the flow to the right and red downwards; in early renderings the reverse."""
    pixels = np.array([[[0, 65535, 0], [13107, 26214, 0]]], np.uint16)  # red, green, blue
    path = tmp_path / "a.png"
    path.write_bytes(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
    scale = flow_format.KubricScale(-100, 150)
    flow, valid = flow_format.read_flow(path, scale=scale)
    assert np.allclose(flow, [[[150, -100], [0, -50]]], atol=1e-4) and valid.all() and flow.flags.c_contiguous
    swapped, _ = flow_format.read_flow(path, scale=scale._replace(swapped=True))
    assert np.array_equal(swapped, flow[..., ::-1])


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f8"])
@given(flow=flows, fortran=st.booleans())
def test_npy_and_npz_files_of_every_float_and_order(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, flow: np.ndarray, fortran: bool
) -> None:
    with np.errstate(over="ignore"):
        array = np.asarray(flow.astype(dtype), order="F" if fortran else "C")
    folder = tmp_path_factory.mktemp("npy")
    (folder / "a.npy").write_bytes(npy(array))
    (folder / "one.npz").write_bytes(npz(arr_0=array))
    (folder / "named é.npz").write_bytes(npz(flow=array, other=np.zeros(3)))
    (folder / "viper.npz").write_bytes(npz(compressed=True, u=array[..., 0], v=array[..., 1]))
    for path in folder.iterdir():
        found, valid = flow_format.read_flow(path)
        assert found.dtype == np.float32 and found.flags.c_contiguous
        assert np.array_equal(found, array.astype(np.float32), equal_nan=True)
        assert np.array_equal(valid, flow_format.find_known(found))
        assert flow_format.flow_size(path) == flow.shape[:2]


def test_float32_arrays_are_read_bit_for_bit() -> None:
    flow = np.array([0x7FC00001, 0xFFC00002, 0x80000000, 0x3F800001], np.uint32).view(np.float32).reshape(1, 2, 2)
    assert flow_format.parse_npy(npy(flow), "f").tobytes() == flow.tobytes()
    assert flow_format.parse_npz(npz(u=flow[..., 0], v=flow[..., 1]), "f").tobytes() == flow.tobytes()


def test_flow_beyond_a_datasets_limit_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(npy(np.array([[[511, 0], [512, 0], [0, -600], [np.nan, 0]]], np.float16)))
    assert flow_format.read_flow(path, limit=512)[1].tolist() == [[1, 0, 0, 0]]
    assert flow_format.read_flow(path)[1].tolist() == [[1, 1, 1, 0]]


def with_header(text: bytes, data: bytes = b"", version: int = 1) -> bytes:
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def unwise_npz() -> dict[str, bytes]:
    """.npz files that are damaged or hostile."""
    sound, encrypted = npz(u=ZEROS[..., 0], v=ZEROS[..., 1]), bytearray(npz(flow=ZEROS))
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("flow.npy", npy(ZEROS))
    claims = bytearray(bomb.getvalue())
    directory = claims.index(b"PK\1\2")
    claims[directory + 24 : directory + 28] = (1 << 31).to_bytes(4, "little")
    lzma = io.BytesIO()
    with zipfile.ZipFile(lzma, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("flow.npy", npy(ZEROS))
    flipped = bytearray(sound)
    flipped[sound.index(b"PK\3\4") + 200] ^= 1
    return {
        "cut": sound[:-30],
        "encrypted": bytes(encrypted),
        "claims": bytes(claims),
        "lzma": lzma.getvalue(),
        "flipped": bytes(flipped),
    }


@pytest.mark.parametrize("data,message", [
    (b"", "begins with b'', expected a NumPy array"),
    (b"PK\3\4" + bytes(20), "begins with b'PK"),
    (with_header(b"{'descr': '<f4'}"), "its NumPy header is damaged"),
    (with_header(b"{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (4, 5, 2), }"), "damaged or of no plain"),
    (with_header(b"{'descr': '|O', 'fortran_order': False, 'shape': (4, 5, 2), }"), "damaged or of no plain array"),
    (with_header(b"{'descr': '<c8', 'fortran_order': False, 'shape': (4, 5, 2), }"), "an array of type '<c8'"),
    (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 5, 2), }"), "expected [0-9]+ for an array"),
    (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999, 99999, 2), }"), "99999"),
    (with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 5, 2), }"), "5x0 pixels"),
    (with_header(b" " * 9000), "its NumPy header is damaged"),
    (with_header(b" " * 99, version=9), "expected a NumPy array"),
    (npy(np.zeros((2, 4, 5), np.float32)), r"contains float32 \(2, 4, 5\), expected floats \(H, W, 2\)"),
    (npy(np.zeros((4, 5), np.float32)), r"contains float32 \(4, 5\)"),
    (npy(np.zeros((4, 5, 2), np.uint8)), "contains uint8"),
    (npy(np.zeros((4, 5, 2), np.int16)), "an array of type '<i2'; expected floats"),
    (npy(np.zeros((4, 5, 2), np.float32))[:-1], "the file is damaged"),
])  # fmt: skip
def test_an_npy_file_without_flow_says_what_is_wrong(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    for read in (flow_format.read_flow, flow_format.flow_size):
        with pytest.raises(UserError, match=f"{path}: .*{message}"):
            read(path)


def test_an_npz_file_without_flow_says_what_is_wrong(tmp_path: Path) -> None:
    path, component = tmp_path / "a.npz", ZEROS[..., 0]
    for data, message in (
        (b"", "cannot read this .npz file"),
        (npz(), "contains no arrays; expected u and v, or one array, or one named flow"),
        (npz(a=ZEROS, b=ZEROS), "contains a, b; expected u and v"),
        (npz(u=component, v=component[1:]), r"u is \(4, 5\) and v is \(3, 5\)"),
        (npz(u=component, v=ZEROS), r"contains float32 \(4, 5, 2\), expected floats \(H, W\)"),
        (npz(flow=np.zeros((4, 5, 2), object)), "flow: its NumPy header is damaged or of no plain array"),
        (unwise_npz()["cut"], "cannot read this .npz file"),
        (unwise_npz()["encrypted"], "array flow of this .npz file .it is encrypted"),
        (unwise_npz()["claims"], "array flow of this .npz file .it claims 2147483648 bytes"),
        (unwise_npz()["lzma"], "array flow of this .npz file .it is not compressed by deflate"),
        (unwise_npz()["flipped"], "array u of this .npz file .Bad CRC-32"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"^{path}: .*{message}"):
            flow_format.read_flow(path)


NOISE = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
WRITERS = {
    ".flo": lambda path: flow_format.write_flo(path, np.zeros((400, 500, 2), np.float32)),
    ".png": lambda path: flow_viz.save_png(path, NOISE),
    ".ppm": lambda path: image_format.write_ppm(path, np.zeros((400, 500, 3), np.uint8)),
    ".json": lambda path: files.write_json(path, ["x" * 200000]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    """Limiting files to 100 kB makes the same calls fail as a full disk."""
    path, before = tmp_path / f"a{suffix}", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            WRITERS[suffix](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(path) in errors.describe_os_error(raised.value) and not list(tmp_path.iterdir())


ZEROS = np.zeros((4, 5, 2), np.float32)
PFM, PNG = pfm(ZEROS), kitti_png(ZEROS, ZEROS[..., 0] == 0)


@pytest.mark.parametrize("suffix,data,message", [
    (".pfm", b"", "begins with b'', expected a .pfm file"),
    (".pfm", PFM[:-1], "bytes, expected .* for 5x4 flow; the file is truncated"),
    (".pfm", PFM + b"x", "too long"),
    (".pfm", b"Pf" + PFM[2:], "with one channel"),
    (".pfm", b"PF\n5 4\n0\n", "a scale of 0"),
    (".pfm", b"PF\n5 4\n1.2.3\n", "a scale of 0"),
    (".pfm", b"PF\n999999999 999999999\n-1\n", "truncated"),
    (".pfm", b"PF\n0 4\n-1\n", "its header says 0x4 pixels"),
    (".png", b"", "0 bytes, beginning with b''; expected a PNG file"),
    (".png", PNG[:40], "cannot decode"),
    (".png", PNG[:-20], "cannot decode"),
    (".png", PNG[:20] + b"\xff" + PNG[21:], "too many for its .* bytes"),
    (".png", PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], "cannot decode"),
    (".png", encoded(np.zeros((4, 5, 3), np.uint8), format="PNG"), "of 8 bits and colour type 2"),
    (".png", encoded(np.zeros((4, 5), np.uint16), format="PNG"), "of 16 bits and colour type 0"),
    (".exr", b"", "not a supported flow format; expected .flo, .pfm, .png, .flo5, .npy, .npz"),
])  # fmt: skip
def test_a_damaged_pfm_or_png_file_says_what_is_wrong(tmp_path: Path, suffix: str, data: bytes, message: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        flow_format.read_flow(path)


def test_a_damaged_flo5_file_says_what_is_wrong(tmp_path: Path) -> None:
    sound = flo5(ZEROS)
    huge = flo5(None, shape=(9999, 9999, 2), dtype=np.float32, chunks=(10, 10, 2))
    for data, message in (
        (b"", "not a readable .flo5 file"),
        (sound[:-9], "not a readable .flo5 file"),
        (flo5(ZEROS, "disparity"), "not a readable .flo5 file"),
        (flo5(ZEROS[..., 0]), r"contains float32 \(4, 5\), expected"),
        (flo5(ZEROS.astype(int)), r"contains int64 \(4, 5, 2\), expected"),
        (huge, "contains float32 .*expected float32 .* fits in [0-9]+ bytes"),
    ):
        path = tmp_path / "a.flo5"
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{path}: {message}"):
            flow_format.read_flow(path)


def chunk(kind: bytes, body: bytes, length: int | None = None) -> bytes:
    """A chunk of a PNG file with a correct checksum, and optionally a wrong length."""
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body) if length is None else length) + kind + body + struct.pack(">I", crc)


def flow_png(width: int, height: int, *chunks: bytes, interlace: int = 0) -> bytes:
    """A PNG file of 16-bit RGB with these chunks after its header."""
    fields = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", fields) + b"".join(chunks)


ROWS = np.zeros((4, 1 + 6 * 5), np.uint8)
DATA, END = zlib.compress(ROWS.tobytes()), chunk(b"IEND", b"")
HOSTILE_PNG = [
    (flow_png(5, 4, chunk(b"IDAT", DATA, 0x7F000000), END), "a chunk claims 2130706432 bytes"),
    (flow_png(5, 4, chunk(b"tEXt", b"x", 0x7F000000), chunk(b"IDAT", DATA), END), "a chunk claims"),
    (flow_png(5, 4, chunk(b"IDAT", DATA)), "its end is missing"),
    (flow_png(5, 4, END), "its data is truncated"),
    (flow_png(5, 4, chunk(b"IDAT", DATA[:-1]), END), "its data is truncated"),
    (flow_png(5, 4, chunk(b"IDAT", zlib.compress(bytes(1 << 28))), END), "too many rows"),
    (flow_png(5, 4, chunk(b"IDAT", zlib.compress(b"\5" + bytes(123))), END), "invalid row filter"),
    (flow_png(5, 4, chunk(b"IDAT", b"no zlib"), END), "incorrect header check"),
    (flow_png(5, 4, chunk(b"IDAT", DATA)[:-1] + b"x", END), "a chunk's checksum does not match"),
    (flow_png(5, 4, chunk(b"IDAT", DATA), END, interlace=1), "an interlaced PNG"),
    (flow_png(1 << 14, 1 << 13, chunk(b"IDAT", bytes(10**6)), END), "too many for its .* bytes"),
    (flow_png(10**6 + 1, 1, chunk(b"IDAT", bytes(10**6)), END), "too many for its .* bytes"),
]  # fmt: skip


@pytest.mark.parametrize("data,message", HOSTILE_PNG)
def test_a_flow_png_whose_chunks_are_wrong(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"^a.png: .*{message}"):
        flow_format.parse_kitti_png(data, "a.png")


def test_hostile_images_take_no_memory_and_print_nothing(tmp_path: Path) -> None:
    """libpng would allocate what a chunk claims, and prints its errors itself."""
    grey = encoded(np.zeros((4, 5), np.uint8), format="PNG")
    broad = struct.pack(">IIBBBBB", 10000, 10000, 8, 0, 0, 0, 0)
    wide = grey[:8] + chunk(b"IHDR", broad) + chunk(b"IDAT", bytes(10**6)) + END  # Pillow warns of it
    for number, (data, _) in enumerate([*HOSTILE_PNG, (wide, "")]):
        (tmp_path / f"{number:02}.png").write_bytes(data)
    done = subprocess.run([sys.executable, "-c", f"""if True:
        import pathlib, resource
        from launch import errors
        from prep.formats import flow as flow_format
        from prep.formats import image as image_format
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        before, refused, image_format._noted_reduction = peak(), 0, True
        for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):
            for read in flow_format.read_flow, image_format.read_image, image_format.image_size:
                try:
                    read(path)
                except errors.UserError:
                    refused += 1
        print(refused, peak() - before)
    """], cwd=tiny.ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    refused, megabytes = done.stdout.split()
    assert int(refused) >= len(HOSTILE_PNG) and float(megabytes) < 50


@settings(deadline=None)
@given(flows, st.integers(1, 9), st.integers(1, 400))
def test_a_flow_png_in_many_parts_with_other_chunks_between(flow: np.ndarray, levels: int, size: int) -> None:
    """The flow comes back whatever the compression, row filters and division into IDAT chunks."""
    flow = np.clip(np.nan_to_num(np.rint(64 * flow) / 64), -512, 511).astype(np.float32)
    pixels = tiny.kitti_pixels(flow, np.ones(flow.shape[:2]))[..., ::-1]
    whole = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, levels])[1].tobytes()
    body = b"".join(flow_format.png_data(whole))
    parts = [chunk(b"IDAT", body[i : i + size]) for i in range(0, len(body), size)]
    height, width = flow.shape[:2]
    data = flow_png(width, height, chunk(b"gAMA", bytes(4)), *parts, chunk(b"IEND", b""), b"more")
    assert np.array_equal(flow_format.parse_kitti_png(data, "f"), flow)


def test_a_flo5_file_reads_no_other_file(tmp_path: Path) -> None:
    """HDF5 follows links and external storage into any file that the user can read."""
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(160))
    (tmp_path / "other.flo5").write_bytes(flo5(ZEROS))
    (tmp_path / "ours.flo5").write_bytes(flo5(ZEROS))
    assert flow_format.read_flow(tmp_path / "ours.flo5")[0].shape == ZEROS.shape
    layout = h5py.VirtualLayout(ZEROS.shape, np.float32)
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.flo5"), "flow", ZEROS.shape)
    secret = [(str(tmp_path / "secret"), 0, 160)]
    kinds = {
        "external": lambda f: f.create_dataset("flow", ZEROS.shape, np.float32, external=secret),
        "virtual": lambda f: f.create_virtual_dataset("flow", layout),
        "link": lambda f: f.__setitem__("flow", h5py.ExternalLink(str(tmp_path / "other.flo5"), "flow")),
        "lzf": lambda f: f.create_dataset("flow", data=ZEROS, compression="lzf"),
    }
    for kind, write in kinds.items():
        path = tmp_path / f"{kind}.flo5"
        with h5py.File(path, "w") as file:
            write(file)
        with pytest.raises(UserError, match=f"{kind}.flo5: "):
            flow_format.read_flow(path)


@settings(deadline=None, max_examples=300)
@given(st.data(), st.sampled_from(["pfm", "png", "flo5", "npy", "npz", "compressed npz"]))
def test_any_bytes_are_a_flow_or_an_error_in_every_format(data: st.DataObject, kind: str) -> None:
    """Damaged copies of each format: truncated, or with some bytes overwritten."""
    parse, sound = {
        "pfm": (flow_format.parse_pfm, lambda: PFM),
        "png": (flow_format.parse_kitti_png, lambda: PNG),
        "flo5": (flow_format.parse_flo5, lambda: flo5(ZEROS)),
        "npy": (flow_format.parse_npy, lambda: npy(ZEROS)),
        "npz": (flow_format.parse_npz, lambda: npz(flow=ZEROS)),
        "compressed npz": (flow_format.parse_npz, lambda: npz(True, u=ZEROS[..., 0], v=ZEROS[..., 1])),
    }[kind]
    seed = bytearray(data.draw(st.just(sound()) | st.binary(max_size=60)))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)))):
        if place < len(seed):
            seed[place] = value
    seed = bytes(seed[: data.draw(st.integers(0, len(seed)))])
    try:
        flow = parse(seed, "f")
        assert flow.dtype == np.float32 and flow.ndim == 3 and flow.shape[2] == 2
        assert flow.nbytes <= 1500 * len(seed)
    except UserError:
        pass


# --- What is not known ----------------------------------------------------------------------------


def test_unknown_flow_is_nan_or_from_1e9_on() -> None:
    below = np.nextafter(np.float32(1e9), np.float32(0))
    flow = np.zeros((1, 7, 2), np.float32)
    flow[0, 1, 0], flow[0, 2, 1], flow[0, 3, 0], flow[0, 4, 1] = np.nan, 1e10, -np.inf, -1e9
    flow[0, 5] = below, -below
    assert flow_format.find_known(flow).tolist() == [[1, 0, 0, 0, 0, 1, 1]]
    assert flow_format.find_known(flow[:, 5:]).tolist() == [[1, 1]]


@given(pictures)
def test_ppm_and_png_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, image: np.ndarray) -> None:
    folder = tmp_path_factory.mktemp("image")
    image_format.write_ppm(folder / "a b.ppm", image)
    Image.fromarray(image).save(folder / "ü.png")
    for path in folder.iterdir():
        assert np.array_equal(image_format.read_image(path), image)
        assert image_format.image_size(path) == image.shape[:2]


def test_greyscale_and_palette_images_become_rgb() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    rgb = np.repeat(grey[..., None], 3, 2)
    palette = Image.fromarray(grey).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG")
    opaque = np.concatenate([rgb, np.full((3, 4, 1), 255, np.uint8)], 2)
    for data in (encoded(grey, format="PNG"), encoded(grey, format="PPM"), file.getvalue(),
                 encoded(opaque, format="PNG")):  # fmt: skip
        assert np.array_equal(image_format.parse_image(data, "f"), rgb)
    assert image_format.parse_image(encoded(grey > 99, format="PNG"), "f").max() == 255


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".ppm"])
def test_of_16_bits_the_upper_8_are_kept_with_one_note(
    suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(image_format, "_noted_reduction", False)
    colours = np.random.default_rng(0).integers(0, 1 << 16, (5, 7, 3)).astype(np.uint16)
    for name, pixels in (("colour", colours), ("grey", colours[..., 0])):
        path = tmp_path / (name + (".pgm" if (name, suffix) == ("grey", ".ppm") else suffix))
        path.write_bytes(cv2.imencode(path.suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes())
        assert image_format.image_size(path) == (5, 7)
        expected = pixels >> 8
        assert np.array_equal(image_format.read_image(path), np.broadcast_to(expected.reshape(5, 7, -1), (5, 7, 3)))
        with pytest.raises(UserError, match=r"16 bits per channel, expected 8;|values up to 65535, expected 255"):
            image_format.read_mask(path)  # bits would be lost
    note = "16 bits per channel; of such images, the upper 8 bits are used\n"
    assert capsys.readouterr().err == f"note: {tmp_path}/colour{suffix}: {note}"


def test_a_12_bit_ppm_image_fills_8_bits() -> None:
    data = b"P6\n1 1\n4095\n" + struct.pack(">3H", 0, 2048, 4095)
    assert image_format.parse_image(data, "f").tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"lossless": True, "exif": b"Exif\0\0MM"}])
def test_webp_files_of_every_kind(tmp_path: Path, options: dict[str, Any]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    (tmp_path / "a.webp").write_bytes(encoded(image, format="WEBP", **options))
    found = image_format.read_image(tmp_path / "a.webp")
    assert np.array_equal(found, image) or "quality" in options
    assert found.shape == image.shape and image_format.image_size(tmp_path / "a.webp") == (5, 7)
    black = encoded(np.zeros((1080, 1920, 3), np.uint8), format="WEBP", lossless=True)
    assert len(black) < 500 and not image_format.parse_image(black, "f").any()


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_files_come_back_bit_for_bit(tmp_path: Path, compression: str | None) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    (tmp_path / "a.tiff").write_bytes(encoded(image, format="TIFF", compression=compression))
    assert np.array_equal(image_format.read_image(tmp_path / "a.tiff"), image)
    assert image_format.image_size(tmp_path / "a.tiff") == (5, 7)


def test_masks_are_images_or_arrays(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 10], [100, 255, 0]], np.uint8)
    (tmp_path / "a.png").write_bytes(encoded(mask, format="PNG"))
    (tmp_path / "b.npy").write_bytes(npy(mask))
    (tmp_path / "c.npy").write_bytes(npy(mask != 0))
    for path in tmp_path.iterdir():
        assert np.array_equal(image_format.read_mask(path), mask != 0)
        assert image_format.mask_size(path) == (2, 3)
    (tmp_path / "d.npy").write_bytes(npy(mask.astype(np.float32)))
    for read in (image_format.read_mask, image_format.mask_size):
        with pytest.raises(UserError, match=r"d.npy: contains float32 \(2, 3\), expected a mask: uint8 or bool"):
            read(tmp_path / "d.npy")


def test_a_mask_is_0_only_where_an_image_is_black(tmp_path: Path) -> None:
    """Whatever the colour."""
    colours = [[0, 0, 0], [1, 0, 0], [0, 255, 0], [0, 0, 9]]
    (tmp_path / "a.png").write_bytes(encoded(np.array([colours], np.uint8), format="PNG"))
    palette = Image.fromarray(np.arange(4, dtype=np.uint8)[None]).convert("P")
    palette.putpalette(np.array(colours, np.uint8).tobytes())
    palette.save(tmp_path / "b.png")
    for path in tmp_path.iterdir():
        assert image_format.read_mask(path).tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize("kind", ["JPEG", "WebP"])
def test_a_mask_with_lossy_compression_is_refused(tmp_path: Path, kind: str) -> None:
    """Nonzero pixels surround the edges; the header tells."""
    path = tmp_path / "a"
    path.write_bytes(encoded(np.eye(16, dtype=np.uint8)[..., None].repeat(3, 2), format=kind.upper()))
    for read in (image_format.read_mask, image_format.mask_size):
        with pytest.raises(UserError, match=f"a: a mask with {kind}'s lossy compression, .* save it as PNG"):
            read(path)


@pytest.mark.parametrize("data,message", [
    (b"", "not a readable image"),
    (b"P6\n2 2\n255\n" + bytes(11), "22 bytes, expected 23 for a 2x2 PPM"),
    (b"P6\n2 2\n255\n" + bytes(13), "24 bytes, expected 23"),
    (b"P6\n0 2\n255\n", "for a 0x2 PPM"),
    (encoded(np.zeros((64, 64, 3), np.uint8), format="PNG")[:-40], "not a readable image"),
    (b"P6\n90000 90000\n255\n12", "21 bytes, expected 24300000019"),
    (b"P6\n1 1\n65535\n" + bytes(5), "18 bytes, expected 19 for a 1x1 PPM"),
    (b"P6\n1 1\n99999\n" + bytes(6), "values up to 99999, expected 255"),
    (b"P6\n1 1\n254\n" + bytes(3), "values up to 254, expected 255"),
    (b"P3\n1 1\n1023\n1 2 3\n", "values up to 1023, expected 255"),
    (encoded(np.zeros((4, 4), np.int32), format="TIFF"), "32 bits per channel, expected 8 or 16"),
    (encoded(np.zeros((4, 4), np.float32), format="TIFF"), "32 bits per channel, expected 8 or 16"),
    (encoded(np.zeros((4, 4, 4), np.uint8), format="PNG"), "transparent"),
    (encoded(np.full((4, 4, 2), 7, np.uint8), format="TIFF"), "greyscale or palette TIFF with an alpha channel"),
    (b"GIF89a not this kind either", "not a readable image"),
])  # fmt: skip
def test_an_image_that_cannot_be_read_says_why(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        image_format.parse_image(data, "file.png")


def test_an_image_that_claims_to_be_huge_gets_no_memory() -> None:
    data = bytearray(encoded(np.zeros((4, 4, 3), np.uint8), format="PNG"))
    data[16:24] = struct.pack(">II", 9000, 9000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UserError, match="9000x9000 pixels, too many for"):
        image_format.parse_image(bytes(data), "f")


SEEDS = [encoded(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), format=f)
         for f in ("PNG", "PPM", "JPEG", "WEBP", "TIFF", "BMP")]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_bytes_are_an_image_or_an_error(data: st.DataObject) -> None:
    """Damaged copies of every format: truncated, or with some bytes overwritten."""
    seed = bytearray(data.draw(st.sampled_from(SEEDS) | st.binary(max_size=80)))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)))):
        if place < len(seed):
            seed[place] = value
    seed = bytes(seed[: data.draw(st.integers(0, len(seed)))])
    try:
        image = image_format.parse_image(seed, "f")
        assert image.dtype == np.uint8 and image.ndim == 3 and image.nbytes <= 4000 * len(seed)
    except UserError:
        pass
