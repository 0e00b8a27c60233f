"""Version 2 of the synthetic pairs: exact flow, occlusions, and what each ingredient does."""

from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from scipy import ndimage
from warping import pull_back

from launch.errors import UserError
from prep.datasets.frames import IMAGE_SUFFIXES
from prep.synthesis import effects, shapes
from prep.synthesis.layers import Frame, Layer, blur_motion, find_occluded
from prep.synthesis.motion import MAX_STRAIN, Deformation, Motion, limit_strain, mesh, smooth_field
from prep.synthesis.textures import Photographs, Textures
from prep.synthesis.version2 import Ingredients, PairMaker

EFFECTS = ("motion_blur", "shadow", "fog", "exposure", "noise")
CLEAN = Ingredients(**dict.fromkeys(EFFECTS, 0.0))
"""Layers as they are: what one frame shows, the other shows unchanged."""


def bent_motion(seed: int = 0) -> Motion:
    """A strong deformation, and a perspective motion after it."""
    rng = np.random.default_rng(seed)
    box = (-40, -30, 200, 160)
    field = limit_strain(smooth_field(rng, box, 5, 2) * 20)
    matrix = np.array([[1.05, 0.1, 6.0], [-0.08, 0.95, -9.0], [4e-4, -2e-4, 1.0]])
    return Motion(matrix, Deformation(box, field))


def square(left: int, top: int, shift_x: int, grey: int) -> Layer:
    """An opaque 20x20 square at (left, top), in a circle, which moves to the right."""
    patch = np.full((30, 30, 4), grey, np.uint8)
    patch[..., 3] = np.pad(np.full((20, 20), 255, np.uint8), 5)
    pose, motion = np.eye(3), np.eye(3)
    pose[:2, 2] = left - 5, top - 5
    motion[0, 2] = shift_x
    return Layer(patch, pose, Motion(motion))


# --- Flow and occlusions --------------------------------------------------------------------------


@pytest.mark.parametrize("number", (1, 2, 3, 4, 6, 7))  # pair 5 has fine detail everywhere, which resampling changes
def test_each_image_warped_by_its_flow_is_the_other_where_not_occluded(number: int) -> None:
    pair = PairMaker(3, 128, 192, CLEAN).make(number)
    for image, other, flow, occluded in (
        (pair.image1, pair.image2, pair.flow, pair.occluded),
        (pair.image2, pair.image1, pair.flow_back, pair.occluded_back),
    ):
        assert image.dtype == np.uint8 and flow.dtype == np.float32 and occluded.dtype == bool
        assert image.shape == (128, 192, 3) and flow.shape == (128, 192, 2) and occluded.shape == (128, 192)
        difference = np.abs(pull_back(other, flow, order=1) - image).mean(-1)
        assert (~occluded).mean() > 0.4
        error = difference[~occluded].mean()
        assert error < 4
        assert np.abs(pull_back(other, -flow, order=1) - image).mean(-1)[~occluded].mean() > 2 * error
        if occluded.any():
            assert difference[occluded].mean() > 4 * error


@pytest.mark.parametrize("number", range(1, 7))
def test_forward_and_backward_flow_cancel_where_not_occluded(number: int) -> None:
    """To a few thousandths of a pixel, except at edges, where the pixel found belongs to two layers."""
    pair = PairMaker(3, 128, 192, CLEAN).make(number)
    there_and_back = pair.flow + pull_back(pair.flow_back, pair.flow, order=1)
    distance = np.linalg.norm(there_and_back, axis=-1)[~pair.occluded]
    assert np.median(distance) < 0.004
    assert np.percentile(distance, 80) < 0.02


def test_a_motion_and_its_inverse_cancel() -> None:
    motion = bent_motion()
    box = (0, 0, 160, 120)
    x, y = motion.backward(box)
    deformation = motion.deformation
    assert deformation is not None
    shift = np.stack(
        [
            ndimage.map_coordinates(deformation.field[..., axis], [y + 30, x + 40], order=1, mode="nearest")
            for axis in range(2)
        ],
        -1,
    )
    moved = motion.matrix @ np.stack([x + shift[..., 0], y + shift[..., 1], np.ones_like(x)]).reshape(3, -1)
    expected_x, expected_y = mesh(box)
    error = np.hypot(*(moved[:2] / moved[2]).reshape(2, 120, 160) - np.stack([expected_x + 0 * y, expected_y + 0 * x]))
    assert error.max() < 0.03 and np.median(error) < 0.002
    assert np.abs(x - mesh(box)[0]).max() > 10  # it can fail: the motion is large


def test_deformations_are_scaled_down_until_they_can_be_inverted() -> None:
    field = smooth_field(np.random.default_rng(0), (0, 0, 60, 40), 6, 2) * 100
    limited = limit_strain(field)
    assert max(np.abs(np.diff(limited, axis=axis)).max() for axis in (0, 1)) < 1.3 * MAX_STRAIN
    assert np.array_equal(limit_strain(0.001 * field), 0.001 * field)


def test_layer_in_front_decides_the_flow_and_hides_what_it_moves_over() -> None:
    background = Layer(np.full((40, 60, 3), 50, np.uint8), np.eye(3), Motion(np.eye(3)))
    layers = [background, square(10, 10, 0, 100), square(25, 10, -8, 200)]
    first, second = Frame.empty(40, 60), Frame.empty(40, 60)
    for index, layer in enumerate(layers):
        first.add(layer, index, 1, 0.0)
        second.add(layer, index, 2, 0.0)
    assert first.image[15, 28].tolist() == [200] * 3  # both squares are here, the later is in front
    assert first.flow[15, 28].tolist() == [-8, 0] and first.flow[15, 20].tolist() == [0, 0]
    assert second.flow[15, 20].tolist() == [8, 0] and second.flow[15, 42].tolist() == [0, 0]
    expected = np.zeros((40, 60), bool)
    expected[10:30, 17:25] = True  # the front square arrives there
    assert (find_occluded(first.flow, first.label, second.label) == expected).all()
    expected = np.zeros((40, 60), bool)
    expected[10:30, 37:45] = True  # and leaves from there
    assert (find_occluded(second.flow, second.label, first.label) == expected).all()


def test_what_leaves_the_frame_is_occluded() -> None:
    pair = PairMaker(3, 64, 96).make(2)
    rows, columns = np.indices((64, 96))
    x, y = columns + pair.flow[..., 0], rows + pair.flow[..., 1]
    left = (x < 0) | (x > 95) | (y < 0) | (y > 63)
    assert left.any() and pair.occluded[left].all()


@pytest.mark.parametrize("height, width", [(96, 128), (192, 256)])
def test_displacements_are_like_those_of_real_scenes_and_grow_with_the_size(height: int, width: int) -> None:
    """They scale with the width, as in resized frames: small crops cannot teach larger ones."""
    maker = PairMaker(1, height, width)
    flows = [maker.make(number).flow for number in range(1, 129)]
    length = np.linalg.norm(flows, axis=-1) * 512 / width
    assert 9 < length.mean() < 18  # FlyingChairs: 11, Sintel: 13.5
    assert np.median(length) < 0.8 * length.mean()  # many small ones
    assert 0.02 < (length > 40).mean() < 0.1  # and some large ones
    assert 0.03 < (length < 1).mean() < 0.25  # and some at rest


@pytest.mark.parametrize("height, width", [(32, 32), (32, 400), (400, 32)])
def test_small_and_narrow_frames(height: int, width: int) -> None:
    maker = PairMaker(2, height, width)
    for number in range(1, 9):
        pair = maker.make(number)
        assert pair.image1.shape == (height, width, 3) and np.isfinite(pair.flow).all()


# --- Ingredients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EFFECTS)
def test_effects_change_the_images_but_neither_flow_nor_occlusions(name: str) -> None:
    clean = PairMaker(5, 96, 128, CLEAN).make(1)
    changed = PairMaker(5, 96, 128, replace(CLEAN, **{name: 1.0})).make(1)
    assert not np.array_equal(clean.image1, changed.image1)
    assert np.array_equal(clean.flow, changed.flow) and np.array_equal(clean.occluded, changed.occluded)


@pytest.mark.parametrize("name", ["nonrigid", "perspective", "thin", "soft_edges"])
def test_other_ingredients_change_what_moves(name: str) -> None:
    without = PairMaker(5, 96, 128, replace(CLEAN, **{name: 0.0})).make(1)
    with_it = PairMaker(5, 96, 128, replace(CLEAN, **{name: 1.0})).make(1)
    assert not np.array_equal(without.image1, with_it.image1)


def test_without_bending_and_perspective_motions_are_affine() -> None:
    """The background's flow, in the median over pixels, has no second derivative; with either of them it has one."""

    def curvature(**chances: float) -> float:
        maker = PairMaker(5, 96, 128, replace(CLEAN, thin=0.0, **chances))
        flows = np.stack([maker.make(number).flow for number in range(1, 9)])
        return float(np.median(np.abs(np.diff(flows, 2, axis=1)).max(-1)))

    rigid = curvature(nonrigid=0.0, perspective=0.0)
    assert rigid < 1e-4
    assert curvature(nonrigid=1.0, perspective=0.0) > 10 * rigid
    assert curvature(nonrigid=0.0, perspective=1.0) > 3 * rigid


def test_motion_blur_spreads_a_point_along_its_motion_and_leaves_its_centre() -> None:
    painted = np.zeros((41, 61, 3), np.uint8)
    painted[20, 30] = 255
    flow = np.zeros((41, 61, 2), np.float32)
    flow[..., 0] = 16
    blurred = blur_motion(painted, flow, 0.5)[..., 0].astype(float)
    rows, columns = np.nonzero(blurred)
    assert set(rows) == {20} and 8 <= np.ptp(columns) + 1 <= 10
    centre = (blurred.sum(0) * np.arange(61)).sum() / blurred.sum()
    assert centre == pytest.approx(30, abs=0.1) and blurred.sum() == pytest.approx(255, rel=0.1)
    assert np.array_equal(blur_motion(painted, flow, 0.05), painted)  # less than a pixel


@pytest.mark.parametrize("seed", range(8))
def test_thin_structures_are_thin_and_stay_inside_their_circle(seed: int) -> None:
    mask = shapes.draw_thin(np.random.default_rng(seed), 100, 4.0, 2.0)
    assert 0 < (mask > 127).mean() < 0.5
    assert cv2.erode(mask, np.ones((9, 9))).mean() < 2  # hardly a place is 9 pixels wide
    assert not mask[outside_circle(100)].any()


@pytest.mark.parametrize("seed", range(8))
def test_solid_shapes_stay_inside_their_circle(seed: int) -> None:
    mask = shapes.draw_solid(np.random.default_rng(seed), 100, 4.0)
    assert (mask > 127).mean() > 0.02 and not mask[outside_circle(100)].any()


def outside_circle(side: int) -> np.ndarray:
    """Where a patch must be transparent: bool (side, side)."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return np.hypot(x, y) > side / 2


def test_exposures_differ_between_frames_only_if_asked() -> None:
    same = effects.draw_exposures(np.random.default_rng(0), 0.0)
    other = effects.draw_exposures(np.random.default_rng(0), 1.0)
    assert np.array_equal(*same) and not np.array_equal(*other)
    assert all((np.diff(table[0].astype(int), axis=0) >= 0).all() for table in (*same, *other))


@pytest.mark.parametrize("grain", [0.0, 0.6, 1.0])
def test_noise_has_the_strength_asked_for_whatever_its_grain(grain: float) -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    noisy = effects.add_noise(np.random.default_rng(1), grey, 8.0, grain).astype(float)
    assert noisy.std() == pytest.approx(8, rel=0.1) and noisy.mean() == pytest.approx(128, abs=0.5)


def test_shadow_darkens_and_fog_reduces_contrast() -> None:
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, ::2] = 200
    shadow = effects.draw_air(np.random.default_rng(3), 64, 96, shadow=1.0, fog=0.0)
    fog = effects.draw_air(np.random.default_rng(3), 64, 96, shadow=0.0, fog=1.0)
    assert shadow and fog and effects.draw_air(np.random.default_rng(3), 64, 96, 0.0, 0.0) is None
    assert shadow.apply(image, 1).mean() < image.mean() and shadow.apply(image, 1)[:, 1::2].max() == 0
    assert fog.apply(image, 1).std() < image.std()
    assert not np.array_equal(fog.apply(image, 1), fog.apply(image, 2))


def test_every_ingredient_is_a_probability_with_a_help_text() -> None:
    for ingredient in fields(Ingredients):
        assert 0 <= getattr(Ingredients(), ingredient.name) <= 1 and ingredient.metadata["help"].startswith("of ")


# --- Textures -------------------------------------------------------------------------------------


def photographs(folder: Path) -> Photographs:
    """Three different greys, of which each texture shows one."""
    (folder / "inner").mkdir(parents=True, exist_ok=True)
    for name, grey in (("a.png", 40), ("b.jpg", 120), ("inner/c.PNG", 200)):
        tiny.save(folder / name, np.full((90, 70, 3), grey, np.uint8))
    (folder / "readme.txt").write_text("no photograph")
    return Photographs.load(folder)


def test_photographs_become_textures_with_the_detail_that_frames_need(tmp_path: Path) -> None:
    found = photographs(tmp_path)
    assert [path.name for path in found.paths] == ["a.png", "b.jpg", "c.PNG"]
    textures = Textures(1, 64, found, share=1.0)
    drawn = [textures.draw(np.random.default_rng(seed)) for seed in range(12)]
    assert all(texture.shape == (128, 128, 3) and texture.std() < 2 for texture in drawn)
    assert {round(int(texture.mean()) / 40) for texture in drawn} == {1, 3, 5}
    assert Textures(1, 64, found, share=0.0).draw(np.random.default_rng(0)).std() > 5  # procedural


def test_photographs_are_found_as_frames_are(tmp_path: Path) -> None:
    """In the same formats and in linked folders; hidden files, such as those of macOS, are left out."""
    folder = tmp_path / "folder"
    names = {f"{number}{suffix}" for number, suffix in enumerate(IMAGE_SUFFIXES)}
    for where in (folder, tmp_path / "elsewhere"):
        where.mkdir()
        for name in names:
            tiny.save(where / name, np.full((9, 9, 3), 100, np.uint8))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(folder)
    (folder / "._a.png").write_bytes(b"metadata")
    (folder / ".cache").mkdir()
    (folder / ".cache/a.png").write_bytes(b"a thumbnail")
    found = Photographs.load(folder)
    assert {path.relative_to(folder).as_posix() for path in found.paths} == names | {f"linked/{name}" for name in names}
    Textures(1, 64, found).check(workers=1)
    (folder / "lost.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"lost.png: a broken link; restore the file that it leads to"):
        Photographs.load(folder)


def test_large_photographs_are_reduced_when_they_are_read(tmp_path: Path) -> None:
    gradient = np.repeat(np.linspace(0, 255, 1200).astype(np.uint8)[None, :, None], 900, 0).repeat(3, 2)
    tiny.save(tmp_path / "wide.jpg", gradient)
    texture = Photographs.load(tmp_path).draw(np.random.default_rng(0), 100)
    assert texture.shape == (100, 100, 3) and np.ptp(texture) > 80


def test_the_digest_of_photographs_depends_on_names_and_contents(tmp_path: Path) -> None:
    before = photographs(tmp_path).sha256
    assert photographs(tmp_path).sha256 == before
    (tmp_path / "a.png").rename(tmp_path / "z.png")
    renamed = Photographs.load(tmp_path).sha256
    tiny.save(tmp_path / "z.png", np.full((90, 70, 3), 41, np.uint8))
    assert len({before, renamed, Photographs.load(tmp_path).sha256}) == 3


def test_a_folder_without_photographs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no images; expected files in"):
        Photographs.load(tmp_path)


def test_procedural_textures_are_coloured_and_of_all_contrasts() -> None:
    textures = Textures(1, 96)
    drawn = np.stack([textures.draw(np.random.default_rng(seed)) for seed in range(30)]).astype(float)
    contrast = drawn.std(axis=(1, 2)).mean(-1)
    assert np.ptp(drawn, axis=-1).mean() > 15
    assert contrast.min() > 5 and contrast.max() > 2 * contrast.min()
