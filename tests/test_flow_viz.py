"""Visualisations of flow and errors: the published colour codes, scales, unknown flow, layouts."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prep import flow_viz


def middlebury_color(u: float, v: float) -> list[int]:
    """One vector (1 is full saturation) by the Middlebury flow code, colorcode.cpp."""
    wheel = []
    wheel += [(255, 255 * i // 15, 0) for i in range(15)]
    wheel += [(255 - 255 * i // 6, 255, 0) for i in range(6)]
    wheel += [(0, 255, 255 * i // 4) for i in range(4)]
    wheel += [(0, 255 - 255 * i // 11, 255) for i in range(11)]
    wheel += [(255 * i // 13, 0, 255) for i in range(13)]
    wheel += [(255, 0, 255 - 255 * i // 6) for i in range(6)]
    radius = math.hypot(u, v)
    place = (math.atan2(-v, -u) / math.pi + 1) / 2 * (len(wheel) - 1)
    first = int(place)
    part = place - first
    colour = []
    for a, b in zip(wheel[first], wheel[(first + 1) % len(wheel)], strict=True):
        value = ((1 - part) * a + part * b) / 255
        value = 1 - radius * (1 - value) if radius <= 1 else 0.75 * value
        colour.append(int(255 * value))
    return colour


def color_of(u: float, v: float, max_flow: float = 1.0) -> list[int]:
    return flow_viz.flow_to_color(np.array([[[u, v]]], np.float32), max_flow)[0, 0].tolist()


def test_wheel_has_the_55_published_colours() -> None:
    wheel = np.rint(flow_viz.colour_wheel() * 255).astype(int)
    assert wheel.shape == (55, 3)
    starts = np.cumsum([0, 15, 6, 4, 11, 13])
    assert wheel[starts].tolist() == [
        [255, 0, 0],
        [255, 255, 0],
        [0, 255, 0],
        [0, 255, 255],
        [0, 0, 255],
        [255, 0, 255],
    ]


@pytest.mark.parametrize(
    "u, v, colour",
    [
        (0, 0, [255, 255, 255]),  # no motion: white
        (1, 0, [255, 0, 0]),  # right: red
        (0, 1, [255, 229, 0]),  # down: yellow
        (-1, 0, [0, 209, 255]),  # left: cyan
        (0, -1, [88, 0, 255]),  # up: blue-violet
        (2, 0, [191, 0, 0]),  # beyond the scale: darkened
    ],
)
def test_directions_have_their_published_colours(u: float, v: float, colour: list[int]) -> None:
    assert color_of(u, v) == colour


def test_any_vector_has_the_colour_of_the_published_code() -> None:
    vectors = np.random.default_rng(0).uniform(-1, 1, (40, 50, 2)).astype(np.float32)
    expected = [[middlebury_color(float(u), float(v)) for u, v in row] for row in vectors]
    found = flow_viz.flow_to_color(vectors, 1.0).astype(int)
    assert np.abs(found - expected).max() <= 1  # float32 may fall on the other side of a floor


def test_scale_is_the_longest_known_vector_unless_given() -> None:
    flow = np.zeros((2, 2, 2), np.float32)
    flow[0, 0] = 5, 0
    flow[1, 1] = 1e10, 1e10  # unknown, as Sintel marks it
    assert flow_viz.flow_to_color(flow)[0, 0].tolist() == [255, 0, 0]
    assert flow_viz.flow_to_color(flow, 10)[0, 0].tolist() == [255, 127, 127]


def test_unknown_flow_is_black_and_does_no_harm() -> None:
    flow = np.full((3, 4, 2), np.nan, np.float32)
    assert (flow_viz.flow_to_color(flow) == 0).all()
    assert flow_viz.draw_prediction(np.zeros((3, 4, 3), np.uint8), flow, flow).shape == (3, 16, 3)
    flow[0, 0] = 0
    assert flow_viz.flow_to_color(flow)[0, 0].tolist() == [255, 255, 255]
    assert (flow_viz.flow_to_color(flow)[1:] == 0).all()


def test_error_map_has_the_kitti_colours() -> None:
    epe = np.array([[0, 0.18, 2.9, 3.1, 47, 49, 1e9, np.nan]])
    assert flow_viz.error_map(epe)[0].tolist() == [
        [49, 54, 149],
        [49, 54, 149],
        [224, 243, 248],
        [254, 224, 144],
        [215, 48, 39],
        [165, 0, 38],
        [165, 0, 38],
        [0, 0, 0],
    ]


def test_strip_shows_four_panels_and_both_flows_at_one_scale() -> None:
    image = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    true = np.zeros((128, 192, 2), np.float32)
    true[..., 0] = 8
    row = flow_viz.draw_prediction(image, true, true / 2)
    assert row.shape == (128, 768, 3) and row.dtype == np.uint8
    corners = [row[-1, 192 * panel + 191].tolist() for panel in range(4)]  # away from the labels
    assert corners == [image[-1, -1].tolist(), [255, 0, 0], [255, 127, 127], [254, 224, 144]]
    assert (row[:20, :30] != image[:20, :30]).any()  # a label
    assert (row[30:, :192] == image[30:]).all()


def test_strip_leaves_out_labels_that_do_not_fit() -> None:
    image = np.full((24, 32, 3), 77, np.uint8)
    flow = np.zeros((24, 32, 2), np.float32)
    assert (flow_viz.draw_prediction(image, flow, flow)[:, :32] == image).all()


def test_a_sheet_stacks_images_of_any_size_under_their_captions() -> None:
    rows = [np.full((10, 300, 3), 1, np.uint8), np.full((20, 100, 3), 2, np.uint8)]
    page = flow_viz.contact_sheet(rows, ["first", "second"])
    assert page.dtype == np.uint8 and page.shape[1:] == (300, 3)
    caption = (page.shape[0] - 30) // 2
    assert caption >= flow_viz.TEXT_SIZE
    assert (page[caption : caption + 10] == 1).all()
    assert (page[-20:, :100] == 2).all() and (page[-20:, 100:] == 255).all()
    assert page[:caption].min() < 128 < page[:caption].max()  # black on white
    narrow = flow_viz.contact_sheet([np.zeros((4, 4, 3), np.uint8)], ["wider than the image"])
    assert narrow.shape[1] > 100


@pytest.mark.parametrize("rows, captions", [([], []), ([np.zeros((2, 2, 3), np.uint8)], [])])
def test_sheet_wants_a_caption_for_every_row(rows: list[np.ndarray], captions: list[str]) -> None:
    with pytest.raises(ValueError, match="captions"):
        flow_viz.contact_sheet(rows, captions)


def test_a_saved_png_is_the_image(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    flow_viz.save_png(tmp_path / "x.png", image)
    assert (np.asarray(Image.open(tmp_path / "x.png")) == image).all()
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
