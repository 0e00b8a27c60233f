"""The cache of compiled graphs: the next process reads it, whatever is wrong with it."""

import os
import pathlib
import subprocess
import sys

import pytest
import tiny

from launch.files import cache_folder

PROGRAM = """
import io, sys
sys.stderr = stream = io.StringIO()
from launch import ranks, session
session.start_mindspore(ranks.Rank(), "cpu")
import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn
from model import graph_cache

class Line(nn.Cell):
    def __init__(self, slope, start):
        super().__init__()
        self.slope, self.start = slope, Parameter(Tensor(start), name="start")

    def construct(self, x):
        return x * self.slope + self.start

slope, start = map(float, sys.argv[1:])
line, other, x = Line(slope, start), Line(7.0, 0.0), Tensor(np.float32(10))
with graph_cache.cached("line", slope):
    line.compile(x)
with graph_cache.cached("other"):  # only the first set of a process is kept
    other.compile(x)
print(line(x), other(x))
assert sys.stderr is stream, "compiling must not change where messages go"
"""


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> pathlib.Path:
    """An empty cache folder, apart from the operators, which take long to build."""
    folder = tmp_path / "pwcnet-mindspore"
    folder.mkdir(mode=0o700)
    for library in (cache_folder() or tmp_path).glob("cpu-*.so"):
        (folder / library.name).symlink_to(library)
    return folder


def compute(cache: pathlib.Path, slope: float, start: float, **variables: str) -> list[float]:
    """What a new process computes with this cache."""
    program = cache.parent / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, str(slope), str(start)],
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT), "XDG_CACHE_HOME": str(cache.parent), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [float(value) for value in done.stdout.split()]


def written(cache: pathlib.Path) -> dict[pathlib.Path, int]:
    """The files of all graphs, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in (cache / "graphs").rglob("*") if path.is_file()}


def test_the_next_process_reads_graphs_but_not_weights(cache: pathlib.Path) -> None:
    """Weights come from the network; other constants are another graph; PWCNET_GRAPH_CACHE=0 disables it."""
    assert compute(cache, 2, 1, PWCNET_GRAPH_CACHE="0") == [21, 70]
    assert not written(cache)
    assert compute(cache, 2, 1) == [21, 70]
    first = written(cache)
    assert len(list((cache / "graphs").iterdir())) == 1 and any(path.suffix == ".mindir" for path in first)
    assert compute(cache, 2, 3) == [23, 70]
    assert written(cache) == first
    assert compute(cache, 5, 3) == [53, 70]
    assert len(list((cache / "graphs").iterdir())) == 2


@pytest.mark.parametrize("fault", ["truncated", "unfinished", "not a folder"])
def test_a_damaged_cache_is_replaced(cache: pathlib.Path, fault: str) -> None:
    """What a full disk, a killed process or anything else left is no graph."""
    assert compute(cache, 2, 1) == [21, 70]
    (folder,) = (cache / "graphs").iterdir()
    graph = next(folder.rglob("*.mindir"))
    if fault == "truncated":
        graph.chmod(0o600)
        os.truncate(graph, graph.stat().st_size // 2)
    elif fault == "unfinished":
        (folder / "digest").unlink()
    else:
        folder.rename(cache / "elsewhere")
        folder.touch()
    assert compute(cache, 2, 1) == [21, 70]
    assert [path for path in (cache / "graphs").iterdir() if path.name.startswith("partial")] == []
    if fault == "truncated":
        assert written(cache).keys() >= {graph}
    assert compute(cache, 2, 1) == [21, 70]
