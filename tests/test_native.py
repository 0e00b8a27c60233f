"""Building the project's own operators: once, safely, and with a way on where it can't be done."""

import pathlib
import subprocess
import sys

import pytest
import tiny

from model import native

LOAD = "from model import native; found = native.library('CPU'); print(found and found._name)"
MODEL = """
import numpy as np, mindspore
from launch import session
from launch.ranks import Rank
session.start_mindspore(Rank(), "cpu")
from model.operators import CostVolume
one = mindspore.Tensor(np.ones((1, 2, 3, 4), np.float32))
print(CostVolume()(one, one).asnumpy()[0, 40].tolist())
"""


def start(program, cache, **variables):
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
def compiler():
    try:
        return native.cpu_command()[1][0]
    except native.Unavailable as reason:
        pytest.skip(str(reason))


def test_ranks_that_start_at_once_build_once(compiler, tmp_path: pathlib.Path) -> None:
    """All get the same library; one compiles it; a later process finds it at once."""
    ranks = [start(LOAD, tmp_path) for _ in range(4)]
    outcomes = [rank.communicate(timeout=120) for rank in ranks]
    assert len({out for out, _ in outcomes}) == 1 and str(tmp_path) in outcomes[0][0], outcomes
    assert sum("building" in err for _, err in outcomes) == 1
    libraries = [path.name for path in (tmp_path / "pwcnet-mindspore").glob("*") if path.suffix != ".lock"]
    assert len(libraries) == 1
    assert start(LOAD, tmp_path).communicate(timeout=120)[1] == ""


def test_another_compiler_or_processor_is_another_library(
    compiler, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was built for one machine of a cluster is not taken on another with the same home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    command = [compiler, "-shared", "-fPIC"]
    first = native.build(source, command)
    assert native.build(source, command) == first
    monkeypatch.setattr(native, "processor", lambda: b"another")
    assert native.build(source, command) != first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.build(source, [*command, "-O1"]) != first


@pytest.mark.parametrize(
    "variables,words",
    [
        ({"CXX": "no-such-compiler"}, "no compiler found (no-such-compiler)"),
        ({"CXX": "false"}, "could not compile"),
        ({native.SWITCH: "0"}, None),
    ],
)
def test_without_a_compiler(variables, words, tmp_path: pathlib.Path) -> None:
    """The network runs on MindSpore's own operators, and that is said once."""
    out, err = start(MODEL, tmp_path, **variables).communicate(timeout=120)
    assert out.strip() == str([[1.0] * 4] * 3), err
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert [words in note for note in notes if "building" not in note] == ([True] if words else [])


def test_a_damaged_cache_folder(tmp_path: pathlib.Path) -> None:
    """A cache that can't be written is no reason to stop: the temporary folder takes its place."""
    (tmp_path / "file").touch()
    out, err = start(LOAD, tmp_path / "file", TMPDIR=str(tmp_path)).communicate(timeout=120)
    assert out.strip() and "Traceback" not in err, err
