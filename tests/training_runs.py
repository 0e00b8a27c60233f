"""Training runs for the tests: how they are started, their data, and what they left."""

import importlib
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import hosts
import pytest
import tiny

from prep import synthesize

Job: TypeAlias = "subprocess.Popen[str]"

RECIPE = {
    "crop": "[64,64]",
    "batch": 4,
    "steps": 4,
    "dense": "false",
    "start_from_coarser_flow": "false",
    "log_every": 1,
    "validate_every": 2,
    "checkpoint_every": 2,
    "validation_batch": 1,  # each other batch size, such as that of a last batch, would be another graph to compile
}
MIXED: dict[str, Any] = {"mixture": "[3,1]", "ema_decay": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A converted dataset of 14 pairs of 64x128, 3 of them for validation."""
    return make_set(tmp_path_factory.mktemp("data"), 64, 128, [2, 5, 9])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A second dataset, of another size (64x96, for which the network has the same graph), 2 of its 14 pairs for
    validation."""
    return make_set(tmp_path_factory.mktemp("other"), 64, 96, [3, 4])


def make_set(folder: pathlib.Path, height: int, width: int, validation: list[int]) -> pathlib.Path:
    """Synthetic pairs, converted to a dataset with the name of its folder."""
    synthesize.write_dataset(folder / "raw", synthesize.SyntheticSpec(14, height, width, seed=1), workers=2)
    return tiny.convert(
        "flyingchairs",
        folder / "raw",
        folder / f"set-{width}",
        "--shards",
        "2",
        "--split-file",
        tiny.split_file(folder / "val.txt", validation),
    )


@pytest.fixture(scope="module")
def whole(data: pathlib.Path, other: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of an uninterrupted run of two ranks on a mixture of both datasets.

    The script in the README of recipes, but for its data, run folder and recipe, is what they run; the file `printed`
    beside the folder has its output.
    """
    out = tmp_path_factory.mktemp("runs") / "whole"
    code = (tiny.ROOT / "train" / "recipes" / "README.md").read_text()
    code = code.partition("```python\n")[2].partition("```")[0]
    for documented, used in (
        ('["steps=100"]', repr(overrides(**MIXED))),
        ('["data/example-mindrecord"]', repr([str(data), str(other)])),
        ('"runs/script"', repr(str(out))),
    ):
        assert documented in code
        code = code.replace(documented, used)
    script = out.with_name("script.py")
    script.write_text(code)
    status, printed, err = finish(tiny.mpirun(2, "env", f"PYTHONPATH={tiny.ROOT}", sys.executable, script))
    assert status == 0, err
    out.with_name("printed").write_text(printed)
    return out


def finish(process: Job) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a started command; it must end within five minutes."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def train(
    data: pathlib.Path | list[pathlib.Path],
    out: pathlib.Path,
    ranks: int = 1,
    network: hosts.Hosts | None = None,
    program: Sequence[str | pathlib.Path] = ("launch/train.sh",),
    **options: Any,
) -> Job:
    """Start a training run on one converted dataset or several; in a network, with a rank on each host."""
    command = [*program, *words(data, out, **options)]
    if network:
        settings = [f"{name}={value}" for name, value in tiny.ENVIRONMENT.items()]
        return network.mpirun("env", *settings, *command, hostfile=True, cwd=tiny.ROOT)
    return tiny.mpirun(ranks, *command)


def words(
    data: pathlib.Path | list[pathlib.Path],
    out: pathlib.Path,
    recipe: str | pathlib.Path = "example",
    init: pathlib.Path | None = None,
    validate: Sequence[pathlib.Path] = (),
    **keys: Any,
) -> list[Any]:
    """The command line of a training run, without the program."""
    accumulation_steps = keys.pop("accumulation_steps", 1)
    sets = [word for folder in (data if isinstance(data, list) else [data]) for word in ("--data", folder)]
    sets += [word for folder in validate for word in ("--validate", folder)]
    begin = ["--init", init] if init else []
    begin += ["--accumulation-steps", accumulation_steps]
    return ["--config", recipe, *sets, "--out", out, *begin, *overrides(**keys)]


def overrides(**keys: Any) -> list[str]:
    """RECIPE with some other keys, as `key=value`."""
    return [f"{key}={value}" for key, value in {**RECIPE, **keys}.items()]


@pytest.fixture
def two_hosts(tmp_path: pathlib.Path) -> Iterator[hosts.Hosts | None]:
    """Two hosts, each with its own disk; None if this machine does not allow them."""
    if not hosts.are_possible():
        yield None
        return
    with hosts.Hosts(tmp_path, 2) as two:
        yield two


@pytest.fixture(params=tiny.LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> str:
    """The name of each launcher beside this environment's mpirun; skips the test if it is not installed."""
    if not tiny.has_launcher(request.param):
        pytest.skip(f"no {request.param} here beside this environment's mpirun")
    return request.param


def read_events(run: pathlib.Path) -> Any:
    """TensorBoard's reader of a run's event files."""
    importlib.import_module("mindspore.train.summary_pb2")  # first, because it selects the protobuf for both
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def read_curves(run: pathlib.Path, tag: str) -> dict[int, float]:
    """A curve by step; both kinds of file must hold it, with no step twice."""
    event_type = importlib.import_module("mindspore.train.summary_pb2").Event

    events = read_events(run)
    points = [(point.step, point.value) for point in events.Scalars(tag)]

    recorded = []
    for path in (run / "summary").glob("events.out.*"):
        data, position = path.read_bytes(), 0
        while position < len(data):  # length, its checksum, the message, its checksum
            length = int.from_bytes(data[position : position + 8], "little")
            event = event_type.FromString(data[position + 12 : position + 12 + length])
            recorded += [
                (event.step, value.scalar_value)
                for value in event.summary.value
                if value.tag.startswith(f"{tag}/") or value.tag == tag
            ]
            position += 16 + length
    assert sorted(points) == sorted(recorded)
    assert len(dict(points)) == len(points)
    return dict(points)


def last_step(run: pathlib.Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    return max([int(path.stem[-8:]) for path in (run / "checkpoints").glob("step-????????.ckpt")], default=0)


def wait_for_step(job: Job, run: pathlib.Path, step: int) -> None:
    """Wait until a running job has written the checkpoint of a step or a later one."""
    deadline = time.monotonic() + 240
    while last_step(run) < step:
        assert job.poll() is None and time.monotonic() < deadline, finish(job)
        time.sleep(0.05)


def check_refused(process: Job, *words: str) -> None:
    """The command ends with status 1 and one line that contains the words."""
    status, _, err = finish(process)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]
