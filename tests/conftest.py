"""What tests share: the framework as the commands use it."""

import collections
import os
import signal

import pytest

pytest_plugins = ["runs"]

os.environ.setdefault("GLOG_v", "3")
# A shell that starts the tests in the background has them ignore Ctrl-C, which the commands that
# they start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items) -> None:
    """Begin with the files that take longest, beside which the others find room."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="module")
def graph_mode():
    """MindSpore as `launch` sets it up for one rank: graphs on the CPU."""
    import mindspore

    from launch import session
    from launch.ranks import Rank

    before = mindspore.get_context("mode")
    session.start_mindspore(Rank(), "cpu")
    yield
    mindspore.set_context(mode=before)


@pytest.fixture(scope="module")
def network(graph_mode):
    """A plain network with random weights."""
    import mindspore

    from model.pwcnet import PWCNet

    mindspore.set_seed(0)
    return PWCNet(dense=False)


@pytest.fixture(scope="module")
def predictor(network):
    """Predicts with that network."""
    from model.inference import FlowPredictor

    network.set_train(False)
    return FlowPredictor(network)


@pytest.fixture(scope="module")
def ckpt(network, tmp_path_factory: pytest.TempPathFactory):
    """A file of that network's weights."""
    from model.weights import save_network

    path = tmp_path_factory.mktemp("weights") / "network.ckpt"
    save_network(path, network, {"dense": False})
    return path
