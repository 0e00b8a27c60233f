"""Builds CUDA's libraries and the GPU operators as they are on a machine without a GPU: from tests/cuda_on_cpu."""

import re
import shutil
import subprocess
from pathlib import Path

import mindspore
import pytest

FOLDER = Path(__file__).parent / "cuda_on_cpu"
OPERATOR_SOURCES = sorted((FOLDER.parent.parent / "model" / "native" / "cuda").glob("*.cu"))
PLUGIN = Path(mindspore.__file__).parent / "lib" / "plugin"
LIBRARIES = (
    "libcublas.so.11",
    "libcuda.so.1",
    "libcudart.so.11.0",
    "libcudnn.so.8",
    "libcufft.so.10",
    "libcurand.so.10",
    "libcusolver.so.11",
    "libcusparse.so.11",
    "libnvrtc.so.11.2",
)
"""Of CUDA, that MindSpore's plugin links to."""


def compile_library(path: Path, *options: object) -> None:
    """Compile and link a library with g++, whose warnings are errors; skips the test where there is none."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", *options, "-o", path]
    subprocess.run(list(map(str, command)), check=True)


def build_operators(path: Path) -> None:
    """Build the GPU operators for the CPU; they trap at any index outside an array's declared sizes."""
    sanitizers = "-fsanitize=bounds,alignment,shift,signed-integer-overflow"
    options = ["-Wno-unknown-pragmas", sanitizers, "-fsanitize-undefined-trap-on-error", f"-I{FOLDER}"]
    compile_library(path, *options, "-x", "c++", *OPERATOR_SOURCES)


def build_cuda(folder: Path) -> None:
    """Build libraries with all functions that MindSpore's plugin links to, enough of them to compile graphs."""
    undefined: set[str] = set()
    for plugin in (PLUGIN / "libmindspore_gpu.so.11.6", PLUGIN / "gpu" / "libcuda_ops.so.11"):
        symbols = subprocess.run(["nm", "-D", "--undefined-only", plugin], check=True, capture_output=True, text=True)
        undefined |= set(re.findall(r" U (cu(?:[A-Z]|blas|da|dnn|fft|rand|solver|sparse)\w*|nvrtc\w*)", symbols.stdout))
    runtime = FOLDER / "runtime.cpp"
    undefined -= set(re.findall(r"\b(cu\w+)\(", runtime.read_text()))
    others = folder / "others.cpp"
    others.write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in sorted(undefined)))
    compile_library(folder / LIBRARIES[0], "-fno-builtin", runtime, others)
    for name in LIBRARIES[1:]:  # the linker takes files of one inode for one library
        (folder / name).hardlink_to(folder / LIBRARIES[0])
