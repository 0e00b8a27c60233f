"""What tests share: the framework as the commands use it."""

import os
import signal

import pytest

os.environ.setdefault("GLOG_v", "3")
# A shell that starts the tests in the background has them ignore Ctrl-C, which the commands that
# they start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def graph_mode():
    """MindSpore as `launch` sets it up for one rank: graphs on the CPU."""
    import mindspore

    from launch import cluster

    before = mindspore.get_context("mode")
    cluster.start_mindspore(cluster.Place(), "CPU")
    yield
    mindspore.set_context(mode=before)
