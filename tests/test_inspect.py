"""Inspecting a converted dataset: the statistics are right, image and web page show the pairs."""

import base64
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from prep import datasets
from prep import inspect as inspect_set
from prep.formats.flow import write_flo


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs whose flow is (3, 4) times 1 to 10, of magnitude 5 to 50; a quarter of it is unknown."""
    folder = tmp_path_factory.mktemp("set")
    data = tiny.chairs(folder / "data", 10)
    for number in range(1, 11):
        flow = np.full((24, 40, 2), (3 * number, 4 * number), np.float32)
        flow[:12, :20] = 1e10
        write_flo(data / f"{number:05}_flow.flo", flow)
    list_file = tiny.split_file(folder / "split é.txt", [9])
    return tiny.convert("flyingchairs", data, folder / "a <set> é", "--split-file", list_file)


def run_inspect(*arguments: Any, cwd: Path = tiny.ROOT.parent) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, tiny.ROOT / "prep" / "inspect.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=60)


def test_the_statistics_are_right(converted: Path) -> None:
    done = run_inspect(converted, cwd=tiny.ROOT / "prep")  # where it would hide Python's own inspect
    assert done.returncode == 0, done.stderr
    for text in (
        f"{converted}: flyingchairs, 10 pairs in 10 shards",
        "splits       train 9, val 1",
        "validation   split é.txt",
        "sizes        10 of 40x24",
        "measured on  all pairs",
        "75.0 % with known flow, 0.0 % occluded",
        "mean 27.50 px, maximum 50.0 px; 10 % below 9.50, 50 % below 27.50",
        "     4-8 px  10.0 % ##########\n",
        "   32-64 px  40.0 % ",
    ):
        assert text in done.stdout, text


def test_a_sample_is_spread_evenly_and_said_to_be_one(converted: Path) -> None:
    text = run_inspect(converted, "--pairs", 3).stdout
    assert "a sample of 3 of the 10 pairs" in text and "maximum 50.0 px" in text
    assert inspect_set.spread_evenly(10, 3).tolist() == [0, 4, 9]
    assert inspect_set.spread_evenly(2, 5).tolist() == [0, 1]


def test_the_sheet_shows_pairs_and_marks_unknown_flow(converted: Path, tmp_path: Path) -> None:
    done = run_inspect(converted, "--png", tmp_path / "sheet é.png")
    assert done.returncode == 0, done.stderr
    sheet = np.asarray(Image.open(tmp_path / "sheet é.png"))
    assert sheet.ndim == 3 and sheet.shape[0] > 200 + 8 * 24
    dataset = inspect_set.measure(converted, 10)
    panels = dataset.panels
    assert len(panels) == 8 and panels[0].image.shape == (24, 120, 3)
    flow = panels[0].image[:, 80:]
    assert (flow[:12, :20] == 0).all() and (flow[12:, 20:] == flow[23, 39]).all()
    assert panels[0].caption == "00001 (train), 40x24, mean 5.0, maximum 5.0 px"
    bars = inspect_set.draw_histogram(inspect_set.DISPLACEMENT, [dataset])
    assert bars and (bars.image == inspect_set.COLOURS[0]).all(axis=2).any()


def test_the_page_holds_all_in_one_file(converted: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run_inspect(converted, "--html", page).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert "a &lt;set&gt; é" in text and "<set>" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    images = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(images) == 3 + 8, "a chart of each quantity, and the pairs"
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for data in images)


def make_black(height: int, width: int) -> datasets.Sample:
    """A pair of black images without motion or occlusions."""
    return {
        "image1": np.zeros((height, width, 3), np.uint8),
        "image2": np.zeros((height, width, 3), np.uint8),
        "flow": np.zeros((height, width, 2), np.float32),
        "valid": np.ones((height, width), np.uint8),
        "occluded": np.zeros((height, width), np.uint8),
    }


def test_large_pairs_are_scaled_down_and_unknown_flow_is_no_trouble() -> None:
    sample = make_black(100, 1200)
    sample["valid"][:] = 0
    assert inspect_set.draw_pair(sample).shape == (43, 3 * inspect_set.PANEL_WIDTH, 3)


def test_occluded_pixels_have_a_panel_of_their_own() -> None:
    """White where occluded, black where the flow is unknown, grey elsewhere."""
    sample = make_black(8, 8)
    sample["valid"][0, :2] = 0
    sample["occluded"][0, 1:3] = 1
    drawn = inspect_set.draw_pair(sample)
    assert drawn.shape == (8, 32, 3) and drawn[0, 24:28, 0].tolist() == [0, 255, 255, 110]


# --- Pairs without ground truth, and several datasets ---------------------------------------------


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs without ground truth, of vertical stripes; each frame is 20 grey levels brighter."""
    folder = tmp_path_factory.mktemp("frames")
    for number in range(4):
        stripes = np.full((24, 40, 3), 40 + 20 * number, np.uint8)
        stripes[:, 20:] += 32
        tiny.save(folder / "shots" / f"{number}.png", stripes)
    return tiny.convert("frames", folder / "shots", folder / "frames")


def test_a_dataset_without_ground_truth_shows_brightness_and_texture(frames: Path, tmp_path: Path) -> None:
    done = run_inspect(frames, "--png", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    for text in (
        "frames, 3 pairs in 3 shards, 3 without ground truth",
        "validation   none",
        "brightness   mean 76.00, maximum 112.0; 10 % below 40.00, 50 % below 76.00",
        "texture      mean 0.80 levels/px, maximum 16.0 levels/px",  # 16 in two of 40 columns
        "change       mean difference of both images' brightness 20.00",
        "training needs pairs with ground truth, too",
    ):
        assert text in done.stdout, text
    assert "displacement" not in done.stdout and "known flow" not in done.stdout
    panel = inspect_set.measure(frames, 10).panels[0]
    assert panel.caption == "0 (train-unlabelled), 40x24, no ground truth"
    assert (panel.image[:, 80:] == 20).all(), "the difference of the images"


def test_datasets_are_compared_side_by_side(converted: Path, frames: Path, tmp_path: Path) -> None:
    """What one of them lacks is a dash; charts show both, and the page has a column for each."""
    page = tmp_path / "page.html"
    done = run_inspect(converted, frames, "--html", page)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert str(converted) in lines[0] and lines[0].endswith(f"  {frames}")
    cells = {line[:24].strip(): re.split(r"\s{2,}", line[24:].strip()) for line in lines}
    for name, expected in (
        ("without ground truth", ["0", "3"]),
        ("known flow", ["75.0 %", "-"]),
        ("displacement", ["mean 27.50 px", "-"]),
        ("32-64 px", ["40.0 %", "-"]),
    ):
        assert cells[name] == expected
    assert cells["texture"][1] == "mean 0.80 levels/px"
    # The other dataset has nothing to train on.
    assert f"to train: launch/train.sh --config RECIPE --data '{converted}' --out RUN" in done.stdout
    text = page.read_text(encoding="utf-8")
    assert text.count("<section>") == 2 and len(re.findall("data:image/png", text)) == 3 + 8 + 3
    datasets = [inspect_set.measure(folder, 10) for folder in (converted, frames)]
    chart = inspect_set.draw_histogram(inspect_set.BRIGHTNESS, datasets)
    assert chart and all((chart.image == colour).all(axis=2).any() for colour in inspect_set.COLOURS[:2])
    assert inspect_set.draw_histogram(inspect_set.DISPLACEMENT, datasets[1:]) is None


@pytest.mark.parametrize("arguments,message", [
    (["nowhere"], "expected a folder written by prep/convert.py"),
    (["--pairs", "0"], "--pairs 0: expected 1 or more"),
    (["--png", "nowhere/at all.png"], "nowhere/at all.png"),
    (["--html", "."], "error: .: Is a directory"),
    (["a", "b", "c", "d"], "5 datasets; at most 4 can be compared"),
])  # fmt: skip
def test_a_mistake_is_one_line_of_error(converted: Path, arguments: list[Any], message: str) -> None:
    if arguments[0] != "nowhere":
        arguments = [converted, *arguments]
    done = run_inspect(*arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
