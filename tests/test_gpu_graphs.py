"""A training step on MindSpore's GPU plugin, without a GPU.

The plugin compiles and runs it for libraries of CUDA that tests/cuda_on_cpu defines, whose device is the CPU: kernels,
number formats, layouts and memory are those that the plugin chooses for a GPU.
"""

import collections
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_libraries
import numpy as np
import pytest

from launch.doctor import CUDA_HOME

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("g++") or not shutil.which("nm"),
    reason="needs g++, nm and MindSpore's GPU plugin, which is there for x86-64 alone",
)

ACTIVATED_LAYERS, OTHER_LAYERS = 43, 6
COST_VOLUMES, WARPS = 5, 4
PROGRAM = [sys.executable, str(Path(__file__).with_name("gpu_graph.py"))]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CUDA's libraries and this project's operators."""
    folder = tmp_path_factory.mktemp("cuda")
    cuda_libraries.build_cuda(folder)
    cuda_libraries.build_operators(folder / "operators.so")
    return folder


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The step's losses and gradient, computed by the CPU's operators."""
    path = tmp_path_factory.mktemp("cpu") / "step.npz"
    environment = {**os.environ, "PWCNET_TEST_DEVICE": "CPU"}
    subprocess.run([*PROGRAM, "step", "float32", path], env=environment, check=True)
    with np.load(path) as file:
        return dict(file)


def run_on_gpu(libraries: Path, folder: Path, *arguments: str) -> str:
    """Run gpu_graph.py, from and in a folder; returns MindSpore's text of the graph that ran."""
    environment = {
        **os.environ,
        "CUDA_HOME": str(CUDA_HOME),
        "LD_LIBRARY_PATH": str(libraries),
        "LD_PRELOAD": str(libraries / cuda_libraries.KERNELS),
        "PWCNET_GPU_OPERATORS": str(libraries / "operators.so"),
        "MS_DEV_SAVE_GRAPHS": "1",
        "MS_DEV_SAVE_GRAPHS_PATH": str(folder),
        "MS_DEV_DUMP_IR_PASSES": "hwopt_common_final_graph",
    }
    # MindSpore makes a folder "offload" in the current one.
    done = subprocess.run(
        [*PROGRAM, *arguments], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("hwopt_common_final_graph_0_*.ir")
    return path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("precision,tolerance", [("float32", 1e-3), ("float16", 0.03)])
def test_a_training_step_is_that_of_the_cpu(
    libraries: Path, on_cpu: dict[str, np.ndarray], tmp_path: Path, precision: str, tolerance: float
) -> None:
    """Losses and gradient; in one layout, though MindSpore would change it in float16; with the native operators.

    Biases of the wrong channels make 0.4.
    """
    graph = run_on_gpu(libraries, tmp_path, "step", precision, "step.npz")
    with np.load(tmp_path / "step.npz") as found:
        for name, expected in on_cpu.items():
            error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
            assert error < tolerance, f"{name}: {error}"
    assert "NHWC" not in graph  # see model.precision.set_precision
    count = collections.Counter(re.findall(r"^ *%\d+\(\S+\) = (?:PrimFunc_)?(\w+)\(", graph, re.MULTILINE))
    assert count["Conv2D"] == count["Conv2DBackpropFilter"] == ACTIVATED_LAYERS + OTHER_LAYERS
    assert count["Custom"] == 2 * (ACTIVATED_LAYERS + COST_VOLUMES + WARPS)
    assert count["BiasAdd"] == count["BiasAddGrad"] == OTHER_LAYERS


def test_mindspore_changes_the_layout_of_float16(libraries: Path, tmp_path: Path) -> None:
    """Otherwise the test above does not show that this is prevented."""
    assert "NHWC" in run_on_gpu(libraries, tmp_path, "convolutions")
