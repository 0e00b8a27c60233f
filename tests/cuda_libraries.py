"""Builds CUDA's libraries and the GPU operators as they are on a machine without a GPU: from tests/cuda_on_cpu."""

import re
import shutil
import subprocess
from pathlib import Path

import mindspore
import pytest

from model.native.build import GPU_SOURCES

FOLDER = Path(__file__).parent / "cuda_on_cpu"
PLUGIN = Path(mindspore.__file__).parent / "lib" / "plugin"
KERNELS = "libcuda_ops.so.11"
"""Of MindSpore. The plugin looks beside itself before LD_LIBRARY_PATH, so this one must be preloaded."""
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
    compile_library(path, *options, "-x", "c++", *GPU_SOURCES)


def build_cuda(folder: Path) -> None:
    """Build CUDA's libraries, and `KERNELS`, with all functions that MindSpore's plugin links to.

    Those of CUDA that tests/cuda_on_cpu does not define do nothing and return 0. Such a kernel of MindSpore's ends the
    process and prints its name.
    """
    kernels = list_symbols("--defined-only", PLUGIN / "gpu" / KERNELS)
    needed = list_symbols("--undefined-only", PLUGIN / "libmindspore_gpu.so.11.6")
    stop = 'static int stop(const char* name) { std::fprintf(stderr, "%s is missing\\n", name); std::abort(); }\n'
    others = folder / "others.cpp"
    others.write_text("#include <cstdio>\n#include <cstdlib>\n" + stop + define(needed & kernels, 'stop("{}")'))
    compile_library(folder / KERNELS, "-O2", f"-Wl,-soname,{KERNELS}", FOLDER / "mindspore_kernels.cpp", others)

    of_cuda = {
        name for name in needed if re.match(r"cu[A-Z]|cublas|cuda|cudnn|cufft|curand|cusolver|cusparse|nvrtc", name)
    }
    others.write_text(define(of_cuda, "0"))
    compile_library(folder / LIBRARIES[0], "-O2", "-fno-builtin", FOLDER / "cudnn.cpp", FOLDER / "runtime.cpp", others)
    for name in LIBRARIES[1:]:  # the linker takes files of one inode for one library
        (folder / name).hardlink_to(folder / LIBRARIES[0])


def define(names: set[str], result: str) -> str:
    """Functions that give way to others of the same name."""
    return "".join(
        f'extern "C" __attribute__((weak)) int {name}() {{ return {result.format(name)}; }}\n' for name in sorted(names)
    )


def list_symbols(which: str, library: Path) -> set[str]:
    """Of a library: which it has, or which it needs of others."""
    done = subprocess.run(["nm", "-D", which, library], check=True, capture_output=True, text=True)
    return {line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()}
