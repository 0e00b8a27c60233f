"""Runs over several ranks and several starts have the same gradients, weights and curves."""

import functools
import json
import pathlib
import shutil
import sys
import time

import hosts
import numpy as np
import psutil
import pytest
import tiny
from training_runs import MIXED, finish, read_curves, read_events, train, words

from launch.errors import UserError
from train import goodput
from train.recipe import Recipe
from train.run_folder import RunFolder


@pytest.mark.slow
def test_two_ranks_train_as_one_with_the_doubled_batch(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Both ranks have equal weights after several steps, also if gradients are summed in copies, as on GPUs without
    NCCL; the gradient is that of one rank with the whole batch."""
    program = [sys.executable, tiny.ROOT / "tests" / "two_ranks.py"]
    for ranks in (2, 1):
        status, _, err = finish(tiny.mpirun(ranks, *program, data, tmp_path, 2))
        assert status == 0, err
    first, second, copied, alone = (
        dict(np.load(tmp_path / f"rank-{name}.npz")) for name in ("0-of-2", "1-of-2", "0-of-2-copied", "0-of-1")
    )
    for name, weights in first.items():
        np.testing.assert_array_equal(weights, second[name], err_msg=name)
        np.testing.assert_array_equal(weights, copied[name], err_msg=name)
    # Not the weights: Adam divides gradients that are rounding errors by themselves.
    limit = 1e-4 * np.abs(first["gradient"]).max()
    np.testing.assert_allclose(first["gradient"], alone["gradient"], rtol=1e-3, atol=limit)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(
    data: pathlib.Path, other: pathlib.Path, whole: pathlib.Path, two_hosts: hosts.Hosts | None, tmp_path: pathlib.Path
) -> None:
    """kill -9 on a rank ends the job; the same command resumes and ends as if nothing had happened. Two hosts that
    share nothing end with the weights of two ranks on one host."""
    disks = [tmp_path / f"host{number}" for number in two_hosts.numbers] if two_hosts else [tmp_path]
    for disk in disks:
        for folder in (data, other):
            shutil.copytree(folder, disk / folder.name)
    broken, seen = disks[0] / "broken", tmp_path / "local" if two_hosts else tmp_path
    start = functools.partial(
        train,
        [seen / data.name, seen / other.name],
        seen / "broken",
        ranks=2,
        network=two_hosts,
        checkpoint_every=1,
        **MIXED,
    )
    job = start()
    deadline = time.monotonic() + 240
    while not (broken / "checkpoints" / "step-00000002.ckpt").exists():
        assert job.poll() is None and time.monotonic() < deadline, finish(job)
        time.sleep(0.02)
    processes = two_hosts.processes() if two_hosts else psutil.Process(job.pid).children(recursive=True)
    second = [process for process in processes if process.environ().get("OMPI_COMM_WORLD_RANK") == "1"]
    (watchdog,) = (process for process in second if process.parent() not in second)
    watchdog.children()[0].kill()
    status, _, err = finish(job)
    assert status == 137 and "error: rank 1 on " + ("host2" if two_hosts else "") in err, err
    assert not two_hosts or not two_hosts.remaining()
    assert not (broken / "result.json").exists()
    # The newest checkpoint is damaged, too: the run resumes from the one before.
    newest = sorted((broken / "checkpoints").glob("step-????????.ckpt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    (newest.parent / "step-00000009.partial-1.tmp").touch()  # killed while it wrote

    status, _, err = finish(start())
    assert status == 0 and f"{int(newest.stem[-8:]) - 1}, with 2 rank(s)" in err, err
    assert f"warning: {seen / newest.relative_to(disks[0])}: damaged" in err
    for disk in disks[1:]:
        assert [path.name for path in (disk / "broken").iterdir()] == ["logs"]
    assert not list(newest.parent.glob("*.partial-*"))
    from model import weights

    first, second = (weights.read(run / "checkpoints" / "step-00000004.ckpt") for run in (whole, broken))
    assert first.keys() == second.keys() and "average_offset" in first
    for name in first.keys() - {"model", "best", "validation"}:
        np.testing.assert_array_equal(np.array(first[name]), np.array(second[name]), err_msg=name)
    assert first["best"] == second["best"]
    assert read_curves(broken, "train/loss") == read_curves(whole, "train/loss")
    assert read_curves(broken, "validation/epe") == read_curves(whole, "validation/epe")


@pytest.mark.slow
def test_a_run_resumes_under_another_launcher(
    launcher: str, data: pathlib.Path, other: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Two ranks that Debian's mpirun or srun starts resume a run of this environment's mpirun, to the same losses."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("step-00000004.ckpt"))
    status, _, err = finish(tiny.launch(launcher, "train/main.py", *words([data, other], run, **MIXED)))
    assert status == 0 and "after step 2, with 2 rank(s)" in err, err
    assert read_curves(run, "train/loss") == read_curves(whole, "train/loss")
    assert read_curves(run, "validation/epe") == read_curves(whole, "validation/epe")


@pytest.mark.slow
def test_a_run_leaves_curves_pictures_and_metrics(whole: pathlib.Path) -> None:
    """And what it was made with; a script prints the metrics once, under mpirun, too."""
    events = read_events(whole)
    tags = {
        "train/loss",
        "train/level6",
        "train/level2",
        "train/learning_rate",
        "train/loss_scale",
        "train/gradient_norm",
        "speed/pairs_per_second",
        "speed/teraflops",
        "data_wait/rank-1",
        "memory_gb/rank-0",
        "validation/epe",
        "validation/epe_average",
        "validation/set-96/epe",
    }
    assert tags <= set(events.Tags()["scalars"])
    for tag in tags:
        steps = [2, 4] if tag.startswith("validation") else [1, 2, 3, 4]
        assert list(read_curves(whole, tag)) == steps
    assert [image.step for image in events.Images("validation/flow")] == [2, 4]
    assert "mixture" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    result = json.loads((whole / "result.json").read_text())
    assert whole.with_name("printed").read_text() == f"validation EPE {result['epe']:.3f} px\n"
    assert result["pairs"] == 3 and result["ranks"] == 2
    assert result["step"] == 4 and 0 < result["epe"] < 1000
    assert 0 < result["average_epe"] < 1000 and result["sets"]["set-96"]["pairs"] == 2
    assert result["best_epe"] == min(entry[key] for entry in result["validations"] for key in ("epe", "average_epe"))
    assert result["made_with"]["mindspore"] and len(result["made_with"]["data"]) == 2


@pytest.mark.slow
def test_a_run_of_the_first_version_resumes_with_another_number_of_ranks(
    data: pathlib.Path, other: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """One rank resumes a run of two, with the same pairs in each step, and says what changed. The run's files lack what
    was added since (formats, the dataset that decides what is best, goodput), and its recipe has the former names of
    keys."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("step-00000004.ckpt"))
    make_first_version(run)
    status, _, err = finish(train([data, other], run, accumulation_steps=2, **MIXED))
    assert status == 0 and "after step 2" in err and "ranks 1 (was 2)" in err, err
    assert [start["ranks"] for start in json.loads((run / "starts.json").read_text())] == [2, 1]
    losses, before = read_curves(run, "train/loss"), read_curves(whole, "train/loss")
    assert losses.keys() == before.keys()
    assert losses == pytest.approx(before, rel=1e-2)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (whole, run))
    earlier = first["validations"][0]
    assert second["step"] == 4 and second["best_epe"] <= min(earlier["epe"], earlier["average_epe"])


def test_a_run_without_a_saved_step_keeps_its_initial_weights(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until a step is saved, another --init or none is refused; then it is ignored with a note. Records of older
    versions, without the weights, allow any."""
    recipe, file, other = Recipe.load("example"), tmp_path / "first.ckpt", tmp_path / "other.ckpt"
    file.write_bytes(b"weights")
    other.write_bytes(b"other weights")
    for init, name in ((file, "with"), (None, "without")):
        run = RunFolder(tmp_path / name)
        run.checkpoints.mkdir(parents=True)
        run.record_start(recipe, run.check_init(init), 0)
        assert run.check_init(init) == {"init": run.read_starts()[0]["init"]}
        for wrong in {file, other, None} - {init}:
            remedy = f"give --init {file}" if init else "leave out --init"
            with pytest.raises(UserError, match=rf"{run.path}: .*no step yet, .*--init.*; {remedy}.*another --out"):
                run.check_init(wrong)
        (run.checkpoints / "step-00000002.ckpt").write_bytes(b"")
        recorded = run.read_starts()[0]["init"]
        assert run.check_init(other) == {"init": recorded} == run.check_init(None)
        assert capsys.readouterr().err.count("is ignored") == 1
    with pytest.raises(UserError, match="no such checkpoint"):
        RunFolder(tmp_path / "new").check_init(tmp_path / "none.ckpt")
    older = RunFolder(tmp_path / "older")
    older.path.mkdir()
    older.record_start(recipe, {"ranks": 1}, 0)
    assert older.check_init(None) == {"init": None} and older.check_init(file)["init"]["path"] == str(file)


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(tmp_path: pathlib.Path) -> None:
    """If any record knows of a saved step; one that was killed before its first checkpoint does start again."""
    recipe = Recipe.load("example")
    seconds = dict.fromkeys(("steps", *goodput.PHASES), 1.0)
    for name, after_step, saved, finished in (
        ("killed early", 0, 0, False),
        ("resumed", 30, 0, False),
        ("interrupted", 0, 30, False),
        ("finished", 0, 0, True),
    ):
        run = RunFolder(tmp_path / name)
        run.checkpoints.mkdir(parents=True)
        run.record_start(recipe, {}, after_step)
        run.goodput.write_text(json.dumps([{"first": 0, "step": 30, "saved": saved, "seconds": seconds}]))
        if finished:
            run.result.write_text("{}")
        if name == "killed early":
            run.check(recipe)
            continue
        with pytest.raises(UserError, match=rf"{run.checkpoints}: has no checkpoints, .*step 30 was saved; restore"):
            run.check(recipe)
        (run.checkpoints / "step-00000020.ckpt").write_bytes(b"")
        run.check(recipe)


@pytest.mark.parametrize("offset", [0, 8, 12])  # in the length, its checksum, the event
def test_a_damaged_curve_file_does_not_prevent_resuming(
    offset: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records before the damage are kept, and a warning names the file."""
    from train.monitor import EventFile, drop_events_after, tensorboard

    events = EventFile(tmp_path)
    ends = []
    (path,) = tmp_path.iterdir()
    for step in range(1, 5):
        events.add(step, tensorboard.scalar("train/loss", 0.5))
        ends.append(path.stat().st_size)
    events.close()
    whole = path.read_bytes()
    drop_events_after(tmp_path, 3)
    assert path.read_bytes() == whole[: ends[2]] and not capsys.readouterr().err
    damaged = bytearray(whole)
    damaged[ends[1] + offset] ^= 0xFF
    path.write_bytes(damaged)
    drop_events_after(tmp_path, 3)
    assert path.read_bytes() == whole[: ends[1]]
    assert capsys.readouterr().err.startswith(f"warning: {path}: damaged after {ends[1]} of {ends[3]} bytes; ")


def make_first_version(run: pathlib.Path) -> None:
    """Turn the folder of a run into one that the first version wrote."""
    import mindspore

    (run / "goodput.json").unlink()
    (run / "lock").unlink()
    recipe = (run / "recipe.yaml").read_text()
    assert "ema_decay: " in recipe and "warmup_steps: " in recipe
    (run / "recipe.yaml").write_text(recipe.replace("ema_decay: ", "average: ").replace("warmup_steps: ", "warm_up: "))
    starts = json.loads((run / "starts.json").read_text())
    (run / "starts.json").write_text(
        json.dumps([{key: value for key, value in start.items() if key != "format"} for start in starts])
    )
    added = {"format", "validation"}
    for path in (run / "checkpoints").iterdir():
        values = mindspore.load_checkpoint(str(path))
        assert added <= values.keys()
        names = added | ({"step", "best"} if path.name == "best.ckpt" else set())
        extra = {
            name: value
            for name, value in values.items()
            if name not in names and not isinstance(value, mindspore.Parameter)
        }
        mindspore.save_checkpoint(
            [{"name": name, "data": value} for name, value in values.items() if isinstance(value, mindspore.Parameter)],
            str(path),
            append_dict=extra,
            crc_check=True,
        )
