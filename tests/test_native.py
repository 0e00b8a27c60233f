"""Building the project's own operators: once, safely, and with a fallback where they cannot be built."""

import ctypes
import pathlib
import subprocess
import sys
import tempfile

import pytest
import tiny
from native_calls import check_refusals

from model.backend import NATIVE_VARIABLE
from model.native import build

LOAD = "from model.native import build; library = build.load_library('CPU'); print(library and library._name)"
MODEL = """
import numpy as np, mindspore
from launch import session
from launch.ranks import Rank
session.start_mindspore(Rank(), "cpu")
from model.backend import resolve_backend
from model.operators import CostVolume
one = mindspore.Tensor(np.ones((1, 2, 3, 4), np.float32))
backend = resolve_backend("native")
print(backend, CostVolume(resolve_backend("native"))(one, one).asnumpy()[0, 40].tolist())
"""


def start(program: str, cache: pathlib.Path, **variables: str) -> subprocess.Popen[str]:
    """A Python process with a cache folder and environment of its own."""
    environment = {**tiny.os.environ, "XDG_CACHE_HOME": str(cache), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tiny.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def compiler() -> str:
    try:
        return build.cpu_target().command[0]
    except build.BuildError as reason:
        pytest.skip(str(reason))


def small_target(compiler: str, folder: pathlib.Path, program: str) -> build.Target:
    """A library of one small file, one.cpp in a folder."""
    source = folder / "one.cpp"
    source.write_text(program)
    return build.Target("test", [compiler, "-shared", "-fPIC"], [source])


def test_ranks_that_start_at_once_build_once(compiler: str, tmp_path: pathlib.Path) -> None:
    """All get the same library; one compiles it; a later process finds it."""
    ranks = [start(LOAD, tmp_path) for _ in range(4)]
    outcomes = [rank.communicate(timeout=120) for rank in ranks]
    assert len({out for out, _ in outcomes}) == 1 and str(tmp_path) in outcomes[0][0], outcomes
    assert sum("building" in err for _, err in outcomes) == 1
    libraries = [path.name for path in (tmp_path / "pwcnet-mindspore").glob("*") if path.suffix != ".lock"]
    assert len(libraries) == 1
    assert start(LOAD, tmp_path).communicate(timeout=120)[1] == ""


def test_a_library_is_rebuilt_when_anything_it_depends_on_changes(
    compiler: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources, headers, options, and the processor: machines of a cluster may share a home folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    header = tmp_path / "one.h"
    header.write_text("int number() { return 1; }")
    target = small_target(compiler, tmp_path, '#include "one.h"\nextern "C" int one() { return number(); }')
    libraries = [build.build_library(target)]
    assert build.build_library(target) == libraries[0]
    header.write_text("int number() { return 2; }")
    libraries.append(build.build_library(target))
    libraries.append(build.build_library(build.Target("test", [*target.command, "-O1"], target.sources)))
    with monkeypatch.context() as patch:
        patch.setattr(build, "processor", lambda: b"another")
        libraries.append(build.build_library(target))
    assert len(set(libraries)) == 4


def test_the_headers_of_this_project_are_part_of_the_digest() -> None:
    try:
        files = {path.name for path in build.cpu_target().files()}
    except build.BuildError as reason:
        pytest.skip(str(reason))
    assert {"abi.h", "constants.h", "runtime.h", "flow_convolution.h", "cost_volume.cpp"} <= files


def test_wrong_calls_are_refused_with_a_reason(compiler: str, capfd: pytest.CaptureFixture[str]) -> None:
    library = build.load_library("CPU")
    assert library is not None
    capfd.readouterr()  # the note that it is being built
    check_refusals(library, capfd)


@pytest.mark.parametrize(
    "variables,message",
    [
        ({"CXX": "no-such-compiler"}, "no compiler found (no-such-compiler)"),
        ({"CXX": "false"}, "could not compile"),
        ({NATIVE_VARIABLE: "0"}, "use --backend mindspore"),
    ],
)
def test_without_native_operators_mindspore_s_are_used(
    variables: dict[str, str], message: str, tmp_path: pathlib.Path
) -> None:
    """One note says why."""
    out, err = start(MODEL, tmp_path, **variables).communicate(timeout=120)
    assert out.strip() == f"mindspore {[[1.0] * 4] * 3}", err
    notes = [line for line in err.splitlines() if line.startswith("note: ") and "building" not in line]
    assert [message in note for note in notes] == [True], err


def test_an_unusable_cache_folder_is_replaced(
    compiler: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary folder takes its place."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    library = build.build_library(small_target(compiler, tmp_path, 'extern "C" int one() { return 1; }'))
    assert tmp_path / "temporary" in pathlib.Path(library).parents and ctypes.CDLL(str(library)).one() == 1


def test_a_colon_in_the_path_of_a_library_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """MindSpore would take it for the end of the path."""
    monkeypatch.setattr(build, "build_library", lambda target: tmp_path / "c:d" / "cpu.so")
    monkeypatch.setitem(build.TARGETS, "CPU", lambda: build.Target("cpu", [], []))
    assert build.load_library.__wrapped__("CPU") is None
    assert "a path with a colon; set XDG_CACHE_HOME to a different folder; the network uses" in capfd.readouterr().err
