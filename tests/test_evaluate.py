"""Evaluation: the field's metrics, one and several ranks, what is written; submissions."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import tiny

from launch.communicator import ALONE, Communicator
from launch.errors import UserError
from launch.ranks import Rank
from model.inference import FlowPredictor
from prep import reader
from prep.formats.flow import read_flo, read_flow, write_kitti_png
from prep.formats.image import read_image
from train import metrics, report, submission
from train.evaluate import prepare
from train.evaluation import EvaluationOptions, evaluate
from train.metrics import Evaluation, compute_metrics


class Evaluated(NamedTuple):
    """A split and its evaluation."""

    split: reader.DatasetSplit
    evaluation: Evaluation


SCENES = {"alley_1": 4, "market_6": 3}  # 3 and 2 pairs, in each pass


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.sintel(tmp_path_factory.mktemp("sintel") / "release", SCENES)


@pytest.fixture(scope="module")
def sintel(release: pathlib.Path) -> pathlib.Path:
    """The converted tiny Sintel, all of its ten pairs in val."""
    everything = tiny.split_file(release.parent / "val.txt", range(5))
    return tiny.convert("sintel", release, release.parent / "set", "--shards", 2, "--split-file", everything)


def command(ranks: int, *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of train/evaluate.py."""
    process = tiny.mpirun(ranks, sys.executable, "train/evaluate.py", *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# --- Metrics --------------------------------------------------------------------------------------


def one_row(
    flow: list[float], error: list[float], valid: list[int] | None = None, occluded: list[int] | None = None
) -> np.ndarray:
    """`pair_sums` of an image of one row: flows and errors to the right, in pixels."""
    row = np.zeros((1, len(flow), 2), np.float32)
    row[0, :, 0] = flow
    predicted = row + np.array(error, np.float32)[None, :, None] * np.array([0.6, 0.8], np.float32)
    masks = [[default] * len(flow) if mask is None else mask for mask, default in ((valid, 1), (occluded, 0))]
    return metrics.pair_sums(predicted, row, *(np.array([mask], np.uint8) for mask in masks))


def test_metrics_of_a_few_pixels_by_hand() -> None:
    """One pair of seven pixels, the last unknown; and a second pair, of one pixel."""
    first = one_row(
        [0, 5, 20, 30, 50, 100, 7],
        [0.5, 2, 4, 6, 2, 4, 99],
        valid=[1, 1, 1, 1, 1, 1, 0],
        occluded=[0, 1, 0, 1, 0, 0, 1],
    )
    found = compute_metrics(first[None])
    # Of the errors over 3 px (4 of 20, 6 of 30, 4 of 100) the last is under 5 %.
    expected = {
        "pairs": 1,
        "unlabelled": 0,
        "pixels": 6,
        "epe": 18.5 / 6,
        "epe_pixels": 18.5 / 6,
        "zero_epe": 205 / 6,
        "ratio": 18.5 / 205,
        "fl_all": 200 / 6,
        "over_1px": 500 / 6,
        "over_3px": 50,
        "over_5px": 100 / 6,
        "epe_s0_10": 1.25,
        "epe_s10_40": 5,
        "epe_s40_plus": 3,
        "epe_matched": 10.5 / 4,
        "epe_unmatched": 4,
    }
    assert dataclasses.asdict(found) == pytest.approx(expected, rel=1e-5)
    both = compute_metrics(np.stack([first, one_row([10], [8])]))
    assert both.epe == pytest.approx((18.5 / 6 + 8) / 2, rel=1e-5)
    assert both.epe_pixels == pytest.approx(26.5 / 7, rel=1e-5)
    assert both.fl_all == pytest.approx(300 / 7)


def test_thresholds_belong_to_the_better_side() -> None:
    """Errors of exactly 1, 3 and 5 px are not over; flow of exactly 10 and 40 px is in s10-40."""
    row = np.zeros((1, 3, 2), np.float32)
    predicted = row + np.array([1, 3, 5], np.float32)[:, None] * np.array([1, 0], np.float32)
    found = compute_metrics(metrics.pair_sums(predicted, row, row[..., 0] + 1, row[..., 0])[None])
    assert [getattr(found, key) for key in ("over_1px", "over_3px", "over_5px")] == [
        pytest.approx(share) for share in (200 / 3, 100 / 3, 0)
    ]
    speeds = dict(zip(metrics.SUMS, one_row([9.99, 10, 40, 40.01], [0] * 4), strict=True))
    assert [speeds[f"pixels_{region}"] for region in metrics.REGIONS[:3]] == [1, 2, 1]


def test_metrics_from_sums_equal_those_of_all_pixels_at_once() -> None:
    """With pairs that differ in size and in their share of known pixels."""
    rng = np.random.default_rng(3)
    pairs, sums = [], []
    for height, width, share in ((20, 31, 0.9), (17, 8, 0.3), (40, 25, 1.0)):
        flow = rng.normal(0, 25, (height, width, 2)).astype(np.float32)
        predicted = flow + rng.normal(0, 4, flow.shape).astype(np.float32)
        valid, occluded = (rng.random((2, height, width)) < [[[share]], [[0.2]]]).astype(np.uint8)
        sums.append(metrics.pair_sums(predicted, flow, valid, occluded))
        known = valid == 1
        pairs.append(
            (
                np.linalg.norm((predicted.astype(float) - flow)[known], axis=1),
                np.linalg.norm(flow.astype(float)[known], axis=1),
                occluded[known] == 1,
            )
        )
    error, length, hidden = (np.concatenate(column) for column in zip(*pairs, strict=True))
    found = compute_metrics(np.array(sums))
    expected = {
        "pairs": 3,
        "unlabelled": 0,
        "pixels": error.size,
        "epe": np.mean([pair[0].mean() for pair in pairs]),
        "epe_pixels": error.mean(),
        "zero_epe": np.mean([pair[1].mean() for pair in pairs]),
        "fl_all": 100 * ((error > 3) & (error / length > 0.05)).mean(),
        **{f"over_{limit}px": 100 * (error > limit).mean() for limit in (1, 3, 5)},
        "epe_s0_10": error[length < 10].mean(),
        "epe_s40_plus": error[length > 40].mean(),
        "epe_s10_40": error[(length >= 10) & (length <= 40)].mean(),
        "epe_matched": error[~hidden].mean(),
        "epe_unmatched": error[hidden].mean(),
    }
    expected["ratio"] = expected["epe"] / expected["zero_epe"]
    assert dataclasses.asdict(found) == pytest.approx(expected, rel=1e-5)
    for predicted_epe, pair in zip(metrics.mean_epe(np.array(sums)), pairs, strict=True):
        assert predicted_epe == pytest.approx(pair[0].mean(), rel=1e-5)


def test_unknown_flow_is_left_out_and_nan_is_an_outlier() -> None:
    """A pair without known flow is in no mean; a prediction of nan makes the mean nan."""
    empty, good = one_row([5], [2], valid=[0]), one_row([5], [2])
    found = compute_metrics(np.stack([empty, good]))
    assert found.epe == pytest.approx(2) and found.pairs == 2 and found.pixels == found.unlabelled == 1
    nothing = compute_metrics(empty[None])
    assert np.isnan(nothing.epe) and nothing.fl_all is nothing.epe_s0_10 is None
    broken = compute_metrics(np.stack([one_row([5], [np.nan]), good]))
    assert np.isnan(broken.epe) and broken.fl_all == broken.over_5px == 50


def test_the_worst_pairs_come_in_descending_order() -> None:
    """Equal ones in the order of the split; nan is worst of all, pairs without known flow are left out."""
    sums = np.stack(
        [one_row([5], [error], valid=[known]) for error, known in ((2, 1), (9, 0), (7, 1), (np.nan, 1), (2, 1))]
    )
    assert metrics.find_worst(sums, range(5), 4) == [3, 2, 0, 4]
    assert metrics.find_worst(sums, [4, 0], 1) == [0]


# --- Evaluation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(predictor: FlowPredictor, sintel: pathlib.Path) -> Evaluated:
    """The ten pairs evaluated by one rank in batches of four."""
    split = reader.DatasetSplit.open(sintel, "val")
    return Evaluated(split, evaluate(predictor, split, options=EvaluationOptions(batch=4, pictures=[1], worst=2)))


def raw_figures(release: pathlib.Path, names: list[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Flow magnitudes and occlusion of the known pixels of each pair, from the release's own files."""
    lengths, hidden = [], []
    for name in names:
        inner = name.split("/", 1)[1]
        training = release / "training"
        known = read_image(training / "invalid" / f"{inner}.png")[..., 0] == 0
        flow = read_flo(training / "flow" / f"{inner}.flo")
        lengths.append(np.linalg.norm(flow.astype(float), axis=2)[known])
        hidden.append(read_image(training / "occlusions" / f"{inner}.png")[..., 0][known] > 0)
    return lengths, hidden


def test_an_evaluation_has_the_metrics_of_split_passes_and_scenes(
    result: Evaluated, predictor: FlowPredictor, release: pathlib.Path
) -> None:
    """And the samples to draw."""
    split, evaluation = result
    lengths, hidden = raw_figures(release, split.names)
    summary = report.make_report(split, evaluation)
    assert summary.metrics.pairs == 10 and summary.metrics.pixels == sum(map(len, lengths))
    assert summary.metrics.zero_epe == pytest.approx(np.mean([a.mean() for a in lengths]), rel=1e-6)
    counts = dict(zip(metrics.SUMS, evaluation.sums.sum(0), strict=True))
    assert counts["pixels_unmatched"] == np.concatenate(hidden).sum()
    assert counts["pixels_s0_10"] == (np.concatenate(lengths) < 10).sum()

    passes, scenes = summary.passes, summary.scenes
    assert [entry.pairs for entry in passes.values()] == [5, 5] and list(passes) == ["clean", "final"]
    assert {name: entry["final"].pairs for name, entry in scenes.items()} == {"alley_1": 3, "market_6": 2}
    chosen = [i for i, name in enumerate(split.names) if name.startswith("clean/market_6/")]
    assert scenes["market_6"]["clean"].epe == pytest.approx(evaluation.epe[chosen].mean())
    text = summary.table()
    for value in (passes["clean"].epe, passes["final"].epe_unmatched, summary.metrics.fl_all):
        assert f"{value:.3f}" in text

    assert evaluation.worst == np.argsort(-evaluation.epe, kind="stable")[:2].tolist()
    assert evaluation.samples.keys() == {1, *evaluation.worst}
    sample = evaluation.samples[1]
    images = [read_image(release / "training" / "clean" / "alley_1" / f"frame_000{number}.png") for number in (2, 3)]
    assert split.names[1] == "clean/alley_1/frame_0002" and (sample.image1 == images[0]).all()
    expected = predictor.flow(*images)
    np.testing.assert_allclose(sample.prediction, expected, rtol=1e-3, atol=1e-3)
    error = np.linalg.norm(sample.prediction - sample.flow, axis=2)
    assert evaluation.epe[1] == pytest.approx(np.nanmean(error), rel=1e-5)


def test_without_masks_no_pixel_counts_as_matched(result: Evaluated) -> None:
    assert Evaluation(np.stack([one_row([5], [2])])).metrics().epe_matched is None
    assert result.evaluation.metrics().epe_matched is not None


def test_a_dataset_without_passes_and_scenes_has_one_column(tmp_path: pathlib.Path) -> None:
    folder = tiny.convert("kitti2015", tiny.kitti(tmp_path / "release", 2), tmp_path / "set", "--split-file",
                          tiny.split_file(tmp_path / "val.txt", [0, 1]))  # fmt: skip
    split = reader.DatasetSplit.open(folder, "val")
    summary = report.make_report(split, Evaluation(np.stack([one_row([5], [2])] * 2)))
    assert (summary.passes, summary.scenes) == ({}, {})
    text = summary.table()
    assert "2 pairs of 24x40, 24x48" in text and "matched" not in text and "clean" not in text


@pytest.mark.slow
def test_two_ranks_get_the_metrics_of_one(
    result: Evaluated, sintel: pathlib.Path, ckpt: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Under mpirun each pair counts once, and what does not depend on the network is the same bit for bit; table,
    JSON, Markdown and pictures are written."""
    split, alone = result
    alone_json = report.make_report(split, alone).to_json()
    out = tmp_path / "out"
    status, text, err = command(2, "--data", sintel, "--ckpt", ckpt, "--out", out, "--pictures", 3, "--batch", 5)
    assert status == 0 and "5/5" in err, err
    found = json.loads((out / "evaluation.json").read_text())
    assert [pair["pair"] for pair in found["by_pair"]] == split.names
    sums = np.array([[pair["sums"][name] for name in metrics.SUMS] for pair in found["by_pair"]])
    exact = [i for i, name in enumerate(metrics.SUMS) if name.startswith(("pixels", "zero"))]
    np.testing.assert_array_equal(sums[:, exact], alone.sums[:, exact])
    np.testing.assert_allclose(sums, alone.sums, rtol=1e-4, atol=2)
    assert found["zero_epe"] == alone_json["zero_epe"] and found["pixels"] == alone_json["pixels"]
    for key in (field.name for field in dataclasses.fields(metrics.Metrics)):
        value = alone_json[key]
        assert found[key] == (value if value is None else pytest.approx(value, rel=1e-3)), key
    assert found["scenes"]["alley_1"]["clean"]["pairs"] == 3
    for name in ("clean", "final"):
        assert f"{found['passes'][name]['epe_pixels']:.3f}" in text
    rows = (out / "evaluation.md").read_text().splitlines()
    assert len({row.count("|") for row in rows[:5]}) == 1 and "over all pixels" in rows[-1]
    assert f"| {found['epe']:.3f} |" in rows[4]
    for picture in ("flow.png", "worst.png"):
        assert read_image(out / picture).shape[1] >= 4 * 40


def test_results_on_two_datasets_are_kept_apart(tmp_path: pathlib.Path) -> None:
    """By default; and an empty split is refused before anything is loaded, with those that have pairs."""
    (tmp_path / "best.ckpt").write_bytes(b"weights")
    release = tiny.chairs(tmp_path / "release", 2)
    found = []
    for name, validation in (("one", [0, 1]), ("two", [1])):
        split_file = tiny.split_file(tmp_path / "val.txt", validation)
        data = tiny.convert("flyingchairs", release, tmp_path / name, "--split-file", split_file)
        args = argparse.Namespace(ckpt=tmp_path / "best.ckpt", data=data, split="val", out=None, batch=1, pictures=1,
                                  submission=None, root=None)  # fmt: skip
        prepare(args)
        found.append(args.out)
    assert found == [tmp_path / "best-one-val", tmp_path / "best-two-val"] and not found[0].exists()
    args.data, args.split = tmp_path / "one", "train"
    with pytest.raises(UserError, match=r"one: split train has no pairs; .* --split val$"):
        prepare(args)


def test_bad_options_are_refused(sintel: pathlib.Path, ckpt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With one line and status 1, and without creating a folder."""
    for arguments, words in [
        (["--ckpt", ckpt], ["--data", "--submission"]),
        (["--ckpt", ckpt, "--submission", tmp_path / "out"], ["--root"]),
        (["--ckpt", ckpt, "--data", sintel, "--out", ckpt], [str(ckpt), "is a file"]),
        (["--ckpt", ckpt, "--submission", tmp_path / "out", "--root", sintel], ["contains no test set"]),
    ]:
        status, _, err = command(1, *arguments)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
        assert all(word in err for word in words), err
    assert not (tmp_path / "out").exists()


# --- Submissions ----------------------------------------------------------------------------------


def sintel_test(folder: pathlib.Path, scenes: dict[str, int], height: int = 24, width: int = 40) -> pathlib.Path:
    """The test set of an MPI-Sintel release with `scenes`, name to number of frames."""
    rng = np.random.default_rng(7)
    for kind in ("clean", "final"):
        for scene, frames in scenes.items():
            for number in range(1, frames + 1):
                tiny.save(folder / "test" / kind / scene / f"frame_{number:04}.png", tiny.picture(rng, height, width))
    return folder


def kitti_test(folder: pathlib.Path, pairs: int, frames: str = "image_2") -> pathlib.Path:
    """The test set of a KITTI release whose every second pair is wider."""
    rng = np.random.default_rng(8)
    for number in range(pairs):
        for frame in (10, 11):
            tiny.save(
                folder / "testing" / frames / f"{number:06}_{frame}.png", tiny.picture(rng, 24, 40 + 8 * (number % 2))
            )
    return folder


def predicted(predictor: FlowPredictor, image1: pathlib.Path, image2: pathlib.Path) -> np.ndarray:
    """The flow of two image files, (H, W, 2)."""
    return predictor.flow(read_image(image1), read_image(image2))


def files_in(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_sintel_submission_is_complete(predictor: FlowPredictor, ckpt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Two ranks write every pair of both passes as the network predicts it."""
    root, out = sintel_test(tmp_path / "sintel", {"cave_3": 3, "tiger": 2}), tmp_path / "out"
    status, text, err = command(2, "--submission", out, "--root", root, "--ckpt", ckpt, "--batch", 3)
    assert status == 0 and "6 pairs for Sintel" in text and "1104" in err, err
    names = ["cave_3/frame0001", "cave_3/frame0002", "tiger/frame0001"]
    assert files_in(out) == [f"{kind}/{name}.flo" for kind in ("clean", "final") for name in names]
    scene = root / "test" / "final" / "cave_3"
    expected = predicted(predictor, scene / "frame_0002.png", scene / "frame_0003.png")
    np.testing.assert_allclose(read_flo(out / "final" / "cave_3" / "frame0002.flo"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_kitti_submission_is_complete(predictor: FlowPredictor, ckpt: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With images of two sizes; the files store the flow to 1/64 px, valid everywhere."""
    root, out = kitti_test(tmp_path / "kitti", 3), tmp_path / "out"
    status, text, err = command(1, "--submission", out, "--root", root / "testing", "--ckpt", ckpt)
    assert status == 0 and "3 pairs for KITTI 2015" in text and "200" in err, err
    assert files_in(out) == [f"flow/00000{number}_10.png" for number in range(3)]
    frames = root / "testing" / "image_2"
    for number in (0, 1):
        expected = predicted(predictor, *(frames / f"00000{number}_{f}.png" for f in (10, 11)))
        flow, valid = read_flow(out / "flow" / f"00000{number}_10.png")
        assert valid.all()
        np.testing.assert_allclose(flow, expected, rtol=1e-3, atol=1 / 128 + 1e-3)


def test_a_submission_is_complete_or_absent(predictor: FlowPredictor, tmp_path: pathlib.Path) -> None:
    """After an error, what is written is in OUT.partial, which only the same submission may continue. A folder with
    files is refused, and so are files that another rank wrote to another disk."""
    benchmark = submission.list_test_pairs(kitti_test(tmp_path / "kitti", 3))
    sintel = submission.list_test_pairs(sintel_test(tmp_path / "sintel", {"cave_3": 2}))
    out, partial, image = tmp_path / "out", tmp_path / "out.partial", benchmark.pairs[2].image2
    out.mkdir()
    submission.check_out(out, benchmark)
    whole = image.read_bytes()
    image.write_bytes(whole[:200])
    with pytest.raises(UserError, match=str(image)):
        submission.write_submission(benchmark, out, predictor, 1, ALONE)
    assert files_in(out) == [] and partial.is_dir()
    (partial / "flow").mkdir(exist_ok=True)
    (partial / "flow" / "000000_10.partial-1.png").write_bytes(b"half")
    (partial / "flow" / "000001_10.png").write_bytes(b"of the run before")
    with pytest.raises(UserError, match=rf"is not part of this submission to Sintel; remove {partial}"):
        submission.check_out(out, sintel)

    image.write_bytes(whole)
    submission.check_out(out, benchmark)
    with pytest.raises(UserError, match=r"like 1 of 3 files; .*all hosts share"):
        submission.write_submission(benchmark, tmp_path / "shared", predictor, 1, Communicator(Rank(0, 2)))
    submission.write_submission(benchmark, out, predictor, 1, ALONE)
    assert files_in(out) == [f"flow/00000{number}_10.png" for number in range(3)] and not partial.exists()
    with pytest.raises(UserError, match="not empty"):
        submission.check_out(out, sintel)


def test_a_submission_cannot_replace_the_current_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = submission.list_test_pairs(kitti_test(tmp_path / "kitti", 2))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"here: is the current folder, .*; name a new folder in it"):
        submission.check_out(tmp_path / "here", benchmark)
    assert (tmp_path / "here").is_dir()


def test_a_test_set_is_found_by_its_layout(tmp_path: pathlib.Path) -> None:
    """KITTI 2012 in colour rather than grey; the folder may be that of the release or of the test set."""
    root = kitti_test(kitti_test(tmp_path / "kitti", 2, "image_0"), 2, "colored_0")
    for given in (root, root / "testing"):
        benchmark = submission.list_test_pairs(given)
        assert benchmark.name == "KITTI 2012"
        assert [pair.file for pair in benchmark.pairs] == ["000000_10.png", "000001_10.png"]
        assert benchmark.pairs[1].image2 == root / "testing" / "colored_0" / "000001_11.png"
        assert [len(pairs) for pairs in benchmark.by_size.values()] == [1, 1]


def test_a_release_may_be_in_a_folder_with_the_name_of_the_test_set(tmp_path: pathlib.Path) -> None:
    root = kitti_test(tmp_path / "testing", 2)
    assert [submission.list_test_pairs(root / inner).name for inner in ("", "testing")] == ["KITTI 2015"] * 2


def test_an_incomplete_test_set_is_refused(tmp_path: pathlib.Path, release: pathlib.Path) -> None:
    """The error names what is missing: a frame, a pass, the whole test set."""
    sintel = sintel_test(tmp_path / "sintel", {"cave_3": 4, "tiger": 3})
    kitti = kitti_test(tmp_path / "kitti", 3)
    half = sintel_test(tmp_path / "half", {"cave_3": 2}) / "test"
    (half / "final").rename(tmp_path / "elsewhere")
    (sintel / "test" / "clean" / "cave_3" / "frame_0002.png").unlink()
    (kitti / "testing" / "image_2" / "000001_11.png").unlink()
    short = sintel_test(tmp_path / "short", {"cave_3": 4})
    (short / "test" / "final" / "cave_3" / "frame_0004.png").unlink()
    for root, words in [
        (sintel, ["clean/cave_3/frame_0002.png", "missing"]),
        (kitti, ["000001_11.png", "missing"]),
        (half, [str(half / "final"), "missing"]),
        (short, ["final", "cave_3/frame0003", "lacks"]),
        (release, ["training", "contains no test set"]),
        (release / "training", ["clean", "contains no test set"]),
        (tmp_path / "nowhere", ["no such folder"]),
    ]:
        with pytest.raises(UserError) as error:
            submission.list_test_pairs(root)
        assert all(word in str(error.value) for word in words), error.value
    tiny.save(kitti / "testing" / "image_2" / "000001_11.png", np.zeros((5, 6, 3), np.uint8))
    with pytest.raises(UserError, match=r"5x6 pixels, expected 24x48 as 000001_10\.png"):
        _ = submission.list_test_pairs(kitti).by_size


def test_a_kitti_png_stores_flow_to_a_64th_of_a_pixel(tmp_path: pathlib.Path) -> None:
    """R and G are 64 times the flow plus 2^15, clipped; B says whether it is known."""
    path = tmp_path / "flow.png"
    flow = np.array([[[0, 1], [-2.5, 1 / 64]], [[600, -600], [np.nan, 3]]], np.float32)
    write_kitti_png(path, flow)
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert pixels.dtype == np.uint16 and pixels.tolist() == [
        [[2**15, 2**15 + 64, 1], [2**15 - 160, 2**15 + 1, 1]],
        [[2**16 - 1, 0, 1], [0, 0, 0]],
    ]
    flow = tiny.flow(np.random.default_rng(0), 9, 7)
    write_kitti_png(path, flow)
    found, valid = read_flow(path)
    assert valid.all() and np.abs(found - flow).max() <= 1 / 128
    with pytest.raises(ValueError, match="float64"):
        write_kitti_png(path, flow.astype(float))
