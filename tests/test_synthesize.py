"""Synthetic pairs: reproducible bytes, exact flow, occlusions, displacements, command line."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy import ndimage

from launch.errors import UserError
from prep import synthesize
from prep.formats import flow as flow_format
from prep.formats import image as image_format

SCRIPT = Path(synthesize.__file__)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def pull_back(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The image warped by the flow, with cubic splines of another library than the one that rendered it."""
    rows, columns = np.indices(flow.shape[:2])
    places = [rows + flow[..., 1], columns + flow[..., 0]]
    channels = [
        ndimage.map_coordinates(channel.astype(float), places, order=3, mode="nearest")
        for channel in np.moveaxis(image, -1, 0)
    ]
    return np.clip(np.stack(channels, -1), 0, 255)


def square_layer(left: int, top: int, shift_x: int, grey: int) -> synthesize.Layer:
    """An opaque 20x20 square at (left, top) that moves `shift_x` pixels to the right."""
    patch = np.full((20, 20, 4), grey, np.uint8)
    patch[..., 3] = 255
    pose, motion = np.eye(3), np.eye(3)
    pose[:2, 2] = left, top
    motion[0, 2] = shift_x
    return synthesize.Layer(patch, cv2.BORDER_CONSTANT, pose, motion)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["synthesize.py", *map(str, arguments)])
    synthesize.main()


def test_same_seed_same_bytes_whatever_the_workers_and_the_number_of_pairs(tmp_path: Path) -> None:
    recipe = synthesize.Recipe(pairs=5, height=48, width=64, seed=7)
    synthesize.write_dataset(tmp_path / "one", recipe, workers=1)
    synthesize.write_dataset(tmp_path / "two", recipe, workers=2)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")
    synthesize.write_pair(tmp_path, 5, replace(recipe, pairs=9))
    alone = (tmp_path / "00005_img2.ppm").read_bytes()
    assert alone == (tmp_path / "two" / "00005_img2.ppm").read_bytes()
    synthesize.write_pair(tmp_path, 5, replace(recipe, seed=8))
    assert alone != (tmp_path / "00005_img2.ppm").read_bytes()


def test_it_has_the_flyingchairs_layout_and_a_validation_list(tmp_path: Path) -> None:
    synthesize.write_dataset(tmp_path / "set", synthesize.Recipe(12, 32, 48, 0), workers=2)
    expected = {f"{number:05d}_{part}" for number in range(1, 13) for part in ("img1.ppm", "img2.ppm", "flow.flo")}
    assert set(all_bytes(tmp_path / "set")) == expected | {"validation.txt", "synthesize.json"}
    assert image_format.read_image(str(tmp_path / "set/00001_img1.ppm")).shape == (32, 48, 3)
    assert flow_format.read_flo(str(tmp_path / "set/00012_flow.flo")).shape == (32, 48, 2)
    title, *indices = (tmp_path / "set/validation.txt").read_text().splitlines()
    assert title.startswith("#") and indices == ["9"]
    assert not (tmp_path / "set.partial").exists()


@pytest.mark.parametrize("pairs, expected", [(1, [0]), (4, [3]), (10, [9]), (31, [9, 19, 29])])
def test_about_a_tenth_is_for_validation_and_one_at_least(pairs: int, expected: list[int]) -> None:
    assert list(synthesize.validation_indices(pairs)) == expected


@pytest.mark.parametrize("seed", range(6))
def test_second_image_warped_by_the_flow_is_the_first_where_not_occluded(seed: int) -> None:
    image1, image2, flow, occluded = synthesize.make_pair(seed, 128, 192)
    assert image1.dtype == image2.dtype == np.uint8 and flow.dtype == np.float32
    assert image1.shape == image2.shape == (128, 192, 3) and flow.shape == (128, 192, 2)
    visible = ~occluded
    difference = np.abs(pull_back(image2, flow) - image1).mean(-1)
    error = difference[visible].mean()
    assert visible.mean() > 0.4
    assert error < 2.5
    # The test can fail: without the flow, or with its sign wrong, the frames do not agree.
    for wrong in (image2, pull_back(image2, -flow)):
        assert np.abs(wrong.astype(float) - image1).mean(-1)[visible].mean() > 4 * error


@pytest.mark.parametrize("seed", range(6))
def test_occluded_pixels_are_not_found_again(seed: int) -> None:
    image1, image2, flow, occluded = synthesize.make_pair(seed, 128, 192)
    difference = np.abs(pull_back(image2, flow) - image1).mean(-1)
    assert difference[occluded].mean() > 5 * difference[~occluded].mean()
    _, columns = np.indices(occluded.shape)
    left_the_frame = (columns + flow[..., 0] < 0) | (columns + flow[..., 0] > 191)
    assert occluded[left_the_frame].all()


def test_layer_in_front_decides_the_flow_and_hides_what_it_moves_over() -> None:
    back = replace(square_layer(0, 0, 0, 50), border=cv2.BORDER_REFLECT_101)  # repeated: it fills the frame
    middle, front = square_layer(10, 10, 0, 100), square_layer(25, 10, -8, 200)
    layers = [back, middle, front]
    image1, label1 = synthesize.render(layers, [layer.pose for layer in layers], 40, 60)
    _, label2 = synthesize.render(layers, [layer.motion @ layer.pose for layer in layers], 40, 60)
    flow = synthesize.flow_from_labels(label1, [layer.motion for layer in layers])
    assert image1[15, 28].tolist() == [200] * 3  # both squares are here, the later is in front
    assert flow[15, 28].tolist() == [-8, 0] and flow[15, 20].tolist() == [0, 0]
    occluded = synthesize.find_occluded(flow, label1, label2)
    expected = np.zeros((40, 60), bool)
    expected[10:30, 17:25] = True  # the front square arrives there
    assert (occluded == expected).all()


@pytest.mark.parametrize("height, width", [(48, 64), (96, 128)])
def test_displacements_are_like_those_of_flyingchairs_and_scale_with_the_size(height: int, width: int) -> None:
    flows = [synthesize.make_pair([1, seed], height, width)[2] for seed in range(120)]
    length = np.linalg.norm(flows, axis=-1) * 512 / width
    assert 8 < length.mean() < 14  # FlyingChairs: 11
    assert np.median(length) < 0.6 * length.mean()  # many small ones
    assert 0.02 < (length > 40).mean() < 0.1  # and a few large ones


def test_images_are_textured_bright_and_dark() -> None:
    images = np.stack([synthesize.make_pair(seed, 64, 96)[0] for seed in range(40)]).astype(float)
    brightness = images.mean(axis=(1, 2, 3))
    assert brightness.std() > 20
    assert 60 < brightness.mean() < 160
    assert (images.std(axis=(1, 2)).mean(-1) > 10).mean() > 0.9
    assert np.ptp(images, axis=-1).mean() > 15  # in colour


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size", "128"],
        ["--size", "0x64"],
        ["--size", "64x9999"],
        ["--size", "axb"],
        ["--pairs", "0"],
        ["--pairs", "100000"],
        ["--seed", "-1"],
        ["--workers", "0"],
    ],
)
def test_bad_arguments_are_user_errors_that_name_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    with pytest.raises(UserError, match=f"^{arguments[0]} {arguments[1]}: expected"):
        run_main(monkeypatch, "--out", tmp_path / "set", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    result = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path, "--pairs", "1"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_complete_dataset_is_recognised_and_another_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--out", tmp_path / "set", "--size", "32x32", "--workers", 1]
    run_main(monkeypatch, *common, "--pairs", 2)
    before = all_bytes(tmp_path / "set")
    run_main(monkeypatch, *common, "--pairs", 2)
    assert "already complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="pairs 2 instead of 3"):
        run_main(monkeypatch, *common, "--pairs", 3)
    assert all_bytes(tmp_path / "set") == before


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--out", tmp_path / "set", "--pairs", "5000", "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("set.partial/*.flo")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in complaint
    assert list(tmp_path.iterdir()) == []
