"""Training runs for the tests: how they are started, their data, and what they left."""

import os
import pathlib
import time

import hosts
import pytest
import tiny

from prep import synthesize

RECIPE = {
    "crop": "[64,64]",
    "batch": 4,
    "steps": 4,
    "dense": "false",
    "start_from_coarser_flow": "false",
    "log_every": 1,
    "validate_every": 2,
    "checkpoint_every": 1,
    "validation_batch": 2,
}
MIXED = {"mixture": "[3,1]", "ema_decay": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    """A converted set of 14 pairs of 64x128, 3 of them for validation."""
    return make_set(tmp_path_factory.mktemp("data"), 64, 128, [2, 5, 9])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory):
    """A second set, of other sizes, 2 of its 14 pairs for validation."""
    return make_set(tmp_path_factory.mktemp("other"), 72, 96, [3, 4])


def make_set(folder, height, width, validation):
    """Synthetic pairs, converted to a set that is named as its folder."""
    synthesize.write_set(str(folder / "raw"), 14, height, width, 1, 2)
    return tiny.convert(
        "flyingchairs",
        folder / "raw",
        folder / f"set-{height}",
        "--shards",
        "2",
        "--split-file",
        tiny.split_file(folder / "val.txt", validation),
    )


@pytest.fixture(scope="module")
def whole(data, other, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a run that two ranks made without an interruption, on a mixture of both sets."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    status, _, err = finish(train([data, other], out, ranks=2, **MIXED))
    assert status == 0, err
    return out


def finish(process):
    """(exit status, stdout, stderr) of a started command; it must end within five minutes."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def train(data, out, ranks=1, hosts=None, program=("launch/train.sh",), **options):
    """Start a training run through launch/train.sh on one converted set or several; in a network
    (`hosts.Hosts`) with a rank on each host."""
    command = [*program, *words(data, out, **options)]
    if hosts:  # which have this machine's cores, of which two ranks on one host have a half each
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        return hosts.mpirun("env", f"OMP_NUM_THREADS={threads}", *command, hostfile=True, cwd=tiny.ROOT)
    return tiny.mpirun(ranks, *command)


def words(data, out, recipe="example", init=None, accumulation_steps=1, validate=(), **overrides):
    """The command line of a training run, without the program."""
    pairs = [f"{key}={value}" for key, value in {**RECIPE, **overrides}.items()]
    sets = [word for folder in (data if isinstance(data, list) else [data]) for word in ("--data", folder)]
    sets += [word for folder in validate for word in ("--validate", folder)]
    begin = ["--init", init] if init else []
    return ["--config", recipe, *sets, "--out", out, *begin, "--accumulation-steps", accumulation_steps, *pairs]


@pytest.fixture
def two_hosts(tmp_path: pathlib.Path):
    """Two hosts, each with its own disk; None where this machine does not let us make them."""
    if not hosts.are_possible():
        yield None
        return
    with hosts.Hosts(tmp_path, 2) as two:
        yield two


def read_events(run):
    """TensorBoard's reader of a run's event files."""
    import mindspore.train.summary_pb2  # noqa: F401 - first, as it chooses the protobuf for both
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def read_curves(run, tag):
    """A curve as a dict of step to value; both kinds of file hold it, and no step twice."""
    from mindspore.train.summary_pb2 import Event

    events = read_events(run)
    points = [(point.step, point.value) for point in events.Scalars(tag)]

    recorded = []
    for path in (run / "summary").glob("events.out.*"):
        data, position = path.read_bytes(), 0
        while position < len(data):  # length, its checksum, the message, its checksum
            length = int.from_bytes(data[position : position + 8], "little")
            event = Event.FromString(data[position + 12 : position + 12 + length])
            recorded += [
                (event.step, value.scalar_value)
                for value in event.summary.value
                if value.tag.startswith(f"{tag}/") or value.tag == tag
            ]
            position += 16 + length
    assert sorted(points) == sorted(recorded)
    assert len(dict(points)) == len(points)
    return dict(points)


def last_step(run):
    """The step of a run's newest checkpoint, 0 without one."""
    return max([int(path.stem[-8:]) for path in (run / "checkpoints").glob("step-*.ckpt")], default=0)


def wait_for_step(job, run, step) -> None:
    """Wait until a started run has a checkpoint of a step or a later one."""
    deadline = time.monotonic() + 240
    while last_step(run) < step:
        assert job.poll() is None and time.monotonic() < deadline, finish(job)
        time.sleep(0.05)


def check_refused(process, *words) -> None:
    """The command ends with a status and one line that holds the words."""
    status, out, err = finish(process)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]
