"""The project's own operators: built on first use for the machine at hand, and where they are kept.

C++ for the CPU (ops.cpp, with oneDNN's convolutions where its package is there), CUDA for NVIDIA GPUs
(ops.cu). A library is kept in the user's cache folder under a name made of all that it depends on:
source, compiler, flags, processor. Without a compiler the network is built of MindSpore's own
operators, which compute the same. For GPU machines without a compiler `python -m model.native gpu`
builds the library elsewhere, of the same checkout, and PWCNET_GPU_OPERATORS names it there.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

from launch.files import cache_folder
from launch.gpus import driver_version

HERE = pathlib.Path(__file__).parent
SWITCH = "PWCNET_NATIVE"
"""Environment variable that, set to 0, leaves everything to MindSpore's own operators."""
GPU_LIBRARY = "PWCNET_GPU_OPERATORS"
"""Environment variable with the path of a GPU library that was built on another machine."""

_off = False


@contextlib.contextmanager
def disabled():
    """Networks that are built inside consist of MindSpore's own operators alone, as an export must."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def device():
    """MindSpore's present device target, "CPU" or "GPU"."""
    import mindspore

    return mindspore.get_context("device_target")


def operator(name, inputs_to_shapes, inputs_to_types, bprop=None):
    """One of the project's operators, for use in a graph; None where it is not to be had.

    Args:
        name: of the function in ops.cpp or ops.cu.
        inputs_to_shapes: function of the inputs' shapes to the output's shape, or a tuple of them.
        inputs_to_types: function of the inputs' types to the output's type, or a tuple of them.
        bprop: function (*inputs, output, gradient) to the gradients of the inputs.

    Returns:
        An `mindspore.ops.Custom`, or None.
    """
    from mindspore import ops

    found = library(device())
    if not found or not hasattr(found, name):
        return None
    return ops.Custom(f"{found._name}:{name}", inputs_to_shapes, inputs_to_types, "aot", bprop)


def library(device):
    """The built library for "CPU" or "GPU" as a `ctypes.CDLL`; None if there is none or it is off."""
    if _off or os.environ.get(SWITCH) == "0" or device not in BUILDERS:
        return None
    return _load(device)


@functools.cache
def _load(device):
    try:
        path = os.environ.get(GPU_LIBRARY) if device == "GPU" else None
        if path and not os.path.isfile(path):
            raise Unavailable(f"{GPU_LIBRARY} names {path}, which is no file")
        path = path or build(*BUILDERS[device]())
        # Bound among themselves first (DEEPBIND): MindSpore brings an oneDNN of another version, with
        # the same names in it.
        mode = os.RTLD_NOW | os.RTLD_LOCAL | os.RTLD_DEEPBIND
        return ctypes.CDLL(os.path.abspath(path), mode=mode)
    except (Unavailable, OSError) as reason:
        if int(os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)) == 0:
            print(
                f"note: {reason}; the network runs on MindSpore's own operators, which are slower",
                file=sys.stderr,
                flush=True,
            )
        return None


class Unavailable(Exception):
    """Why a library can't be built here."""


def cpu_command():
    """(source, command) that build the CPU's library, with oneDNN if its package is installed."""
    compiler = find_compiler("CXX", "g++", "c++", "clang++")
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
    header, shared = find_onednn()
    if header and shared:
        command += ["-DWITH_ONEDNN", f"-I{header.parent}", str(shared), f"-Wl,-rpath,{shared.parent}"]
    return HERE / "ops.cpp", command


def find_onednn():
    """Paths of oneDNN's C++ header and library, as pip installed them, or None for each."""
    found = []
    for package, name in (("onednn-devel-cpu-gomp", "dnnl.hpp"), ("onednn-cpu-gomp", "libdnnl.so.3")):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        paths = [pathlib.Path(file.locate()).resolve() for file in files if file.name == name]
        # The header that includes the others is the one that has them beside it.
        found.append(next((path for path in paths if path.is_file()), None))
    return found


def gpu_command():
    """(source, command) that build the GPU's library, for every architecture that this nvcc knows."""
    compiler = find_compiler("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")
    check_driver(compiler)
    listed = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    known = sorted(int(name.removeprefix("compute_")) for name in listed if name[8:].isdigit())
    wanted = [arch for arch in known if arch in (70, 75, 80, 86, 89, 90)]
    if not wanted:
        raise Unavailable(f"{compiler} knows none of the GPUs from sm_70 to sm_90")
    command = [compiler, "-std=c++14", "-O3", "--shared", "-Xcompiler", "-fPIC"]
    for arch in wanted:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return HERE / "ops.cu", [*command, "-gencode", f"arch=compute_{wanted[-1]},code=compute_{wanted[-1]}"]


def check_driver(compiler) -> None:
    """Raise Unavailable if this machine's driver, where there is one, is too old for an nvcc.

    The library holds nvcc's own CUDA runtime, linked in and hidden, beside the CUDA 11 one of
    MindSpore. They share contexts and streams, which are the driver's; but a runtime wants a driver
    of its own major version or a later one.
    """
    found = re.search(rb"release (\d+)", describe(compiler))
    driver = driver_version()
    if found and driver and driver < (int(found[1]), 0):
        raise Unavailable(
            f"{compiler} is of CUDA {found[1].decode()}, the NVIDIA driver here serves programs up to "
            f"CUDA {driver[0]}.{driver[1]}: name an older nvcc in NVCC, or update the driver"
        )


BUILDERS = {"CPU": cpu_command, "GPU": gpu_command}


def find_compiler(variable, *names):
    """The compiler that an environment variable names, else the first of `names` that is there."""
    names = [os.environ[variable]] if os.environ.get(variable) else names
    for name in names:
        if path := shutil.which(name):
            return path
    raise Unavailable(f"no compiler found ({', '.join(names)})")


def build(source, command):
    """Compile a source unless that was done before; returns the library's path.

    Safe to be called by several processes at once, also over a network file system: one builds, and
    the file appears when it is whole.
    """
    key = hashlib.sha256()
    for part in (source.read_bytes(), "\0".join(command).encode(), describe(command[0]), processor()):
        key.update(len(part).to_bytes(8, "little") + part)
    folder = cache_folder()
    if not folder:
        raise Unavailable("no cache folder can be written; set XDG_CACHE_HOME to one")
    path = folder / f"{source.name.replace('.', '_')}-{key.hexdigest()[:32]}.so"
    if path.is_file():
        return path
    with open(path.with_suffix(".lock"), "w") as lock:
        with contextlib.suppress(OSError):  # some shared file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            print(f"note: building the operators of {source.name} for this machine, once", file=sys.stderr, flush=True)
            partial = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}")
            try:
                done = subprocess.run(
                    [*command[:1], str(source), *command[1:], "-o", str(partial)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    lines = [line for line in done.stderr.splitlines() if "error" in line]
                    reason = (lines or done.stderr.splitlines() or ["no message"])[0]
                    raise Unavailable(f"{command[0]} could not compile {source}: {reason}")
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    return path


def describe(compiler):
    """What a compiler says of its version, as bytes."""
    return subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout


def processor():
    """What code compiled with -march=native depends on, as bytes."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        return b"".join(sorted({line for line in file if line.startswith((b"model name", b"flags", b"Features"))}))
    return os.uname().machine.encode()
