"""Weights of published networks in and out, checked against PyTorch; files that hold none."""

import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
import pytest
import tiny

from launch.errors import UserError
from model import checkpoint_file, weights
from model.export_torch import export_weights
from model.import_torch import import_weights
from model.inference import load_predictor
from model.published import FIRST_LAYER, published_names
from model.pwcnet import PWCNet
from prep.synthesis.version1 import make_pair

torch = pytest.importorskip("torch", reason="the exchange with PyTorch needs it: install .[torch]")

import torch_pwcnet
from torch import nn
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("graph_mode")


def random_network(variant: str) -> nn.Module:
    """A network of PyTorch whose flows are several pixels long."""
    torch.manual_seed(1)
    network = {"irr": torch_pwcnet.IRR, "nvlabs": torch_pwcnet.NVlabs}[variant]()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return network


def published(variant: str, network: nn.Module) -> dict[str, Any]:
    """What the publishers of a variant save: their kind of dict."""
    if variant == "nvlabs":
        return network.state_dict()
    state = {f"_model.{name}": value for name, value in network.state_dict().items()}
    return {"epoch": 7, "best_epe": np.float64(2.5), "state_dict": state}


class Imported(NamedTuple):
    """A published network with random weights."""

    variant: str
    network: nn.Module
    source: pathlib.Path
    """Its PyTorch file."""
    ckpt: pathlib.Path
    """Our checkpoint of it."""


@pytest.fixture(scope="module", params=["irr", "nvlabs"])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """Imported from the command line."""
    variant = request.param
    folder = tmp_path_factory.mktemp(variant)
    network = random_network(variant)
    source, target = folder / "pwc_net.pth.tar", folder / "pwc_net.ckpt"
    torch.save(published(variant, network), source, _use_new_zipfile_serialization=variant == "irr")
    done = script("import_torch", source, target)
    assert done.returncode == 0, done.stderr
    assert f"variant {variant}" in done.stdout
    channels = {"irr": "RGB images, as visinf/irr", "nvlabs": "BGR images, detected by the layer deconv2"}
    assert channels[variant] in done.stdout
    left_out = {"irr": "epoch, best_epe", "nvlabs": "deconv2.weight, deconv2.bias"}[variant]
    assert left_out in done.stdout
    return Imported(variant, network, source, target)


def script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of `model/` as a user does, from another folder."""
    command = [sys.executable, tiny.ROOT / "model" / f"{name}.py", *arguments]
    return subprocess.run(
        [*map(str, command)],
        env={**os.environ, **environment},
        text=True,
        check=False,
        capture_output=True,
        timeout=120,
        cwd=tiny.ROOT.parent,
    )


def published_flow(variant: str, network: nn.Module, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
    """Flow (H, W, 2) in pixels of two uint8 images, as the publishers of a variant compute it."""
    height, width = image1.shape[:2]
    size = -(-height // 64) * 64, -(-width // 64) * 64
    corners = {"mode": "bilinear", "align_corners": variant == "irr"}
    images = []
    for image in (image1, image2):
        image = image[..., ::-1] if variant == "nvlabs" else image
        image = torch.tensor(image.transpose(2, 0, 1)[None] / np.float32(255))
        images.append(functional.interpolate(image, size, **corners))
    with torch.no_grad():
        flow = functional.interpolate(network(*images)[-1] / 0.05, (height, width), **corners)[0]
    return flow.permute(1, 2, 0).numpy() * np.array([width / size[1], height / size[0]], np.float32)


@pytest.mark.slow
def test_an_imported_network_computes_the_published_flow(imported: Imported) -> None:
    """To a thousandth of a pixel, at any image size, from the checkpoint and from the PyTorch file itself."""
    variant, network, source, ckpt = imported
    image1, image2, _, _ = make_pair(5, 60, 120)
    expected = published_flow(variant, network, image1, image2)
    assert np.abs(expected).max() > 5
    for file in (ckpt, source):
        flow = load_predictor(file).flow(image1, image2)
        np.testing.assert_allclose(flow, expected, rtol=0, atol=1e-3)


def test_import_and_export_change_no_bit(imported: Imported, tmp_path: pathlib.Path) -> None:
    """What comes out is what the publishers' code loads, in the format of their time."""
    variant, network, _, ckpt = imported
    done = script("export_torch", ckpt, tmp_path / "out.pth")
    assert done.returncode == 0, done.stderr
    assert not zipfile.is_zipfile(tmp_path / "out.pth")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    if variant == "irr":
        content = {name.removeprefix("_model."): value for name, value in content["state_dict"].items()}
    before = network.state_dict()
    again = {"irr": torch_pwcnet.IRR, "nvlabs": torch_pwcnet.NVlabs}[variant]()
    again.load_state_dict(content)
    for name, value in before.items():
        if name.startswith("deconv2"):
            assert not content[name].any()
        else:
            assert torch.equal(content[name], value), name


def first_layer(ckpt: pathlib.Path) -> np.ndarray:
    """The weights of the first convolution in a checkpoint."""
    value = checkpoint_file.read_values(ckpt)[FIRST_LAYER]
    assert isinstance(value, np.ndarray)
    return value


def test_the_first_network_took_bgr(imported: Imported) -> None:
    """The import reverses the input channels of NVlabs' first convolution, and changes nothing else."""
    variant, network, _, ckpt = imported
    first = first_layer(ckpt)
    name = published_names(variant)[FIRST_LAYER]
    theirs = network.state_dict()[name].numpy()
    np.testing.assert_array_equal(first, theirs[:, ::-1] if variant == "nvlabs" else theirs)


def ptlflow(state: dict[str, Any]) -> dict[str, Any]:
    """The kind of file that ptlflow saves, of a network with NVlabs' names."""
    state = {name: value for name, value in state.items() if not name.startswith("deconv2")}
    return {"epoch": 3, "pytorch-lightning_version": "1.3.1", "state_dict": state, "hyper_parameters": {}}


def test_ptlflow_s_network_took_rgb(tmp_path: pathlib.Path) -> None:
    """Its files have NVlabs' names, and the channels of their first convolution stay as they are."""
    network = random_network("nvlabs")
    torch.save(ptlflow(network.state_dict()), tmp_path / "in.ckpt")
    done = script("import_torch", tmp_path / "in.ckpt", tmp_path / "out.ckpt")
    assert done.returncode == 0 and "took RGB images, detected by pytorch-lightning_version" in done.stdout
    theirs = network.state_dict()[published_names("nvlabs")[FIRST_LAYER]].numpy()
    first = first_layer(tmp_path / "out.ckpt")
    np.testing.assert_array_equal(first, theirs)

    assert import_weights(tmp_path / "in.ckpt", tmp_path / "out.ckpt", channels="bgr").channels == "bgr"
    first = first_layer(tmp_path / "out.ckpt")
    np.testing.assert_array_equal(first, theirs[:, ::-1])


@pytest.mark.slow
def test_an_imported_network_of_ptlflow_computes_its_flow(tmp_path: pathlib.Path) -> None:
    """Given the same RGB images; with reversed channels it would be wrong by far more."""
    network = random_network("nvlabs")
    torch.save(ptlflow(network.state_dict()), tmp_path / "in.ckpt")
    import_weights(tmp_path / "in.ckpt", tmp_path / "out.ckpt")
    images = make_pair(5, 64, 128)[:2]
    swapped = [np.ascontiguousarray(image[..., ::-1]) for image in images]
    expected = published_flow("nvlabs", network, *swapped)  # which turns them to RGB again
    flow = load_predictor(tmp_path / "out.ckpt").flow(*images)
    np.testing.assert_allclose(flow, expected, rtol=0, atol=1e-3)
    assert np.abs(published_flow("nvlabs", network, *images) - flow).max() > 0.1


def test_a_file_that_does_not_tell_its_channels(tmp_path: pathlib.Path) -> None:
    """Nothing is guessed, and nothing written."""
    state = random_network("nvlabs").state_dict()
    alone = ptlflow(state)["state_dict"]
    both = {**ptlflow(state), "state_dict": state}
    for content, words in ((alone, "neither the layer deconv2"), (both, "has both the layer deconv2")):
        torch.save(content, tmp_path / "in.pth")
        with pytest.raises(UserError, match=f"in.pth: .*{words}.*--channels bgr or --channels rgb"):
            import_weights(tmp_path / "in.pth", tmp_path / "out.ckpt")
        assert not (tmp_path / "out.ckpt").exists()
        assert import_weights(tmp_path / "in.pth", tmp_path / "out.ckpt", channels="rgb").channels == "rgb"
        (tmp_path / "out.ckpt").unlink()


def test_parameter_counts(imported: Imported) -> None:
    """As published; NVlabs' 9,374,340 are with a layer of 66 that is never called."""
    variant, network, _, ckpt = imported
    published = sum(parameter.numel() for parameter in network.parameters())
    assert published == {"irr": 8_639_230, "nvlabs": 9_374_340}[variant]
    ours = sum(parameter.size for parameter in weights.load_network(ckpt).get_parameters())
    assert ours == {"irr": 8_639_230, "nvlabs": 9_374_340 - 66}[variant]


PurePickler: Any = pickle._Pickler  # the implementation in Python


class Python2(PurePickler):
    """Pickles as PyTorch 0.2 under Python 2 did: byte strings, tensors by its first function."""

    dispatch: ClassVar = dict(PurePickler.dispatch)

    def save_text(self, text: str) -> None:
        data = text.encode()
        self.write(pickle.SHORT_BINSTRING + struct.pack("<B", len(data)) + data)
        self.memoize(text)

    dispatch[str] = save_text

    def reducer_override(self, value: Any) -> Any:
        if not torch.is_tensor(value):
            return NotImplemented
        parts = value.storage_offset(), tuple(value.shape), value.stride()
        return torch._utils._rebuild_tensor, (value._typed_storage(), *parts)


def test_a_file_of_python_2(imported: Imported, tmp_path: pathlib.Path) -> None:
    """NVlabs' own file is of 2018: Python 2, PyTorch 0.2."""
    _, network, _, ckpt = imported

    def dump(value: Any, file: BinaryIO, protocol: int | None = None) -> None:
        Python2(file, protocol).dump(value)

    torch.save(
        network.state_dict(),
        tmp_path / "old.pth.tar",
        pickle_module=types.SimpleNamespace(__name__="python2", Pickler=Python2, dump=dump),
        _use_new_zipfile_serialization=False,
    )
    assert b"_rebuild_tensor\n" in (tmp_path / "old.pth.tar").read_bytes()[:10_000]
    import_weights(tmp_path / "old.pth.tar", tmp_path / "out.ckpt")
    assert_same(weights.read(ckpt), weights.read(tmp_path / "out.ckpt"))


def assert_same(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Two checkpoints hold the same."""
    assert first.keys() == second.keys()
    for name in first.keys() - {"model"}:
        np.testing.assert_array_equal(first[name].asnumpy(), second[name].asnumpy(), err_msg=name)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"state_dict": {f"module._model.{name}": value for name, value in state.items()}},
        lambda state: {"model": {"state_dict": {f"model.{n}": v for n, v in state.items()}}, "lr": 1},
        lambda state: {name: nn.Parameter(value.double()) for name, value in state.items()},
    ],
)
def test_wrappers(imported: Imported, tmp_path: pathlib.Path, wrap: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """DataParallel, Lightning and trainers put names and dicts around the weights."""
    variant, network, _, ckpt = imported
    torch.save(wrap(network.state_dict()), tmp_path / "in.pt")
    assert import_weights(tmp_path / "in.pt", tmp_path / "out.ckpt")[0] == variant
    assert_same(weights.read(ckpt), weights.read(tmp_path / "out.ckpt"))


class Intruder:
    """Runs a command when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    names = list(state)
    return {f"strange{number}" if number < 30 else name: state[name] for number, name in enumerate(names)}


def misshapen(state: dict[str, Any]) -> dict[str, Any]:
    name = "flow_estimators.0.conv1.0.bias"
    return {**state, name: torch.zeros(5), "flow_estimators.0.extra": torch.zeros(1)}


def holed(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "flow_estimators.0.conv1.0.bias": torch.full((128,), torch.nan)}


WRONG = {
    "empty": (b"", "is empty"),
    "text": (b"This is not the file you want.\n" * 9, "damaged or not a PyTorch checkpoint"),
    "a page": (b"<!DOCTYPE html><html>not found</html>", "damaged or not a PyTorch checkpoint"),
    "other tensors": (lambda state: {"fc.weight": torch.zeros(3)}, "such as fc.weight"),
    "no tensors": (lambda state: {"state_dict": {"a": 1}, "epoch": 3}, "holds no tensors but"),
    "a list": (lambda state: [torch.zeros(3)], "holds list"),
    "other names": (renamed, r"30 missing \(.*, ...\); 30 unknown \(strange0, .*strange9, ...\)"),
    "other shapes": (
        misshapen,
        r"1 unknown \(flow_estimators.0.extra\); 1 of another shape \(flow_"
        r"estimators.0.conv1.0.bias has \(5,\), expected \(128,\)",
    ),
    "not a number": (holed, "flow_estimators.0.conv1.0.bias is .*NaN"),
    "integers": (lambda state: {name: value.int() for name, value in state.items()}, "int32"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file(kind: str, tmp_path: pathlib.Path) -> None:
    """An error that names the file and what is wrong with it; what was there before is left."""
    content, message = WRONG[kind]
    source, target = tmp_path / "in.pth", tmp_path / "out.ckpt"
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        torch.save(content(random_network("irr").state_dict()), source)
    target.write_bytes(b"of an earlier import")
    with pytest.raises(UserError, match=message) as error:
        import_weights(source, target)
    assert str(error.value).startswith(f"{source}: ") and len(str(error.value)) < 2500
    assert target.read_bytes() == b"of an earlier import"
    assert sorted(tmp_path.iterdir()) == [source, target]


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9999])
def test_a_truncated_file(imported: Imported, tmp_path: pathlib.Path, share: float) -> None:
    """A download that broke off, in either format."""
    data = imported[2].read_bytes()
    (tmp_path / "in.pth").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"in.pth: .*damaged .*download it again"):
        import_weights(tmp_path / "in.pth", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_the_wrong_variant(imported: Imported, tmp_path: pathlib.Path) -> None:
    """Told, not guessed: the names must be of it."""
    variant, _, source, _ = imported
    other = {"irr": "nvlabs", "nvlabs": "irr"}[variant]
    with pytest.raises(UserError, match=f"does not fit the published network .* {other}"):
        import_weights(source, tmp_path / "out.ckpt", other)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed as it should."""
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_does_not_run(tmp_path: pathlib.Path, is_zip: bool) -> None:
    """Not even as far as to see that it is none."""
    touched = tmp_path / "touched"
    torch.save({"state_dict": Intruder(touched)}, tmp_path / "in.pth", _use_new_zipfile_serialization=is_zip)
    line = error_line(script("import_torch", tmp_path / "in.pth", tmp_path / "out.ckpt"))
    assert "system, code that would run" in line and "weights_only" not in line
    assert not touched.exists() and not (tmp_path / "out.ckpt").exists()


def test_targets_that_cannot_be_written(imported: Imported, tmp_path: pathlib.Path) -> None:
    """No folder, another suffix: it is said, and nothing is left."""
    _, _, source, ckpt = imported
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "no")):
        import_weights(source, tmp_path / "no" / "out.ckpt")
    with pytest.raises(UserError, match=r"out.pth: .* must end in .ckpt"):
        import_weights(source, tmp_path / "out.pth")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "no")):
        export_weights(ckpt, tmp_path / "no" / "out.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["import_torch", "export_torch"])
def test_without_torch(tmp_path: pathlib.Path, name: str) -> None:
    """It says what to install."""
    (tmp_path / "torch.py").write_text("raise ImportError('no such thing')")
    done = script(name, tmp_path / "torch.py", tmp_path / "out.ckpt", PYTHONPATH=str(tmp_path))
    assert "pip install -e '.[torch]'" in error_line(done)


def test_networks_that_were_never_published(tmp_path: pathlib.Path) -> None:
    """Weights that the publishers' code would load and compute something else with."""
    network = PWCNet(dense=False, normalize_features=True)
    weights.save_network(tmp_path / "in.ckpt", network, {"dense": False, "normalize_features": True})
    with pytest.raises(UserError, match=r"in.ckpt: .*dense: false, normalize_features: true"):
        export_weights(tmp_path / "in.ckpt", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
