"""The Python API: `model.load`, flow of any image size, one graph per size after resizing."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tiny
from mindspore import Tensor
from test_model import upsample_in_float64
from test_published import FILE, images, load_plain_weights

import model
from model.inference import FlowPredictor, PredictionGraph
from model.pwcnet import VARIANTS, PWCNet
from model.weights import save_network
from prep.synthesis.version1 import make_pair

pytestmark = pytest.mark.usefixtures("graph_mode")


def test_importing_the_package_is_cheap() -> None:
    """It imports neither MindSpore nor NumPy."""
    program = "import sys, model; print({'mindspore', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tiny.ROOT, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_network_gives_the_published_flow(variant: str, tmp_path: pathlib.Path) -> None:
    """In pixels at the size of the images, x first."""
    network = PWCNet(variant)
    load_plain_weights(network)
    save_network(tmp_path / "weights.ckpt", network, {"variant": variant})
    flow = model.load(tmp_path / "weights.ckpt").flow(*images())
    assert flow.dtype == np.float32
    finest = np.load(FILE)[f"{variant}-2"][None].astype(np.float64)
    expected = upsample_in_float64(finest / 0.05, 64, 64, variant == "irr")[0].transpose(1, 2, 0)
    np.testing.assert_allclose(flow, expected, atol=2e-3)


def test_sizes_with_the_same_padding_share_a_graph(network: PWCNet) -> None:
    """Its results are those of one graph for everything."""
    predictor, graph = FlowPredictor(network), PredictionGraph(network)
    before = len(network.compile_cache)
    for size in ((70, 93), (128, 128), (100, 65)):
        image1, image2 = make_pair(1, *size)[:2]
        flow = predictor.flow(image1, image2)
        expected = graph(Tensor(image1[None]), Tensor(image2[None])).asnumpy()[0]
        assert flow.shape == (*size, 2)
        np.testing.assert_allclose(flow, expected, atol=1e-3)
    assert len(network.compile_cache) == before + 1


def test_wrong_images_are_refused(predictor: FlowPredictor) -> None:
    image = np.zeros((8, 9, 3), np.uint8)
    cases: list[tuple[Any, str]] = [
        (image.tolist(), r"image 2 is of type list, expected a NumPy array, uint8 .H, W, 3."),
        (None, "image 2 is of type NoneType"),
        (image[None], r"image 2 is uint8 .1, 8, 9, 3., expected uint8 .H, W, 3."),
        (image.astype(np.float32), "float32 .8, 9, 3., expected uint8"),
        (image[..., :1], "uint8 .8, 9, 1., expected uint8 .H, W, 3."),
        (image[:, :8], "image 1 is .8, 9, 3. and image 2 .8, 8, 3."),
        (image[:0], "expected uint8 .H, W, 3."),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            predictor.flow(image, other)
    for count, message in (
        (2, r"image 1 is .1, 8, 9, 3. and image 2 .2, 8, 9, 3."),
        (0, r"image 2 is uint8 .0, 8, 9, 3., expected uint8 .N, H, W, 3."),
    ):
        with pytest.raises(ValueError, match=message):
            predictor.flow_batch(image[None], np.repeat(image[None], count, 0))


THREADS = """
import concurrent.futures, sys
import numpy as np
import model
predictors = [model.load(sys.argv[1], backend="mindspore") for _ in range(2)]
image1, image2 = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
with concurrent.futures.ThreadPoolExecutor(4) as threads:
    flows = list(threads.map(lambda number: predictors[number % 2].flow(image1, image2), range(12)))
print(all(np.array_equal(flow, flows[0]) for flow in flows))
"""


def test_threads_may_predict_at_once(ckpt: pathlib.Path) -> None:
    """With a predictor that they share, and with others, from the first use on; MindSpore warns of nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "GLOG_v"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS, ckpt],
        env=environment,
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "[WARNING]" not in done.stderr
