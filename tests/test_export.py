"""Exported files: they give the network's flow, and networks are left as they were."""

import pathlib
import subprocess
import sys

import mindspore
import numpy as np
import pytest
import tiny
from mindspore import Tensor, nn

from launch.errors import UserError
from model import native, onnx_ops
from model import ops as usual
from model.export import TOLERANCE, compare, export
from model.pwcnet import FlowPredictor, PWCNet, normalize_pair, resize
from model.weights import save_network

pytestmark = pytest.mark.usefixtures("graph_mode")


def predictor(**options):
    """A new network without the project's own operators."""
    mindspore.set_seed(0)
    with native.disabled():
        return FlowPredictor(PWCNet(**options))


def random(*shape, scale=1.0):
    values = np.random.default_rng(0).normal(0, scale, shape)
    return Tensor(values.astype(np.float32))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(64, 128), (7, 40), (5, 6), (1, 1)])
def test_resize(size, align_corners) -> None:
    """Larger and smaller, each side on its own."""
    x = random(2, 3, 7, 40)
    found = onnx_ops.resize(x, size, align_corners).asnumpy()
    np.testing.assert_allclose(found, resize(x, size, align_corners).asnumpy(), atol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_warp(mode) -> None:
    """Inside, outside and exactly on the pixels and edges."""
    features, flow = random(2, 3, 9, 14), random(2, 2, 9, 14, scale=4.0).asnumpy()
    flow[:, :, ::2] = np.floor(flow[:, :, ::2])
    found = onnx_ops.warp(features, Tensor(flow), mode).asnumpy()
    expected = usual.warp(features, Tensor(flow), mode).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert 0.1 < (found == 0).mean() < 0.9


def test_normalize_pair() -> None:
    x, y = random(2, 3, 4, 5), random(2, 3, 4, 5, scale=9.0)
    for found, expected in zip(onnx_ops.normalize_pair(x, y), normalize_pair(x, y)):
        np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["mindir", "onnx"])
@pytest.mark.parametrize(
    "options,size,batch",
    [
        ({}, (70, 93), 2),
        ({"variant": "nvlabs", "dense": False, "normalize_features": True}, (64, 70), 1),
    ],
)
def test_export(tmp_path: pathlib.Path, format, options, size, batch) -> None:
    """The file gives the network's flow; the network gives what it gave before."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    network = predictor(**options)
    rng = np.random.default_rng(1)
    images = [Tensor(image) for image in rng.integers(0, 256, (2, batch, *size, 3), np.uint8)]
    before = network(*images).asnumpy()
    path = tmp_path / f"network.{format}"
    export(network, size, path, batch=batch, format=format)
    mean, largest, longest = compare(network, path, size, batch=batch, format=format)
    assert mean < TOLERANCE / 10 and largest < TOLERANCE and longest > 1
    np.testing.assert_array_equal(network(*images).asnumpy(), before)
    assert path.stat().st_mode & 0o444 == 0o444 and list(tmp_path.iterdir()) == [path]


def test_what_can_not_be_exported(tmp_path: pathlib.Path) -> None:
    """An operator that the format lacks is named, and no file is left."""
    pytest.importorskip("onnx")

    class Unknown(nn.Cell):
        def construct(self, image1, image2):
            return (image1 + image2).astype(mindspore.float32).erfinv()

    with pytest.raises(UserError, match="Erfinv"):
        export(Unknown(), (8, 8), tmp_path / "network.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


def command(*arguments):
    """Run the command as a user does: (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, tiny.ROOT / "model" / "export.py", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_command(tmp_path: pathlib.Path) -> None:
    """From a checkpoint to a file, with the proof in its output."""
    network = predictor(dense=False).network
    save_network(tmp_path / "network.ckpt", network, {"dense": False})
    out = tmp_path / "new" / "network.mindir"
    status, text, err = command(
        "--ckpt", tmp_path / "network.ckpt", "--size", 64, 64, "--format", "mindir", "--out", out
    )
    assert status == 0 and "checked: " in text and out.is_file(), err


@pytest.mark.parametrize(
    "options,words",
    [
        ({"--ckpt": "none.ckpt"}, ["none.ckpt", "no such"]),
        ({"--out": "network.ms"}, ["network.ms", "*.mindir"]),
        ({"--batch": "0"}, ["--batch"]),
    ],
)
def test_bad_options(tmp_path: pathlib.Path, options, words) -> None:
    """One line, and no file."""
    (tmp_path / "a.ckpt").write_bytes(b"")
    given = {
        "--ckpt": tmp_path / "a.ckpt",
        "--out": tmp_path / "a.mindir",
        "--format": "mindir",
        "--batch": "1",
        **options,
    }
    status, _, err = command("--size", 64, 64, *(word for pair in given.items() for word in pair))
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
