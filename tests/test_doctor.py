"""launch/doctor.py and tests/bench/gpu_check.py: what is missing is named, and the rest still runs."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
import tiny

from launch import doctor
from model.native import build as native

DOCTOR = tiny.ROOT / "launch" / "doctor.py"


def compile_library(path: pathlib.Path, source: str, *flags: pathlib.Path) -> pathlib.Path:
    """Compile a shared library from C source; skips the test without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler or not shutil.which("ldd"):
        pytest.skip("no C compiler or no ldd")
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


class Plugin(NamedTuple):
    """Folders of the libraries that a plugin needs."""

    cublas: pathlib.Path
    driver: pathlib.Path


@pytest.fixture
def plugin(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """A plugin with the layout of MindSpore's, which needs libcublas.so.11 and the driver."""
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
    return Plugin(cublas.parent, driver.parent)


def test_missing_libraries_of_the_plugin_are_named_with_how_to_install_them(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """The driver's library is reported separately."""
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
    assert problem and "cublasCreate_v2" in problem and "libmindspore_gpu.so.11.6" in problem
    assert str(other.parent) in advice


def test_this_environment_lacks_no_more_than_cuda() -> None:
    """Of the real plugin's dependencies, CUDA's libraries may be missing, MindSpore's own may not."""
    if not shutil.which("ldd"):
        pytest.skip("no ldd")
    found = doctor.plugin_libraries()
    assert all(name.startswith(("libcu", "libnvrtc")) for name in found.missing), found.missing


def test_the_reason_why_the_plugin_does_not_run_is_one_line() -> None:
    """It is taken from the GPU's part of MindSpore's report, not from another back end's."""
    text = (
        "Unsupported device target GPU.\n"
        "Load dynamic library: libmindspore_ascend.so.2 failed. libge_runner.so: cannot open\n"
        "Load dynamic library: libmindspore_gpu.so.11.6 failed. "
        "libcublas.so.11: cannot open shared object file: No such file or directory\n"
    )
    assert str(doctor.plugin_error(text)).startswith("libcublas.so.11: cannot open shared object file")
    text = "x\n- Cuda error:\n----\nThe cudaGetLastError[100], no CUDA-capable device is detected\n"
    assert str(doctor.plugin_error(text)).startswith("The cudaGetLastError[100]")
    assert doctor.plugin_error("nothing of the kind") is None


def test_the_nvcc_of_launch_makes_mindspore_load_its_plugin_for_cuda_11_6() -> None:
    done = doctor.run_limited(
        [sys.executable, "-c", "import mindspore"], 60, GLOG_v="1", CUDA_HOME=str(doctor.CUDA_HOME)
    )
    assert "Get cuda version [11.6]" in done.err and "libmindspore_gpu.so.11.6" in done.err


def test_a_machine_where_everything_is_missing_gets_a_remedy_for_each(tmp_path: pathlib.Path) -> None:
    """No packages, no compiler, no mpirun: the table says how to fix each, without a traceback."""
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
def test_two_ranks_can_sum_under_mpirun() -> None:
    assert doctor.check_all_reduce().status == doctor.OK


@pytest.mark.parametrize(
    "program,words",
    [
        ("import time; time.sleep(60)", "still running after 2 s"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("raise RuntimeError('no such thing')", "no such thing"),
    ],
)
def test_crashes_errors_and_time_limits_become_one_line(program: str, words: str) -> None:
    done = doctor.run_limited([sys.executable, "-c", program], 2)
    assert done.status != 0 and words in done.reason and "\n" not in done.reason


def gpu_check_command(tmp_path: pathlib.Path, *words: str) -> list[str]:
    """gpu_check.py with results in a folder of the test."""
    program = tiny.ROOT / "tests" / "bench" / "gpu_check.py"
    return [sys.executable, str(program), "--out", str(tmp_path / "out"), *words]


def test_a_section_that_fails_does_not_stop_the_next(tmp_path: pathlib.Path) -> None:
    """The results hold every section with its reason; sections that need a failed one are not run."""
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


@pytest.mark.parametrize(
    "words,message",
    [
        (["--torch-python", "/no/python"], "--torch-python /no/python: no such program"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--size", "60", "64"], "--size 60 64: expected multiples of 64"),
    ],
)
def test_a_wrong_option_of_gpu_check_is_refused_at_once(tmp_path: pathlib.Path, words: list[str], message: str) -> None:
    """Later, it would waste time on a GPU machine."""
    command = gpu_check_command(tmp_path, "--only", "environment", *words)
    done = subprocess.run(command, text=True, check=False, capture_output=True, timeout=60)
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "out").exists()


def test_the_time_limit_is_kept_and_the_sections_left_out_are_named(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        gpu_check_command(tmp_path, "--limit", "1", "--only", "read"),
        text=True,
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert "no time left of 1 s; run it alone with --only read" in done.stdout


def test_the_interpreter_for_pytorch_needs_none_of_the_toolkits_packages(tmp_path: pathlib.Path) -> None:
    result = tmp_path / "result.json"
    program, *options = gpu_check_command(tmp_path, "--device", "cpu", "--section", "torch", "--result", str(result))
    subprocess.run([program, "-S", "-E", *options], check=True, timeout=60)
    section = json.loads(result.read_text())
    assert section["status"] == "not run" and "has no PyTorch" in section["line"]


def test_sections_come_after_what_they_need() -> None:
    """Each section comes after the one it needs, and has a time limit."""
    gpu_check = importlib.import_module("bench.gpu_check")
    names = list(gpu_check.SECTIONS)
    for name, section in gpu_check.SECTIONS.items():
        assert 0 < section.time_limit < 600
        assert not section.needs or names.index(section.needs) < names.index(name)


def test_a_gpu_library_built_elsewhere_needs_no_compiler(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An environment variable names the library."""
    path = compile_library(tmp_path / "ops.so", "int Warp() { return 7; } int cuda_version() { return 12080; }")
    monkeypatch.setenv("NVCC", "no-such-compiler")
    monkeypatch.setenv(native.GPU_LIBRARY, str(path))
    monkeypatch.setattr(native, "driver_version", lambda: (12, 2))
    native.load_library.cache_clear()
    try:
        library = native.load_library("GPU")
        assert library is not None and library._name == str(path) and library.Warp() == 7
        native.load_library.cache_clear()
        monkeypatch.setattr(native, "driver_version", lambda: (11, 8))
        assert native.load_library("GPU") is None
        assert "ops.so is from CUDA 12, but the NVIDIA driver supports only up to CUDA 11.8" in capsys.readouterr().err
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
def test_an_nvcc_too_new_for_the_driver_is_refused(
    release: str,
    driver: tuple[int, int] | None,
    words: str | None,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver could not load the library; without a driver, any nvcc is accepted."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1; compute_90'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setattr(native, "driver_version", lambda: driver)
    if words:
        with pytest.raises(native.BuildError, match=words):
            native.gpu_target()
    else:
        native.gpu_target()


def test_a_missing_compiler_is_one_line() -> None:
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
