"""Exported files give the network's flow, and the operators that they are made of agree with the usual ones."""

import argparse
import functools
import pathlib
from typing import Any

import forked
import mindspore
import numpy as np
import pytest
import tiny
from mindspore import Tensor, nn

from launch.errors import UserError
from model import exportable, inference, operators, resizing
from model.backend import Backend
from model.export import BACKENDS, TOLERANCE, Difference, compare, export, export_checkpoint
from model.inference import FlowPredictor, PredictionGraph
from model.pwcnet import PWCNet
from model.weights import save_network

pytestmark = pytest.mark.usefixtures("graph_mode")


def make_network(backend: Backend, **options: Any) -> PWCNet:
    """A network with the same weights for every backend."""
    mindspore.set_seed(0)
    network = PWCNet(**options, backend=backend)
    network.set_train(False)
    return network


def random(*shape: int, scale: float = 1.0) -> Tensor:
    values = np.random.default_rng(0).normal(0, scale, shape)
    return Tensor(values.astype(np.float32))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(64, 128), (7, 40), (5, 6), (1, 1)])
def test_resize_equals_mindspore_s(size: tuple[int, int], align_corners: bool) -> None:
    """Larger and smaller, each side on its own."""
    x = random(2, 3, 7, 40)
    found = exportable.resize(x, size, align_corners).asnumpy()
    np.testing.assert_allclose(found, resizing.resize(x, size, align_corners).asnumpy(), atol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_warp_equals_mindspore_s(mode: str) -> None:
    """Inside, outside, and exactly on the pixels and edges."""
    features, flow = random(2, 3, 9, 14), random(2, 2, 9, 14, scale=4.0).asnumpy()
    flow[:, :, ::2] = np.floor(flow[:, :, ::2])
    found = exportable.warp(features, Tensor(flow), mode).asnumpy()
    expected = operators.warp(features, Tensor(flow), mode).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert 0.1 < (found == 0).mean() < 0.9


def test_normalization_equals_mindspore_s() -> None:
    x, y = random(2, 3, 4, 5), random(2, 3, 4, 5, scale=9.0)
    for found, expected in zip(exportable.normalize_pair(x, y), operators.normalize_pair(x, y), strict=True):
        np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=1e-4, atol=1e-6)


NVLABS: dict[str, Any] = {"variant": "nvlabs", "dense": False, "normalize_features": True}


@functools.cache  # so that its graphs are compiled once for all formats
def make_predictor(**options: Any) -> FlowPredictor:
    """The network that exported files are compared with."""
    return FlowPredictor(make_network("native", **options))


def check_flow(path: pathlib.Path, format: str, options: dict[str, Any], size: tuple[int, int], batch: int) -> None:
    """An exported file gives the flow of the network with these options."""
    difference = compare(make_predictor(**options), path, size, batch=batch, format=format)
    assert difference.mean < TOLERANCE / 10 and difference.largest < TOLERANCE and difference.max_flow > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "format,options,size,batch",
    [
        ("mindir", {}, (70, 93), 2),
        ("onnx", {}, (70, 93), 2),
        ("onnx", NVLABS, (64, 70), 1),  # the command, below, writes it as mindir
    ],
)
def test_an_exported_file_gives_the_network_s_flow(
    tmp_path: pathlib.Path, format: str, options: dict[str, Any], size: tuple[int, int], batch: int
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"network.{format}"
    export(PredictionGraph(make_network(BACKENDS[format], **options)), size, path, batch=batch, format=format)
    check_flow(path, format, options, size, batch)
    assert path.stat().st_mode & 0o444 == 0o444 and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_exported_is_named(tmp_path: pathlib.Path) -> None:
    """An operator that the format lacks; no file is left."""
    pytest.importorskip("onnx")

    class Unknown(nn.Cell):
        def construct(self, image1: Tensor, image2: Tensor) -> Tensor:
            return (image1 + image2).astype(mindspore.float32).erfinv()

    with pytest.raises(UserError, match="Erfinv"):
        export(Unknown(), (8, 8), tmp_path / "network.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_fails_the_check_gets_no_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it replace one of before."""
    out = tmp_path / "network.mindir"
    out.write_bytes(b"before")
    monkeypatch.setattr(inference, "load_predictor", lambda *_: make_predictor(**NVLABS))
    monkeypatch.setattr("model.export.export", lambda graph, size, path, **_: path.write_bytes(b"partial"))
    monkeypatch.setattr("model.export.compare", lambda *_, **__: Difference(float("nan"), 0, 0))
    args = argparse.Namespace(ckpt=tmp_path, out=out, size=(64, 64), batch=1, format="mindir", check=True)
    with pytest.raises(UserError, match=r"network.mindir: not written"):
        export_checkpoint(args)
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == b"before"


def command(*arguments: object) -> tuple[int, str, str]:
    """Run the command as a user does: (status, stdout, stderr)."""
    done = forked.run([*map(str, (tiny.ROOT / "model" / "export.py", *arguments))])
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_says_what_it_wrote(tmp_path: pathlib.Path) -> None:
    """From a checkpoint to a file, with the check in its output."""
    save_network(tmp_path / "network.ckpt", make_network("mindspore", **NVLABS), NVLABS)
    out = tmp_path / "new" / "network.mindir"
    status, text, err = command(
        "--ckpt", tmp_path / "network.ckpt", "--size", 64, 70, "--format", "mindir", "--out", out
    )
    assert status == 0 and "checked: " in text and text.splitlines()[-1].startswith(f"{out}: "), err
    check_flow(out, "mindir", NVLABS, (64, 70), 1)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"--ckpt": "none.ckpt"}, ["none.ckpt", "no such"]),
        ({"--out": "network.ms"}, ["network.ms", "*.mindir"]),
        ({"--batch": "0"}, ["--batch"]),
        ({"--batch": "99999"}, ["--batch 99999", "409,595,904 pixels", "67,108,864"]),
    ],
)
def test_bad_options_are_one_line_and_no_file(
    tmp_path: pathlib.Path, options: dict[str, str], words: list[str]
) -> None:
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
