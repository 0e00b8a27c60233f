"""Runs over several ranks and several starts: the same gradients, weights and curves."""

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
from runs import MIXED, finish, read_curves, read_events, train, words


@pytest.mark.slow
def test_two_ranks_train_as_one_with_the_doubled_batch(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Equal weights on both ranks after several steps, also where gradients are summed in copies, as on GPUs
    without NCCL; the gradient is that of one rank with the whole batch, at once or in parts."""
    program = [sys.executable, tiny.ROOT / "tests" / "two_ranks.py"]
    for ranks, *parts in ((2, 1), (2, 1, "copy"), (1, 1), (1, 4)):
        status, _, err = finish(tiny.mpirun(ranks, *program, data, tmp_path, 2, *parts))
        assert status == 0, err
    first, second, copied, alone, slowly = (
        dict(np.load(tmp_path / f"rank-{name}.npz"))
        for name in ("0-of-2-1", "1-of-2-1", "0-of-2-copy", "0-of-1-1", "0-of-1-4")
    )
    for name, weights in first.items():
        np.testing.assert_array_equal(weights, second[name], err_msg=name)
        np.testing.assert_array_equal(weights, copied[name], err_msg=name)
    # Not the weights: Adam divides gradients that are rounding errors by themselves.
    for other in (alone, slowly):
        np.testing.assert_allclose(
            first["gradient"], other["gradient"], rtol=1e-3, atol=1e-4 * np.abs(first["gradient"]).max()
        )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(
    data: pathlib.Path, other: pathlib.Path, whole: pathlib.Path, two_hosts: hosts.Hosts | None, tmp_path: pathlib.Path
) -> None:
    """kill -9 on a rank ends the job; the same command goes on and ends as if nothing had been, on two
    hosts that share nothing with the weights of two ranks on one."""
    disks = [tmp_path / f"host{number}" for number in two_hosts.numbers] if two_hosts else [tmp_path]
    for disk in disks:
        for folder in (data, other):
            shutil.copytree(folder, disk / folder.name)
    broken, seen = disks[0] / "broken", tmp_path / "local" if two_hosts else tmp_path
    start = functools.partial(
        train, [seen / data.name, seen / other.name], seen / "broken", ranks=2, network=two_hosts, **MIXED
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
    assert not two_hosts or not two_hosts.processes()
    assert not (broken / "result.json").exists()
    # The newest checkpoint is damaged, too: the run goes on from the one before.
    newest = sorted((broken / "checkpoints").glob("step-*.ckpt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    (newest.parent / "step-00000009.partial-1.tmp").touch()  # killed while it wrote

    status, out, err = finish(start())
    assert status == 0 and f"{int(newest.stem[-8:]) - 1}, with 2 rank(s)" in err, err
    assert f"warning: {seen / newest.relative_to(disks[0])}: damaged" in out
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
def test_a_run_goes_on_with_other_ranks(
    data: pathlib.Path, other: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """One rank takes up what two began, with the same pairs in each step, and says what changed."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for number in (3, 4):
        (run / "checkpoints" / f"step-{number:08}.ckpt").unlink()
    status, _, err = finish(train([data, other], run, accumulation_steps=2, **MIXED))
    assert status == 0 and "after step 2" in err and "ranks 1 (was 2)" in err, err
    assert [start["ranks"] for start in json.loads((run / "starts.json").read_text())] == [2, 1]
    losses, before = read_curves(run, "train/loss"), read_curves(whole, "train/loss")
    assert losses.keys() == before.keys()
    assert losses == pytest.approx(before, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", tiny.LAUNCHERS)
def test_a_run_goes_on_under_another_launcher(
    launcher: str, data: pathlib.Path, other: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Two ranks that Debian's mpirun or srun starts take up what mpirun's began, to the same
    losses."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for number in (3, 4):
        (run / "checkpoints" / f"step-{number:08}.ckpt").unlink()
    status, _, err = finish(tiny.launch(launcher, "train/main.py", *words([data, other], run, **MIXED)))
    assert status == 0 and "after step 2, with 2 rank(s)" in err, err
    assert read_curves(run, "train/loss") == read_curves(whole, "train/loss")
    assert read_curves(run, "validation/epe") == read_curves(whole, "validation/epe")


@pytest.mark.slow
def test_what_a_run_leaves(whole: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Curves of each kind, pictures, figures, what it was made with; the evaluation agrees."""
    events = read_events(whole)
    tags = {
        "train/loss",
        "train/level6",
        "train/level2",
        "train/learning_rate",
        "train/loss_scale",
        "train/gradient_norm",
        "speed/pairs_per_second",
        "data_wait/rank-1",
        "memory_gb/rank-0",
        "validation/epe",
        "validation/epe_average",
        "validation/set-72/epe",
    }
    assert tags <= set(events.Tags()["scalars"])
    for tag in tags:
        steps = [2, 4] if tag.startswith("validation") else [1, 2, 3, 4]
        assert list(read_curves(whole, tag)) == steps
    assert [image.step for image in events.Images("validation/flow")] == [2, 4]
    assert "mixture" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    check_result(whole)
    check_evaluation(data, whole, tmp_path / "evaluation")


def check_result(run: pathlib.Path) -> None:
    """The final figures are those of the last validation, and say what they were made with."""
    result = json.loads((run / "result.json").read_text())
    assert result["pairs"] == 3 and result["ranks"] == 2
    assert result["step"] == 4 and 0 < result["epe"] < 1000
    assert 0 < result["average_epe"] < 1000 and result["sets"]["set-72"]["pairs"] == 2
    assert result["best_epe"] == min(entry[key] for entry in result["validations"] for key in ("epe", "average_epe"))
    assert result["made_with"]["mindspore"] and len(result["made_with"]["data"]) == 2


def check_evaluation(data: pathlib.Path, run: pathlib.Path, out: pathlib.Path) -> None:
    """train/evaluate.py sees the EPE that the two ranks saw, and leaves table, JSON and picture."""
    ckpt = run / "checkpoints" / "step-00000004.ckpt"
    status, text, err = finish(
        tiny.mpirun(1, "train/evaluate.py", "--data", data, "--split", "val", "--ckpt", ckpt, "--out", out)
    )
    assert status == 0, err
    figures = json.loads((out / "evaluation.json").read_text())
    seen = json.loads((run / "result.json").read_text())
    assert figures["epe"] == pytest.approx(seen["epe"], rel=1e-4)
    assert figures["zero_epe"] == pytest.approx(seen["zero_epe"], rel=1e-6)
    assert f"{figures['epe']:.3f}" in text and "zero flow" in text
    assert [pair["pair"] for pair in figures["by_pair"]] == ["00003", "00006", "00010"]
    assert (out / "flow.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_of_the_first_version_goes_on(
    data: pathlib.Path, other: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its files lack what was added since: formats, the dataset that decides what is best, goodput."""
    import mindspore

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "goodput.json").unlink()
    (run / "lock").unlink()
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
    status, _, err = finish(train([data, other], run, steps=5, **MIXED))
    assert status == 0 and "resuming after step 4" in err, err
    before, after = (json.loads((folder / "result.json").read_text()) for folder in (whole, run))
    assert after["step"] == 5 and after["best_epe"] <= before["best_epe"]
