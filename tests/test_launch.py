"""Environments, scripts, and what all command lines have in common."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import tiny

from launch import errors, requirements, session
from launch.arguments import Parser


def test_requirements_are_read_from_setup_cfg_and_versions_count() -> None:
    """Comments in setup.cfg are not requirements, and those for other platforms are not missing."""
    required = requirements.required(["test"])
    assert "mindspore == 2.8.0" in required and not any(line.startswith("#") for line in required)
    assert requirements.missing(required) == []
    assert requirements.missing(['no-such-package-anywhere; sys_platform == "win32"']) == []
    assert requirements.missing(["numpy >= 2", "no-such-package-anywhere"]) == [
        "numpy >= 2",
        "no-such-package-anywhere",
    ]


def test_requirements_can_be_checked_in_an_empty_environment() -> None:
    done = run_python("-S", "-E", "launch/requirements.py")
    assert done.returncode == 1 and "mindspore" in done.stdout and "Traceback" not in done.stderr


COMMANDS = {
    "model/export.py": ["--ckpt=a", "--size", "8", "8", "--format=onnx", "--out=b"],
    "model/export_torch.py": ["a", "b"],
    "model/import_torch.py": ["--variant=irr", "a", "b"],
    "model/predict.py": ["--ckpt=a", "--out=b", "--batch=2", "--device=cpu", "c"],
    "prep/convert.py": ["flyingchairs", "--root=a", "--out=b", "--shards=2", "--split-file=c"],
    "prep/inspect.py": ["a", "--html=b", "--pairs=3"],
    "prep/synthesize.py": ["--out=a", "--pairs=3", "--seed=1"],
    "prep/verify.py": ["a", "--workers=1"],
    "train/evaluate.py": ["--ckpt=a", "--data=b", "--split=c", "--out=d"],
    "train/main.py": ["--config=a", "--data=b", "--data=c", "--out=d", "--accumulation-steps=2"],
}
"""Users' commands with options that may each be given once, except for --data of train/main.py."""


def run_python(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments and environment variables at the project's root."""
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=tiny.ROOT, timeout=120, capture_output=True, text=True, env=environment
    )


def test_names_that_the_output_cannot_encode_are_escaped() -> None:
    program = "from launch.errors import run; run(lambda: print('caf\\xe9'))"
    done = run_python("-c", program, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "caf\\xe9\n"), done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_given_twice_is_an_error(command: str) -> None:
    """The second value does not silently replace the first."""
    words = COMMANDS[command]
    for option in [word for word in words if word.startswith("--") and "data" not in word]:
        more = ["8", "8"] if "=" not in option else []
        done = run_python(command, *words, option, *more)
        assert done.returncode == 2, done.stderr
        assert f"argument {option.partition('=')[0]}: given twice" in done.stderr
    if command == "train/main.py":
        done = run_python(command, *words)
        assert done.returncode == 1 and "a: no such recipe" in done.stderr


def test_an_option_is_counted_once_per_command_line_however_it_is_spelled(capsys: pytest.CaptureFixture[str]) -> None:
    """Options that append, and flags, can be repeated."""
    parser = Parser()
    parser.add_argument("--ckpt", default="none")
    parser.add_argument("--size", nargs=2)
    parser.add_argument("--data", action="append")
    parser.add_argument("--warp", action="store_true")
    parser.add_argument("rest", nargs="*")
    words = ["--ckpt", "a", "--data", "b", "--data", "c", "--warp", "--warp", "--size", "1", "2", "d", "e"]
    for _ in range(2):
        found = vars(parser.parse_args(words))
        assert found == {"ckpt": "a", "data": ["b", "c"], "warp": True, "size": ["1", "2"], "rest": ["d", "e"]}
    assert parser.parse_args([]).ckpt == "none"
    for again in (["--ck", "a"], ["--ckpt=none"], ["--size", "1", "2"]):
        with pytest.raises(SystemExit):
            parser.parse_args([*words, *again])
        assert "given twice" in capsys.readouterr().err


def test_help_states_each_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    parser.add_argument("--batch", type=int, default=4, help="pairs per step")
    parser.add_argument("--size", nargs=2, default=[8, 16], help="height and width")
    parser.add_argument("--share", default="5%", help="part of the pairs")
    parser.add_argument("--workers", type=int, help="threads (default: one per core)")
    parser.add_argument("--out", help="folder for the results")
    parser.add_argument("--warp", action="store_true", help="warp the second image")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    lines = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and lines.count("default") == 4 and "None" not in lines
    for text in ("pairs per step (default: 4)", "width (default: 8 16)", "(default: 5%)", "(default: one per core)"):
        assert text in lines


def test_an_option_s_former_name_still_works_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    parser.add_argument("--ema-decay", type=float)
    parser.add_argument("words", nargs="*")
    parser.rename_option("--average", "--ema-decay")
    for words in (["--average", "0.5"], ["--average=0.5"]):
        assert parser.parse_args(words).ema_decay == 0.5
        assert capsys.readouterr().err == "note: --average is now called --ema-decay\n"
    assert parser.parse_args(["--", "--average"]).words == ["--average"]
    assert "--average" not in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--average=0.5", "--ema-decay=0.5"])
    assert "argument --ema-decay: given twice" in capsys.readouterr().err


def test_usage_shows_the_command_as_typed() -> None:
    """Python's file for a command, else the script that started it."""
    assert run_python("launch/doctor.py", "--help").stdout.startswith("usage: python launch/doctor.py ")
    assert run_python("launch/doctor.py", "-h", PWCNET_COMMAND="launch/doctor.sh").stdout.startswith(
        "usage: launch/doctor.sh "
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_outside_the_environment_says_how_to_get_one(command: str) -> None:
    done = run_python("-S", "-E", command, *COMMANDS[command])
    assert done.returncode == 1 and done.stderr.startswith("error: ") and not done.stdout
    assert done.stderr.count("\n") == 1 and "lacks the package " in done.stderr, done.stderr
    assert ".venv/bin/activate" in done.stderr


SCRIPTS = sorted(path.name for path in (tiny.ROOT / "launch").glob("*.sh") if path.name != "env.sh")


@pytest.mark.parametrize(
    "script,words",
    [
        (script, words)
        for script in SCRIPTS
        for words in (["--help"], ["steps=1", "-h"])
        if (script, words[0]) != ("retry.sh", "steps=1")
    ],
)
def test_help_of_a_script_sets_nothing_up(script: str, words: list[str], tmp_path: pathlib.Path) -> None:
    """Whether the environment exists or not, no file is created and nothing is installed."""
    checkout = tmp_path / "checkout"
    shutil.copytree(tiny.ROOT / "launch", checkout / "launch")
    before = sorted(checkout.rglob("*"))
    variables = {
        name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV" and not name.startswith("SLURM")
    }
    done = subprocess.run(
        [checkout / "launch" / script, *words],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout[0].isupper() and "set -e" not in done.stdout and "SBATCH" not in done.stdout
    after = [path for path in sorted(checkout.rglob("*")) if "__pycache__" not in path.parts]
    assert after == [path for path in before if "__pycache__" not in path.parts]
    assert [path.name for path in tmp_path.iterdir()] == ["checkout"]


def test_help_of_a_script_lists_the_command_s_options() -> None:
    """If the environment has what the command imports; usage shows the script."""
    done = subprocess.run(
        [tiny.ROOT / "launch" / "train.sh", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix},
    )
    assert done.returncode == 0 and "mpirun -n RANKS" in done.stdout and "--accumulation-steps" in done.stdout
    assert f"usage: {tiny.ROOT}/launch/train.sh " in done.stdout


@pytest.mark.parametrize(
    "variables,words",
    [
        ({}, "not in a Slurm batch job; submit it: sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not the checkout; submit from there"),
        ({"SLURM_SUBMIT_DIR": str(tiny.ROOT)}, "not in a Slurm batch job"),
    ],
)
def test_the_slurm_script_outside_slurm_says_how_to_submit_it(
    variables: dict[str, str], words: str, tmp_path: pathlib.Path
) -> None:
    """Wherever the script is: sbatch runs a copy of it elsewhere."""
    script = tiny.ROOT / "launch" / "slurm.sh"
    if variables:
        script = shutil.copy(script, tmp_path)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        ["bash", script, "--config", "chairs"],
        cwd=tmp_path,
        env={**kept, **variables},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("device", [["--device", "cpu"], ["--device=cpu"]])
def test_the_slurm_script_takes_the_device_that_is_given(device: list[str], tmp_path: pathlib.Path) -> None:
    """It adds --device gpu only if none is given: a second --device would be refused."""
    variables = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "VIRTUAL_ENV": sys.prefix}
    words = ["--config", "example", "--data", "none", "--out", str(tmp_path), *device, "--no-such-option"]
    done = subprocess.run(
        ["bash", tiny.ROOT / "launch" / "slurm.sh", *words],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "unrecognized arguments: --no-such-option" in done.stderr, done.stderr
    assert "launch/train.sh: error" in done.stderr and "its command line is invalid" in done.stderr


def test_an_unknown_extra_is_refused_with_the_known_ones() -> None:
    assert "tensorboard" in run_python("launch/requirements.py", "--help").stdout
    done = run_python("launch/requirements.py", "test", "nope")
    assert done.returncode == 2 and "no extra nope; expected any of: test" in done.stderr


def test_ctrl_c_is_one_line_and_waits_for_mindspore_s_import(capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupted import would crash Python."""

    def main() -> None:
        with session.interrupted_later():
            signal.raise_signal(signal.SIGINT)
            print("imported")
        raise AssertionError

    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == 130 and tuple(capsys.readouterr()) == ("imported\n", "\ninterrupted\n")


def test_recipe_keys_before_options_are_sent_to_the_end() -> None:
    first, *rest = COMMANDS["train/main.py"]
    done = run_python("train/main.py", first, "batch=2", *rest, "steps=0")
    assert done.returncode == 2 and "steps=0; all recipe keys go last, after the options" in done.stderr, done.stderr
    done = run_python("train/main.py", *COMMANDS["train/main.py"], "--lr=1")
    assert done.returncode == 2 and done.stderr.endswith("unrecognized arguments: --lr=1\n"), done.stderr
