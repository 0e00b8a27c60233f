"""Training as a user starts it: ranks under mpirun, interruption, resumption, curves, evaluation."""

import functools
import json
import os
import shutil
import signal
import sys
import time

import hosts
import numpy as np
import psutil
import pytest
import tiny

from prep import synthesize

RECIPE = {"crop": "[64,64]", "batch": 4, "steps": 4, "dense": "false",
          "start_from_coarser_flow": "false", "log_every": 1,
          "validate_every": 2, "checkpoint_every": 1, "validation_batch": 2}
MIXED = {"mixture": "[3,1]", "average": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A converted set of 14 pairs of 64x128, 3 of them for validation."""
    return make_set(tmp_path_factory.mktemp("data"), 64, 128, [2, 5, 9])


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second set, of other sizes, 2 of its 14 pairs for validation."""
    return make_set(tmp_path_factory.mktemp("other"), 72, 96, [3, 4])


def make_set(folder, height, width, validation):
    """Synthetic pairs, converted to a set that is named as its folder."""
    synthesize.write_set(str(folder / "raw"), 14, height, width, 1, 2)
    return tiny.convert("flyingchairs", folder / "raw", folder / f"set-{height}", "--shards", "2",
                        "--split-file", tiny.split_file(folder / "val.txt", validation))


@pytest.fixture(scope="module")
def whole(data, other, tmp_path_factory):
    """The folder of a run that two ranks made without an interruption, on a mixture of both sets."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    status, _, err = finish(train([data, other], out, ranks=2, **MIXED))
    assert status == 0, err
    return out


def finish(process):
    """(exit status, stdout, stderr) of a started command; it must end within five minutes."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def train(data, out, ranks=1, network=None, program=("launch/train.sh",), **options):
    """Start a training run through launch/train.sh on one converted set or several; in a network
    (`hosts.Hosts`) with a rank on each host."""
    command = [*program, *words(data, out, **options)]
    if network:  # which have this machine's cores, of which two ranks on one host have a half each
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        return network.mpirun("env", f"OMP_NUM_THREADS={threads}", *command, hostfile=True, cwd=tiny.ROOT)
    return tiny.mpirun(ranks, *command)


def words(data, out, recipe="example", init=None, accumulate=1, validate=(), **overrides):
    """The command line of a training run, without the program."""
    pairs = [f"{key}={value}" for key, value in {**RECIPE, **overrides}.items()]
    sets = [word for folder in (data if isinstance(data, list) else [data])
            for word in ("--data", folder)]
    sets += [word for folder in validate for word in ("--validate", folder)]
    begin = ["--init", init] if init else []
    return ["--config", recipe, *sets, "--out", out, *begin, "--accumulate", accumulate, *pairs]


@pytest.mark.slow
def test_two_ranks_train_as_one_with_the_doubled_batch(data, tmp_path):
    """Equal weights on both ranks after several steps; the gradient is that of one rank with the
    whole batch, at once or in parts."""
    program = [sys.executable, tiny.ROOT / "tests" / "two_ranks.py"]
    for ranks, parts in ((2, 1), (1, 1), (1, 4)):
        status, _, err = finish(tiny.mpirun(ranks, *program, data, tmp_path, 2, parts))
        assert status == 0, err
    first, second, alone, slowly = (
        dict(np.load(tmp_path / f"rank-{name}.npz"))
        for name in ("0-of-2-1", "1-of-2-1", "0-of-1-1", "0-of-1-4"))
    for name, weights in first.items():
        np.testing.assert_array_equal(weights, second[name], err_msg=name)
    # Not the weights: Adam divides gradients that are rounding errors by themselves.
    for other in (alone, slowly):
        np.testing.assert_allclose(first["gradient"], other["gradient"], rtol=1e-3,
                                   atol=1e-4 * np.abs(first["gradient"]).max())


@pytest.fixture
def network(tmp_path):
    """Two hosts, each with its own disk; None where this machine does not let us make them."""
    if not hosts.are_possible():
        yield None
        return
    with hosts.Hosts(tmp_path, 2) as two:
        yield two


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(data, other, whole, network, tmp_path):
    """kill -9 on a rank ends the job; the same command goes on and ends as if nothing had been, on two
    hosts that share nothing with the weights of two ranks on one."""
    disks = [tmp_path / f"host{number}" for number in network.numbers] if network else [tmp_path]
    for disk in disks:
        for folder in (data, other):
            shutil.copytree(folder, disk / folder.name)
    broken, seen = disks[0] / "broken", tmp_path / "local" if network else tmp_path
    start = functools.partial(train, [seen / data.name, seen / other.name], seen / "broken", ranks=2,
                              network=network, **MIXED)
    job = start()
    deadline = time.monotonic() + 240
    while not (broken / "checkpoints" / "step-00000002.ckpt").exists():
        assert job.poll() is None and time.monotonic() < deadline, finish(job)
        time.sleep(0.02)
    processes = network.processes() if network else psutil.Process(job.pid).children(recursive=True)
    second = [process for process in processes
              if process.environ().get("OMPI_COMM_WORLD_RANK") == "1"]
    keeper, = (process for process in second if process.parent() not in second)
    keeper.children()[0].kill()
    status, _, err = finish(job)
    assert status == 137 and "error: rank 1 on " + ("host2" if network else "") in err, err
    assert not network or not network.processes()
    assert not (broken / "result.json").exists()
    # The newest checkpoint is damaged, too: the run goes on from the one before.
    newest = sorted((broken / "checkpoints").glob("step-*.ckpt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    (newest.parent / "writing-step-00000009.tmp").touch()  # killed while it wrote

    status, out, err = finish(start())
    assert status == 0 and f"{int(newest.stem[-8:]) - 1}, with 2 rank(s)" in err, err
    assert f"warning: {seen / newest.relative_to(disks[0])}: damaged" in out
    for disk in disks[1:]:
        assert [path.name for path in (disk / "broken").iterdir()] == ["logs"]
    assert not list(newest.parent.glob("writing-*"))
    from model import weights

    first, second = (weights.read(run / "checkpoints" / "step-00000004.ckpt")
                     for run in (whole, broken))
    assert first.keys() == second.keys() and "average_offset" in first
    for name in first.keys() - {"model", "best"}:
        np.testing.assert_array_equal(first[name].asnumpy(), second[name].asnumpy(), err_msg=name)
    assert first["best"] == second["best"]
    assert read_curves(broken, "train/loss") == read_curves(whole, "train/loss")
    assert read_curves(broken, "validation/epe") == read_curves(whole, "validation/epe")


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks(data, other, whole, tmp_path):
    """One rank takes up what two began, with the same pairs in each step, and says what changed."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for number in (3, 4):
        (run / "checkpoints" / f"step-{number:08}.ckpt").unlink()
    status, _, err = finish(train([data, other], run, accumulate=2, **MIXED))
    assert status == 0 and "after step 2" in err and "ranks 1 (was 2)" in err, err
    assert [start["ranks"] for start in json.loads((run / "starts.json").read_text())] == [2, 1]
    losses, before = read_curves(run, "train/loss"), read_curves(whole, "train/loss")
    assert losses.keys() == before.keys()
    assert losses == pytest.approx(before, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", tiny.LAUNCHERS)
def test_a_run_goes_on_under_another_launcher(launcher, data, other, whole, tmp_path):
    """Two ranks that Debian's mpirun, srun or msrun starts take up what mpirun's began, to the same
    losses."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for number in (3, 4):
        (run / "checkpoints" / f"step-{number:08}.ckpt").unlink()
    status, _, err = finish(tiny.launch(launcher, tmp_path, "train/main.py",
                                        *words([data, other], run, **MIXED)))
    assert status == 0 and "after step 2, with 2 rank(s)" in err, err
    assert read_curves(run, "train/loss") == read_curves(whole, "train/loss")
    assert read_curves(run, "validation/epe") == read_curves(whole, "validation/epe")


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
            length = int.from_bytes(data[position:position + 8], "little")
            event = Event.FromString(data[position + 12:position + 12 + length])
            recorded += [(event.step, value.scalar_value) for value in event.summary.value
                         if value.tag.startswith(f"{tag}/") or value.tag == tag]
            position += 16 + length
    assert sorted(points) == sorted(recorded)
    assert len(dict(points)) == len(points)
    return dict(points)


@pytest.mark.slow
def test_what_a_run_leaves(whole, data, tmp_path):
    """Curves of each kind, pictures, figures, what it was made with; the evaluation agrees."""
    events = read_events(whole)
    tags = {"train/loss", "train/level6", "train/level2", "train/learning_rate", "train/loss_scale",
            "train/gradient_norm", "speed/pairs_per_second", "data_wait/rank-1", "memory_gb/rank-0",
            "validation/epe", "validation/epe_average", "validation/set-72/epe"}
    assert tags <= set(events.Tags()["scalars"])
    for tag in tags:
        steps = [2, 4] if tag.startswith("validation") else [1, 2, 3, 4]
        assert list(read_curves(whole, tag)) == steps
    assert [image.step for image in events.Images("validation/flow")] == [2, 4]
    assert "mixture" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    check_result(whole)
    check_evaluation(data, whole, tmp_path / "evaluation")


def check_result(run):
    """The final figures are those of the last validation, and say what they were made with."""
    result = json.loads((run / "result.json").read_text())
    assert result["pairs"] == 3 and result["ranks"] == 2
    assert result["step"] == 4 and 0 < result["epe"] < 1000
    assert 0 < result["average_epe"] < 1000 and result["sets"]["set-72"]["pairs"] == 2
    assert result["best_epe"] == min(entry[key] for entry in result["validations"]
                                     for key in ("epe", "average_epe"))
    assert result["made_with"]["mindspore"] and len(result["made_with"]["data"]) == 2


def check_evaluation(data, run, out):
    """train/evaluate.py sees the EPE that the two ranks saw, and leaves table, JSON and picture."""
    ckpt = run / "checkpoints" / "step-00000004.ckpt"
    status, text, err = finish(tiny.mpirun(1, "train/evaluate.py", "--data", data, "--split", "val",
                                           "--ckpt", ckpt, "--out", out))
    assert status == 0, err
    figures = json.loads((out / "evaluation.json").read_text())
    seen = json.loads((run / "result.json").read_text())
    assert figures["epe"] == pytest.approx(seen["epe"], rel=1e-4)
    assert figures["zero_epe"] == pytest.approx(seen["zero_epe"], rel=1e-6)
    assert f"{figures['epe']:.3f}" in text and "zero flow" in text
    assert [pair["pair"] for pair in figures["by_pair"]] == ["00003", "00006", "00010"]
    assert (out / "flow.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("ranks,number", [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_stopped_run_keeps_its_last_step(data, tmp_path, ranks, number):
    """A signal ends a run after the step that it is in, which the same command goes on from; mpirun
    gives SIGUSR1 to all ranks."""
    run = tmp_path / "run"
    job = train(data, run, ranks, steps=200, checkpoint_every=200, validate_every=200)
    while not list(run.glob("tensorboard/*")):
        assert job.poll() is None, finish(job)
        time.sleep(0.1)
    time.sleep(1)
    job.send_signal(number)
    status, _, err = finish(job)
    kept = sorted(path.stem for path in (run / "checkpoints").glob("*.ckpt"))
    assert status == 130 and "Traceback" not in err and "error: " not in err, err
    assert all(name.startswith("step-") for name in kept), "none half written, no validation"
    assert f"stopped after step {int(kept[-1][-8:])}," in err


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_diverging_run_says_with_which_pairs(data, tmp_path, precision):
    """A loss that is no number ends the run, in float16 once no loss scale helps; the checkpoints before
    it stay."""
    job = train(data, tmp_path / "run", learning_rate=1e30, steps=30, precision=precision,
                validate_every=30)
    check_refused(job, "no finite number", "with the pairs 000", "learning_rate")


@pytest.mark.slow
def test_a_run_begins_with_given_weights(data, tmp_path):
    """--init takes the weights of another file on every rank, and no file that does not fit."""
    from model import weights
    from model.pwcnet import PWCNet

    options = {"dense": False, "normalize_features": True}
    network = PWCNet(**options)
    weights.save_network(tmp_path / "first.ckpt", network, options)
    status, _, err = finish(train(data, tmp_path / "run", 2, init=tmp_path / "first.ckpt", steps=1,
                                  learning_rate=1e-12))
    assert status == 0, err
    kept = weights.read(tmp_path / "run" / "checkpoints" / "best.ckpt")
    for parameter in network.get_parameters():
        np.testing.assert_allclose(kept[parameter.name].asnumpy(), parameter.asnumpy(), atol=1e-7)

    check_refused(train(data, tmp_path / "other", init=tmp_path / "first.ckpt", variant="nvlabs"),
                  "first.ckpt", "does not fit")
    check_refused(train(data, tmp_path / "third", init=tmp_path / "none.ckpt"), "none.ckpt")


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    """Converted sets of pairs of five widths: (six for training and four for validation, all ten for
    validation)."""
    folder = tmp_path_factory.mktemp("kitti")
    release = tiny.kitti(folder / "release", 10, height=72, width=72)
    return [tiny.convert("kitti2015", release, folder / name, "--shards", "1", "--split-file",
                         tiny.split_file(folder / f"{name}.txt", positions))
            for name, positions in (("mixed", [0, 3, 5, 8]), ("unseen", range(10)))]


@pytest.mark.slow
def test_pairs_of_different_sizes(kitti, tmp_path):
    """Training on them, validating on them and on a set that has nothing else, and the evaluation: each
    with two ranks, each with a picture of pairs that both had."""
    mixed, unseen = kitti
    run = tmp_path / "run"
    status, _, err = finish(train(mixed, run, 2, validate=[unseen], batch=2, steps=2))
    assert status == 0 and "warning: " not in err, err
    result = json.loads((run / "result.json").read_text())
    assert result["pairs"] == 10 and result["sets"]["mixed"]["pairs"] == 4
    assert result["best_epe"] == result["epe"] and result["epe"] != result["sets"]["mixed"]["epe"]
    events = read_events(run)
    assert {"validation/epe", "validation/mixed/epe"} <= set(events.Tags()["scalars"])
    drawn, = events.Images("validation/flow")
    assert drawn.height > 4 * 72 and drawn.width >= 4 * (72 + 3 * 8), "four pairs, as wide as the fourth"

    best = run / "checkpoints" / "best.ckpt"
    status, text, err = finish(tiny.mpirun(2, sys.executable, "train/evaluate.py", "--data", unseen,
                                           "--ckpt", best, "--out", tmp_path))
    assert status == 0, err
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["epe"] == pytest.approx(result["epe"], rel=1e-4)
    assert "72x72, 72x80" in text and (tmp_path / "flow.png").exists()


def test_what_can_be_validated_on(data, kitti, tmp_path):
    """A set without training pairs is refused as --data, and one without validation pairs as the only
    one to validate on."""
    mixed, unseen = kitti
    check_refused(train(unseen, tmp_path / "run"), "no training pairs", "--validate")
    everything = tiny.convert("kitti2015", mixed.parent / "release", tmp_path / "everything", "--split-file",
                              tiny.split_file(tmp_path / "none.txt", []))
    check_refused(train(everything, tmp_path / "run", batch=2), "split val has no pair", "--validate")
    check_refused(train(data, tmp_path / "run", validate=[everything]), "everything: split val has no pair")
    twin = shutil.copytree(unseen, tmp_path / "other" / "mixed")
    check_refused(train(mixed, tmp_path / "run", validate=[twin], batch=2), "several folders mixed")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fine_tuning_takes_the_options_of_the_weights(data, tmp_path):
    """A run from weights with normalised features has their error before its first step (one that is too
    small to change them), keeps the option, and so can be extended without the file."""
    from model import weights
    from model.pwcnet import PWCNet

    options = {"dense": False, "normalize_features": True}
    first, run, recipe = tmp_path / "first.ckpt", tmp_path / "run", tmp_path / "plain.yaml"
    weights.save_network(first, PWCNet(**options), options)
    recipe.write_text("crop: [64, 64]\nlearning_rate: 1.0e-30\n")
    known = {"recipe": recipe, "schedule": "milestones", "clip_norm": 1.0}
    check_refused(train(data, run, init=first, normalize_features="false", **known),
                  "normalize_features is false", f"{first} is of a network with normalize_features true")
    status, _, err = finish(train(data, run, 2, init=first, steps=1, **known))
    assert status == 0, err
    status, _, err = finish(tiny.mpirun(1, "train/evaluate.py", "--data", data, "--ckpt", first,
                                        "--batch", "2", "--out", tmp_path))
    assert status == 0, err
    result = json.loads((run / "result.json").read_text())
    assert result["epe"] == json.loads((tmp_path / "evaluation.json").read_text())["epe"]
    assert "normalize_features: true" in (run / "recipe.yaml").read_text()

    first.unlink()
    changed = {"steps": 3, "log_every": 3, "validate_every": 1, "validation_batch": 1, "checkpoint_every": 2}
    status, _, err = finish(train(data, run, init=first, **known, **changed))
    assert status == 0 and "going on after step 1" in err and "steps 3 (was 1)" in err, err
    longer = json.loads((run / "result.json").read_text())
    assert [entry["step"] for entry in longer["validations"]] == [2, 3]
    best = weights.read(run / "checkpoints" / "best.ckpt")
    assert float(best["best"]) == longer["best_epe"] <= result["best_epe"]
    check_refused(train(data, run, **known, steps=2), "has done 3 steps", "steps=3")


def test_what_may_not_change(data, tmp_path):
    """The key that differs from the run's recipe is named with both values; as is a run folder of a newer
    version."""
    from train import recipe as recipes

    run = tmp_path / "run"
    run.mkdir()
    settings = [f"{key}={value}" for key, value in RECIPE.items()]
    (run / "recipe.yaml").write_text(recipes.load("example", settings).to_yaml())
    check_refused(train(data, run, learning_rate=0.5), "another recipe", "learning_rate is 0.001, here 0.5")
    check_refused(train(data, run, crop="[64,128]"), "crop is [64, 64], here [64, 128]")
    check_refused(train(data, run, dense="true"), "dense is false, here true")
    (run / "starts.json").write_text(json.dumps([{"after_step": 0, "format": 99}]))
    check_refused(train(data, run), str(run), "format 99", "a newer one")


def last_step(run):
    """The step of a run's newest checkpoint, 0 without one."""
    return max([int(path.stem[-8:]) for path in (run / "checkpoints").glob("step-*.ckpt")], default=0)


def wait_for_step(job, run, step):
    """Wait until a started run has a checkpoint of a step or a later one."""
    deadline = time.monotonic() + 240
    while last_step(run) < step:
        assert job.poll() is None and time.monotonic() < deadline, finish(job)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_is_disturbed(data, tmp_path):
    """Another run in the same folder is refused; without SummaryRecord's writer, killed, it goes on; killed
    itself, it leaves a lock that holds nobody up, and an account of the steps that were lost."""
    run = tmp_path / "run"
    often = {"checkpoint_every": 1, "validate_every": 1000}
    job = train(data, run, steps=1000, **often)
    wait_for_step(job, run, 2)
    check_refused(train(data, run, 2, steps=1000, **often), str(run), f"process {job.pid}", "training run")
    writer, = psutil.Process(job.pid).children()
    writer.kill()
    wait_for_step(job, run, last_step(run) + 3)
    job.kill()
    status, _, err = finish(job)
    assert status == -signal.SIGKILL
    assert err.count("warning: ") == 1 and f"process {writer.pid}, which writes SummaryRecord" in err, err

    done = json.loads((run / "goodput.json").read_text())[0]["step"]
    for step in range(done - 1, last_step(run) + 1):  # as if the last minute had not been kept
        (run / "checkpoints" / f"step-{step:08}.ckpt").unlink(missing_ok=True)
    kept = last_step(run)
    assert 0 < kept < done
    status, out, err = finish(train(data, run, steps=done + 1, **often))
    assert status == 0 and f"after step {kept}" in err, err
    account = json.loads((run / "result.json").read_text())["goodput"]
    assert account["starts"] == 2 and f"goodput {100 * account['goodput']:.0f} %" in out
    assert all(account["seconds"][name] > 0 for name in (
        "steps", "lost_steps", "startup", "compilation", "validation", "checkpoints"))
    assert sum(account["seconds"].values()) == pytest.approx(account["wall"])


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written(data, tmp_path):
    """It ends the run with its name, and leaves the one before and nothing half written."""
    from model import weights

    run = tmp_path / "run"
    job = train(data, run, steps=1000, checkpoint_every=1, validate_every=1000)
    wait_for_step(job, run, 2)
    psutil.Process(job.pid).rlimit(psutil.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    check_refused(job, str(run / "checkpoints" / "step-"), ".ckpt: File too large")
    assert {path.name[:5] for path in (run / "checkpoints").iterdir()} == {"step-"}
    assert weights.read(run / "checkpoints" / f"step-{last_step(run):08}.ckpt")["step"] == last_step(run)


@pytest.mark.slow
def test_a_run_of_the_first_version_goes_on(data, other, whole, tmp_path):
    """Its files lack what was added since: formats, the dataset that decides what is best, goodput."""
    import mindspore

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "goodput.json").unlink()
    (run / "lock").unlink()
    starts = json.loads((run / "starts.json").read_text())
    (run / "starts.json").write_text(json.dumps([{key: value for key, value in start.items()
                                                  if key != "format"} for start in starts]))
    added = {"format", "validation"}
    for path in (run / "checkpoints").iterdir():
        values = mindspore.load_checkpoint(str(path))
        assert added <= values.keys()
        names = added | ({"step", "best"} if path.name == "best.ckpt" else set())
        extra = {name: value for name, value in values.items()
                 if name not in names and not isinstance(value, mindspore.Parameter)}
        mindspore.save_checkpoint([{"name": name, "data": value} for name, value in values.items()
                                   if isinstance(value, mindspore.Parameter)], str(path),
                                  append_dict=extra, crc_check=True)
    status, _, err = finish(train([data, other], run, steps=5, **MIXED))
    assert status == 0 and "going on after step 4" in err, err
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (whole, run))
    assert after["step"] == 5 and after["best_epe"] <= before["best_epe"]


def check_refused(process, *words):
    """The command ends with a status and one line that holds the words."""
    status, out, err = finish(process)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err, err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("overrides,words", [
    ({"learning_rat": 1}, ["learning_rat", "learning_rate"]),
    ({"batch": 40}, ["11 training pairs", "batch"]),
    ({"crop": "[128,128]"}, ["64x128", "128x128"]),
    ({"crop": "[64,96]"}, ["multiples of 64"]),
    ({"precision": "float8"}, ["float16"]),
    ({"steps": -1}, ["steps", "at least 1"]),
    ({"mixture": "[1,2]"}, ["2 shares", "1 set(s)"]),
    ({"accumulate": 3}, ["batch is 4", "3 parts", "batch=6"]),
])
def test_a_bad_recipe(data, tmp_path, overrides, words):
    """One line says which key is wrong and what would be right; no run folder appears."""
    check_refused(train(data, tmp_path / "run", **overrides), *words)
    assert not (tmp_path / "run").exists()


def test_bad_folders(data, tmp_path):
    """No data set, somebody's own folder, another run's folder, an unknown recipe, no checkpoint."""
    check_refused(train(tmp_path / "nothing", tmp_path / "run"), "nothing")
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.tex").write_text("")
    check_refused(train(data, own), str(own), "not empty")
    (own / "recipe.yaml").write_text("steps: 7\n")
    check_refused(train(data, own), str(own), "another recipe")
    check_refused(train(data, tmp_path / "run", recipe="exampel"), "exampel", "example")
    check_refused(tiny.mpirun(1, "train/evaluate.py", "--data", data, "--ckpt",
                              tmp_path / "none.ckpt"), "none.ckpt")


def test_a_host_that_differs_is_named(data, network, tmp_path):
    """A shard that only one host lacks, and other code there; nothing is begun on either."""
    if not network:
        pytest.skip("takes root and iproute2 to make hosts")
    for number in network.numbers:
        for folder in ("launch", "model", "prep", "train"):
            shutil.copytree(tiny.ROOT / folder, tmp_path / f"host{number}" / folder)
        shutil.copytree(data, tmp_path / f"host{number}" / "data")
    local, second = tmp_path / "local", tmp_path / "host2"
    shard = second / "data" / "train-00001-of-00002.mindrecord"
    whole = shard.read_bytes()
    for damaged, words in ((None, "not there"), (whole[:-1], f"{len(whole)} as the set's manifest")):
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        job = train(local / "data", local / "run", network=network)
        check_refused(job, f"rank 1 on host2: {local}/data/{shard.name}", words)
    shard.write_bytes(whole)
    with open(second / "train" / "loop.py", "a") as file:
        file.write("# another revision\n")
    job = train(local / "data", local / "run", network=network,
                program=(sys.executable, local / "train" / "main.py"))
    check_refused(job, "rank 1 on host2 has code ", "rank 0 on host1 has ", "same code")
    assert not any((tmp_path / f"host{number}" / "run").exists() for number in network.numbers)


def test_ranks_are_told_once(data, tmp_path):
    """A mistake that every rank sees is one line of output."""
    check_refused(train(data, tmp_path / "run", ranks=2, batch=3), "batch is 3", "multiple of 2")
