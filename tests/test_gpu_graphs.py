"""What MindSpore's GPU plugin makes of this project's graphs, without a GPU.

The plugin compiles them for CUDA libraries that tests/cuda_on_cpu pretends: it chooses kernels, number formats and
layouts, and refuses what it has no kernel for. Nothing is computed.
"""

import collections
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import cuda_libraries
import pytest

from launch.doctor import CUDA_HOME

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="MindSpore has its GPU plugin for x86-64 alone")

ACTIVATED_LAYERS, OTHER_LAYERS = 43, 6
COST_VOLUMES, WARPS = 5, 4


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CUDA's libraries and this project's operators."""
    folder = tmp_path_factory.mktemp("cuda")
    cuda_libraries.build_cuda(folder)
    cuda_libraries.build_operators(folder / "operators.so")
    return folder


def compile_graph(libraries: Path, folder: Path, *arguments: str) -> str:
    """MindSpore's text of a graph of gpu_graph.py, as it would run."""
    environment = {
        **os.environ,
        "CUDA_HOME": str(CUDA_HOME),
        "LD_LIBRARY_PATH": str(libraries),
        "PWCNET_GPU_OPERATORS": str(libraries / "operators.so"),
        "MS_DEV_SAVE_GRAPHS": "1",
        "MS_DEV_SAVE_GRAPHS_PATH": str(folder),
        "MS_DEV_DUMP_IR_PASSES": "hwopt_common_final_graph",
    }
    program = [sys.executable, Path(__file__).with_name("gpu_graph.py"), *arguments]
    # MindSpore makes a folder "offload" in the current one.
    done = subprocess.run(program, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("hwopt_common_final_graph_0_*.ir")
    return path.read_text()


def count_operators(graph: str) -> collections.Counter[str]:
    """How often each operator is in a graph."""
    return collections.Counter(re.findall(r"^ *%\d+\(\S+\) = (?:PrimFunc_)?(\w+)\(", graph, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_training_step_compiles(libraries: Path, tmp_path: Path, precision: str) -> None:
    """There is a kernel for everything, in one layout, and the native operators are in use.

    In float16, MindSpore would change the layout; see `model.precision.set_precision`.
    """
    graph = compile_graph(libraries, tmp_path, "training", precision)
    assert "NHWC" not in graph
    count = count_operators(graph)
    layers = ACTIVATED_LAYERS + OTHER_LAYERS
    assert count["Conv2D"] == count["Conv2DBackpropFilter"] == layers
    assert count["Custom"] == 2 * (ACTIVATED_LAYERS + COST_VOLUMES + WARPS)
    assert count["BiasAdd"] == count["BiasAddGrad"] == OTHER_LAYERS
    # Kernels that wait for the host to start them take most of a step: launch/README.md.
    assert sum(count.values()) < (1250 if precision == "float16" else 1050)


def test_mindspore_changes_the_layout_of_float16(libraries: Path, tmp_path: Path) -> None:
    """Otherwise the test above shows nothing."""
    assert "NHWC" in compile_graph(libraries, tmp_path, "convolutions")
