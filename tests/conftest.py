"""Fixtures of several test files."""

import collections
import os
import pathlib
import shutil
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from model.inference import FlowPredictor
    from model.pwcnet import PWCNet

pytest_plugins = ["training_runs"]

os.environ.setdefault("GLOG_v", "3")
# OpenMP's threads wait for work by spinning otherwise, on cores that other tests need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tests that a shell starts in the background ignore Ctrl-C, and the commands they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than there are cores, because many tests wait for processes or for a time limit."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, to balance the load."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="module", autouse=True)
def remove_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove what the fixtures of a file wrote when its tests have passed; pytest would do so after the last file.

    None has a wider scope, so no other file needs it. Folders of tests that failed before stay.
    """
    base = tmp_path_factory.getbasetemp()
    before, failed = set(base.iterdir()), request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        for folder in set(base.iterdir()) - before:
            shutil.rmtree(folder, ignore_errors=True)  # leaves pytest's links to them


@pytest.fixture(scope="module")
def graph_mode() -> Iterator[None]:
    """MindSpore as `launch` sets it up for one rank: graph mode on the CPU."""
    import mindspore

    from launch import session
    from launch.ranks import Rank

    before = mindspore.get_context("mode")
    session.start_mindspore(Rank(cores=frozenset([0])), "cpu")  # one thread, because idle ones wait by spinning
    yield
    mindspore.set_context(mode=before)


@pytest.fixture(scope="module")
def network(graph_mode: None) -> "PWCNet":
    """A plain network with random weights."""
    import mindspore

    from model.pwcnet import PWCNet

    mindspore.set_seed(0)
    return PWCNet(dense=False)


@pytest.fixture(scope="module")
def predictor(network: "PWCNet") -> "FlowPredictor":
    """Predicts with that network."""
    from model.inference import FlowPredictor

    network.set_train(False)
    return FlowPredictor(network)


@pytest.fixture(scope="module")
def ckpt(network: "PWCNet", tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint of that network."""
    from model.weights import save_network

    path = tmp_path_factory.mktemp("weights") / "network.ckpt"
    save_network(path, network, {"dense": False})
    return path
