"""Training as a user starts it: interruptions, initial weights, validation, and what is refused."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import hosts
import numpy as np
import psutil
import pytest
import tiny
from training_runs import RECIPE, check_refused, finish, last_step, read_curves, read_events, train, wait_for_step

from prep.formats.flow import write_flo


@pytest.mark.slow
@pytest.mark.parametrize("ranks,number", [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_a_stopped_run_keeps_its_last_step(
    data: pathlib.Path, tmp_path: pathlib.Path, ranks: int, number: signal.Signals
) -> None:
    """A signal stops a run after its current step, from which the same command resumes; mpirun forwards SIGUSR1 to
    all ranks."""
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
def test_a_diverging_run_names_the_pairs(data: pathlib.Path, tmp_path: pathlib.Path, precision: str) -> None:
    """A loss that is not finite ends the run, in float16 once no loss scale helps; earlier checkpoints stay."""
    job = train(data, tmp_path / "run", learning_rate=1e30, steps=30, precision=precision, validate_every=30)
    check_refused(job, "is not finite", "pairs: 000", "learning_rate")


@pytest.fixture(scope="module")
def kitti(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Two converted datasets of six pairs, each of another width: four for training and two for validation; all for
    validation. The network has the same graphs for them as for the dataset `data`."""
    folder = tmp_path_factory.mktemp("kitti")
    release = tiny.kitti(folder / "release", 6, height=64, width=72)
    return [
        tiny.convert(
            "kitti2015",
            release,
            folder / name,
            "--shards",
            "2",
            "--split-file",
            tiny.split_file(folder / f"{name}.txt", positions),
        )
        for name, positions in (("mixed", [0, 3]), ("unseen", range(6)))
    ]


@pytest.mark.slow
def test_pairs_may_differ_in_size(kitti: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
    """In training, in validation on two datasets, one of validation pairs only, with two ranks, and in the evaluation
    with one, which finds the same metrics; both draw pairs of several sizes."""
    mixed, unseen = kitti
    run = tmp_path / "run"
    status, _, err = finish(train(mixed, run, 2, validate=[unseen], steps=2))
    assert status == 0 and "warning: " not in err, err
    result = json.loads((run / "result.json").read_text())
    assert result["pairs"] == 6 and result["sets"]["mixed"]["pairs"] == 2
    assert result["best_epe"] == result["epe"] and result["epe"] != result["sets"]["mixed"]["epe"]
    events = read_events(run)
    assert {"validation/epe", "validation/mixed/epe"} <= set(events.Tags()["scalars"])
    (drawn,) = events.Images("validation/flow")
    assert drawn.height > 4 * 64 and drawn.width >= 4 * (72 + 3 * 8), "four pairs, as wide as the fourth"

    best = run / "checkpoints" / "best.ckpt"
    status, text, err = finish(
        tiny.mpirun(1, "train/evaluate.py", "--data", unseen, "--split", "val", "--ckpt", best, "--out", tmp_path)
    )
    assert status == 0, err
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["epe"] == pytest.approx(result["epe"], rel=1e-4)
    assert found["zero_epe"] == pytest.approx(result["zero_epe"], rel=1e-6)
    assert [pair["pair"] for pair in found["by_pair"]] == [f"00000{number}" for number in range(6)]
    assert f"{found['epe']:.3f}" in text and "zero-flow EPE" in text and "64x72, 64x80" in text
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_a_dataset_that_lacks_the_needed_split_is_refused(
    data: pathlib.Path, kitti: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Without training pairs as --data; without validation pairs as --validate, or as the only dataset."""
    mixed, unseen = kitti
    check_refused(train(unseen, tmp_path / "run"), "no training pairs", "--validate")
    everything = tiny.convert(
        "kitti2015",
        mixed.parent / "release",
        tmp_path / "everything",
        "--split-file",
        tiny.split_file(tmp_path / "none.txt", []),
    )
    check_refused(train(everything, tmp_path / "run", batch=2), "split val has no pair", "--validate")
    job = train(data, tmp_path / "run", validate=[everything])
    check_refused(job, "everything: split val has no pair")
    twin = shutil.copytree(unseen, tmp_path / "other" / "mixed")
    check_refused(train(mixed, tmp_path / "run", validate=[twin], batch=2), "several folders named mixed")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """Two converted datasets: frames, five pairs without ground truth; and three validation pairs, two of which have
    it."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for number in range(6):
        tiny.save(folder / "shots" / f"{number}.png", tiny.picture(rng, 64, 96))
        write_flo(folder / "shots" / f"{number}.flo", tiny.flow(rng, 64, 96))
    rows = [f"{number}.png,{number + 1}.png,{flow},val" for number, flow in ((0, "0.flo"), (1, "1.flo"), (2, ""))]
    (folder / "shots" / "pairs.csv").write_text("\n".join(["image1,image2,flow,split", *rows]))
    frames = tiny.convert("frames", folder / "shots", folder / "frames")
    return [frames, tiny.convert("pairs", folder / "shots", folder / "pairs", "--list", folder / "shots" / "pairs.csv")]


@pytest.mark.slow
def test_pairs_without_ground_truth_in_a_mixture(
    data: pathlib.Path, own: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """They are read, augmented and trained on beside labelled ones, here in whole batches, and no EPE counts them."""
    frames, pairs = own
    run = tmp_path / "run"
    status, out, err = finish(
        train([frames, data], run, 2, validate=[pairs], mixture="[9,1]", batch=2, affine=1, noise=0.01)
    )
    assert status == 0, err
    assert "5 of 16 training pairs have no ground truth" in out + err
    assert ", 1 pair without ground truth left out" in out + err
    result = json.loads((run / "result.json").read_text())
    assert result["pairs"] == 3 and result["unlabelled"] == 1 and result["pixels"] == 2 * 64 * 96
    assert np.isfinite(result["epe"]) and result["sets"].keys() == {"set-128"}
    assert 0.0 in read_curves(run, "train/loss").values(), "a batch without ground truth"

    best = run / "checkpoints" / "best.ckpt"
    for split, expected in (("val", 0), ("val-unlabelled", 1)):
        words = ["--data", pairs, "--split", split, "--ckpt", best, "--out", tmp_path / split]
        status, text, err = finish(tiny.mpirun(1, sys.executable, "train/evaluate.py", *words))
        assert status == expected, err
        assert ("12,288 pixels with known flow; 1 pair without ground truth left out" in text) == (split == "val")
    assert "no pair of split val-unlabelled has ground truth to evaluate on" in err


def test_training_without_any_ground_truth_is_refused(
    data: pathlib.Path, own: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    frames, _ = own
    job = train(frames, tmp_path / "run", validate=[data])
    check_refused(job, "frames: none of the 5 training pairs has ground truth")
    check_refused(train(data, tmp_path / "run", validate=[frames]), "frames: split val has no pairs")


@pytest.mark.slow
def test_fine_tuning_starts_from_given_weights_and_their_network_options(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """--init loads a file's weights on every rank, and refuses a file that does not fit. A run from weights with
    normalised features has their EPE (its only step is too small to change them), stores the option, and so can be
    extended without the file."""
    from model import weights
    from model.pwcnet import PWCNet

    options: dict[str, Any] = {"dense": False, "normalize_features": True}
    first, run, recipe = tmp_path / "first.ckpt", tmp_path / "run", tmp_path / "plain.yaml"
    network = PWCNet(**options)
    weights.save_network(first, network, options)
    recipe.write_text("crop: [64, 64]\nlearning_rate: 1.0e-30\n")
    known: dict[str, Any] = {"recipe": recipe, "schedule": "milestones", "clip_norm": 1.0}
    check_refused(
        train(data, run, init=first, normalize_features="false", **known),
        "normalize_features is false",
        f"{first} is of a network with normalize_features true",
    )
    check_refused(train(data, run, init=tmp_path / "none.ckpt", **known), "none.ckpt")
    status, _, err = finish(train(data, run, 2, init=first, steps=1, **known))
    assert status == 0, err
    kept = weights.read(run / "checkpoints" / "best.ckpt")
    for parameter in network.get_parameters():
        np.testing.assert_allclose(np.array(kept[parameter.name]), parameter.asnumpy(), atol=1e-7)
    status, _, err = finish(
        tiny.mpirun(1, "train/evaluate.py", "--data", data, "--ckpt", first, "--batch", "1", "--out", tmp_path)
    )
    assert status == 0, err
    result = json.loads((run / "result.json").read_text())
    assert result["epe"] == json.loads((tmp_path / "evaluation.json").read_text())["epe"]
    assert "normalize_features: true" in (run / "recipe.yaml").read_text()

    first.unlink()
    changed: dict[str, Any] = {
        "steps": 3,
        "log_every": 2,
        "validate_every": 1,
        "validation_batch": 3,
        "checkpoint_every": 2,
    }
    status, _, err = finish(train(data, run, init=first, **known, **changed))
    assert status == 0 and "resuming after step 1" in err and "steps 3 (was 1)" in err, err
    assert f"--init {first} is ignored" in err and "| 3/3 [" in err, err
    longer = json.loads((run / "result.json").read_text())
    assert [entry["step"] for entry in longer["validations"]] == [2, 3]
    best = weights.read(run / "checkpoints" / "best.ckpt")
    assert float(best["best"]) == longer["best_epe"] <= result["best_epe"]
    check_refused(train(data, run, **known, steps=2), "has done 3 steps", "steps=3")


def test_a_run_does_not_resume_with_another_recipe(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The message names the key with both values; nor does a run of a newer version resume."""
    from train import Recipe

    run = tmp_path / "run"
    run.mkdir()
    settings = [f"{key}={value}" for key, value in RECIPE.items()]
    (run / "recipe.yaml").write_text(Recipe.load("example", settings).to_yaml())
    check_refused(train(data, run, learning_rate=0.5), "another recipe", "learning_rate is 0.001, here 0.5")
    check_refused(train(data, run, crop="[64,128]"), "crop is [64, 64], here [64, 128]")
    check_refused(train(data, run, dense="true"), "dense is false, here true")
    (run / "starts.json").write_text(json.dumps([{"after_step": 0, "format": 99}]))
    check_refused(train(data, run), str(run), "format 99", "a newer one")


@pytest.mark.slow
def test_a_run_survives_what_disturbs_it(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Another run in the same folder is refused. If SummaryRecord's writer is killed, the run continues. A checkpoint
    that cannot be written ends the run with its name; the one before stays, and nothing is left half written. The run
    resumes, and goodput counts the lost steps."""
    from model import weights

    run = tmp_path / "run"
    often: dict[str, Any] = {"checkpoint_every": 1, "validate_every": 1000}
    job = train(data, run, steps=1000, **often)
    wait_for_step(job, run, 2)
    check_refused(train(data, run, 2, steps=1000, **often), str(run), f"process {job.pid}", "training run")
    (writer,) = psutil.Process(job.pid).children()
    writer.kill()
    wait_for_step(job, run, last_step(run) + 3)
    psutil.Process(job.pid).rlimit(psutil.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    status, _, err = finish(job)
    assert status == 1 and err.count("error: ") == 1 and "Traceback" not in err, err
    assert re.search(rf"error: {run}/checkpoints/step-.*\.ckpt: File too large", err), err
    assert err.count("warning: ") == 1 and f"process {writer.pid}, which writes SummaryRecord" in err, err
    assert {path.name[:5] for path in (run / "checkpoints").iterdir()} == {"step-"}
    assert weights.read(run / "checkpoints" / f"step-{last_step(run):08}.ckpt")["step"] == last_step(run)

    record = json.loads((run / "goodput.json").read_text())[0]
    done = record["step"]
    assert 0 < record["saved"] <= last_step(run)
    for step in range(done - 1, last_step(run) + 1):  # as if the last minute had not been kept
        (run / "checkpoints" / f"step-{step:08}.ckpt").unlink(missing_ok=True)
    kept = last_step(run)
    assert 0 < kept < done
    status, out, err = finish(train(data, run, steps=done + 1, **often))
    assert status == 0 and f"after step {kept}" in err, err
    account = json.loads((run / "result.json").read_text())["goodput"]
    assert account["starts"] == 2 and f"goodput {100 * account['goodput']:.0f} %" in out
    assert all(
        account["seconds"][name] > 0
        for name in ("steps", "lost_steps", "startup", "compilation", "validation", "checkpoints")
    )
    assert sum(account["seconds"].values()) == pytest.approx(account["wall"])


@pytest.mark.parametrize(
    "overrides,words",
    [
        ({"learning_rat": 1}, ["learning_rat", "learning_rate"]),
        ({"batch": 40}, ["11 training pairs", "batch"]),
        ({"crop": "[128,128]"}, ["64x128", "128x128"]),
        ({"crop": "[64,96]"}, ["multiples of 64"]),
        ({"precision": "float8"}, ["float16"]),
        ({"steps": -1}, ["steps", "at least 1"]),
        ({"mixture": "[1,2]"}, ["2 shares", "1 training dataset;"]),
        ({"accumulation_steps": 3}, ["batch is 4", "3 accumulation steps", "batch=6"]),
    ],
)
def test_a_bad_recipe_is_refused(
    data: pathlib.Path, tmp_path: pathlib.Path, overrides: dict[str, Any], words: list[str]
) -> None:
    """One line says which key is wrong and what is expected; no run folder appears."""
    check_refused(train(data, tmp_path / "run", **overrides), *words)
    assert not (tmp_path / "run").exists()


def test_bad_folders_are_refused(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """No dataset, a folder with other files, another run's folder, an unknown recipe, no checkpoint."""
    check_refused(train(tmp_path / "nothing", tmp_path / "run"), "nothing")
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.tex").write_text("")
    check_refused(train(data, own), str(own), "not empty")
    (own / "recipe.yaml").write_text("steps: 7\n")
    check_refused(train(data, own), str(own), "another recipe")
    check_refused(train(data, tmp_path / "run", recipe="exampel"), "exampel", "example")
    check_refused(tiny.mpirun(1, "train/evaluate.py", "--data", data, "--ckpt", tmp_path / "none.ckpt"), "none.ckpt")


def test_a_host_that_differs_is_named(
    data: pathlib.Path, two_hosts: hosts.Hosts | None, tmp_path: pathlib.Path
) -> None:
    """It lacks a shard, has a damaged one, or other code; nothing starts on either host."""
    if not two_hosts:
        pytest.skip("needs root and iproute2 to make hosts")
    for number in two_hosts.numbers:
        for folder in ("launch", "model", "prep", "train"):
            shutil.copytree(tiny.ROOT / folder, tmp_path / f"host{number}" / folder)
        shutil.copytree(data, tmp_path / f"host{number}" / "data")
    local, second = tmp_path / "local", tmp_path / "host2"
    shard = second / "data" / "train-00001-of-00002.mindrecord"
    whole = shard.read_bytes()
    for damaged, words in ((None, "missing"), (whole[:-1], f"{len(whole)} in the manifest")):
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        job = train(local / "data", local / "run", network=two_hosts)
        check_refused(job, f"rank 1 on host2: {local}/data/{shard.name}", words)
    shard.write_bytes(whole)
    with open(second / "train" / "trainer.py", "a") as file:
        file.write("# another revision\n")
    job = train(local / "data", local / "run", network=two_hosts, program=(sys.executable, local / "train" / "main.py"))
    check_refused(job, "rank 1 on host2 has code ", "rank 0 on host1 has ", "same code")
    assert not any((tmp_path / f"host{number}" / "run").exists() for number in two_hosts.numbers)


def test_an_error_on_every_rank_is_reported_once(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """One line of output for all ranks."""
    check_refused(train(data, tmp_path / "run", ranks=2, batch=3), "batch is 3", "multiple of 2")


def test_importing_the_package_imports_nothing_else() -> None:
    """Commands that need a recipe alone do not wait for MindSpore."""
    code = "import sys, train; from train import Recipe, RunConfig, start_trainer; print('mindspore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
