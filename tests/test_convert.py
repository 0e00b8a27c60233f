"""Conversion as a user runs it: its result, splits, interruptions, bad input."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
from PIL import Image

from launch.errors import UserError
from prep import codec, convert, datasets, reader, shards
from prep.datasets import flyingchairs, sintel, splits
from prep.datasets.flyingchairs import FLYINGCHAIRS
from prep.datasets.kitti import KITTI2015
from prep.datasets.sintel import SINTEL
from prep.shards import FIELDS, Manifest, decode_record


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.chairs(tmp_path_factory.mktemp("chairs") / "data", 12)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop(*arguments: Any) -> str:
    """Run a conversion that must fail with one line of error; returns that line."""
    done = tiny.run_convert(*arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 and done.stderr.strip().splitlines()[-1] == lines[0], done.stderr
    return lines[0]


# --- What is written ------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_workers_and_ranks(root: Path, tmp_path: Path) -> None:
    """Its hashes identify a dataset in papers and bug reports."""
    one = tiny.convert("flyingchairs", root, tmp_path / "1", "--shards", 5, "--workers", 3)
    ranks = tiny.mpirun(3, "prep/convert.py", "flyingchairs", "--root", root, "--out",
                        tmp_path / "2", "--shards", 5, "--workers", 1)  # fmt: skip
    out, err = ranks.communicate(timeout=60)
    assert ranks.returncode == 0, err
    assert out.count("11 for training") == 1, "one rank speaks for all"
    assert contents(one) == contents(tmp_path / "2")
    assert sorted(contents(one)) == sorted(
        ["manifest.json"]
        + [f"train-0000{i}-of-00005.mindrecord{s}" for i in range(5) for s in ("", ".db")]
        + [f"val-00000-of-00001.mindrecord{s}" for s in ("", ".db")]
    )


def test_the_manifest_says_what_is_there(root: Path, tmp_path: Path) -> None:
    list_file = tiny.split_file(tmp_path / "mine.txt", [0, 11])
    out = tiny.convert("flyingchairs", root, tmp_path / "o", "--shards", 3, "--split-file", list_file)
    manifest = Manifest.load(out)
    assert manifest.dataset == "flyingchairs" and manifest.validation["file"] == "mine.txt"
    assert reader.DatasetSplit.open(out, "val").names == ["00001", "00012"]
    assert reader.DatasetSplit.open(out, "train").names == [f"{i:05}" for i in range(2, 12)]
    for shard in manifest.shards.values():
        shard.check_bytes(out)
        assert (out / shard.file).stat().st_mode & 0o777 == 0o666 & ~umask()


def test_a_dataset_may_be_all_for_validation(root: Path, tmp_path: Path) -> None:
    """It then has the requested number of shards, not one per pair."""
    every = tiny.split_file(tmp_path / "all.txt", range(12))
    out = tiny.convert("flyingchairs", root, tmp_path / "o", "--shards", 2, "--split-file", every)
    assert sorted(Manifest.load(out).shards) == [f"val-0000{i}-of-00002.mindrecord" for i in (0, 1)]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_release_folder_may_be_given_instead_of_its_data_folder(root: Path, tmp_path: Path) -> None:
    assert flyingchairs.list_pairs(root.parent, "") == flyingchairs.list_pairs(root, "")


def test_fixed_splits_have_their_published_sizes() -> None:
    for dataset, val in ((FLYINGCHAIRS, 640), (SINTEL, 133)):
        assert dataset.validation and dataset.pairs
        indices, _ = splits.read_split_file(splits.FOLDER / dataset.validation)
        assert len(set(indices)) == val and max(indices) < dataset.pairs


def test_the_fixed_split_knows_each_pair_by_its_name(tmp_path: Path) -> None:
    """What is missing moves no other pair to the other side of the split: index 5 is 00006, whatever is before it."""
    root = tiny.chairs(tmp_path / "data", 7)
    for suffix in flyingchairs.SUFFIXES:
        (root / f"00003{suffix}").unlink()
    done = tiny.run_convert("flyingchairs", root, tmp_path / "out", "--shards", 1)
    assert done.returncode == 0, done.stderr
    assert "found 6 of the release's 22,872 pairs; each stays on its side of the fixed split" in done.stderr
    assert reader.DatasetSplit.open(tmp_path / "out", "val").names == ["00006"]
    for suffix in flyingchairs.SUFFIXES:
        (root / f"00002{suffix}").rename(root / f"mine{suffix}")
    line = stop("flyingchairs", root, tmp_path / "out2")
    assert "mine_flow.flo: pair mine is not in the original release, to which the fixed validation split refers" in line


def test_the_fixed_splits_of_scenes_and_numbers(tmp_path: Path) -> None:
    """Of a part of the releases: where a scene of Sintel begins, and KITTI's numbers."""
    assert sum(sintel.SCENES.values()) == SINTEL.pairs and list(sintel.SCENES) == sorted(sintel.SCENES)
    assert SINTEL.validation and KITTI2015.validation
    indices = splits.read_split_file(splits.FOLDER / SINTEL.validation).indices
    root = tiny.sintel(tmp_path / "sintel", {"ambush_6": 3, "bamboo_2": 27, "market_5": 3, "market_6": 3, "mine": 3})
    pairs = sintel.list_pairs(root, "final")
    with pytest.raises(UserError, match=r"pair final/mine/frame_0001 is not in the original release"):
        splits.fixed_indices(pairs, indices)
    held_out = [pairs[index].name for index in splits.fixed_indices(pairs[:-2], indices)]
    assert held_out == [
        f"final/{scene}/frame_{frame:04}"
        for scene, frames in (("ambush_6", (1, 2)), ("bamboo_2", (25, 26)), ("market_6", (1, 2)))
        for frame in frames
    ]
    root = tiny.kitti(tmp_path / "kitti", 11)
    (root / "training/flow_occ/000003_10.png").unlink()
    pairs = KITTI2015.list_pairs(root, "")
    indices = splits.read_split_file(splits.FOLDER / KITTI2015.validation).indices
    assert [pairs[index].name for index in splits.fixed_indices(pairs, indices)] == ["000009"]


def test_a_real_flyingchairs_pair_comes_back_bit_for_bit(tmp_path: Path) -> None:
    if not tiny.SAMPLES.exists():
        pytest.skip(f"{tiny.SAMPLES} does not exist")
    out = tiny.convert("flyingchairs", tiny.SAMPLES, tmp_path / "a dataset é")
    (pair,) = flyingchairs.list_pairs(tiny.SAMPLES, "")
    sample = datasets.read_pair(pair)
    (batch,) = tiny.evaluation(out, "train", batch=1)
    for field, array in sample.items():
        assert getattr(batch, field)[0].tobytes() == array.tobytes()


def test_the_readmes_decoder_reads_a_shard_without_this_project(root: Path, tmp_path: Path) -> None:
    """The documented format is the real one."""
    _, _, code = (tiny.ROOT / "prep" / "README.md").read_text().partition("```python\n")
    code = code.partition("```")[0]
    out = tiny.convert("flyingchairs", root, tmp_path / "out", "--shards", 1)
    command = [sys.executable, "-c", code, str(out / "train-00000-of-00001.mindrecord")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sample = datasets.read_pair(flyingchairs.list_pairs(root, "")[0])
    image1, flow = sample["image1"], sample["flow"]
    assert done.stdout == f"{image1.shape} {image1[0, 0]} {flow.shape} {flow[0, 0]}\n"


# --- MPI-Sintel -----------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return tiny.sintel(tmp_path / "sintel", {"alley_1": 4, "market_2": 3})


def test_sintel_passes_share_a_split_and_keep_masks_and_unknown_flow(release: Path, tmp_path: Path) -> None:
    """Unknown flow is stored bit for bit and invalid in batches."""
    path = release / "training/flow/alley_1/frame_0002.flo"
    data = bytearray(path.read_bytes())
    data[12:20] = np.array([1e10, np.nan], np.float32).tobytes()
    path.write_bytes(data)
    list_file = tiny.split_file(tmp_path / "val.txt", [1])  # frame_0002, in both passes
    out = tiny.convert("sintel", release, tmp_path / "out", "--shards", 2, "--split-file", list_file)
    frame = "alley_1/frame_0002"
    assert reader.DatasetSplit.open(out, "val").names == [f"clean/{frame}", f"final/{frame}"]
    assert reader.DatasetSplit.open(out, "val-final").names == [f"final/{frame}"]
    assert [len(reader.DatasetSplit.open(out, name)) for name in ("train", "train-clean")] == [8, 4]
    (batch,) = tiny.evaluation(out, "val-final", batch=1)
    flow, valid = batch.flow, batch.valid
    training = release / "training"
    for found, number in ((batch.image1, 2), (batch.image2, 3)):
        expected = Image.open(training / f"final/alley_1/frame_000{number}.png")
        assert np.array_equal(found[0], np.asarray(expected))
    invalid = np.asarray(Image.open(training / f"invalid/{frame}.png")) != 0
    invalid[0, 0] = True  # where the flow is not known
    assert np.array_equal(valid[0], ~invalid)
    assert np.isfinite(flow).all() and (flow[0][invalid] == 0).all()
    stored = stored_pair(out, "val-final", f"final/{frame}")
    assert stored["flow"].tobytes() == bytes(data[12:])
    occluded = np.asarray(Image.open(training / f"occlusions/{frame}.png")) != 0
    assert np.array_equal(stored["occluded"], occluded)


def stored_pair(folder: Path, name: str, pair: str) -> datasets.Sample:
    """The first record of a split, read by MindSpore's own reader."""
    from mindspore.mindrecord import FileReader

    file = str(folder / Manifest.load(folder).splits[name][0])
    rows = FileReader(file)
    record = next(iter(rows.get_next()))["pair"]
    rows.close()
    return decode_record(record, FIELDS, size=(24, 40), pair=pair, source=file)


@pytest.mark.parametrize("missing,message", [
    ("clean/alley_1/frame_0002.png", "frame_0002.png: missing; frames of a scene must run"),
    ("final/alley_1/frame_0001.png", "frame_0001.png: missing; frames of a scene must run"),
    ("clean/alley_1/frame_0004.png", "frame_0004.png: missing; the scene has as many flow files"),
    ("flow/alley_1/frame_0002.flo", "frame_0002.flo: missing; every frame except the last of its scene"),
    ("final", "final: does not exist; expected the final pass"),
    ("flow", "flow: does not exist; expected the flow"),
])  # fmt: skip
def test_what_is_missing_from_sintel_is_named(release: Path, tmp_path: Path, missing: str, message: str) -> None:
    path = release / "training" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert message in stop("sintel", release, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# --- Interruptions --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release whose conversion takes long enough to be interrupted; `whole` beside it is its result, in 12 shards."""
    root = tiny.chairs(tmp_path_factory.mktemp("large") / "data", 36, 256, 320)
    tiny.convert("flyingchairs", root, root.with_name("whole"), "--shards", 12)
    return root


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_resumes_after_its_complete_shards(large: Path, tmp_path: Path, how: signal.Signals) -> None:
    root, whole = large, large.with_name("whole")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, tiny.ROOT / "prep/convert.py", "flyingchairs", "--root", root,
               "--out", out, "--shards", "12", "--workers", "2"]  # fmt: skip
    run = subprocess.Popen([*map(str, command)], start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not list(partial.glob("train-0000[23]*.mindrecord.json")) and run.poll() is None:
        time.sleep(0.002)
    if how == signal.SIGINT:
        os.killpg(run.pid, how)  # as a terminal does
    else:
        os.kill(run.pid, how)  # the workers are left behind, and must end by themselves
    stderr = run.communicate(timeout=30)[1]
    assert run.returncode == (130 if how == signal.SIGINT else -9), stderr
    assert "Traceback" not in stderr
    assert partial.exists() and not out.exists()
    deadline = time.time() + 10
    while processes_of(run.pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not processes_of(run.pid), "workers outlive the run"
    (partial / "train-00011-of-00012.mindrecord.partial-1").mkdir()  # kill -9 may leave either
    (partial / "train-00011-of-00012.mindrecord.json.partial-1").touch()
    finished = [path.with_suffix("") for path in partial.glob("*.mindrecord.json")]
    before = {path: path.stat().st_ino for path in finished}
    assert 0 < len(before) < 13
    tiny.convert("flyingchairs", root, out, "--shards", 12, "--workers", 1)
    assert contents(out) == contents(whole)
    assert not partial.exists()
    assert all((out / path.name).stat().st_ino == inode for path, inode in before.items())


def test_a_lost_rank_ends_the_others_and_any_number_goes_on(large: Path, tmp_path: Path) -> None:
    root, whole = large, large.with_name("whole")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    ranks = tiny.mpirun(2, "prep/convert.py", "flyingchairs", "--root", root, "--out", out,
                        "--shards", 12, "--workers", 1, start_new_session=True)  # fmt: skip
    while not list(partial.glob("train-0000[12]*.mindrecord.json")) and ranks.poll() is None:
        time.sleep(0.002)
    last = max(pid for pid in processes_of(ranks.pid) if "convert.py" in command_of(pid))
    os.kill(os.getpgid(last), signal.SIGKILL)  # mpirun gives each rank a process group
    assert ranks.wait(60) != 0 and not out.exists()
    deadline = time.time() + 10
    while processes_of(ranks.pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not processes_of(ranks.pid)
    assert 0 < len(list(partial.glob("*.mindrecord"))) < 13
    tiny.convert("flyingchairs", root, out, "--shards", 12)
    assert contents(out) == contents(whole)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def processes_of(session: int) -> list[int]:
    """The live processes of a session."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    state, _, _, sid = file.read().rpartition(")")[2].split()[:4]
                if int(sid) == session and state != "Z":
                    found.append(int(entry))
            except (FileNotFoundError, ProcessLookupError):
                pass
    return found


def test_a_killed_worker_ends_the_run_and_names_its_shard(large: Path, tmp_path: Path) -> None:
    command = [sys.executable, tiny.ROOT / "prep/convert.py", "flyingchairs", "--root", large,
               "--out", tmp_path / "out", "--shards", "4", "--workers", "2"]  # fmt: skip
    run = subprocess.Popen([*map(str, command)], start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (begun := list((tmp_path / "out.partial").glob("*.mindrecord.partial-*"))) and run.poll() is None:
        time.sleep(0.002)
    os.kill(int(begun[0].name.rpartition("-")[2]), signal.SIGKILL)
    stderr = run.communicate(timeout=30)[1]
    assert run.returncode == 1 and "was killed (out of memory?)" in stderr.splitlines()[-1]
    assert stderr.splitlines()[-1].count(".mindrecord") == 1, "the others were terminated, not killed"
    assert begun[0].name.partition(".partial-")[0] in stderr.splitlines()[-1]


def test_a_second_conversion_to_the_same_folder_is_refused(large: Path, tmp_path: Path) -> None:
    command = [sys.executable, tiny.ROOT / "prep/convert.py", "flyingchairs", "--root", large,
               "--out", tmp_path / "out", "--shards", "4", "--workers", "1"]  # fmt: skip
    first = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list((tmp_path / "out.partial").glob("*.mindrecord.partial-*")) and first.poll() is None:
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    line = stop("flyingchairs", large, tmp_path / "out", "--shards", "4")
    assert "out.partial: another conversion is writing" in line and str(first.pid) in line
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    assert len(Manifest.load(tmp_path / "out")) == 36


def test_a_complete_dataset_is_recognised_and_another_is_not_overwritten(root: Path, tmp_path: Path) -> None:
    out = tiny.convert("flyingchairs", root, tmp_path / "out", "--shards", 2)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = tiny.run_convert("flyingchairs", root, out, "--shards", 2)
    assert again.returncode == 0 and "already complete, nothing to do" in again.stdout
    assert "contains another dataset" in stop("flyingchairs", root, out, "--shards", 3)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    os.truncate(next(out.glob("*.mindrecord")), 10)
    assert "10 bytes, but" in stop("flyingchairs", root, out, "--shards", 2)


def test_an_unfinished_conversion_with_other_options_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    for text, message in (
        (
            '{"command": "prep/convert.py sintel"}',
            f"by another command; remove it, or finish it with `python prep/convert.py sintel --out {tmp_path}/out`",
        ),
        ("{}", ", but its plan.json is damaged or of an old version; remove it"),
    ):
        (tmp_path / "out.partial" / "plan.json").write_text(text)
        line = stop("flyingchairs", root, tmp_path / "out")
        assert "out.partial: an unfinished conversion" in line and message in line


@pytest.mark.parametrize("when", ["before the second begins", "while the second waits"])
def test_a_conversion_that_another_one_has_finished_is_complete(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    """The first conversion has renamed the folder since the second one looked whether there is anything to do."""
    whole, out = tiny.convert("flyingchairs", root, tmp_path / "whole"), tmp_path / "out"
    name = "resume_partial" if when.startswith("before") else "Lock"
    original = getattr(convert, name)

    def finish_first(path: Path, *arguments: Any) -> Any:
        shutil.copytree(whole, out)
        if name == "Lock":
            shutil.rmtree(path.parent)
        return original(path, *arguments)

    monkeypatch.setattr(convert, name, finish_first)
    monkeypatch.setattr(sys, "argv", ["convert.py", "flyingchairs", "--root", str(root), "--out", str(out)])
    convert.main()
    assert f"{out}: already complete, nothing to do" in capsys.readouterr().out
    assert contents(out) == contents(whole) and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("target", ["exists", "does not exist"])
def test_a_link_as_output_leads_to_the_dataset(root: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to("target")
    if target == "exists":
        (tmp_path / "target").mkdir()
    tiny.convert("flyingchairs", root, tmp_path / "link", "--shards", 1)
    assert (tmp_path / "link").is_symlink() and len(Manifest.load(tmp_path / "target")) == 12
    again = tiny.run_convert("flyingchairs", root, tmp_path / "link", "--shards", 1)
    assert f"{tmp_path}/target: already complete, nothing to do" in again.stdout


def test_an_output_folder_that_cannot_be_replaced_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_disk: Path
) -> None:
    """Renaming would fail, or lose the current folder, after all the work."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{small_disk}: is a mount point, .*; name a new folder in it, .*disk/data"):
        convert.find_out(small_disk)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"\.: is the current folder, .* such as data"):
        convert.find_out(Path("."))
    assert convert.find_out(Path("data/")) == Path("data")


def test_a_file_in_place_of_the_work_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").touch()
    line = stop("flyingchairs", root, tmp_path / "out")
    assert "out.partial: already exists and is not an unfinished conversion; move it away" in line


# --- Bad input ------------------------------------------------------------------------------------


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere: does not exist; expected" in stop("flyingchairs", tmp_path / "nowhere", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    assert "empty: contains no pairs" in stop("flyingchairs", tmp_path / "empty", tmp_path / "o")
    (tmp_path / "file").touch()
    assert "file: is not a folder" in stop("sintel", tmp_path / "file", tmp_path / "o")


def test_an_output_folder_that_is_not_ours(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    assert "out: already exists and is not empty" in stop("flyingchairs", root, out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "resized":
        Image.new("RGB", (8, 8)).save(path)
    else:
        path.write_bytes({"empty": b"", "cut": data[:-9], "long": data + b"x", "other": b"x" * 99}[how])


@pytest.mark.parametrize("file,how,message", [
    ("00003_img2.ppm", "removed", "every pair needs two images and a flow"),
    ("00003_flow.flo", "removed", "every pair needs two images and a flow"),
    ("00003_img1.ppm", "resized", "8x8 pixels, expected 40x24"),
    ("00003_img1.ppm", "empty", "not a readable image (it is empty)"),
    ("00003_img1.ppm", "other", "not a readable image"),
    ("00003_img1.ppm", "cut", "bytes, expected 2893 for a 40x24 PPM"),
    ("00003_flow.flo", "cut", "the file is truncated"),
    ("00003_flow.flo", "long", "the file is too long"),
    ("00003_flow.flo", "empty", "0 bytes, expected a .flo file"),
    ("00003_flow.flo", "other", "begins with b'xxxx'"),
])  # fmt: skip
def test_a_damaged_input_file_is_named(root: Path, tmp_path: Path, file: str, how: str, message: str) -> None:
    broken = shutil.copytree(root, tmp_path / "with space é")
    damage(broken / file, how)
    line = stop("flyingchairs", broken, tmp_path / "out", "--shards", 2)
    assert message in line and f"with space é/{file}" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_conversion_resumes_after_a_damaged_file_is_corrected(root: Path, tmp_path: Path, ranks: int) -> None:
    """It keeps the shards that were complete, and only those: another file changes, too."""
    whole = tiny.convert("flyingchairs", root, tmp_path / "whole", "--shards", 6)
    data = shutil.copytree(root, tmp_path / "data")
    damage(data / "00009_img1.ppm", "cut")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = ["flyingchairs", "--root", data, "--out", out, "--shards", 6, "--workers", 1]
    words = [sys.executable, "prep/convert.py", *command] if ranks == 1 else ["prep/convert.py", *command]
    process = tiny.mpirun(ranks, *words)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(lines) == 1, err
    assert "00009_img1.ppm: " in lines[0] and lines[0].endswith(f"run the same command again to resume from {partial}")
    with pytest.raises(UserError, match="run the same command again to resume"):
        Manifest.load(out)
    before = {path.name: path.stat().st_ino for path in partial.glob("*.mindrecord")}
    assert "train-00000-of-00006.mindrecord" in before and "train-00004-of-00006.mindrecord" not in before
    shutil.copy2(root / "00009_img1.ppm", data)
    os.utime(data / "00001_flow.flo")
    tiny.convert(*command[:1], data, out, "--shards", 6)
    kept = {name for name, inode in before.items() if (out / name).stat().st_ino == inode}
    assert kept == before.keys() - {"train-00000-of-00006.mindrecord"}
    resumed, fresh = (sorted(folder.glob("*.mindrecord")) for folder in (out, whole))
    assert [*map(Path.read_bytes, resumed)] == [*map(Path.read_bytes, fresh)]


def test_a_pair_too_large_for_a_record_is_named_with_a_remedy(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of uncompressed pairs before anything is written, of compressed ones as they are."""
    pairs = flyingchairs.list_pairs(root, "")
    monkeypatch.setattr(shards, "MAX_RECORD", 13000)
    limit = r"takes 0.0 MB with --codec {}, but MindRecord can store at most 0.0 MB; use {}"
    with pytest.raises(UserError, match="img1.ppm: the pair 00001 of 40x24 pixels " + limit.format("raw", "--codec")):
        convert.largest_image(pairs, "raw")
    assert convert.largest_image(pairs, "zstd") == 24 * 40
    monkeypatch.setattr(shards, "MAX_RECORD", 500)
    with pytest.raises(UserError, match="00001_img1.ppm: .* " + limit.format("zstd", "smaller images")):
        shards.write_shard(
            tmp_path / "a.mindrecord", pairs, codec_name="zstd", layout=shards.PageLayout.fitting(24 * 40, 12)
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("image,message", [
    (np.full((24, 40, 4), 7, np.uint8), "parts of the image are transparent"),
    (np.full((24, 40), 77, np.uint8), None),
    (np.full((24, 40, 3), 77 << 8, np.uint16), None),
    (Image.fromarray(np.full((24, 40), 77, np.uint8)).convert("P"), None),
])  # fmt: skip
def test_frames_become_rgb_or_are_refused_if_that_loses_anything(
    release: Path, tmp_path: Path, image: np.ndarray | Image.Image, message: str | None
) -> None:
    """Greyscale and palette frames lose nothing, 16-bit ones little; transparent ones would."""
    path = release / "training/clean/alley_1/frame_0002.png"
    image.save(path) if isinstance(image, Image.Image) else cv2.imwrite(str(path), image)
    if message:
        line = stop("sintel", release, tmp_path / "out")
        assert str(path) in line and message in line
    else:
        none = tiny.split_file(tmp_path / "none.txt", [])
        out = tiny.convert("sintel", release, tmp_path / "out", "--split-file", none)
        images = [batch.image1 for batch in tiny.evaluation(out, "train", batch=1)]
        assert (images[1] == 77).all() and not (images[0] == 77).all()


def test_one_note_for_all_images_of_16_bits(release: Path, tmp_path: Path) -> None:
    for path in release.glob("training/*/*/*.png"):
        if path.parents[1].name in ("clean", "final"):
            cv2.imwrite(str(path), np.full((24, 40, 3), 1000, np.uint16))
    done = tiny.run_convert("sintel", release, tmp_path / "out", "--shards", 3, "--workers", 2)
    assert done.returncode == 0 and done.stderr.count("16 bits per channel") == 1, done.stderr


def test_unknown_flow_of_every_kind(root: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(root, tmp_path / "data")
    path = broken / "00001_flow.flo"
    data = bytearray(path.read_bytes())
    data[12:44] = np.array([1e9, 0, np.nan, 0, 0, -np.inf, 3e38, 1], np.float32).tobytes()
    path.write_bytes(data)
    out = tiny.convert("flyingchairs", broken, tmp_path / "out")
    batches = tiny.evaluation(out, "train", batch=1)
    batch = next(batches)
    flow, valid = batch.flow, batch.valid
    assert (valid[0, 0, :4] == 0).all() and valid[0, 0, 4:].all() and valid[0, 1:].all()
    assert (flow[0, 0, :4] == 0).all() and np.isfinite(flow).all()


def test_two_pairs_with_one_name() -> None:
    pair = datasets.PairFiles("00001", Path("a.ppm"), Path("b.ppm"), Path("c.flo"))
    with pytest.raises(UserError, match="00001: 2 pairs have this name; rename or remove all but one"):
        convert.check_names([pair, dataclasses.replace(pair, name="00002"), pair])


def test_names_that_are_not_text(root: Path, tmp_path: Path) -> None:
    """Python decodes bytes that are not UTF-8 as lone surrogates, which JSON and MindSpore refuse."""
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/strange\xff")
    assert "the path is not UTF-8" in stop("flyingchairs", root, strange)
    shutil.copytree(root, strange)
    assert "the path is not UTF-8" in stop("flyingchairs", strange, tmp_path / "out")
    os.rename(strange, tmp_path / "data")
    for suffix in flyingchairs.SUFFIXES:
        os.rename(
            tmp_path / f"data/00001{suffix}",
            os.fsencode(tmp_path) + b"/data/\xff" + suffix.encode(),
        )
    assert "the file name is not UTF-8" in stop("flyingchairs", tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize("out", ["/proc/nowhere/out", "/sys/out"])
def test_a_target_that_takes_no_files(root: Path, out: str) -> None:
    """Not because of permissions, which do not apply to root."""
    assert stop("flyingchairs", root, out).startswith(f"error: {os.path.dirname(out)}")


@pytest.mark.parametrize("text,message", [
    ("1\nx\n", "line 2 is 'x', expected the 0-based index of a pair"),
    ("3\n12\n", "contains index 12, but"),
    ("-1\n", "line 1 is '-1'"),
    ("1\n2\n1\n", "index 1 is listed twice"),
])  # fmt: skip
def test_a_bad_split_file_is_named_with_the_line(root: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    assert message in stop("flyingchairs", root, tmp_path / "o", "--split-file", tmp_path / "list.txt")
    assert "none.txt" in stop("flyingchairs", root, tmp_path / "o", "--split-file", tmp_path / "none.txt")


def test_a_full_disk_is_one_line_and_the_conversion_resumes(root: Path, tmp_path: Path) -> None:
    """Limiting files to 100 kB makes the same calls fail as a full disk."""
    command = f"ulimit -f 100; trap '' XFSZ; exec '{sys.executable}' prep/convert.py flyingchairs" \
        f" --root '{root}' --out '{tmp_path}/out' --shards 1"  # fmt: skip
    run = subprocess.run(["bash", "-c", command], cwd=tiny.ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()
    tiny.convert("flyingchairs", root, tmp_path / "out", "--shards", 1)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["schema_version"] == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB. A process unmounts it when its input ends, also if the tests are killed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    script = 'mount -t tmpfs -o size=20m tmpfs "$0" && echo mounted && cat && umount --lazy "$0"'
    with subprocess.Popen(
        ["sh", "-c", script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as owner:
        if not (owner.stdout and owner.stdout.readline()):
            pytest.skip("no file system can be mounted here")
        yield folder
    assert owner.returncode == 0


@pytest.mark.slow
def test_every_command_names_the_file_when_a_disk_is_full(tmp_path: Path, small_disk: Path) -> None:
    """The last line also says how much space was left when it failed."""
    root = tiny.chairs(tmp_path / "data", 4, 1000, 1500)  # 12 MB each when converted
    line = stop("flyingchairs", root, small_disk / "out", "--shards", 2, "--workers", 1)
    found = re.search(r"/out.partial/.*.mindrecord: .*[(]([0-9.]+) MB were free there; ", line)
    assert found and float(found[1]) < 8, line
    shutil.rmtree(small_disk / "out.partial")
    whole = tiny.convert("flyingchairs", tiny.chairs(tmp_path / "few", 2), tmp_path / "whole")
    with pytest.raises(OSError), open(small_disk / "filling", "wb", 0) as file:
        while True:
            file.write(bytes(1 << 20))
    for command, path in (
        (["synthesize.py", "--out", small_disk / "made", "--pairs", 1], "made.partial/synthesize.lock"),
        (["inspect.py", whole, "--html", small_disk / "a.html"], "a.html"),
        (["inspect.py", whole, "--png", small_disk / "a.png"], "a.png"),
        (["convert.py", "flyingchairs", "--root", root, "--out", small_disk / "o"], "o.partial/plan.json"),
    ):
        words = [sys.executable, tiny.ROOT / "prep" / command[0], *command[1:]]
        done = subprocess.run([*map(str, words)], capture_output=True, text=True)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert last.startswith(f"error: {small_disk / path}: No space left on device; free some"), last
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, tiny.ROOT / "prep/verify.py", whole], stdout=full,
                              stderr=subprocess.PIPE, text=True, env=buffered)  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: standard output: No space left"), last


def test_run_as_a_file_from_its_own_folder(root: Path, tmp_path: Path) -> None:
    """With prep/ first on sys.path, prep/inspect.py would hide the standard library's module."""
    done = subprocess.run(
        [sys.executable, "convert.py", "flyingchairs", "--root", root, "--out", tmp_path / "o",
         "--codec", codec.CODECS[1]],
        cwd=tiny.ROOT / "prep", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
