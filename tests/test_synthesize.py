"""The synthesize command, and version 1 of the pairs: reproducible bytes, exact flow, occlusions, displacements."""

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import tiny
from warping import pull_back

from launch.errors import UserError
from prep import synthesize
from prep.datasets import flyingchairs
from prep.formats import flow as flow_format
from prep.formats import image as image_format
from prep.synthesis import version1
from prep.synthesis.textures import BLOCK

SCRIPT = Path(synthesize.__file__)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def square_layer(left: int, top: int, shift_x: int, grey: int) -> version1.Layer:
    """An opaque 20x20 square at (left, top) that moves `shift_x` pixels to the right."""
    patch = np.full((20, 20, 4), grey, np.uint8)
    patch[..., 3] = 255
    pose, motion = np.eye(3), np.eye(3)
    pose[:2, 2] = left, top
    motion[0, 2] = shift_x
    return version1.Layer(patch, cv2.BORDER_CONSTANT, pose, motion)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["synthesize.py", *map(str, arguments)])
    synthesize.main()


@pytest.mark.parametrize("profile", [1, 2])
def test_same_seed_same_bytes_whatever_the_workers_and_the_number_of_pairs(tmp_path: Path, profile: int) -> None:
    pairs = BLOCK + 1 if profile == 2 else 5  # in two jobs
    spec = synthesize.SyntheticSpec(pairs, height=48, width=64, seed=7, profile=profile)
    synthesize.write_dataset(tmp_path / "one", spec, workers=1)
    synthesize.write_dataset(tmp_path / "two", spec, workers=2)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")
    name = f"{pairs:05d}_img2.ppm"
    synthesize.write_some(tmp_path, range(pairs, pairs + 1), replace(spec, pairs=99))
    alone = (tmp_path / name).read_bytes()
    assert alone == (tmp_path / "two" / name).read_bytes()
    synthesize.write_some(tmp_path, range(pairs, pairs + 1), replace(spec, seed=8))
    assert alone != (tmp_path / name).read_bytes()


def test_profile_1_still_makes_the_bytes_of_release_0_9(tmp_path: Path) -> None:
    """The hash is of that release's files; synthesize.json is the same too, so its datasets count as complete."""
    spec = synthesize.SyntheticSpec(pairs=6, height=48, width=64, seed=7, profile=1)
    synthesize.write_dataset(tmp_path / "set", spec, workers=1)
    written = all_bytes(tmp_path / "set")
    names = ["00005_img1.ppm", "00005_img2.ppm", "00005_flow.flo", "synthesize.json", "validation.txt"]
    digest = hashlib.sha256(b"".join(written[name] for name in names))
    assert digest.hexdigest() == "08fb1db18c63a40c43240a942261a1022ffbf6ff88c07b4e5e1bd68f49aa2f1b"
    assert len(written) == 6 * 3 + 2


@pytest.mark.parametrize("profile, parts", [(1, ()), (2, ("flow_b.flo", "occ1.png", "occ2.png"))])
def test_it_has_the_flyingchairs_layout_and_a_validation_list(
    tmp_path: Path, profile: int, parts: tuple[str, ...]
) -> None:
    synthesize.write_dataset(tmp_path / "set", synthesize.SyntheticSpec(12, 32, 48, 0, profile), workers=2)
    parts = ("img1.ppm", "img2.ppm", "flow.flo", *parts)
    expected = {f"{number:05d}_{part}" for number in range(1, 13) for part in parts}
    lists = {"validation.txt", "synthesize.json"} | ({"pairs.csv"} if profile == 2 else set())
    assert set(all_bytes(tmp_path / "set")) == expected | lists
    assert len(flyingchairs.list_pairs(tmp_path / "set", "")) == 12
    assert image_format.read_image(str(tmp_path / "set/00001_img1.ppm")).shape == (32, 48, 3)
    assert flow_format.read_flo(str(tmp_path / "set/00012_flow.flo")).shape == (32, 48, 2)
    title, *indices = (tmp_path / "set/validation.txt").read_text().splitlines()
    assert title.startswith("#") and indices == ["9"]
    assert not (tmp_path / "set.partial").exists()


def test_png_frames_have_the_same_pixels_and_the_list_names_all_files(tmp_path: Path) -> None:
    spec = synthesize.SyntheticSpec(11, 32, 48, 3)
    synthesize.write_dataset(tmp_path / "ppm", spec, workers=1)
    synthesize.write_dataset(tmp_path / "png", replace(spec, format="png"), workers=1)
    with open(tmp_path / "png/pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == 9 * ["train"] + ["val", "train"]
    for row in rows:
        for column in ("image1", "image2"):
            pixels = image_format.read_image(tmp_path / "png" / row[column])
            ppm = tmp_path / "ppm" / row[column].replace(".png", ".ppm")
            assert np.array_equal(pixels, image_format.read_image(ppm))
        assert flow_format.read_flo(tmp_path / "png" / row["flow"]).shape == (32, 48, 2)
        mask = image_format.read_image(tmp_path / "png" / row["occluded"])
        assert mask.shape == (32, 48, 3) and set(np.unique(mask)) <= {0, 255}


@pytest.mark.parametrize("pairs, expected", [(1, [0]), (4, [3]), (10, [9]), (31, [9, 19, 29])])
def test_about_a_tenth_is_for_validation_and_one_at_least(pairs: int, expected: list[int]) -> None:
    assert list(synthesize.validation_indices(pairs)) == expected


@pytest.mark.parametrize("seed", range(6))
def test_second_image_warped_by_the_flow_is_the_first_where_not_occluded(seed: int) -> None:
    image1, image2, flow, occluded = version1.make_pair(seed, 128, 192)
    assert image1.dtype == image2.dtype == np.uint8 and flow.dtype == np.float32
    assert image1.shape == image2.shape == (128, 192, 3) and flow.shape == (128, 192, 2)
    visible = ~occluded
    difference = np.abs(np.clip(pull_back(image2, flow, order=3), 0, 255) - image1).mean(-1)
    error = difference[visible].mean()
    assert visible.mean() > 0.4
    assert error < 2.5
    # The test can fail: without the flow, or with its sign wrong, the frames do not agree.
    for wrong in (image2, np.clip(pull_back(image2, -flow, order=3), 0, 255)):
        assert np.abs(wrong.astype(float) - image1).mean(-1)[visible].mean() > 4 * error


@pytest.mark.parametrize("seed", range(6))
def test_occluded_pixels_are_not_found_again(seed: int) -> None:
    image1, image2, flow, occluded = version1.make_pair(seed, 128, 192)
    difference = np.abs(np.clip(pull_back(image2, flow, order=3), 0, 255) - image1).mean(-1)
    assert difference[occluded].mean() > 5 * difference[~occluded].mean()
    _, columns = np.indices(occluded.shape)
    left_the_frame = (columns + flow[..., 0] < 0) | (columns + flow[..., 0] > 191)
    assert occluded[left_the_frame].all()


def test_layer_in_front_decides_the_flow_and_hides_what_it_moves_over() -> None:
    back = replace(square_layer(0, 0, 0, 50), border=cv2.BORDER_REFLECT_101)  # repeated: it fills the frame
    middle, front = square_layer(10, 10, 0, 100), square_layer(25, 10, -8, 200)
    layers = [back, middle, front]
    image1, label1 = version1.render(layers, [layer.pose for layer in layers], 40, 60)
    _, label2 = version1.render(layers, [layer.motion @ layer.pose for layer in layers], 40, 60)
    flow = version1.flow_from_labels(label1, [layer.motion for layer in layers])
    assert image1[15, 28].tolist() == [200] * 3  # both squares are here, the later is in front
    assert flow[15, 28].tolist() == [-8, 0] and flow[15, 20].tolist() == [0, 0]
    occluded = version1.find_occluded(flow, label1, label2)
    expected = np.zeros((40, 60), bool)
    expected[10:30, 17:25] = True  # the front square arrives there
    assert (occluded == expected).all()


@pytest.mark.parametrize("height, width", [(48, 64), (96, 128)])
def test_displacements_are_like_those_of_flyingchairs_and_scale_with_the_size(height: int, width: int) -> None:
    flows = [version1.make_pair([1, seed], height, width)[2] for seed in range(120)]
    length = np.linalg.norm(flows, axis=-1) * 512 / width
    assert 8 < length.mean() < 14  # FlyingChairs: 11
    assert np.median(length) < 0.6 * length.mean()  # many small ones
    assert 0.02 < (length > 40).mean() < 0.1  # and a few large ones


def test_images_are_textured_bright_and_dark() -> None:
    images = np.stack([version1.make_pair(seed, 64, 96)[0] for seed in range(40)]).astype(float)
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
        ["--fog", "1.5"],
        ["--soft-edges", "-0.1"],
        ["--noise", "nan"],
    ],
)
def test_bad_arguments_are_user_errors_that_name_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    with pytest.raises(UserError, match=f"^{arguments[0]} {arguments[1]}: expected"):
        run_main(monkeypatch, "--out", tmp_path / "set", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--profile", "1", "--fog", "0"], "--fog: needs --profile 2"),
        (["--profile", "1", "--format", "png"], "--format: needs --profile 2"),
        (["--photographs", "1"], "--photographs: needs --textures"),
        (["--textures", "missing"], "--textures missing: is not a folder"),
    ],
)
def test_options_that_contradict_each_other_are_user_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        run_main(monkeypatch, "--out", tmp_path / "set", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, content", [("z.jpg", b"not a photograph"), ("z.jpg", b""), ("z.png", None)])
def test_a_bad_photograph_among_good_ones_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None
) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(20):
        tiny.save(folder / f"{number}.png", np.full((9, 9, 3), number, np.uint8))
    if content is None:
        cv2.imwrite(str(folder / name), np.full((9, 9, 4), 100, np.uint8))
    else:
        (folder / name).write_bytes(content)
    monkeypatch.setattr(synthesize, "write_pairs", lambda *_: pytest.fail("it has begun to write"))
    with pytest.raises(UserError, match=rf"{name}: (not a readable image|parts of the image are transparent)"):
        run_main(monkeypatch, "--out", tmp_path / "set", "--textures", folder, "--pairs", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["photographs"]


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
    with pytest.raises(UserError, match=r"fog 0\.05 instead of 0\.5"):
        run_main(monkeypatch, *common, "--pairs", 2, "--fog", 0.5)
    with pytest.raises(UserError, match="version 2 instead of 1"):
        run_main(monkeypatch, *common, "--pairs", 2, "--profile", 1)
    assert all_bytes(tmp_path / "set") == before


def test_a_dataset_that_lacks_a_file_is_not_complete(tmp_path: Path) -> None:
    spec = synthesize.SyntheticSpec(2, 32, 32, seed=1)
    synthesize.write_dataset(tmp_path / "set", spec, workers=1)
    assert sorted(spec.file_names()) == sorted(all_bytes(tmp_path / "set"))
    for name in ("00002_img1.ppm", "00001_occ2.png"):
        (tmp_path / "set" / name).unlink()
        with pytest.raises(UserError, match=f"/set/{name}: is missing, expected .*; remove the folder and run"):
            synthesize.write_dataset(tmp_path / "set", spec, workers=1)


def test_files_that_vanish_while_others_are_written_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesize, "write_pairs", lambda *_: None)
    with pytest.raises(UserError, match=r"/set\.partial/00001_img1\.ppm: is missing"):
        synthesize.write_dataset(tmp_path / "set", synthesize.SyntheticSpec(2, 32, 32, seed=1), workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to write 200 pairs to `tmp_path / "set"`."""
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--out", tmp_path / "set", "--pairs", "200", "--workers", "2", "--size", "64x96"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("set.partial/*.flo")) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield process
        process.kill()


def test_a_second_run_to_the_same_folder_is_refused(tmp_path: Path, writing: subprocess.Popen[str]) -> None:
    writing.send_signal(signal.SIGSTOP)
    spec = synthesize.SyntheticSpec(200, 64, 96, seed=1)
    with pytest.raises(UserError, match=rf"/set\.partial: another synthesis is writing to it, process {writing.pid} "):
        synthesize.write_dataset(tmp_path / "set", spec, workers=1)
    writing.send_signal(signal.SIGCONT)
    assert writing.wait(60) == 0
    assert sorted(spec.file_names()) == sorted(os.listdir(tmp_path / "set"))


def test_what_a_killed_run_left_is_replaced(tmp_path: Path, writing: subprocess.Popen[str]) -> None:
    """Its workers end, too: they would go on to write files."""
    workers = psutil.Process(writing.pid).children()
    writing.kill()
    assert not psutil.wait_procs(workers, timeout=20)[1]
    spec = synthesize.SyntheticSpec(2, 32, 32, seed=1)
    synthesize.write_dataset(tmp_path / "set", spec, workers=1)
    assert sorted(spec.file_names()) == sorted(os.listdir(tmp_path / "set"))
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("kind", ["conversion", "file", "link"])
def test_what_another_command_left_in_the_place_of_the_work_folder_is_kept(tmp_path: Path, kind: str) -> None:
    partial = tmp_path / "set.partial"
    if kind == "conversion":
        partial.mkdir()
        (partial / "plan.json").write_text("{}")
    elif kind == "file":
        partial.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to("elsewhere")
    found = "a folder with plan.json" if kind == "conversion" else "a file or link"
    with pytest.raises(UserError, match=rf"/set\.partial: already exists .* \(it is {found}\); move it away or"):
        synthesize.write_dataset(tmp_path / "set", synthesize.SyntheticSpec(1, 32, 32, seed=1), workers=1)
    assert os.path.lexists(partial) and not (tmp_path / "set").exists()
    assert kind != "conversion" or os.listdir(partial) == ["plan.json"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    run_main(monkeypatch, "--out", tmp_path / "link", "--pairs", 1, "--size", "32x32")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target/synthesize.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_the_current_folder_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesize, "write_pairs", lambda *_: pytest.fail("it has begun to write"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r": is the current folder, .*; name a new folder in it, such as .*/data"):
        run_main(monkeypatch, "--out", ".")
    assert os.listdir(tmp_path) == []


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path) -> None:
    """The mount is one that only a comparison of devices would miss, and ends with the command."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    script = 'mount --bind "$0" "$0" || exit 77; exec "$@"'
    command = [sys.executable, SCRIPT, "--out", mounted, "--pairs", "9999"]
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, mounted, *command], capture_output=True, text=True, timeout=60
    )
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip("nothing can be mounted here")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {mounted}: is a mount point, so the finished folder cannot take its place")
    assert f"; name a new folder in it, such as {mounted}/data" in result.stderr
    assert os.listdir(tmp_path) == ["mounted"]


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, writing: subprocess.Popen[str]) -> None:
    os.killpg(writing.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, complaint = writing.communicate(timeout=60)
    assert writing.returncode == 130
    assert "Traceback" not in complaint
    assert list(tmp_path.iterdir()) == []
