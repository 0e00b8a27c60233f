"""The layouts of the datasets: which pairs are listed, what they contain, what is reported when files are missing."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from launch.errors import UserError
from prep import datasets, reader
from prep.datasets import (
    autoflow,
    chairssdhom,
    flyingchairs2,
    flyingchairsocc,
    flyingthings3d,
    flyingthings3d_subset,
    hd1k,
    middlebury,
    splits,
    spring,
    tartanair,
    viper,
)
from prep.datasets.kitti import KITTI2012, KITTI2015
from prep.datasets.kubric import KUBRIC, KUBRIC_SWAPPED
from prep.datasets.registry import DATASETS
from prep.datasets.sceneflow import DRIVING, MONKAA
from prep.formats.flow import read_flow


def names(pairs: list[datasets.PairFiles]) -> list[str]:
    return [pair.name for pair in pairs]


def test_every_dataset_has_the_interface_and_a_list_that_fits() -> None:
    for dataset in DATASETS.values():
        assert dataset.title and dataset.passes and callable(dataset.list_pairs)
        if dataset.validation:
            indices, _ = splits.read_split_file(splits.FOLDER / dataset.validation)
            assert len(indices) > 0 and dataset.pairs
            assert max(indices) < dataset.pairs and 0.02 < len(indices) / dataset.pairs < 0.15


def test_a_pair_too_large_for_a_shard_is_named_before_the_work(tmp_path: Path) -> None:
    """Readers refuse more, so it must not be written."""
    path = tmp_path / "a.flo"
    path.write_bytes(b"PIEH" + np.array([8200, 8200], np.int32).tobytes())
    os.truncate(path, 12 + 8 * 8200 * 8200)  # a hole, which takes no space
    with pytest.raises(UserError, match=r"a.flo: 8200x8200 pixels, expected at most 67108864 in total"):
        datasets.pair_size(datasets.PairFiles("a", Path("a.ppm"), Path("b.ppm"), path))


# --- KITTI ----------------------------------------------------------------------------------------


def test_kitti_through_conversion_and_reader(tmp_path: Path) -> None:
    """Sparse flow keeps its validity to the batches; pairs of every size are read."""
    release = tiny.kitti(tmp_path / "KITTI 2015", 4)
    list_file = tiny.split_file(tmp_path / "val.txt", [3])
    out = tiny.convert("kitti2015", release, tmp_path / "out", "--shards", 2, "--split-file", list_file)
    assert reader.DatasetSplit.open(out, "val").names == ["000003"]
    (batch,) = tiny.evaluation(out, "val", batch=1)
    training = release / "training"
    for image, number in ((batch.image1, 10), (batch.image2, 11)):
        assert np.array_equal(image[0], np.asarray(Image.open(training / f"image_2/000003_{number}.png")))
    expected, known = read_flow(training / "flow_occ/000003_10.png")
    assert np.array_equal(batch.valid[0], known) and 0 < known.mean() < 1
    assert np.array_equal(batch.flow[0], np.where(known[..., None] == 1, expected, 0))
    assert len(reader.DatasetSplit.open(out, "train")) == 3


def test_kitti_occlusions_are_what_only_the_one_flow_has(tmp_path: Path) -> None:
    release = tiny.kitti(tmp_path, 2)
    for root in (release, release / "training"):
        pair = KITTI2015.list_pairs(root, "")[1]
        sample = datasets.read_pair(pair)
        _, valid = read_flow(release / "training/flow_occ/000001_10.png")
        _, seen = read_flow(release / "training/flow_noc/000001_10.png")
        assert np.array_equal(sample["occluded"], valid & ~seen & 1) and sample["occluded"].any()
        assert datasets.pair_size(pair) == (24, 48)
    shutil.rmtree(release / "training/flow_noc")
    assert not datasets.read_pair(KITTI2015.list_pairs(release, "")[1])["occluded"].any()


def test_kitti_2012_in_colour_or_grey(tmp_path: Path) -> None:
    tiny.kitti(tmp_path, 1, frames="image_0")
    assert Path(KITTI2012.list_pairs(tmp_path, "")[0].image1).parent.name == "image_0"
    tiny.kitti(tmp_path, 1, frames="colored_0")
    assert Path(KITTI2012.list_pairs(tmp_path, "")[0].image2).parent.name == "colored_0"


def test_what_is_missing_from_kitti_is_named(tmp_path: Path) -> None:
    tiny.kitti(tmp_path, 2)
    with pytest.raises(UserError, match="colored_0: does not exist; expected the frames"):
        KITTI2012.list_pairs(tmp_path, "")
    (tmp_path / "training/image_2/000001_11.png").unlink()
    with pytest.raises(UserError, match=r"000001_11.png: missing; restore the missing file"):
        KITTI2015.list_pairs(tmp_path, "")
    shutil.rmtree(tmp_path / "training/flow_occ")
    with pytest.raises(UserError, match="flow_occ: does not exist"):
        KITTI2015.list_pairs(tmp_path, "")


# --- HD1K -----------------------------------------------------------------------------------------


def test_hd1k_pairs_stay_within_their_sequence(tmp_path: Path) -> None:
    root = tiny.hd1k(tmp_path, {0: 3, 8: 1, 9: 2})
    pairs = hd1k.list_pairs(root, "")
    assert names(pairs) == ["000000_0010", "000000_0011", "000009_0010"]
    assert [pair.image2.name for pair in pairs] == [
        "000000_0011.png", "000000_0012.png", "000009_0011.png",
    ]  # fmt: skip
    assert splits.held_out_indices(pairs) == [2]
    assert 0 < datasets.read_pair(pairs[0])["valid"].mean() < 1


@pytest.mark.parametrize("missing", ["hd1k_input/image_2", "hd1k_flow_gt/flow_occ"])
def test_what_is_missing_from_hd1k_is_named(tmp_path: Path, missing: str) -> None:
    root = tiny.hd1k(tmp_path, {0: 3})
    (root / missing / "000000_0011.png").unlink()
    with pytest.raises(UserError, match=f"{missing}/000000_0011.png: missing"):
        hd1k.list_pairs(root, "")
    shutil.rmtree(root / missing)
    with pytest.raises(UserError, match=f"{missing}: does not exist"):
        hd1k.list_pairs(root, "")


# --- Spring ---------------------------------------------------------------------------------------


def test_spring_lists_both_cameras_and_directions_at_frame_resolution(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    root = tiny.spring(tmp_path, {"0001": 3, "0012": 2})
    pairs = spring.list_pairs(root, "")
    assert names(pairs) == [
        "0001/FW_left/0001", "0001/FW_left/0002", "0001/BW_left/0002", "0001/BW_left/0003",
        "0001/FW_right/0001", "0001/FW_right/0002", "0001/BW_right/0002", "0001/BW_right/0003",
        "0012/FW_left/0001", "0012/BW_left/0002", "0012/FW_right/0001", "0012/BW_right/0002",
    ]  # fmt: skip
    assert splits.held_out_indices(pairs) == [8, 9, 10, 11]
    assert str(pairs[2].image2).endswith("0001/frame_left/frame_left_0001.png")
    assert names(spring.list_pairs(root / "train", "")) == names(pairs)
    assert pairs[2].flow
    flow, _ = read_flow(pairs[2].flow)
    assert np.array_equal(datasets.read_pair(pairs[2])["flow"], flow[::2, ::2])
    assert datasets.pair_size(pairs[2]) == (12, 20)


def test_what_is_missing_from_spring_is_named(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    root = tiny.spring(tmp_path, {"0001": 4})
    shutil.rmtree(root / "train/0001/flow_BW_right")
    shutil.rmtree(root / "train/0001/frame_left")
    assert names(spring.list_pairs(root, "")) == [f"0001/FW_right/000{i}" for i in (1, 2, 3)]
    (root / "train/0001/flow_FW_right/flow_FW_right_0002.flo5").unlink()
    with pytest.raises(UserError, match=r"flow_FW_right_0002.flo5: missing; every frame except"):
        spring.list_pairs(root, "")
    (root / "train/0001/frame_right/frame_right_0002.png").unlink()
    with pytest.raises(UserError, match=r"frame_right_0002.png: missing; frames of a scene must run"):
        spring.list_pairs(root, "")
    with pytest.raises(UserError, match="train: contains no pairs; expected folders such as 0001/frame_left"):
        shutil.rmtree(root / "train/0001")
        spring.list_pairs(root, "")


# --- FlyingThings3D -------------------------------------------------------------------------------


def test_flyingthings3d_lists_train_before_test_which_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tiny.flyingthings3d(tmp_path, ["TRAIN/A/0000", "TEST/B/0003"])
    pairs = flyingthings3d.list_pairs(root, "clean")
    assert "all_unused_files.txt: not found" in capsys.readouterr().err
    assert names(pairs)[:5] == [
        f"clean/TRAIN/A/0000/{name}" for name in (
            "left/into_future/0006", "left/into_future/0007", "left/into_past/0007",
            "left/into_past/0008", "right/into_future/0006",
        )
    ]  # fmt: skip
    assert len(pairs) == 16 and splits.held_out_indices(pairs) == list(range(8, 16))
    assert str(pairs[2].image2).endswith("frames_cleanpass/TRAIN/A/0000/left/0006.png")
    assert str(pairs[4].flow).endswith("/into_future/right/OpticalFlowIntoFuture_0006_R.pfm")
    assert datasets.read_pair(pairs[0])["flow"].shape == (24, 40, 2)
    assert flyingthings3d.list_pairs(root, "final") == []


def test_flyingthings3d_leaves_the_hard_frames_out(tmp_path: Path) -> None:
    root = tiny.flyingthings3d(tmp_path, ["TRAIN/A/0000"])
    (root / "all_unused_files.txt").write_text("TRAIN/A/0000/left/0008.png\nTEST/A/0000/left/0006.png\n")
    assert names(flyingthings3d.list_pairs(root, "clean"))[:3] == [
        f"clean/TRAIN/A/0000/{name}" for name in (
            "left/into_future/0006", "left/into_past/0007", "right/into_future/0006"
        )
    ]  # fmt: skip


def test_a_frame_that_the_flyingthings3d_subset_excludes_takes_two_pairs_with_it(tmp_path: Path) -> None:
    """Its val folder is held out; a frame that the release leaves out takes two pairs with it."""
    root = tiny.flyingthings3d_subset(tmp_path / "subset", [0, 1, 3, 4])
    out = tiny.convert("flyingthings3d-subset", root, tmp_path / "out", "--shards", 3)
    pairs = flyingthings3d_subset.list_pairs(root, "clean")
    assert names(pairs)[:5] == [
        "clean/train/left/into_future/0000000", "clean/train/left/into_future/0000003",
        "clean/train/left/into_past/0000001", "clean/train/left/into_past/0000004",
        "clean/train/right/into_future/0000000",
    ]  # fmt: skip
    assert reader.DatasetSplit.open(out, "train").names == names(pairs)[:8]
    assert reader.DatasetSplit.open(out, "val-clean").names == names(pairs)[8:]
    sample = datasets.read_pair(pairs[2])
    mask = Image.open(root / "train/flow_occlusions/left/into_past/0000001.png")
    assert np.array_equal(sample["occluded"], np.asarray(mask) // 255)
    with pytest.raises(UserError, match="nowhere: does not exist"):
        flyingthings3d_subset.list_pairs(tmp_path / "nowhere", "clean")
    with pytest.raises(
        UserError, match=r"contains no pairs; expected files such as train/image_clean/left/0000000.png"
    ):
        flyingthings3d_subset.list_pairs(tmp_path, "clean")


# --- Monkaa, Driving ------------------------------------------------------------------------------


def test_monkaa_lists_both_cameras_and_directions(tmp_path: Path) -> None:
    root = tiny.flyingthings3d(tmp_path, ["a_rain_of_stones_x2", "eating_x2"])
    pairs = MONKAA.list_pairs(root, "clean")
    assert len(pairs) == 16 and not splits.held_out_indices(pairs)
    assert names(pairs)[:3] == [
        f"clean/a_rain_of_stones_x2/left/{name}" for name in ("into_future/0006", "into_future/0007", "into_past/0007")
    ]
    assert str(pairs[2].image2).endswith("frames_cleanpass/a_rain_of_stones_x2/left/0006.png")
    assert datasets.read_pair(pairs[0])["flow"].shape == (24, 40, 2)
    assert MONKAA.list_pairs(root, "final") == []
    with pytest.raises(UserError, match=r"optical_flow: contains no pairs; expected a_rain_of_stones_x2/into_future"):
        shutil.rmtree(root / "frames_cleanpass")
        (root / "frames_cleanpass").mkdir()
        MONKAA.list_pairs(root, "clean")


def test_driving_has_more_folders_and_may_have_webp_frames(tmp_path: Path) -> None:
    scenes = ["15mm_focallength/scene_forwards/fast", "35mm_focallength/scene_backwards/slow"]
    root = tiny.flyingthings3d(tmp_path, scenes, frames="frames_cleanpass_webp/*.webp")
    pairs = DRIVING.list_pairs(root, "clean")
    assert len(pairs) == 16 and names(pairs)[-1] == f"clean/{scenes[1]}/right/into_past/0008"
    assert str(pairs[-1].image2).endswith(f"frames_cleanpass_webp/{scenes[1]}/right/0007.webp")
    assert datasets.read_pair(pairs[-1])["image1"].shape == (24, 40, 3)


# --- Chairs ---------------------------------------------------------------------------------------


def test_flyingchairs2_has_both_directions_with_occlusions_and_its_own_val(tmp_path: Path) -> None:
    root = tiny.flyingchairs2(tmp_path, 2, 1)
    pairs = flyingchairs2.list_pairs(root, "")
    assert names(pairs) == [
        f"{name}/{way}" for name in ("train/0000000", "train/0000001", "val/0000000") for way in ("forward", "backward")
    ]
    assert splits.held_out_indices(pairs) == [4, 5]
    assert (pairs[3].image1.name, pairs[3].image2.name) == ("0000001-img_1.png", "0000001-img_0.png")
    sample = datasets.read_pair(pairs[3])
    mask = Image.open(root / "train/0000001-occ_10.png")
    assert np.array_equal(sample["occluded"], np.asarray(mask) // 255)
    assert np.array_equal(sample["flow"], read_flow(root / "train/0000001-flow_10.flo")[0])
    (root / "train/0000001-occ_10.png").unlink()
    assert flyingchairs2.list_pairs(root, "")[3].occluded is None
    (root / "train/0000001-img_0.png").unlink()
    with pytest.raises(UserError, match=r"0000001-img_0.png: missing, and 1 more files; every flow file needs two"):
        flyingchairs2.list_pairs(root, "")
    with pytest.raises(UserError, match=r"train: contains no pairs; expected files such as train/0000000-flow_01.flo"):
        flyingchairs2.list_pairs(root / "train", "")


def test_flyingchairsocc_holds_out_flyingchairs_validation_pairs_in_both_directions(tmp_path: Path) -> None:
    root = tiny.flyingchairsocc(tmp_path, [5, 6, 18])  # of which 6 and 18 have the indices 5 and 17
    pairs = flyingchairsocc.list_pairs(root, "")
    assert names(pairs) == [f"{n:05}/{way}" for n in (5, 6, 18) for way in ("forward", "backward")]
    assert splits.held_out_indices(pairs) == [2, 3, 4, 5]
    assert (pairs[1].image1.name, pairs[1].image2.name) == ("00005_img2.png", "00005_img1.png")
    assert pairs[1].flow and pairs[1].flow.name == "00005_flow_b.flo"
    mask = Image.open(root / "data/00005_occ2.png")
    assert np.array_equal(datasets.read_pair(pairs[1])["occluded"], np.asarray(mask) // 255)
    assert names(flyingchairsocc.list_pairs(root / "data", "")) == names(pairs)
    for frame in (1, 2):
        Image.open(root / f"data/00005_img{frame}.png").save(root / f"data/00005_img{frame}.ppm")
    assert flyingchairsocc.list_pairs(root, "")[1].image1.name == "00005_img2.ppm"
    (root / "data/00018_img1.png").unlink()
    with pytest.raises(UserError, match=r"00018_img1.png: missing"):
        flyingchairsocc.list_pairs(root, "")


def test_chairssdhom_holds_out_its_test_folder(tmp_path: Path) -> None:
    root = tiny.chairssdhom(tmp_path, 2, 1)
    pairs = chairssdhom.list_pairs(root, "")
    assert names(pairs) == ["train/00001", "train/00002", "test/00001"] and splits.held_out_indices(pairs) == [2]
    assert datasets.read_pair(pairs[1])["flow"].shape == (24, 40, 2)
    assert str(pairs[1].image2).endswith("data/train/t1/00002.png")
    (root / "data/test/t0/00001.png").unlink()
    with pytest.raises(UserError, match=r"test/t0/00001.png: missing; restore"):
        chairssdhom.list_pairs(root / "data", "")


def test_autoflow_holds_out_the_listed_names(tmp_path: Path) -> None:
    root = tiny.autoflow(tmp_path, {1: ["table_0_batch_0", "table_0_batch_1"], 3: ["table_9_batch_2"]})
    pairs = autoflow.list_pairs(root, "")
    assert names(pairs) == ["table_0_batch_0", "table_0_batch_1", "table_9_batch_2"]
    assert splits.held_out_indices(pairs) == [1]
    assert datasets.read_pair(pairs[0])["flow"].shape == (24, 40, 2)
    part = root / "static_40k_png_3_of_4"
    part.rename(root / "inner")
    part.mkdir()
    (root / "inner").rename(part / part.name)
    assert names(autoflow.list_pairs(root, "")) == names(pairs)
    (part / part.name / "table_9_batch_2/im1.png").unlink()
    with pytest.raises(UserError, match=r"table_9_batch_2/im1.png: missing; restore"):
        autoflow.list_pairs(root, "")
    held_out = (splits.FOLDER / autoflow.SPLIT).read_text().splitlines()
    assert len(set(held_out)) == 2000


# --- TartanAir, VIPER, Middlebury, Kubric ---------------------------------------------------------


def test_tartanair_masks_where_its_flow_does_not_hold(tmp_path: Path) -> None:
    root = tiny.tartanair(tmp_path, {"ocean/ocean/Easy/P001": 3, "ocean/ocean/Hard/P000": 2, "abandoned/Hard/P002": 2})
    pairs = tartanair.list_pairs(root, "")
    assert names(pairs) == [
        "abandoned/Hard/P002/000000", "ocean/Easy/P001/000000", "ocean/Easy/P001/000001", "ocean/Hard/P000/000000",
    ]  # fmt: skip
    sample = datasets.read_pair(pairs[2])
    flows = root / "ocean/ocean/Easy/P001/flow"
    assert np.array_equal(sample["flow"], np.load(flows / "000001_000002_flow.npy"))
    assert np.array_equal(sample["valid"], np.load(flows / "000001_000002_mask.npy") == 0)
    assert datasets.pair_size(pairs[2]) == (24, 40) and 0 < sample["valid"].mean() < 1
    (flows / "000001_000002_mask.npy").unlink()
    with pytest.raises(UserError, match=r"000001_000002_mask.npy: missing; download the masks as well"):
        tartanair.list_pairs(root, "")


@pytest.mark.parametrize("images", ["png", "jpg"])
def test_viper_leaves_out_flow_without_a_second_frame_and_beyond_its_limit(tmp_path: Path, images: str) -> None:
    root = tiny.viper(tmp_path, {"train/001": 3, "val/002": 2}, images=images)
    pairs = viper.list_pairs(root, "")
    assert names(pairs) == ["train/001_00001", "train/001_00002", "val/002_00001"]
    assert splits.held_out_indices(pairs) == [2] and pairs[1].image2.name == f"001_00003.{images}"
    sample = datasets.read_pair(pairs[0])
    components = np.load(root / "train/flow/001/001_00001.npz")
    assert np.array_equal(sample["flow"], np.dstack([components["u"], components["v"]]))
    assert np.array_equal(sample["valid"], (np.abs(sample["flow"]) < 512).all(2)) and not sample["valid"].all()
    with pytest.raises(UserError, match=r"val: contains no pairs; expected files such as train/flow/001/001_00001"):
        viper.list_pairs(root / "val", "")


def test_middlebury_is_all_for_validation(tmp_path: Path) -> None:
    root = tiny.middlebury(tmp_path / "middlebury", ["Venus", "Grove2"])
    pairs = middlebury.list_pairs(root, "")
    assert names(pairs) == ["Grove2", "Venus"] and splits.held_out_indices(pairs) == [0, 1]
    assert datasets.read_pair(pairs[0])["valid"].tolist() == 3 * [40 * [0]] + 21 * [40 * [1]]
    out = tmp_path / "out"
    done = tiny.run_convert("middlebury", root, out)
    assert "no training pairs with ground truth; suitable for launch/train.sh --validate and" in done.stdout
    assert reader.DatasetSplit.open(out, "val").names == names(pairs)
    (root / "other-data/Venus/frame11.png").unlink()
    with pytest.raises(UserError, match=r"Venus/frame11.png: missing; restore"):
        middlebury.list_pairs(root, "")


def test_kubric_flow_in_both_directions_has_its_scenes_scale(tmp_path: Path) -> None:
    root = tiny.kubric(tmp_path, {"0": 3, "1": 2})
    pairs = KUBRIC.list_pairs(root, "")
    assert names(pairs) == [
        "0/forward/00000", "0/forward/00001", "0/backward/00001", "0/backward/00002", "1/forward/00000",
        "1/backward/00001",
    ]  # fmt: skip
    assert (pairs[2].image1.name, pairs[2].image2.name) == ("rgba_00001.png", "rgba_00000.png")
    for dataset, expected in ((KUBRIC, (2, -1)), (KUBRIC_SWAPPED, (-1, 2))):
        for pair in dataset.list_pairs(root, ""):
            sample = datasets.read_pair(pair)
            sign = -1 if "backward" in pair.name else 1
            assert np.allclose(sample["flow"], sign * np.array(expected), atol=1e-6) and sample["valid"].all()
    assert datasets.pair_size(pairs[0]) == (24, 40)


SCALE = '{"backward_flow": {"min": 0, "max": 1}, "forward_flow": {"min": %s, "max": 1}}'


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"forward_flow": {"min": 1}}', "[" * 9999, SCALE % "NaN", SCALE % "-1e400", SCALE % "2"]
)
def test_a_kubric_scene_without_its_scale(tmp_path: Path, text: str) -> None:
    root = tiny.kubric(tmp_path, {"0": 2})
    (root / "0/data_ranges.json").write_text(text)
    with pytest.raises(UserError, match=r"0/data_ranges.json: expected the numbers min and max of forward_flow"):
        KUBRIC.list_pairs(root, "")
    (root / "0/data_ranges.json").unlink()
    with pytest.raises(UserError, match=r"0/data_ranges.json: missing; it has the scale of the flow"):
        KUBRIC.list_pairs(root, "")
