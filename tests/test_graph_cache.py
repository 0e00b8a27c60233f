"""The cache of compiled graphs: the next process reads it, whatever is wrong with it."""

import os
import pathlib
import shutil
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
graph_cache.compile_graph(line, [x], slope)
graph_cache.compile_graph(other, [x], "other")
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


def files(cache: pathlib.Path) -> list[pathlib.Path]:
    """All files of graphs, those first that were used first."""
    return sorted((cache / "graphs").glob("*"), key=lambda path: path.stat().st_mtime_ns)


def test_the_next_process_reads_graphs_but_not_weights(cache: pathlib.Path) -> None:
    """Weights come from the network; other constants are another graph; PWCNET_GRAPH_CACHE=0 disables it."""
    assert compute(cache, 2, 1, PWCNET_GRAPH_CACHE="0") == [21, 70]
    assert not files(cache)
    assert compute(cache, 2, 1) == [21, 70]
    two, other = files(cache)
    written = two.read_bytes()
    assert compute(cache, 5, 3) == [53, 70]
    (five,) = {*files(cache)} - {two, other}
    assert compute(cache, 2, 3) == [23, 70]
    assert two.read_bytes() == written and files(cache) == [five, two, other]
    two.write_bytes(five.read_bytes())
    assert compute(cache, 2, 3) == [53, 70], "a graph that is there must be read"


@pytest.mark.parametrize("fault", ["truncated", "empty", "no folder"])
def test_a_damaged_cache_is_replaced(cache: pathlib.Path, fault: str) -> None:
    """What a full disk or anything else left is no graph."""
    assert compute(cache, 2, 1) == [21, 70]
    two, other = files(cache)
    written = two.read_bytes()
    if fault == "no folder":
        shutil.rmtree(cache / "graphs")
        (cache / "graphs").touch()
    else:
        os.truncate(two, 0 if fault == "empty" else two.stat().st_size // 2)
    assert compute(cache, 2, 1) == [21, 70]
    if fault != "no folder":
        assert {*files(cache)} == {two, other} and len(two.read_bytes()) == len(written)
        assert compute(cache, 2, 1) == [21, 70]


def test_old_graphs_are_removed(tmp_path: pathlib.Path) -> None:
    """Those used last stay; what a killed process left goes, too."""
    from model import graph_cache

    for index in range(graph_cache.KEPT + 2):
        path = tmp_path / f"{index}"
        if index == 1:
            (path / "rank_0").mkdir(parents=True)
        else:
            path.touch()
        os.utime(path, (index, index))
    graph_cache.remove_old(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{index}" for index in range(2, graph_cache.KEPT + 2)}
