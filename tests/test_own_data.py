"""Your own data: lists of pairs, folders of frames, videos; what they become, and what is wrong with them."""

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import forked
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from launch.errors import UserError
from prep import datasets, reader
from prep.datasets import frames, pairs
from prep.formats.flow import read_flow, write_flo
from prep.formats.video import Decoder, scan_video
from prep.shards import Manifest

HEIGHT, WIDTH = 24, 40


def run_convert(*words: Any, cwd: Path = tiny.ROOT) -> subprocess.CompletedProcess[str]:
    return forked.run([*map(str, (tiny.ROOT / "prep" / "convert.py", *words))], cwd)


def convert(*words: Any, out: Path) -> Path:
    """A conversion that must succeed; returns `out`."""
    done = run_convert(*words, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def refusal(*words: Any, out: Path) -> str:
    """The line of error of a conversion that must fail, and leave nothing behind unless that line says so."""
    done = run_convert(*words, "--out", out)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    left = [f"{out.name}.partial"] if lines[0].endswith(f"to resume from {out}.partial") else []
    assert [path.name for path in out.parent.glob(f"{out.name}*")] == left
    return lines[0]


def write_list(path: Path, *rows: dict[str, str]) -> Path:
    """A CSV list of pairs with the columns of its first row."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with frames 1.png to 4.png, flow 1.flo to 3.flo, and the masks valid.png and occluded.png."""
    folder, rng = tmp_path / "my data é", np.random.default_rng(0)
    for number in range(1, 5):
        tiny.save(folder / f"{number}.png", tiny.picture(rng, HEIGHT, WIDTH))
        write_flo(folder / f"{number}.flo", tiny.flow(rng, HEIGHT, WIDTH))
    for name in ("valid", "occluded"):
        tiny.save(folder / f"{name}.png", tiny.mask(rng, HEIGHT, WIDTH))
    return folder


ROWS = [
    {"image1": "1.png", "image2": "2.png", "flow": "1.flo", "valid": "valid.png", "occluded": "occluded.png"},
    {"image1": "2.png", "image2": "3.png", "flow": "2.flo"},
    {"image1": "3.png", "image2": "4.png"},
]
"""One pair with everything, one with flow alone, one without ground truth."""


def rows_of(*rows: dict[str, str], **values: str) -> list[dict[str, str]]:
    """Rows that all have the columns of the first one, with `values` in the last one."""
    complete = [dict.fromkeys(rows[0], "") | row for row in rows]
    complete[-1] |= values
    return complete


# --- Lists of pairs -------------------------------------------------------------------------------


def test_a_list_becomes_a_dataset_with_its_masks(files: Path, tmp_path: Path) -> None:
    """Pairs with flow, with masks and without ground truth arrive as they are, the last one marked."""
    list_file = write_list(files / "pairs.csv", *rows_of(*ROWS))
    done = run_convert("pairs", "--list", list_file, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "3 pairs, 3 for training and 0 for validation; 1 without ground truth" in done.stdout
    split = reader.DatasetSplit.open(tmp_path / "out", "train")
    assert split.names == ["1", "2", "3"] and split.labelled.tolist() == [True, True, False]
    assert reader.DatasetSplit.open(tmp_path / "out", "train-unlabelled").names == ["3"]
    first, second, third = tiny.evaluation(tmp_path / "out", "train", batch=1)
    valid, occluded = (np.asarray(Image.open(files / f"{name}.png")) // 255 for name in ("valid", "occluded"))
    assert np.array_equal(first.valid[0], valid) and np.array_equal(tiny.occluded(first)[0], occluded)
    assert np.array_equal(first.image2[0], np.asarray(Image.open(files / "2.png")))
    assert second.valid.all() and not tiny.occluded(second).any()
    assert second.flow.tobytes() == (files / "2.flo").read_bytes()[12:]
    assert np.array_equal(third.image1[0], np.asarray(Image.open(files / "3.png")))
    assert not third.valid.any() and not third.flow.any() and not tiny.occluded(third).any()


def test_a_dataset_with_ground_truth_for_all_pairs_is_written_as_before(files: Path, tmp_path: Path) -> None:
    """Older toolkits read it; with an unlabelled pair, they say that they are too old."""
    out = convert("pairs", "--list", write_list(files / "a.csv", ROWS[1]), out=tmp_path / "a")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["schema_version"] == 1 and "labelled" not in manifest["shards"][0]
    out = convert("pairs", "--list", write_list(files / "b.csv", ROWS[2]), out=tmp_path / "b")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["schema_version"] == 2 and manifest["shards"][0]["labelled"] is False
    assert Manifest.load(out).unlabelled == 1


@pytest.mark.parametrize("suffix", ["csv", "tsv", "semicolons", "jsonl", "excel"])
def test_every_format_of_a_list_says_the_same(files: Path, suffix: str) -> None:
    """The content tells the format, so the name of the file does not matter."""
    rows = rows_of(*ROWS, split="val", name="last")
    for row in rows[:-1]:
        row |= {"split": "", "name": ""}
    path = files / f"pairs.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({k: v or None for k, v in row.items()}) + "\n\n" for row in rows))
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], delimiter={"tsv": "\t", "semicolons": ";"}.get(suffix, ","))
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), "utf-8-sig" if suffix == "excel" else "utf-8")
    listed = pairs.PairList(path).list_pairs(files, "")
    assert [(pair.name, pair.held_out, bool(pair.flow), bool(pair.valid)) for pair in listed] == [
        ("1", False, True, True),
        ("2", False, True, False),
        ("last", True, False, False),
    ]
    assert listed[0].occluded == files / "occluded.png"


def test_the_example_is_a_list() -> None:
    """What `pairs --example` prints is understood, and has every column."""
    done = run_convert("pairs", "--example")
    assert done.returncode == 0 and not done.stderr
    path = Path(__file__).parent / "pairs.csv"  # need not exist
    rows = list(pairs._read_table(path, done.stdout.splitlines()))
    assert len(rows) == 4 and rows[0].values.keys() == set(pairs.COLUMNS)


def test_paths_are_relative_to_root(files: Path, tmp_path: Path) -> None:
    list_file = write_list(tmp_path / "pairs.csv", {"image1": f"{files.name}/1.png", "image2": str(files / "2.png")})
    out = convert("pairs", "--list", list_file, "--root", tmp_path, out=tmp_path / "a")
    assert reader.DatasetSplit.open(out, "train").names == [f"{files.name}/1"]
    line = refusal("pairs", "--list", list_file, "--root", files, out=tmp_path / "b")
    assert f"pairs.csv, line 2: image1 {files}/{files.name}/1.png: no such file" in line


def make_pairs(labelled: int, unlabelled: int) -> list[datasets.PairFiles]:
    path = Path("x")
    return [
        datasets.PairFiles(str(i), path, path, path if i < labelled else None) for i in range(labelled + unlabelled)
    ]


@given(st.integers(1, 400), st.integers(0, 30), st.floats(0.01, 0.99))
def test_a_share_is_held_out_in_blocks(labelled: int, unlabelled: int, share: float) -> None:
    """About the share of the pairs with flow, at least one if there are two, never all, and none without flow."""
    held_out = [pair.held_out for pair in pairs.hold_out(make_pairs(labelled, unlabelled), share)]
    number = sum(held_out)
    assert abs(number - share * labelled) <= max(1, labelled / 100) and number < labelled
    assert number or labelled == 1
    assert not any(held_out[labelled:])


def test_a_share_takes_the_end_of_each_hundred() -> None:
    held_out = [pair.held_out for pair in pairs.hold_out(make_pairs(200, 0), 0.1)]
    assert [i for i, chosen in enumerate(held_out) if chosen] == [*range(90, 100), *range(190, 200)]
    assert sum(pair.held_out for pair in pairs.hold_out(make_pairs(0, 20), 0.1)) == 2


def test_options_of_other_datasets_are_refused(files: Path, tmp_path: Path) -> None:
    for words, message in (
        (["frames", "--root", files, "--val-share", 0.1], "--val-share is an option of pairs, not of frames"),
        (["sintel", "--root", files, "--step", 2], "--step is an option of frames, not of sintel"),
        (["sintel", "--root", files, "--example"], "--example is an option of pairs, not of sintel"),
        (["frames", "--root", files, "--nan-is-unknown"], "--nan-is-unknown is an option of pairs, not of frames"),
        (["frames"], "required: --root"),
        (["pairs"], "required: --list"),
        (["frames", "--root", files, "--step", 0], "expected numbers of at least 1"),
        (["pairs", "--list", files / "a.csv", "--val-share", 1], "--val-share 1: expected a share between 0 and 1"),
    ):
        done = run_convert(*words, "--out", tmp_path / "out")
        assert done.returncode in (1, 2) and message in done.stderr.splitlines()[-1]


def write_as(suffix: str, flow: np.ndarray, path: Path) -> Path:
    """Write flow in a format; returns the path."""
    path = path.with_suffix(suffix)
    if suffix == ".npy":
        np.save(path, flow)
    elif suffix == ".npz":
        np.savez_compressed(path, flow=flow)
    elif suffix == ".pfm":
        rows = np.dstack([flow, np.zeros(flow.shape[:2])])[::-1].astype("<f4")
        path.write_bytes(b"PF\n%d %d\n-1\n" % (WIDTH, HEIGHT) + rows.tobytes())
    elif suffix == ".png":
        tiny.save_kitti(path, flow, np.ones(flow.shape[:2]))
    elif suffix == ".flo5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file.create_dataset("flow", data=flow)
    else:
        write_flo(path, flow)
    return path


def test_every_format_of_images_and_flow(files: Path, tmp_path: Path) -> None:
    """The list may mix them, in any case; of 16 bits, the upper 8 are used, with one note."""
    flow = np.round(64 * tiny.flow(np.random.default_rng(1), HEIGHT, WIDTH)) / 64  # what KITTI's format can say
    image = np.asarray(Image.open(files / "1.png"))
    frames = ["a.png", "a.ppm", "a.webp", "a.tif", "a.bmp", "deep.png", "deep.tif"]
    for name in frames[:5]:
        Image.fromarray(image).save(files / name, lossless=True)  # which only WebP knows
    for name in ("deep.png", "deep.tif"):
        cv2.imwrite(str(files / name), image[..., ::-1].astype(np.uint16) << 8)
    suffixes = (".flo", ".pfm", ".png", ".flo5", ".npy", ".npz")
    flows = [write_as(suffix, flow.astype(np.float32), files / "flow") for suffix in suffixes]
    flows = [path.rename(path.with_suffix(path.suffix.upper())).name for path in flows]
    rows = [
        {"image1": name, "image2": "2.png", "flow": flows[i % len(flows)], "name": name}
        for i, name in enumerate(frames)
    ]
    list_file = write_list(files / "pairs.csv", *rows)
    done = run_convert("pairs", "--list", list_file, "--out", tmp_path / "out", "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("16 bits per channel; of such images, the upper 8 bits are used") == 1
    for batch in tiny.evaluation(tmp_path / "out", "train", batch=1):
        assert np.array_equal(batch.image1[0], image)
        assert np.array_equal(batch.flow[0], flow) and batch.valid.all()


# --- Lists with mistakes --------------------------------------------------------------------------


@pytest.mark.parametrize("text,message", [
    ("", "lists no pairs; expected rows with image1, image2"),
    ("image1,image2\n", "lists no pairs"),
    ("image1,flow\n1.png,1.flo\n", "line 1: has no column image2; expected image1, image2, flow"),
    ("image1,image2,flo\n", "line 1: unknown column 'flo'; did you mean flow?"),
    ("image1,image2,image1\n", "line 1: has two columns image1"),
    ("image1,image2\n1.png\n", "line 2: has 1 value, expected 2 as in the header"),
    ("image1,image2\na, b.png,2.png\n", "line 2: has 3 values, .* contains ',' must be in quotation marks"),
    ('image1,image2\n1.png,"2.png\n', "line 2: not a valid table"),
    ("image1,image2\n\n1.png,\n", "line 3: image2 is empty"),
    ("image1,image2\n1.png,2.png\n5.png,2.png\n", "line 3: image1 .*5.png: no such file; paths are relative"),
    ("image1,image2\n1.png,.\n", "line 2: image2 .*: is a folder, expected a file"),
    (f"image1,image2\n1.png,{'x' * 300}\n", "line 2: image2 .*: no such file"),
    ("image1,image2\n1.png,2.png\n1.png,3.png\n", "line 3: the name '1' is already that of line 2"),
    ("image1,image2,name\n1.png,2.png,a\n2.png,3.png,a\n", "line 3: the name 'a' is already that of line 2"),
    ("image1,image2,valid\n1.png,2.png,valid.png\n", "line 2: has valid but no flow"),
    ("image1,image2,split\n1.png,2.png,test\n", "line 2: split is 'test', expected train or val"),
    ('{"image1": "1.png"}\n', "line 1: has no column image2"),
    ('{"image1": "1.png", "image2": "2.png"}\n{"image1": 3, "image2": "2.png"}\n',
     "line 2: image1 is 3, expected text"),
    ('{"image1": "1.png", "image2": NaN}\n', "line 1: image2 is nan, expected text"),
    ('{"image1": "1.png", "image2": "2.png"}\n[1]\n', "line 2: expected a JSON object"),
    ('{"image1": "1.png", "image1": "2.png"}\n', "line 1: not valid JSON .a key is given twice"),
    ('{"image1": "1.png"\n', "line 1: not valid JSON"),
    ('[{"image1": "1.png", "image2": "2.png"}]\n', "begins with '\\[' like a JSON array; expected one JSON object per"),
    ("\xff", "is not UTF-8 text"),
])  # fmt: skip
def test_a_mistake_in_a_list_is_named_with_its_line(files: Path, text: str, message: str) -> None:
    path = files / "pairs.csv"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=f"pairs.csv(: |, ){message}"):
        pairs.PairList(path).list_pairs(files, "")


def test_a_list_with_a_split_needs_no_share(files: Path) -> None:
    path = write_list(files / "pairs.csv", {**ROWS[1], "split": "val"})
    with pytest.raises(UserError, match="has a 'split' column; remove --val-share or the column"):
        pairs.PairList(path, val_share=0.1).list_pairs(files, "")
    with pytest.raises(UserError, match="has a 'split' column; remove --split-file or the column"):
        pairs.PairList(path, split_file=True).list_pairs(files, "")


@pytest.mark.parametrize(
    "column,options,note",
    [
        ("val", [], "no pairs for training; mark some as train in the list's 'split' column"),
        ("train", [], "no pairs for validation; mark some as val in a 'split' column of the list or, without one,"),
        (None, ["--val-share", "0.1"], "no pairs for validation; --val-share 0.1 of 1 pair leaves none"),
        (None, ["--split-file", "all.txt"], "no pairs for training; give a different --split-file"),
    ],
)
def test_the_remedy_for_an_empty_split_is_possible(
    files: Path, tmp_path: Path, column: str | None, options: list[str], note: str
) -> None:
    tiny.split_file(tmp_path / "all.txt", [0])
    list_file = write_list(files / "pairs.csv", {**ROWS[1], "split": column or ""})
    words = ["--out", tmp_path / "out", *options]
    assert note in run_convert("pairs", "--list", list_file, *words, cwd=tmp_path).stderr


def test_a_share_and_a_split_file_contradict_each_other(files: Path, tmp_path: Path) -> None:
    path = write_list(files / "pairs.csv", ROWS[1], ROWS[1] | {"image1": "1.png"})
    split = tiny.split_file(tmp_path / "val.txt", [0])
    words = ["pairs", "--list", path, "--split-file", split]
    line = refusal(*words, "--val-share", 0.5, out=tmp_path / "out")
    assert "--split-file and --val-share both choose the validation pairs; leave one out" in line
    write_list(path, {**ROWS[1], "split": "val"})
    assert "has a 'split' column; remove --split-file or the column" in refusal(*words, out=tmp_path / "out")


def test_a_name_that_is_not_text_is_named_with_its_line(files: Path, tmp_path: Path) -> None:
    path = files / "pairs.jsonl"
    path.write_text(json.dumps({"image1": "1.png", "image2": "2.png", "name": "a\nb"}))
    line = refusal("pairs", "--list", path, out=tmp_path / "out")
    assert f"{path}, line 1: the pair's name 'a\\nb' is not UTF-8 or has control characters; give it another" in line


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_list_or_one_error(data: bytes) -> None:
    class Bytes(type(Path())):
        def read_bytes(self) -> bytes:
            return data

    try:
        rows = pairs.read_rows(Bytes("pairs.csv"))
    except UserError as error:
        assert str(error).startswith("pairs.csv")
    else:
        assert all(row.values.keys() <= set(pairs.COLUMNS) for row in rows)


cells = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), min_size=1, max_size=20).map(
    str.strip
)


@given(st.lists(st.tuples(cells.filter(bool), cells.filter(bool)), min_size=1, max_size=5), st.sampled_from("\t,;"))
def test_any_text_survives_a_table(rows: list[tuple[str, str]], delimiter: str) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([("image1", "image2"), *rows])
    found = pairs._read_table(Path("pairs.csv"), text.getvalue().split("\n"))
    assert [(row.values["image1"], row.values["image2"]) for row in found] == rows


def spoil_flow(folder: Path, value: float, pixels: int) -> None:
    """Write a value to the first pixels of 2.flo."""
    data = bytearray((folder / "2.flo").read_bytes())
    data[12 : 12 + 8 * pixels] = np.full(2 * pixels, value, np.float32).tobytes()
    (folder / "2.flo").write_bytes(data)


def resize(folder: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(folder / name)


@pytest.mark.parametrize("spoil,message", [
    (lambda folder: resize(folder, "3.png"), "3.png: 8x8 pixels, expected 40x24 as in 2.flo"),
    (lambda folder: write_flo(folder / "2.flo", np.zeros((8, 8, 2), np.float32)),
     "2.png: 40x24 pixels, expected 8x8 as in 2.flo"),
    (lambda folder: spoil_flow(folder, np.nan, 3), "2.flo: NaN at 3 of 960 pixels, the first at row 0, column 0"),
    (lambda folder: spoil_flow(folder, 1e10, 960), "2.flo: contains no known flow; leave the 'flow' column empty"),
    (lambda folder: (folder / "2.flo").write_bytes(b"x"), "2.flo: 1 bytes, expected a .flo file"),
    (lambda folder: (folder / "3.png").write_bytes(b"x"), "3.png: not a readable image"),
])  # fmt: skip
def test_files_that_contradict_each_other_are_named_with_their_line(
    files: Path, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    """What a header shows is found before anything is written."""
    spoil(files)
    list_file = write_list(files / "pairs.csv", *rows_of(*ROWS))
    line = refusal("pairs", "--list", list_file, "--workers", 1, out=tmp_path / "out")
    assert line.startswith(f"error: {list_file}, line 3: {files}/") and message in line


def test_nan_may_mean_unknown_if_a_mask_or_an_option_says_so(files: Path, tmp_path: Path) -> None:
    spoil_flow(files, np.nan, 3)
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[0, :3] = 0
    tiny.save(files / "mask.png", mask)
    row = {**ROWS[1], "valid": "mask.png"}
    masked = convert("pairs", "--list", write_list(files / "a.csv", row), out=tmp_path / "a")
    option = convert("pairs", "--list", write_list(files / "b.csv", ROWS[1]), "--nan-is-unknown", out=tmp_path / "b")
    for out in (masked, option):
        (batch,) = tiny.evaluation(out, "train", batch=1)
        assert np.array_equal(batch.valid[0], mask // 255) and np.isfinite(batch.flow).all()
    mask[0, 2] = 1
    tiny.save(files / "mask.png", mask)
    line = refusal("pairs", "--list", files / "a.csv", out=tmp_path / "c")
    assert "mask.png: marks 1 pixels as valid at which 2.flo is NaN or over 1e9, the first at row 0, column 2" in line


def test_a_list_may_be_corrected_in_any_way_before_it_is_resumed(files: Path, tmp_path: Path) -> None:
    """Without the wrong pair, the others are in other shards; with the advised option, they are in the same ones."""
    spoil_flow(files, np.nan, 3)
    list_file = write_list(files / "pairs.csv", *rows_of(*ROWS))
    for corrected, options in ((rows_of(ROWS[0], ROWS[2]), []), (rows_of(*ROWS), ["--nan-is-unknown"])):
        write_list(list_file, *rows_of(*ROWS))
        assert "NaN at 3" in refusal("pairs", "--list", list_file, "--workers", 1, out=tmp_path / "out")
        write_list(list_file, *corrected)
        resumed = convert("pairs", "--list", list_file, *options, out=tmp_path / "out")
        fresh = convert("pairs", "--list", list_file, *options, out=tmp_path / "fresh")
        assert {path.name: path.read_bytes() for path in resumed.iterdir()} == {
            path.name: path.read_bytes() for path in fresh.iterdir()
        }
        shutil.rmtree(resumed)
        shutil.rmtree(fresh)


def test_the_same_list_is_recognised_and_a_changed_one_is_not(files: Path, tmp_path: Path) -> None:
    list_file = write_list(files / "pairs.csv", *rows_of(*ROWS))
    out = convert("pairs", "--list", list_file, out=tmp_path / "out")
    assert "nothing to do" in run_convert("pairs", "--list", list_file, "--out", out).stdout
    write_list(list_file, *rows_of(*ROWS, image2="2.png"))
    done = run_convert("pairs", "--list", list_file, "--out", out)
    assert done.returncode == 1 and "contains another dataset (pairs, made by" in done.stderr


# --- Frames ---------------------------------------------------------------------------------------


def write_video(path: Path, images: list[np.ndarray]) -> Path:
    """A Motion JPEG video in AVI at 10 frames per second; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = images[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, size)
    for image in images:
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()
    return path


def grey_frames(count: int) -> list[np.ndarray]:
    """Frames that tell their number: 10 grey levels brighter each."""
    return [np.full((64, 96, 3), 10 * number, np.uint8) for number in range(count)]


def numbers_in(images: np.ndarray) -> list[int]:
    """The numbers of such frames in a batch."""
    return np.rint(images.mean((1, 2, 3)) / 10).astype(int).tolist()


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Two folders of frames, one of them with a single frame, and a video; frame 10 comes after frame 9."""
    folder = tmp_path / "shots"
    for number, image in enumerate(grey_frames(12)):
        tiny.save(folder / "walk" / f"{number}.png", image)
    tiny.save(folder / "still" / "1.png", grey_frames(1)[0])
    tiny.save(folder / ".hidden" / "1.png", grey_frames(1)[0])
    (folder / "walk" / "notes.txt").touch()
    write_video(folder / "ride.avi", grey_frames(10))
    return folder


@pytest.mark.parametrize("step,stride", [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_frames_of_folders_and_videos_become_pairs(shots: Path, tmp_path: Path, step: int, stride: int) -> None:
    options = ["--step", step, "--stride", stride, "--shards", 4]
    out = convert("frames", "--root", shots, *options, out=tmp_path / "out")
    split = reader.DatasetSplit.open(out, "train")
    expected = [("ride.avi/{:06}", first, first + step) for first in range(0, 10 - step, stride)]
    expected += [("walk/{}", first, first + step) for first in range(0, 12 - step, stride)]
    assert split.names == [name.format(first) for name, first, _ in expected]
    batches = tiny.evaluation(out, "train", batch=1)
    found = [(*numbers_in(batch.image1), *numbers_in(batch.image2)) for batch in batches]
    assert found == [(first, second) for _, first, second in sorted(expected)]
    assert not split.labelled.any() and not len(reader.DatasetSplit.open(out, "val"))


def test_a_video_alone(shots: Path, tmp_path: Path) -> None:
    done = run_convert("frames", "--root", shots / "ride.avi", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "9 pairs, 9 for training" in done.stdout and "training needs pairs with ground truth, too" in done.stdout


def test_frames_are_decoded_in_any_order(shots: Path) -> None:
    decoder = Decoder(shots / "ride.avi", 2)
    for number in (0, 1, 3, 2, 7, 5, 9, 0, 4):
        assert numbers_in(decoder.frame(number)[None]) == [number]
    with pytest.raises(UserError, match="ends before frame 10"):
        decoder.frame(10)


def test_a_video_whose_path_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    """OpenCV would crash."""
    path = tmp_path / "ride\udce9.avi"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"ride\\udce9\.avi': the path is not UTF-8; rename it"):
        scan_video(path)


@pytest.mark.parametrize("suffix,codec", [("avi", "MJPG"), ("avi", "mp4v"), ("mkv", "mp4v"), ("mp4", "mp4v")])
def test_a_truncated_video_is_refused(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"ride.{suffix}"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, (96, 64))
    for _ in range(40):
        writer.write(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    writer.release()
    assert scan_video(path).frames == 40
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    line = refusal("frames", "--root", tmp_path, out=tmp_path.parent / "out")
    assert str(path) in line and "truncated" in line


@pytest.mark.parametrize("spoil,message", [
    (lambda folder: shutil.rmtree(folder), "shots: does not exist; expected a folder of frames or a video"),
    (lambda folder: [shutil.rmtree(folder / "walk"), (folder / "ride.avi").unlink()],
     "shots: contains no pairs of frames; expected folders with more than 1 images"),
    (lambda folder: resize(folder, "walk/7.png"), "walk/7.png: 8x8 pixels, expected 96x64 as in 6.png"),
    (lambda folder: (folder / "walk/7.png").write_bytes(b"x"), "walk/7.png: not a readable image"),
    (lambda folder: (folder / "walk/11.PNG").touch(), "walk/11.png: 11.PNG has the same name; remove or rename one"),
    (lambda folder: (folder / "walk/12.png").symlink_to("nowhere"),
     "walk/12.png: a broken link; restore the file that it leads to, or remove the link"),
    (lambda folder: (folder / "gone.avi").symlink_to("nowhere"), "gone.avi: a broken link; restore the file"),
    (lambda folder: (folder / "ride.avi").write_bytes(b"x" * 99), "ride.avi: is not a video that OpenCV can decode"),
])  # fmt: skip
def test_a_mistake_in_frames_is_named(shots: Path, tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(shots)
    assert message in refusal("frames", "--root", shots, out=tmp_path / "out")


def test_links_are_followed_unless_they_lead_back(shots: Path, tmp_path: Path) -> None:
    """Data sets are often made of links. What is skipped is said."""
    (shots / "again").symlink_to("walk")
    (shots / "walk" / "up").symlink_to("..")
    (shots / "lost").symlink_to("nowhere")
    os.mkfifo(shots / "walk" / "pipe.png")
    done = run_convert("frames", "--root", shots, "--out", tmp_path / "out", "--step", 6)
    assert done.returncode == 0, done.stderr
    names = reader.DatasetSplit.open(tmp_path / "out", "train").names
    expected = {"again": 6, "ride.avi": 4, "walk": 6}
    assert {folder: sum(name.startswith(folder + "/") for name in names) for folder in expected} == expected
    assert len(names) == 16
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: {shots}/again/pipe.png: skipped: not a file",
        f"note: {shots}/again/up: skipped: a link to one of its parent folders",
        f"note: {shots}/lost: skipped: a broken link",
        f"note: {shots}/walk/pipe.png: skipped: not a file",
        f"note: {shots}/walk/up: skipped: a link to one of its parent folders",
        f"note: {shots}: skipped 2 files in unknown formats; the first is {shots}/again/notes.txt",
    ]


def test_another_step_is_another_dataset(shots: Path, tmp_path: Path) -> None:
    """The files of a video are the same, whatever the step."""
    out = convert("frames", "--root", shots / "ride.avi", out=tmp_path / "out")
    done = run_convert("frames", "--root", shots / "ride.avi", "--out", out, "--step", 2)
    assert done.returncode == 1 and "contains another dataset" in done.stderr


def test_pairs_and_frames_are_read_from_an_archive(files: Path, shots: Path, tmp_path: Path) -> None:
    """Without unpacking it; only videos must be files of their own."""
    list_file = write_list(tmp_path / "pairs.csv", *rows_of(*ROWS))
    shutil.make_archive(str(tmp_path / "a"), "zip", files)
    shutil.make_archive(str(tmp_path / "b"), "zip", shots / "walk")
    found = convert("pairs", "--list", list_file, "--root", tmp_path / "a.zip", out=tmp_path / "a")
    expected = convert("pairs", "--list", list_file, "--root", files, out=tmp_path / "a2")
    batches = [tiny.evaluation(folder, "train", batch=1) for folder in (found, expected)]
    for one, other in zip(*batches, strict=True):
        assert np.array_equal(one.image1, other.image1) and np.array_equal(one.flow, other.flow)
    assert len(Manifest.load(convert("frames", "--root", tmp_path / "b.zip", out=tmp_path / "b"))) == 11
    shutil.make_archive(str(tmp_path / "c"), "zip", shots)
    line = refusal("frames", "--root", tmp_path / "c.zip", out=tmp_path / "d")
    assert "c.zip/ride.avi: a video cannot be read in an archive; unpack it" in line


def test_files_of_a_list_are_found_in_archives_beside_it_and_in_folders(files: Path, tmp_path: Path) -> None:
    """As those of a release are; paths may begin with ./."""
    rows = [{"image1": f"./{i}.png", "image2": f"./{i + 1}.png", "flow": f"./{i}.flo"} for i in (1, 2)]
    list_file = write_list(tmp_path / "pairs.csv", *rows)
    shutil.make_archive(str(tmp_path / "files"), "zip", files)
    shutil.make_archive(str(tmp_path / "around"), "zip", files.parent, files.name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "files.zip").rename(tmp_path / "folder" / "files.zip")
    for root in (tmp_path / "folder", tmp_path / "around.zip"):
        dataset = datasets.Dataset("Custom pairs", pairs.PairList(list_file).list_pairs)
        found = datasets.find_release(dataset, root)
        listed = dataset.list_pairs(found, "")
        assert np.array_equal(datasets.read_pair(listed[1])["flow"], read_flow(files / "2.flo")[0])
    write_list(list_file, *rows_of(*rows, flow="9.flo"))
    with pytest.raises(UserError, match=r"line 3: flow .*/around.zip/my data é/9.flo: no such file"):
        pairs.PairList(list_file).list_pairs(found, "")


def test_what_frames_leave_out_is_said_once(shots: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if the folder is listed again, because it may contain archives of frames."""
    shutil.rmtree(shots / "walk")
    (shots / "more.zip").write_bytes(b"not read")
    sequences = datasets.Dataset("Frames", frames.FrameSequences().list_pairs)
    assert len(sequences.list_pairs(datasets.find_release(sequences, shots), "")) == 9
    assert capsys.readouterr().err == (
        f"note: {shots}: skipped 1 file in unknown formats; the first is {shots}/more.zip\n"
    )


def test_numbers_in_names_count_by_value(tmp_path: Path) -> None:
    for name in ("10.png", "9.PNG", "a2.jpg", "a10.jpg", ".9.png", "9.txt"):
        (tmp_path / name).touch()
    (tmp_path / "11.png").mkdir()
    assert frames.image_names(tmp_path) == ["9.PNG", "10.png", "a2.jpg", "a10.jpg"]


def test_a_pair_of_a_video_lists_its_file(shots: Path) -> None:
    pair = frames.FrameSequences().list_pairs(shots / "ride.avi", "")[0]
    assert set(pair.files()) == {shots / "ride.avi"} and datasets.pair_size(pair) == (64, 96)
    broken = dataclasses.replace(pair, frames=dataclasses.replace(pair.frames, second=99)) if pair.frames else pair
    with pytest.raises(datasets.BadPair, match=r"ride.avi: ends before frame 99"):
        datasets.read_pair(broken)
