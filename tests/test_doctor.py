"""Saying what a machine can do, and measuring a GPU: what is missing is named, the rest goes on."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
import tiny

from launch import doctor
from model.native import build as native

DOCTOR = tiny.ROOT / "launch" / "doctor.py"


def compile_library(path, source, *flags):
    """A shared library of a C source; skips without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler or not shutil.which("ldd"):
        pytest.skip("there is no C compiler or no ldd here")
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-x",
            "c",
            "-",
            "-x",
            "none",
            "-o",
            path,
            f"-Wl,-soname,{path.name}",
            "-Wl,--unresolved-symbols=ignore-all",
            *flags,
        ],
        input=source.encode(),
        check=True,
    )
    return path


@pytest.fixture
def plugin(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """A plugin in the layout of MindSpore's: it wants libcublas.so.11 and the driver."""
    cublas = compile_library(tmp_path / "cublas" / "libcublas.so.11", "int cublasCreate_v2() { return 0; }")
    driver = compile_library(tmp_path / "driver" / "libcuda.so.1", "int cuInit() { return 0; }")
    source = (
        "int cublasCreate_v2(); int cuInit(); int PyObject_Call();"
        "int use() { return cublasCreate_v2() + cuInit() + PyObject_Call(); }"
    )
    folder = tmp_path / "mindspore"
    plugins = folder / "lib" / "plugin"
    compile_library(plugins / "libmindspore_gpu.so.11.6", source, cublas, driver)
    compile_library(plugins / "gpu11.6" / "libnvidia_collective.so", "int nccl;")
    compile_library(folder / "lib" / "libmpi_collective.so", "int mpi;")
    monkeypatch.setattr(doctor, "mindspore_folder", lambda: folder)
    return types.SimpleNamespace(cublas=cublas.parent, driver=driver.parent)


def test_libraries_of_the_plugin(plugin, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """A missing library is named with what to install; the driver's part is kept apart from it."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    found = doctor.plugin_libraries()
    assert found.missing == ["libcublas.so.11", "libcuda.so.1"] and found.driver == 1
    problem, advice = doctor.describe_libraries(found)
    assert problem == "missing: libcublas.so.11" and "'.[gpu]'" in advice

    monkeypatch.setenv("LD_LIBRARY_PATH", str(plugin.cublas))
    found = doctor.plugin_libraries()
    assert found.missing == ["libcuda.so.1"] and found.undefined == [] and found.driver == 1
    assert found.found == {"libcublas.so.11": str(plugin.cublas / "libcublas.so.11")}
    assert doctor.describe_libraries(found) == (None, "")

    monkeypatch.setenv("LD_LIBRARY_PATH", f"{plugin.cublas}:{plugin.driver}")
    found = doctor.plugin_libraries()
    assert not found.missing and not found.undefined and not found.driver

    other = compile_library(tmp_path / "other" / "libcublas.so.11", "int other() { return 0; }")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{other.parent}:{plugin.cublas}:{plugin.driver}")
    problem, advice = doctor.describe_libraries(doctor.plugin_libraries())
    assert "cublasCreate_v2" in problem and "libmindspore_gpu.so.11.6" in problem
    assert str(other.parent) in advice


def test_this_environment_lacks_no_more_than_cuda() -> None:
    """What ldd says of the real plugin: CUDA's libraries may be missing, MindSpore's own not."""
    if not shutil.which("ldd"):
        pytest.skip("there is no ldd here")
    found = doctor.plugin_libraries()
    assert all(name.startswith(("libcu", "libnvrtc")) for name in found.missing), found.missing


def test_why_the_plugin_does_not_run() -> None:
    """One line out of MindSpore's report: the GPU's part, not that of other back ends."""
    text = (
        "Unsupported device target GPU.\n"
        "Load dynamic library: libmindspore_ascend.so.2 failed. libge_runner.so: cannot open\n"
        "Load dynamic library: libmindspore_gpu.so.11.6 failed. "
        "libcublas.so.11: cannot open shared object file: No such file or directory\n"
    )
    assert doctor.plugin_error(text).startswith("libcublas.so.11: cannot open shared object file")
    text = "x\n- Cuda error:\n----\nThe cudaGetLastError[100], no CUDA-capable device is detected\n"
    assert doctor.plugin_error(text).startswith("The cudaGetLastError[100]")
    assert doctor.plugin_error("nothing of the kind") is None


def test_mindspore_asks_the_nvcc_of_launch() -> None:
    """The answer in CUDA_HOME is what has MindSpore try its plugin for CUDA 11.6."""
    done = doctor.run_limited(
        [sys.executable, "-c", "import mindspore"], 60, GLOG_v="1", CUDA_HOME=str(doctor.CUDA_HOME)
    )
    assert "Get cuda version [11.6]" in done.err and "libmindspore_gpu.so.11.6" in done.err


def test_a_machine_where_everything_is_missing(tmp_path: pathlib.Path) -> None:
    """No packages, no compiler, no mpirun: a table with what to do about each, no traceback."""
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "-S", "-E", DOCTOR], check=False, env=environment, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    for words in (
        "FAIL  packages",
        "FAIL  MindSpore, CPU    not installed",
        "FAIL  mpirun",
        "FAIL  two ranks",
        "warn  own operators     no compiler found (no-such-compiler)",
        "apt install g++",
        "checks failed",
    ):
        assert words in done.stdout, done.stdout
    assert done.stdout.count("pip install -e") >= 3


@pytest.mark.slow
def test_two_ranks() -> None:
    """The doctor's own all-reduce under mpirun; without mpirun it says so."""
    assert doctor.check_all_reduce().status == doctor.OK


@pytest.mark.parametrize(
    "program,words",
    [
        ("import time; time.sleep(60)", "it was stopped after"),
        ("import os; os.kill(os.getpid(), 11)", "it was ended by SIGSEGV"),
        ("raise RuntimeError('no such thing')", "no such thing"),
    ],
)
def test_a_process_that_fails(program, words) -> None:
    """Crashes, errors and time limits become one line."""
    done = doctor.run_limited([sys.executable, "-c", program], 2)
    assert done.status != 0 and words in done.reason and "\n" not in done.reason


def gpu_check_command(tmp_path: pathlib.Path, *words):
    """The command that writes into a folder of the test."""
    program = tiny.ROOT / "tests" / "bench" / "gpu_check.py"
    return [sys.executable, program, "--out", tmp_path / "out", *words]


def test_a_section_that_fails_does_not_stop_the_next(tmp_path: pathlib.Path) -> None:
    """Figures and table hold every section with its reason; what needs a failed one is not run."""
    names = ("plugin", "step", "libraries", "environment")
    done = subprocess.run(
        gpu_check_command(tmp_path, "--only", *names),
        check=False,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=120,
    )
    whole = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    found = whole["sections"]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert tuple(found) == names
    assert found["plugin"]["status"] == "FAIL" and found["plugin"]["line"]
    assert found["step"] == {"status": "not run", "seconds": 0, "line": "needs: plugin"}
    assert found["environment"]["packages"]["mindspore"] == "2.8.0"
    table = (tmp_path / "out" / "gpu_check.md").read_text()
    assert table.count("\n| ") == 2 + 4 and table in done.stdout


def test_no_time_left(tmp_path: pathlib.Path) -> None:
    """A limit on the whole is kept, and the table says which sections it left out."""
    done = subprocess.run(
        gpu_check_command(tmp_path, "--limit", "1", "--only", "read"),
        text=True,
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert "no time left of 1 s; --only read does it alone" in done.stdout


def test_sections_come_after_what_they_need() -> None:
    """A section's need is decided before it, and each has a time limit."""
    gpu_check = importlib.import_module("bench.gpu_check")
    names = list(gpu_check.SECTIONS)
    for name, section in gpu_check.SECTIONS.items():
        assert 0 < section.seconds < 600
        assert not section.needs or names.index(section.needs) < names.index(name)


def test_a_gpu_library_of_another_machine(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a variable names a library, that one is taken and no compiler asked for."""
    path = compile_library(tmp_path / "ops.so", "int Warp() { return 7; }")
    monkeypatch.setenv("NVCC", "no-such-compiler")
    monkeypatch.setenv(native.GPU_LIBRARY, str(path))
    native.load_library.cache_clear()
    try:
        library = native.load_library("GPU")
        assert library is not None and library._name == str(path) and library.Warp() == 7
        native.load_library.cache_clear()
        monkeypatch.setenv(native.GPU_LIBRARY, str(tmp_path / "none.so"))
        assert native.load_library("GPU") is None
        assert "none.so, which is not a file" in capsys.readouterr().err
    finally:
        native.load_library.cache_clear()


@pytest.mark.parametrize(
    "release,driver,words",
    [
        ("13.0", (12, 8), "supports only up to CUDA 12.8"),
        ("13.0", (13, 0), None),
        ("12.9", (13, 0), None),
        ("12.9", (12, 2), None),
        ("13.0", None, None),
    ],
)
def test_an_nvcc_that_is_too_new_for_the_driver(
    release, driver, words, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that the driver would refuse is not built; without a driver any is."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(native, "driver_version", lambda: driver)
    if words:
        with pytest.raises(native.BuildError, match=words):
            native.check_driver(str(nvcc))
    else:
        native.check_driver(str(nvcc))


def test_building_from_the_command_line() -> None:
    """A missing compiler is one line, not a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "model.native", "gpu"],
        check=False,
        text=True,
        cwd=tiny.ROOT,
        env={**os.environ, "NVCC": "no-such-compiler"},
        capture_output=True,
    )
    assert done.returncode == 1
    assert done.stderr == "error: no compiler found (no-such-compiler)\n"
