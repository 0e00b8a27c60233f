"""Files of weights, without PyTorch: the network they describe, and files without weights."""

import pathlib
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import mindspore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from launch.errors import UserError
from model import checkpoint_file, weights
from model.import_torch import LIGHTNING, UNUSED, check_zip, detect_channels, import_weights
from model.pwcnet import PWCNet

pytestmark = pytest.mark.usefixtures("graph_mode")


def test_a_file_describes_its_network(network: PWCNet, tmp_path: pathlib.Path) -> None:
    """Options that it lacks have their defaults."""
    path = tmp_path / "in.ckpt"
    defaults = {"variant": "irr", "dense": True, "normalize_features": False, "warp_mode": "bilinear"}
    for options in ({"dense": False}, {"normalize_features": True, "warp_mode": "nearest"}, defaults):
        weights.save_network(path, network, options)
        assert weights.network_options(path) == {**defaults, **options}
    weights.write(path, network, {})
    assert weights.network_options(path) == defaults
    assert PWCNet(**defaults).variant == "irr"


@pytest.mark.parametrize(
    "options", [{"depth": 3}, {"variant": "other"}, {"dense": 1}, {"warp_mode": ["nearest"]}, [1], "irr"]
)
def test_options_of_another_version_are_refused(network: PWCNet, tmp_path: pathlib.Path, options: Any) -> None:
    weights.save_network(tmp_path / "in.ckpt", network, options)
    with pytest.raises(UserError, match=r"in.ckpt: .*options .* are unknown to this version"):
        weights.network_options(tmp_path / "in.ckpt")


VALUES = {
    "scalar": np.int32(7),
    "flag": np.bool_(True),
    "small": np.arange(6, dtype=np.float32).reshape(2, 3),
    "wide": np.arange(3, dtype=np.int64),
    "half": np.ones((1, 2), np.float16),
}


def small_file(path: pathlib.Path, crc_check: bool = True) -> bytes:
    """A small checkpoint as MindSpore writes it; returns its bytes."""
    values = [{"name": name, "data": Tensor(value)} for name, value in VALUES.items()]
    mindspore.save_checkpoint(
        values, str(path), crc_check=crc_check, append_dict={"text": "näher", "step": 3, "best": 2.5}
    )
    return path.read_bytes()


@pytest.mark.parametrize("crc_check", [True, False])
def test_a_file_holds_what_mindspore_reads_in_it(tmp_path: pathlib.Path, crc_check: bool) -> None:
    """Every type, shape and text, with and without a checksum."""
    path = tmp_path / "in.ckpt"
    small_file(path, crc_check)
    expected, found = mindspore.load_checkpoint(str(path)), weights.read(path)
    assert found.keys() == expected.keys()
    assert found["text"] == expected["text"] == "näher" == checkpoint_file.read_values(path, "text")["text"]
    numbers = {name: value for name, value in found.items() if not isinstance(value, str)}
    assert numbers.keys() == expected.keys() - {"text"}
    for name, value in numbers.items():
        assert value.dtype == expected[name].dtype and value.shape == expected[name].shape and value.name == name
        np.testing.assert_array_equal(value.asnumpy(), expected[name].asnumpy())
    assert int(numbers["step"]) == 3


def message(*values: tuple[int, int | bytes]) -> bytes:
    """Protobuf's encoding of (field number, integer or bytes)."""

    def varint(value: int) -> bytes:
        return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])

    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in values
    )


def entry(name: str, kind: str, shape: tuple[int, ...], content: bytes) -> bytes:
    """A value of a checkpoint."""
    tensor = message(*((1, side) for side in shape), (2, kind.encode()), (3, content))
    return message((1, message((1, name.encode()), (2, tensor))))


def test_the_parts_of_a_large_parameter_are_joined(tmp_path: pathlib.Path) -> None:
    """MindSpore splits at 512 MB."""
    parts = [
        entry("a", "Float32", (2, 3), np.arange(6, dtype="<f4").tobytes()[part])
        for part in (slice(8), slice(8, 20), slice(20, 24))
    ]
    (tmp_path / "in.ckpt").write_bytes(b"".join([entry("b", "str", (0,), b""), *parts]))
    found = checkpoint_file.read_values(tmp_path / "in.ckpt")
    np.testing.assert_array_equal(found["a"], np.arange(6).reshape(2, 3))
    assert found["b"] == ""


WRONG = {
    "empty": (b"", "it is empty"),
    "zeros": (b"\0" * 999, "unknown field 0"),
    "text": (b"no checkpoint", "unknown field"),
    "an old file of PyTorch": (b"\x80\2\x8a\x0al\xfc", "model/import_torch.py"),
    "a file of PyTorch": (b"PK\3\4" + b"\0" * 99, "model/import_torch.py"),
    "more than there is": (entry("a", "Float32", (10**6, 10**6), b"1234"), "4 bytes, expected 4000000000000"),
    "sides beyond NumPy": (entry("a", "Float32", (0, 2**62), b""), "has the shape"),
    "negative sides": (entry("a", "Float32", (2**64 - 1,), b""), "has the shape"),
    "less than there is": (entry("a", "Float32", (1,), b"12345678"), "8 bytes, expected 4"),
    "many sides": (entry("a", "Float32", (1,) * 33, b"1234"), "has the shape"),
    "another type": (entry("a", "BFloat16", (1,), b"12"), "the type 'BFloat16'"),
    "twice": (b"".join(entry(name, "Int8", (1,), b"1") for name in "aba"), "'a' twice"),
    "other parts": (entry("a", "Int8", (1,), b"1") + entry("a", "Int8", (2,), b"1"), "different shapes"),
    "no tensor": (message((1, message((1, b"a")))), "no tensor"),
    "many": (entry("a", "Int8", (1,), b"") * 10_001, "more than 10000"),
    "no name": (entry("a", "Int8", (1,), b"1").replace(b"\1a", b"\1\xff"), "a name or text"),
    "no text": (entry("a", "str", (0,), b"abc"), "a name or text"),
    "length beyond the end": (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "ends too early"),
    "an endless number": (b"\xff" * 20, "more than ten bytes"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_not_a_checkpoint_is_one_error(
    tmp_path: pathlib.Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With its name, at once, without much memory, and without MindSpore's output."""
    content, words = WRONG[kind]
    (tmp_path / "in.ckpt").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=f"in.ckpt: damaged or not a MindSpore checkpoint .*{words}") as error:
        weights.read(tmp_path / "in.ckpt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(str(error.value)) < 500 and peak < 8 * 2**20 and capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match="no such checkpoint file"):
        weights.read(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path: pathlib.Path, share: float) -> None:
    data = small_file(tmp_path / "in.ckpt")
    (tmp_path / "in.ckpt").chmod(0o600)
    (tmp_path / "in.ckpt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="damaged"):
        weights.read(tmp_path / "in.ckpt")


@pytest.fixture(scope="module")
def whole(graph_mode: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, pathlib.Path]:
    """(a small checkpoint's bytes, a path to write others to)."""
    folder = tmp_path_factory.mktemp("bytes")
    return small_file(folder / "in.ckpt", crc_check=False), folder / "changed.ckpt"


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_bytes_are_a_checkpoint_or_refused(whole: tuple[bytes, pathlib.Path], data: st.DataObject) -> None:
    """Without a checksum to protect them; with one, no changed byte passes."""
    content, path = whole
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place, kind = data.draw(st.integers(0, len(changed))), data.draw(st.integers(0, 2))
        changed[place : place + kind] = data.draw(st.binary(max_size=3))
    checked = content + b"crc_num" + zlib.crc32(content).to_bytes(10, "big")
    path.write_bytes(changed)
    try:
        for name, value in checkpoint_file.read_values(path).items():
            assert isinstance(name, str) and isinstance(value, (str, np.ndarray))
    except UserError as error:
        assert str(error).startswith(f"{path}: damaged")
    path.write_bytes(checked)
    assert checkpoint_file.read_values(path)["text"] == "näher"
    if bytes(changed) != content:
        path.write_bytes(changed + checked[len(content) :])
        with pytest.raises(UserError, match="damaged"):
            checkpoint_file.read_values(path)


@pytest.mark.parametrize(
    "others,tensors,expected",
    [
        ([], UNUSED, "bgr"),
        (["epoch"], UNUSED, "bgr"),
        ([LIGHTNING, "epoch"], [], "rgb"),
        ([], [], "neither"),
        ([], UNUSED[:1], "neither"),
        ([LIGHTNING], UNUSED, "both the layer"),
    ],
)
def test_the_channel_order_is_detected_or_asked_for(
    others: list[str], tensors: list[str] | tuple[str, ...], expected: str
) -> None:
    """NVlabs' files have a layer that ptlflow's lack; anything else needs the user."""
    tensors = ["conv1a.0.weight", *tensors]
    assert detect_channels(pathlib.Path("in.pth"), "irr", tensors, others)[0] == "rgb"
    if len(expected) == 3:
        assert detect_channels(pathlib.Path("in.pth"), "nvlabs", tensors, others)[0] == expected
        return
    with pytest.raises(UserError, match=f"in.pth: .*{expected}.*--channels bgr or --channels rgb"):
        detect_channels(pathlib.Path("in.pth"), "nvlabs", tensors, others)


def zip_file(path: pathlib.Path, compression: int = zipfile.ZIP_STORED, size: int = 2**26) -> pathlib.Path:
    """A zip of two entries, zeros of this size together."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name in ("archive/data/0", "archive/data/1"):
            file.writestr(name, bytes(size // 2))
    return path


def overlap(path: pathlib.Path) -> None:
    """A zip whose two entries are the same bytes."""
    data = bytearray(zip_file(path, size=2**20).read_bytes())
    second = data.rindex(b"PK\1\2")
    data[second + 42 : second + 46] = bytes(4)  # where it begins
    del data[2**19 + 46 : data.index(b"PK\1\2")]
    begin, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
    data[end + 16 : end + 20] = begin.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda path: zip_file(path, zipfile.ZIP_DEFLATED), "holds 67108864 bytes in .*compressed"),
        (lambda path: zip_file(path, zipfile.ZIP_BZIP2), "holds 67108864 bytes in .*compressed"),
        (overlap, "holds 1048576 bytes in 5.*overlapping"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(99)), "damaged or not a PyTorch checkpoint"),
    ],
)
def test_a_zip_larger_inside_than_outside_is_refused(
    tmp_path: pathlib.Path, make: Callable[[pathlib.Path], object], words: str
) -> None:
    """Before PyTorch could unpack it; nothing is unpacked here."""
    make(tmp_path / "in.pth")
    tracemalloc.start()
    with pytest.raises(UserError, match=f"in.pth: {words}"):
        import_weights(tmp_path / "in.pth", tmp_path / "out.ckpt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20
    check_zip(zip_file(tmp_path / "right.pth", size=2**20))
