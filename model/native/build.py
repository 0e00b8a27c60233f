"""Compiles the native operators for this machine, keeps them in the user's cache folder, and loads them.

A library's name is a hash of everything it depends on: sources, headers, compiler, flags, processor. A GPU machine
without nvcc can use a library that `python -m model.native gpu` built elsewhere from the same sources: launch/bundle.sh
installs one, and the environment variable PWCNET_GPU_OPERATORS names another.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

from launch.errors import print_line
from launch.files import cache_folder
from launch.gpus import driver_version
from launch.lock import wait_for_lock
from launch.logs import print_note
from launch.paths import OPERATORS

HERE = pathlib.Path(__file__).parent
GPU_LIBRARY = "PWCNET_GPU_OPERATORS"
"""Environment variable with the path of a GPU library that was built on another machine."""
GPU_SOURCES = [HERE / "cuda" / name for name in ("activation.cu", "cost_volume.cu", "version.cu", "warp.cu")]
GPU_ARCHITECTURES = (70, 75, 80, 86, 89, 90)


class BuildError(Exception):
    """Why the operators cannot be used here."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A library to compile."""

    name: str
    """What its file name begins with."""
    command: list[str]
    """The compiler and its options, without sources and output."""
    sources: list[pathlib.Path]

    def files(self) -> list[pathlib.Path]:
        """The sources, and the headers beside them and beside this file."""
        folders = sorted({source.parent for source in self.sources} | {HERE})
        return self.sources + [header for folder in folders for header in sorted(folder.glob("*.h"))]


@functools.cache
def load_library(device: str) -> ctypes.CDLL | None:
    """The library for "CPU" or "GPU", built if necessary; None, with a note on stderr, if there can be none."""
    try:
        path = (os.environ.get(GPU_LIBRARY) or find_bundled()) if device == "GPU" else None
        if path and not os.path.isfile(path):
            raise BuildError(f"{GPU_LIBRARY} names {path}, which is not a file")
        if device not in TARGETS:
            raise BuildError(f"there are no operators for {device}")
        path = os.path.abspath(path or build_library(TARGETS[device]()))
        if ":" in path:  # which MindSpore takes for the end of it
            raise BuildError(
                f"{path}: MindSpore cannot load operators from a path with a colon; set XDG_CACHE_HOME to a different "
                f"folder{f', or {GPU_LIBRARY} to a library in one' if device == 'GPU' else ''}"
            )
        # DEEPBIND: the library's own symbols first, as MindSpore brings an oneDNN of another version.
        library = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_LOCAL | os.RTLD_DEEPBIND)
        if device == "GPU" and hasattr(library, "cuda_version"):
            check_driver(path, library.cuda_version() // 1000, "use a library that an older nvcc built")
        if device == "CPU" and not hasattr(library, "Convolution3x3"):
            print_note("no oneDNN package for this platform; convolutions are MindSpore's, which are slower", True)
        return library
    except (BuildError, OSError) as reason:
        print_note(f"{reason}; the network uses MindSpore's own operators, which are slower", each_host=True)
        return None


def cpu_target() -> Target:
    """The library for the CPU; without oneDNN's package it lacks the convolution."""
    compiler = find_compiler("CXX", "g++", "c++", "clang++")
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
    sources = [HERE / "cpu" / name for name in ("adam.cpp", "cost_volume.cpp", "warp.cpp")]
    header = find_installed("onednn-devel-cpu-gomp", "dnnl.hpp")
    library = find_installed("onednn-cpu-gomp", "libdnnl.so.3")
    if header and library:
        command += [f"-I{header.parent}", str(library), f"-Wl,-rpath,{library.parent}"]
        names = ("convolution.cpp", "flow_convolution.cpp", "flow_estimator.cpp", "winograd.cpp")
        sources += [HERE / "cpu" / name for name in names]
    return Target("cpu", command, sources)


def find_installed(package: str, name: str) -> pathlib.Path | None:
    """The path of a file that an installed package brought."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(package) or []:
            # Of several headers of a name, the one that includes the others comes first.
            if file.name == name and (path := pathlib.Path(str(file.locate())).resolve()).is_file():
                return path
    return None


def find_bundled() -> str | None:
    """The path of the GPU library that launch/bundle.sh installed for these sources, if it did."""
    path = pathlib.Path(sys.prefix) / OPERATORS / bundled_name()
    return str(path) if path.is_file() else None


def bundled_name() -> str:
    """The file name of a GPU library built elsewhere; another for other sources."""
    digest = hashlib.sha256()
    for file in Target("gpu", [], GPU_SOURCES).files():
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return f"gpu-{digest.hexdigest()[:32]}.so"


def gpu_target() -> Target:
    """The library for GPUs, for every architecture that this nvcc knows."""
    compiler = find_compiler("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")
    if release := re.search(rb"release (\d+)", compiler_version(compiler)):
        check_driver(compiler, int(release[1]), "set NVCC to an older nvcc")
    listed = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    architectures = [number for number in GPU_ARCHITECTURES if f"compute_{number}" in listed]
    if not architectures:
        raise BuildError(f"{compiler} supports no GPU architecture from sm_70 to sm_90; set NVCC to a newer nvcc")
    command = [compiler, "-std=c++14", "-O3", "--shared", "-Xcompiler", "-fPIC"]
    for number in architectures:
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    newest = architectures[-1]  # also as PTX, which newer GPUs compile on loading
    command += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
    return Target("gpu", command, GPU_SOURCES)


TARGETS: dict[str, Callable[[], Target]] = {"CPU": cpu_target, "GPU": gpu_target}
"""Functions that describe the library to compile, by MindSpore's device target."""


def check_driver(path: str, release: int, remedy: str) -> None:
    """Raise BuildError if this machine has an NVIDIA driver that is too old for an nvcc, or for what one has built.

    The library contains nvcc's own CUDA runtime, linked in and hidden, beside MindSpore's CUDA 11 runtime. They share
    contexts and streams, which belong to the driver; but a runtime needs a driver of its major version or newer.
    """
    driver = driver_version()
    if driver and driver < (release, 0):
        raise BuildError(
            f"{path} is from CUDA {release}, but the NVIDIA driver supports only up to CUDA {driver[0]}.{driver[1]}: "
            f"{remedy}, or update the driver"
        )


def find_compiler(variable: str, *names: str) -> str:
    """The compiler that an environment variable names, else the first of `names` that exists."""
    if os.environ.get(variable):
        names = (os.environ[variable],)
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no compiler found ({', '.join(names)})")


def build_library(target: Target) -> pathlib.Path:
    """Compile a library unless the cache has it; returns its path.

    Several processes may call this at once, also over a network file system: one compiles, and the file appears when
    it is complete.

    Raises:
        BuildError: the compiler failed, or there is no cache folder.
    """
    digest = hashlib.sha256()
    inputs = [file.read_bytes() for file in target.files()]
    for part in (*inputs, "\0".join(target.command).encode(), compiler_version(target.command[0]), processor()):
        digest.update(len(part).to_bytes(8, "little") + part)
    folder = cache_folder()
    if not folder:
        raise BuildError("no cache folder is writable; set XDG_CACHE_HOME to a writable folder")
    path = folder / f"{target.name}-{digest.hexdigest()[:32]}.so"
    if path.is_file():
        return path
    with open(path.with_suffix(".lock"), "w") as lock:
        wait_for_lock(lock)
        if not path.is_file():
            # Not by `print_note`: it may be any rank that builds.
            print_line(f"note: building the {target.name} operators for this machine, once")
            compile_library(target, path)
    return path


def compile_library(target: Target, path: pathlib.Path) -> None:
    """Compile a library to a path, where it appears when it is complete."""
    compiler, *options = target.command
    partial = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}")
    command = [compiler, *map(str, target.sources), *options, "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.splitlines()
            reason = next((line for line in lines if "error" in line), next(iter(lines), "no message"))
            raise BuildError(f"{compiler} could not compile {target.sources[0].parent}: {reason}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def compiler_version(compiler: str) -> bytes:
    """What a compiler prints about its version."""
    return subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout


def processor() -> bytes:
    """The processor's model and features, on which code compiled with -march=native depends."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        return b"".join(sorted({line for line in file if line.startswith((b"model name", b"flags", b"Features"))}))
    return os.uname().machine.encode()
