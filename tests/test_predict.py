"""Prediction of pairs, folders and videos of any size; resumed runs; bad input; pictures."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import forked
import numpy as np
import pytest
import tiny
from PIL import Image

from launch.errors import UserError
from model.inference import FlowPredictor
from model.predict import Outputs, PairCounts, make_pairs, open_frames, predict
from prep import flow_viz
from prep.formats.flow import read_flo
from prep.prefetch import prefetch
from prep.synthesis.version1 import make_pair

pytestmark = pytest.mark.usefixtures("graph_mode")

ODD = 70, 93


def write_frames(folder: Path, numbers: Iterable[int], size: tuple[int, int] = ODD) -> Path:
    """A folder of synthetic frames frame_N.png; returns it."""
    for number in numbers:
        tiny.save(folder / f"frame_{number}.png", make_pair(number, *size)[0])
    return folder


def write_video(path: Path, count: int, size: tuple[int, int] = (64, 96)) -> Path:
    """A Motion JPEG video in AVI of four different frames in turn; returns its path."""
    frames = [make_pair(number, *size)[0][..., ::-1].copy() for number in range(4)]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, size[::-1])
    for number in range(count):
        writer.write(frames[number % 4])
    writer.release()
    return path


def run(
    predictor: FlowPredictor,
    inputs: list[Path],
    out: Path,
    *,
    salt: bytes = b"",
    pictures: bool = False,
    overwrite: bool = False,
    batch: int = 1,
) -> PairCounts:
    """What the command does with its inputs."""
    out.mkdir(exist_ok=True)
    outputs = Outputs(out, overlay=pictures, warp=pictures)
    pairs = make_pairs(open_frames(inputs).frames, salt)
    return predict(
        predictor, pairs, outputs.write, batch=batch, is_done=lambda pair: not overwrite and outputs.exist(pair)
    )


def check_flow(predictor: FlowPredictor, path: Path, image1: np.ndarray, image2: np.ndarray) -> None:
    """A .flo file holds what the network gives for two images, at their size."""
    flow = read_flo(path)
    assert flow.shape == (*image1.shape[:2], 2)
    np.testing.assert_allclose(flow, predictor.flow(image1, image2), atol=1e-3)


def test_two_images_of_any_kind_are_a_pair(predictor: FlowPredictor, tmp_path: Path) -> None:
    """Here grey and palette, of an odd size."""
    image1, image2, _, _ = make_pair(5, *ODD)
    grey, colours = Image.fromarray(image1).convert("L"), Image.fromarray(image2).convert("P")
    grey.save(tmp_path / "a.png")
    colours.save(tmp_path / "b.bmp")
    assert run(predictor, [tmp_path / "a.png", tmp_path / "b.bmp"], tmp_path / "out") == (1, 0)
    check_flow(
        predictor, tmp_path / "out" / "a.flo", np.asarray(grey.convert("RGB")), np.asarray(colours.convert("RGB"))
    )
    assert Image.open(tmp_path / "out" / "a_flow.png").size == ODD[::-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.flo", "a_flow.png"]


def test_a_second_run_computes_only_what_is_missing(predictor: FlowPredictor, tmp_path: Path) -> None:
    """Consecutive frames, 9 before 10; outputs of these images and weights stay."""
    frames, out = write_frames(tmp_path / "frames", (8, 9, 10, 11)), tmp_path / "out"
    tiny.save(frames / ".hidden.png", make_pair(1, 8, 8)[0])
    (frames / "notes.txt").write_text("not a frame")

    def again(salt: bytes = b"", overwrite: bool = False) -> PairCounts:
        return run(predictor, [frames], out, pictures=True, batch=2, salt=salt, overwrite=overwrite)

    assert again() == (3, 0)
    images = {number: np.asarray(Image.open(frames / f"frame_{number}.png")) for number in (8, 9, 10, 11)}
    for number in (8, 9, 10):
        check_flow(predictor, out / f"frame_{number}.flo", images[number], images[number + 1])
    assert len(list(out.iterdir())) == 3 * 4
    before = (out / "frame_9.flo").read_bytes()

    assert again() == (0, 3)
    (out / "frame_9.flo").unlink()
    (out / "frame_10_warp.png").unlink()
    assert again() == (2, 1)
    assert (out / "frame_9.flo").read_bytes() == before
    assert again(salt=b"other weights") == (3, 0)
    assert again(salt=b"other weights", overwrite=True) == (3, 0)
    tiny.save(frames / "frame_11.png", make_pair(99, *ODD)[0])
    assert again(salt=b"other weights") == (1, 2)


def test_a_video_gives_the_flow_of_every_frame(predictor: FlowPredictor, tmp_path: Path) -> None:
    """With the next, named by its number, as OpenCV decodes them."""
    path = write_video(tmp_path / "clip.avi", 4)
    video = open_frames([path])
    images = dict(video.frames)
    assert video.count == 4 and list(images) == [f"clip_{number:06}" for number in range(4)]
    original = make_pair(0, 64, 96)[0]
    assert np.abs(images["clip_000000"].astype(int) - original).mean() < 10  # red is red
    assert run(predictor, [path], tmp_path / "out") == (3, 0)
    check_flow(predictor, tmp_path / "out" / "clip_000002.flo", images["clip_000002"], images["clip_000003"])


@pytest.mark.parametrize("size", [(1, 1), (64, 64)])
def test_images_may_have_any_size(predictor: FlowPredictor, tmp_path: Path, size: tuple[int, int]) -> None:
    """Down to a single pixel, for which the images are enlarged to 64 pixels a side."""
    rng, frames = np.random.default_rng(0), tmp_path / "frames"
    for number in (1, 2):
        tiny.save(frames / f"frame_{number}.png", tiny.picture(rng, *size))
    assert run(predictor, [frames], tmp_path / "out", pictures=True) == (1, 0)
    flow = read_flo(tmp_path / "out" / "frame_1.flo")
    assert flow.shape == (*size, 2) and np.isfinite(flow).all()


def test_a_failure_while_writing_ends_the_run(predictor: FlowPredictor, tmp_path: Path) -> None:
    """With the system's error."""
    frames = write_frames(tmp_path / "frames", (1, 2, 3), (64, 64))
    (tmp_path / "out" / "frame_2.flo").mkdir(parents=True)
    with pytest.raises(OSError, match=r"frame_2\.flo"):
        run(predictor, [frames], tmp_path / "out")
    assert (tmp_path / "out" / "frame_1.flo").is_file()


def test_a_failure_while_reading_ends_the_run(predictor: FlowPredictor, tmp_path: Path) -> None:
    """With the frame's name; the outputs of the pairs before it exist."""
    frames = write_frames(tmp_path / "frames", range(1, 6), (64, 64))
    data = (frames / "frame_5.png").read_bytes()
    (frames / "frame_5.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"frame_5\.png"):
        run(predictor, [frames], tmp_path / "out")
    assert (tmp_path / "out" / "frame_1.flo").is_file()


@pytest.mark.parametrize("name", ["a.flo", "a_flow.png", "a_warp.png"])
def test_files_of_others_are_not_replaced(predictor: FlowPredictor, tmp_path: Path, name: str) -> None:
    """Such as ground truth, unless --overwrite asks for it."""
    images, out = [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out"
    for number, path in enumerate(images):
        tiny.save(path, make_pair(number, 64, 64)[0])
    out.mkdir()
    if name.endswith(".png"):
        tiny.save(out / name, make_pair(9, 64, 64)[0])
    else:
        (out / name).write_bytes(b"ground truth")
    before = (out / name).read_bytes()
    with pytest.raises(UserError, match=rf"{name}: already exists and was not written by this command.*--overwrite"):
        run(predictor, images, out, pictures=True)
    assert [path.read_bytes() for path in out.iterdir()] == [before]
    assert run(predictor, images, out, pictures=True, overwrite=True) == (1, 0)
    assert run(predictor, images, out, pictures=True) == (0, 1)


def test_prefetching_keeps_order_and_errors() -> None:
    assert list(prefetch(iter(range(1, 10)), 3)) == list(range(1, 10))

    def broken() -> Iterator[int]:
        yield 1
        raise UserError("broken")

    values = prefetch(broken(), 4)
    assert next(values) == 1
    with pytest.raises(UserError, match="broken"):
        next(values)


def command(*arguments: object) -> tuple[int, str, str]:
    """Run the command as a user does: (status, stdout, stderr)."""
    done = forked.run([*map(str, (tiny.ROOT / "model" / "predict.py", *arguments))])
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs that are wrong in different ways."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save(folder / "a.png", make_pair(1, 64, 64)[0])
    tiny.save(folder / "wide.png", make_pair(2, 64, 80)[0])
    write_frames(folder / "one", [1])
    (folder / "empty").mkdir()
    write_frames(folder / "mixed", [1, 2])
    tiny.save(folder / "mixed" / "frame_3.png", make_pair(3, 64, 64)[0])
    write_frames(folder / "twice", [1, 2])
    tiny.save(folder / "twice" / "frame_1.bmp", make_pair(3, *ODD)[0])
    (folder / "clip.mp4").write_bytes(b"no video" * 100)
    (folder / "text.png").write_text("no image")
    (folder / "bad.ckpt").write_bytes(b"no checkpoint")
    write_video(folder / "still.avi", 1)
    data = write_video(folder / "cut.avi", 4).read_bytes()
    (folder / "cut.avi").write_bytes(data[: data.index(b"00dc", data.index(b"movi") + 8)])
    return folder


@pytest.mark.parametrize(
    "names,words",
    [
        (["none.png", "a.png"], ["none.png", "no such file"]),
        (["a.png"], ["a.png", "is one image", "second"]),
        (["a.png", "a.png", "a.png"], ["3 inputs", "two images"]),
        (["a.png", "one"], ["one", "is a folder"]),
        (["a.png", "wide.png"], ["wide.png", "64x80", "64x64", "crop or resize"]),
        (["a.png", "text.png"], ["text.png", "not a readable image"]),
        (["one"], ["one", "1 frame (", "two"]),
        (["empty"], ["empty", "0 frames"]),
        (["mixed"], ["frame_3.png", "64x64", "70x93", "frame_1.png"]),
        (["twice"], ["frame_1.bmp", "frame_1.png", "rename"]),
        (["clip.mp4"], ["clip.mp4", "is not a video"]),
    ],
)
def test_bad_input_is_one_line(inputs: Path, ckpt: Path, tmp_path: Path, names: list[str], words: list[str]) -> None:
    """It names the file, what was found and what was expected; nothing is written."""
    status, _, err = command(*(inputs / name for name in names), "--ckpt", ckpt, "--out", tmp_path / "out")
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists()


def test_options_are_checked_before_anything_is_computed(inputs: Path, ckpt: Path, tmp_path: Path) -> None:
    """The output folder, the checkpoint and the numbers."""
    folder = write_frames(tmp_path / "frames", [1, 2])
    for name in ("long/1.png", "long/2.png"):
        tiny.save(tmp_path / name, np.zeros((1, 32767, 3), np.uint8))
    pair = folder / "frame_1.png", folder / "frame_2.png"
    for arguments, words in [
        ([folder, "--ckpt", ckpt, "--out", ckpt], ["is a file", "expected a folder"]),
        ([folder, "--ckpt", ckpt, "--out", ckpt / "out"], ["Not a directory"]),
        ([folder, "--ckpt", ckpt, "--out", folder], ["choose another --out"]),
        ([*pair, "--ckpt", ckpt, "--out", folder], ["choose another --out"]),
        ([tmp_path / "long", "--ckpt", ckpt, "--out", tmp_path / "out", "--warp"], ["1x32767", "32,766", "--warp"]),
        ([folder, "--ckpt", "none.ckpt", "--out", tmp_path / "out"], ["none.ckpt"]),
        ([folder, "--ckpt", ckpt, "--out", tmp_path / "out", "--batch", 0], ["--batch"]),
        ([folder, "--ckpt", ckpt, "--out", tmp_path / "out", "--max-flow", "inf"], ["--max-flow inf", "finite"]),
        ([folder, "--ckpt", ckpt, "--out", tmp_path / "out", "--max-flow", "1e-300"], ["--max-flow", "0.001"]),
    ]:
        status, _, err = command(*arguments)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
        for word in words:
            assert word in err


@pytest.mark.slow
def test_errors_found_late_are_one_line_too(inputs: Path, ckpt: Path, tmp_path: Path) -> None:
    """A damaged checkpoint, a video of one frame, and one that is damaged behind its first."""
    for names, weights, words in [
        (["a.png", "a.png"], inputs / "bad.ckpt", ["bad.ckpt", "damaged"]),
        (["still.avi"], ckpt, ["still.avi", "one frame"]),
        (["cut.avi"], ckpt, ["cut.avi", "says it has 4 frames", "damaged"]),
    ]:
        status, _, err = command(*(inputs / name for name in names), "--ckpt", weights, "--out", tmp_path / "out")
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 1 and len(lines) == 1 and "Traceback" not in err, err
        for word in words:
            assert word in lines[0]


@pytest.mark.slow
def test_the_command_says_what_it_did(ckpt: Path, tmp_path: Path) -> None:
    """A video, twice: all pictures, and then nothing left to do but in another precision."""
    path = write_video(tmp_path / "clip.avi", 3)
    arguments = (path, "--ckpt", ckpt, "--out", tmp_path / "out", "--overlay", "--warp", "--max-flow", 10)
    status, out, err = command(*arguments)
    assert status == 0 and "flow of 2 pairs; look at" in out and "2/2" in err, err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"clip_00000{number}{end}" for number in (0, 1) for end in (".flo", "_flow.png", "_overlay.png", "_warp.png")
    }
    status, out, err = command(*arguments)
    assert status == 0 and "flow of 0 pairs, 2 skipped" in out, err
    status, out, err = command(*arguments, "--precision", "float16")
    assert status == 0 and "flow of 2 pairs;" in out, err


@pytest.mark.slow
def test_an_interrupted_run_leaves_whole_files(ckpt: Path, tmp_path: Path) -> None:
    """Ctrl-C says how to resume; a truncated video is predicted to its end."""
    path, out = write_video(tmp_path / "clip.avi", 300), tmp_path / "out"
    process = subprocess.Popen(
        [*map(str, (sys.executable, tiny.ROOT / "model" / "predict.py", path, "--ckpt", ckpt, "--out", out))],
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(out.glob("*.flo"))) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "resumes from here" in err, err
    done = list(out.glob("*_flow.png"))
    assert len(list(out.iterdir())) == 2 * len(done) and len(done) < 299

    data = path.read_bytes()
    path.write_bytes(data[: len(data) * (len(done) + 5) // 300])
    status, text, err = command(path, "--ckpt", ckpt, "--out", out)
    assert status == 0 and f"{len(done)} skipped" in text and "cut short" in err, (text, err)


def test_an_overlay_colours_only_what_moves() -> None:
    """What does not is grey, as light as the image."""
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, 3:] = 255
    still = flow_viz.overlay_flow(image, np.zeros((4, 6, 2), np.float32))
    assert (still[..., 0] == still[..., 1]).all() and (still[..., 0] == still[..., 2]).all()
    assert still[0, 5, 0] > still[0, 0, 0] > 0
    right = flow_viz.overlay_flow(image, np.full((4, 6, 2), [5, 0], np.float32), 5.0)
    assert (right[..., 0] > 2 * right[..., 1:].max(2)).all()


def test_the_right_flow_warps_image_2_onto_image_1() -> None:
    """Except where it leaves the frame."""
    image1 = make_pair(4, 40, 60)[0]
    image2 = np.roll(image1, (-2, 3), (0, 1))
    panels = flow_viz.draw_warp_check(image1, image2, np.full((40, 60, 2), [3, -2], np.float32))
    assert panels.shape == (80, 120, 3)
    assert (panels[60:80, 60:117] == 0).all()  # below the labels
    assert panels[60:80, :60].mean() > 1
    np.testing.assert_array_equal(panels[20:40, 60:117], image1[20:, :57])


def test_the_typical_flow_ignores_a_few_fast_pixels() -> None:
    """It is at least one pixel."""
    flow = np.zeros((100, 100, 2), np.float32)
    assert flow_viz.typical_max_flow(flow) == 1
    flow[...] = [3, 4]
    flow[0, 0] = [1000, 0]
    assert flow_viz.typical_max_flow(flow) == pytest.approx(5)


def test_a_png_keeps_its_note(tmp_path: Path) -> None:
    """Files without one, broken or absent, have none."""
    path = tmp_path / "a.png"
    flow_viz.save_png(path, np.zeros((4, 4, 3), np.uint8), note="a key")
    assert flow_viz.png_note(path) == "a key"
    flow_viz.save_png(path, np.zeros((4, 4, 3), np.uint8))
    assert flow_viz.png_note(path) is None
    Path(path).write_text("no picture")
    assert flow_viz.png_note(path) is None and flow_viz.png_note(tmp_path / "b.png") is None
