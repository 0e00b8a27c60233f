#!/usr/bin/env python3
"""Collect everything that launch/*.sh install, for a machine without a network, and install it there.

launch/bundle.sh [--python VERSION] [--gpu [ARCHITECTURE ...]] [--strip] [--split SIZE] --out DIR
launch/bundle.sh --install DIR

A bundle is a folder of wheels and, for GPUs, the project's own CUDA operators, all of which may be cut into pieces, and
bundle.json with the SHA-256 of each piece, which is written last. Installing needs only Python's standard library and
pip.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import base64
import concurrent.futures
import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import multiprocessing
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

from launch import errors, fatbin
from launch.arguments import Parser
from launch.errors import UserError
from launch.files import naming, replacing, write_bytes, write_json
from launch.paths import OPERATORS, ROOT
from launch.processes import end_with_parent
from launch.requirements import read_setup, required

FORMAT_VERSION = 1
PYTHONS = ("3.10", "3.11", "3.12")
EXTRAS = ("test", "tensorboard")
"""What the scripts in launch/ install besides the package's own requirements."""
ARCHITECTURES = (80, 86, 89, 90)
"""A100, RTX 30 and A40, RTX 40 and L40, H100 and H200."""
GLIBC = ("2_5", "2_12", "2_17", "2_24", "2_27", "2_28")
"""glibc versions of the wheels to take: those of RHEL 8, Debian 11, Ubuntu 20.04 and later."""
UNUSED = (
    # Other devices and CUDA 11.1.
    "mindspore/lib/plugin/ascend/*",
    "mindspore/lib/plugin/gpu11.1/*",
    "mindspore/lib/plugin/*ascend*",
    "mindspore/lib/plugin/libmindspore_gpu.so.11.1",
    "mindspore/include/*",
    # The compiler of graph kernels, which only MindSpore's option `enable_graph_kernel` uses.
    "mindspore/lib/plugin/*/libakg.so",
    # Recurrent networks, which cuDNN loads when one is used; other front ends of cuSOLVER and cuFFT.
    "nvidia/cudnn/lib/libcudnn_adv_*",
    "nvidia/cusolver/lib/libcusolverMg.so*",
    "nvidia/cufft/lib/libcufftw.so*",
    "nvidia/cublas/lib/libnvblas.so*",
    "nvidia/*/include/*",
)
"""Files that this project's use of MindSpore never opens."""
UNUSED_ON_CPU = ("mindspore/lib/plugin/gpu*/*", "mindspore/lib/plugin/libmindspore_gpu.so.*")
"""Files that only GPUs need."""
NVCC = tuple(f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl"))
"""Wheels with a complete nvcc. Those of CUDA 11 and 12 lack the compiler driver."""
ASSEMBLER = ("nvidia-cuda-nvcc-cu11==11.8.*", "lz4")
"""Wheels with ptxas, whose machine code any driver for CUDA 11.8 or later loads, and with the decompressor of PTX."""
MANIFEST = "bundle.json"
WORK = "downloading"
"""Folder in a bundle that is not complete."""


def main() -> None:
    options = parse()
    if options.install:
        install(options.install)
    else:
        collect(options)


def parse() -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=pathlib.Path, metavar="DIR", help="collect a bundle in this new or empty folder")
    target.add_argument("--install", type=pathlib.Path, metavar="DIR", help="install the bundle in this folder")
    own = platform.python_version().rpartition(".")[0]
    parser.add_argument(
        "--python",
        choices=PYTHONS,
        default=own,
        metavar="VERSION",
        help=f"Python version of the machine without a network: {', '.join(PYTHONS)} (default: this one's, {own})",
    )
    parser.add_argument(
        "--gpu",
        type=int,
        nargs="*",
        metavar="ARCHITECTURE",
        help="include the CUDA 11.8 libraries, for GPUs of these architectures "
        f"(default: {' '.join(map(str, ARCHITECTURES))}; 90 is an H100)",
    )
    parser.add_argument(
        "--extras",
        nargs="*",
        default=EXTRAS,
        metavar="EXTRA",
        help="extras of setup.cfg to include",
    )
    parser.add_argument(
        "--strip",
        action="store_true",
        help="leave out files that are never opened and GPU code of other architectures, and compress better "
        "(several minutes)",
    )
    parser.add_argument(
        "--split", type=parse_size, metavar="SIZE", help="cut files into pieces of at most this size, for example 60M"
    )
    options = parser.parse_args()
    known = [extra for extra in read_setup()["options.extras_require"] if extra != "gpu"]
    if unknown := sorted({*options.extras} - {*known}):
        raise UserError(f"--extras {' '.join(unknown)}: setup.cfg has no such extra; it has {', '.join(known)}")
    if unknown := [str(number) for number in options.gpu or [] if not 70 <= number <= 90]:
        raise UserError(f"--gpu {' '.join(unknown)}: expected architectures from 70 to 90, such as 80 or 90")
    return options


def parse_size(text: str) -> int:
    """Bytes of a size such as 60M; M and G are powers of ten."""
    match = re.fullmatch(r"(\d+)([MG]?)", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; expected for example 60M, 1G or 1000000")
    return int(match[1]) * {"": 1, "M": 10**6, "G": 10**9}[match[2]]


def collect(options: argparse.Namespace) -> None:
    """Download the wheels, strip and cut them, and write bundle.json."""
    out: pathlib.Path = options.out
    architectures = None if options.gpu is None else tuple(options.gpu or ARCHITECTURES)
    extras = [*options.extras, *(["gpu"] if architectures else [])]
    with new_bundle(out) as folder:
        wheels = download(folder, options.python, extras)
        if options.strip:
            ptxas = find_ptxas(folder) if architectures else None
            wheels = strip_all(wheels, architectures or (), ptxas)
        operators = build_operators(folder) if architectures else []
        files = [store(file, out, options.split) for file in [*wheels, *operators]]
        contents = {
            "format_version": FORMAT_VERSION,
            "python": options.python,
            "extras": extras,
            "architectures": architectures,
            "stripped": options.strip,
            "files": files,
        }
        # Last, so that a bundle with a manifest is complete.
        write_json(out / MANIFEST, contents)
    print(f"\n{'MB':>8}  file")
    for file in sorted(files, key=lambda file: -file["size"]):
        print(
            f"{file['size'] / 1e6:8.1f}  {file['name']}"
            + (f", {len(file['pieces'])} pieces" * (len(file["pieces"]) > 1))
        )
    total = sum(file["size"] for file in files)
    print(f"{total / 1e6:8.1f}  in all, in {out}")
    print(f"next: copy this checkout and {out} to the other machine, and there: launch/bundle.sh --install DIR")


@contextlib.contextmanager
def new_bundle(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a work folder in a new bundle, without what an earlier process has left there if it was killed.

    If the body fails, nothing of the bundle is left.

    Raises:
        UserError: the folder has other contents, or another process is writing to it.
    """
    work = out / WORK
    if out.exists() and any(out.iterdir()) and not work.exists():
        raise UserError(f"{out}: already exists and is not empty; name a new folder")
    work.mkdir(parents=True, exist_ok=True)
    with locked(out):
        remove_parts(out)
        try:
            with scratch_folder(work):
                yield work
        except BaseException as error:
            remove_parts(out)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt("interrupted; the same command starts from the beginning") from None
            raise


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
    """Hold a lock on a folder; UserError if another process does."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{out}: another command is collecting a bundle in it; wait, or name another folder"
                ) from None
        yield
    finally:
        os.close(descriptor)


def remove_parts(out: pathlib.Path) -> None:
    """Remove the files of a bundle that is not complete, its manifest first."""
    for path in [out / MANIFEST, *out.glob("*.whl*"), *out.glob("*.so*")]:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(path: pathlib.Path) -> Iterator[None]:
    """Have an empty folder, also if a killed process has left it with contents, and remove it afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def download(folder: pathlib.Path, python: str, extras: list[str]) -> list[pathlib.Path]:
    """Download the wheels of all requirements for a Python version on x86-64 Linux."""
    platforms = [f"manylinux_{version}_x86_64" for version in GLIBC]
    platforms += [f"manylinux{version}_x86_64" for version in ("1", "2010", "2014")]
    print(f"downloading the packages for Python {python}: {', '.join(['base', *extras])}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder), "--progress-bar=off", "-q"]
    command += [word for name in platforms for word in ("--platform", name)]
    run([*command, *required(extras)], "pip could not download the packages", "is there a network?")
    return sorted(folder.glob("*.whl"))


def build_operators(folder: pathlib.Path) -> list[pathlib.Path]:
    """Compile the project's CUDA operators, with nvcc from PyPI if this machine has none; returns the library."""
    environment = dict(os.environ)
    if not (os.environ.get("NVCC") or shutil.which("nvcc")):
        root = install_tool("nvcc", NVCC, folder) / "nvidia" / "cu13"
        (root / "lib64").symlink_to("lib")  # where nvcc looks for its libraries
        environment["NVCC"] = str(root / "bin" / "nvcc")
    build = [sys.executable, "-m", "model.native", "gpu", "--bundle", str(folder)]
    return [pathlib.Path(run(build, "cannot compile the CUDA operators", env=environment, cwd=ROOT).splitlines()[-1])]


def install_tool(name: str, packages: tuple[str, ...], folder: pathlib.Path) -> pathlib.Path:
    """Install the packages of a tool into a folder of its own in `folder`; returns that."""
    target = folder / f"{name}-packages"
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps"]
    run([*pip, "--target", str(target), *packages], f"pip could not download {name}", "is there a network?")
    return target


def find_ptxas(folder: pathlib.Path) -> pathlib.Path:
    """Install NVIDIA's assembler into a folder; returns its path."""
    toolkit = install_tool("ptxas", ASSEMBLER, folder)
    sys.path.append(str(toolkit))  # of lz4, here and in worker processes
    return toolkit / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"


def strip_all(
    wheels: list[pathlib.Path], architectures: tuple[int, ...], ptxas: pathlib.Path | None
) -> list[pathlib.Path]:
    """Strip wheels, several at a time; returns the paths of the smaller ones."""
    with concurrent.futures.ProcessPoolExecutor(initializer=start_worker, initargs=(os.getpid(),)) as pool:
        stripped = []
        try:
            # The largest first: they take the longest.
            running = [
                pool.submit(strip, wheel, architectures, ptxas) for wheel in sorted(wheels, key=size_of, reverse=True)
            ]
            for done in concurrent.futures.as_completed(running):
                stripped.append(done.result())
                print(f"stripped {len(stripped)} of {len(wheels)}: {stripped[-1].name}", flush=True)
        except BaseException:  # or leaving the context would wait for all wheels
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return sorted(stripped)


def start_worker(parent: int) -> None:
    """End with the parent process, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent)


def size_of(path: pathlib.Path) -> int:
    return path.stat().st_size


def strip(wheel: pathlib.Path, architectures: tuple[int, ...], ptxas: pathlib.Path | None = None) -> pathlib.Path:
    """Write a wheel without unused files and GPU code, compressed by LZMA; returns its path.

    Args:
        ptxas: compiles the GPU code that the driver of the other machine would have to compile.
    """
    unused = UNUSED if architectures else UNUSED + UNUSED_ON_CPU
    with (
        replacing(wheel) as target,
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as stripped,
    ):
        records = {}
        for item in source.infolist():
            if item.is_dir() or item.filename.endswith(".dist-info/RECORD"):
                continue
            if any(fnmatch.fnmatchcase(item.filename, pattern) for pattern in unused):
                continue
            data = bytearray(source.read(item))
            if ".so" in item.filename and architectures:
                if ptxas:
                    fatbin.compile_ptx(data, architectures, ptxas)
                fatbin.blank_unused(data, architectures)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            records[item.filename] = f"{item.filename},sha256={digest},{len(data)}"
            stripped.writestr(as_member(item), data)
        # A RECORD lists every file with its hash (PEP 376), itself without one.
        record = next(item for item in source.infolist() if item.filename.endswith(".dist-info/RECORD"))
        lines = [*records.values(), f"{record.filename},,"]
        stripped.writestr(as_member(record), "\n".join(lines) + "\n")
    return wheel


def as_member(item: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """A new entry of an archive with the name, date and permissions of another."""
    member = zipfile.ZipInfo(item.filename, item.date_time)
    member.external_attr = item.external_attr
    member.compress_type = zipfile.ZIP_LZMA
    return member


def store(path: pathlib.Path, out: pathlib.Path, limit: int | None) -> dict[str, Any]:
    """Put a file into the bundle, cut into pieces of at most `limit` bytes; returns its entry in bundle.json."""
    size = size_of(path)
    pieces = []
    with path.open("rb") as file:
        while data := file.read(limit or size):
            name = path.name if size <= (limit or size) else f"{path.name}.{len(pieces):03d}"
            write_bytes(out / name, data)
            pieces.append({"name": name, "sha256": hashlib.sha256(data).hexdigest()})
    path.unlink()
    return {"name": path.name, "size": size, "pieces": pieces}


def install(bundle: pathlib.Path) -> None:
    """Check a bundle and install it into the active virtual environment, or .venv in the checkout."""
    contents = read_bundle(bundle)
    environment = pathlib.Path(os.environ.get("VIRTUAL_ENV") or ROOT / ".venv")
    python = find_interpreter(contents["python"], environment)
    if python is None:
        raise UserError(
            f"{bundle}: collected for Python {contents['python']}, found neither in {environment} nor on the PATH; "
            "install it, or collect the bundle again with the --python that is there"
        )
    # Beside the environment, which is large too: /tmp may be small.
    folder = environment.with_name(f"{environment.name}.bundle")
    with scratch_folder(folder):
        files = [assemble(file, bundle, folder) for file in contents["files"]]
        print(f"all {len(files)} files are intact; installing into {environment}", flush=True)
        own = environment / "bin" / "python"
        if not own.exists():
            # Debian's Python makes no environment with pip unless python3-venv is installed.
            options = [] if succeeds([python, "-c", "import ensurepip"]) else ["--without-pip"]
            run([python, "-m", "venv", *options, str(environment)], f"cannot create the environment {environment}")
        pip = [str(own), "-m", "pip"] if succeeds([str(own), "-m", "pip", "--version"]) else [python, "-m", "pip"]
        pip += ["--python", str(own), "install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "-q"]
        pip.append("--disable-pip-version-check")
        # Three at a time, because unpacking takes long. NVIDIA's wheels have files in common.
        groups: dict[str, list[str]] = {"mindspore": [], "nvidia": [], "": []}
        for file in files:
            if file.suffix == ".whl":
                groups[next(name for name in groups if file.name.startswith(name))].append(str(file))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            failure = f"pip could not install into {environment}"
            list(pool.map(lambda wheels: run([*pip, *wheels], failure), filter(None, groups.values())))
        (environment / OPERATORS).mkdir(parents=True, exist_ok=True)
        for file in files:
            if file.suffix == ".so":
                shutil.copy2(file, environment / OPERATORS)
    print(f"installed; next: . {environment}/bin/activate && launch/doctor.sh")


def succeeds(command: list[str]) -> bool:
    """Whether a command ends with status 0; it prints nothing."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_interpreter(version: str, environment: pathlib.Path) -> str | None:
    """A Python of this version: the environment's if that exists, else this process's or one on the PATH."""
    own = environment / "bin" / "python"
    for name in [str(own)] if own.exists() else [sys.executable, f"python{version}", "python3"]:
        if path := shutil.which(name):
            probe = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
            if subprocess.run(probe, capture_output=True, text=True, check=False).stdout.strip() == version:
                return path
    return None


def run(command: list[str], failure: str, remedy: str = "", **options: Any) -> str:
    """Run a command, which ends with this process, and return its output; raises UserError with the reason if it fails.

    Args:
        failure: begins the error.
        remedy: ends it, unless a disk is full.
        options: of subprocess.run.
    """
    parent = os.getpid()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=lambda: end_with_parent(parent), **options
    )
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no message"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]  # pip's
        reason = lines[-1] if errors[:1] in ([], ["Exception:"]) else errors[0]
        if os.strerror(errno.ENOSPC) in reason:
            remedy = f"free some space there, and in {tempfile.gettempdir()}, or choose another disk"
        raise UserError("; ".join(filter(None, [f"{failure}: {reason}", remedy])))
    return done.stdout


def read_bundle(bundle: pathlib.Path) -> dict[str, Any]:
    """What bundle.json says."""
    path = bundle / MANIFEST
    if not path.exists():
        raise UserError(f"{path}: missing; expected a folder that launch/bundle.sh --out has completed")
    try:
        contents = json.loads(path.read_text())
        version = contents["format_version"]
        if version == FORMAT_VERSION:
            names = [contents["python"], *(file["name"] for file in contents["files"])]
            names += [
                piece[key] for file in contents["files"] for piece in file["pieces"] for key in ("name", "sha256")
            ]
            if any(pathlib.PurePath(name).name != name for name in names):
                raise ValueError("a name is a path")
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a bundle's manifest; copy the bundle again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}; use the same checkout for both")
    return contents


def assemble(file: dict[str, Any], bundle: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Join the pieces of a file in a folder, checking each; returns its path."""
    path = folder / file["name"]
    with naming(path), path.open("wb") as target:
        for piece in file["pieces"]:
            source = bundle / piece["name"]
            if not source.exists():
                raise UserError(f"{source}: missing; copy it again")
            with naming(source):
                data = source.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if digest != piece["sha256"]:
                raise UserError(
                    f"{source}: damaged, SHA-256 {digest[:12]}..., expected {piece['sha256'][:12]}...; copy it again"
                )
            target.write(data)
    return path


if __name__ == "__main__":
    errors.run(main)
