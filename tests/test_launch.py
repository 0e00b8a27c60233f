"""Starting: what an environment lacks, what the command lines of scripts and commands have in common."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tiny

from launch import requirements
from launch.arguments import Parser


def test_this_environment_has_what_setup_cfg_asks_for() -> None:
    """Comments in setup.cfg are no requirements, and versions count."""
    wanted = requirements.wanted(["test"])
    assert "mindspore == 2.8.0" in wanted and not any(line.startswith("#") for line in wanted)
    assert requirements.missing(wanted) == []
    assert requirements.missing(["numpy >= 2", "no-such-package-anywhere"]) == [
        "numpy >= 2",
        "no-such-package-anywhere",
    ]


def test_an_empty_environment_lacks_everything(tmp_path: pathlib.Path) -> None:
    """The check itself runs with nothing but the standard library."""
    done = subprocess.run(
        [sys.executable, "-S", "-E", tiny.ROOT / "launch" / "requirements.py"], capture_output=True, text=True
    )
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
"""Commands of users, with options that may each be given once, beside --data of train/main.py."""


def python(*words, **options):
    """Run Python with these arguments, at this project's root."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=tiny.ROOT,
        check=False,
        timeout=120,
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_given_twice(command) -> None:
    """The last one does not win in silence."""
    words = COMMANDS[command]
    for option in [word for word in words if word.startswith("--") and "data" not in word]:
        more = ["8", "8"] if "=" not in option else []
        done = python(command, *words, option, *more)
        assert done.returncode == 2, done.stderr
        assert f"argument {option.partition('=')[0]}: given twice" in done.stderr
    if command == "train/main.py":
        done = python(command, *words)
        assert done.returncode == 1 and "a: no such recipe" in done.stderr


def test_values_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """Counted for each command line, by option and not by spelling; lists and flags as ever."""
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


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_outside_the_environment(command) -> None:
    """It says in one line which environment to activate or how to make one."""
    done = python("-S", "-E", command, *COMMANDS[command])
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
def test_help_of_a_script(script, words, tmp_path: pathlib.Path) -> None:
    """Nothing is made, installed or run, be the environment there or not."""
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
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout[0].isupper() and "set -e" not in done.stdout and "SBATCH" not in done.stdout
    after = [path for path in sorted(checkout.rglob("*")) if "__pycache__" not in path.parts]
    assert after == [path for path in before if "__pycache__" not in path.parts]
    assert [path.name for path in tmp_path.iterdir()] == ["checkout"]


def test_help_has_the_command_s_options() -> None:
    """Where the environment has what the command imports."""
    done = subprocess.run(
        [tiny.ROOT / "launch" / "train.sh", "--help"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix},
    )
    assert done.returncode == 0 and "mpirun -n RANKS" in done.stdout and "--accumulation-steps" in done.stdout


@pytest.mark.parametrize(
    "variables,words",
    [
        ({}, "no batch job of Slurm; submit it: sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not the checkout; submit from there"),
        ({"SLURM_SUBMIT_DIR": str(tiny.ROOT)}, "no batch job of Slurm"),
    ],
)
def test_the_slurm_script_outside_slurm(variables, words, tmp_path: pathlib.Path) -> None:
    """Wherever it is; sbatch runs a copy of it elsewhere."""
    script = tiny.ROOT / "launch" / "slurm.sh"
    if variables:
        script = shutil.copy(script, tmp_path)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        ["bash", script, "--config", "chairs"],
        cwd=tmp_path,
        env={**kept, **variables},
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_line_of_requirements() -> None:
    assert "tensorboard" in python("launch/requirements.py", "--help").stdout
    done = python("launch/requirements.py", "test", "nope")
    assert done.returncode == 2 and "no extra nope; expected some of: test" in done.stderr
