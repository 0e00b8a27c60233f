"""Both variants against stored flows of PyTorch networks with the published names.

tests/torch_pwcnet.py made the file from the weights and images below; where PyTorch is installed, tests/test_weights.py
compares with PyTorch itself.
"""

import pathlib
import zlib

import numpy as np
import pytest
from mindspore import Tensor

from model.published import published_names, swap_red_and_blue
from model.pwcnet import VARIANTS, PWCNet, to_network

FILE = pathlib.Path(__file__).parent / "published_flows.npz"


def uniform(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) that are the same with every version of NumPy."""
    raw = np.random.Philox(seed).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)


def plain_weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights for a published name: He uniform, with small biases."""
    bound = 0.1 if len(shape) == 1 else (6 / np.prod(shape[1:])) ** 0.5
    return (bound * uniform(zlib.crc32(name.encode()), shape)).astype(np.float32)


def images() -> list[np.ndarray]:
    """Two smooth images, uint8 (64, 64, 3)."""
    y, x = np.mgrid[:64, :64][..., None] / 10
    phases = np.arange(3)
    return [(127 + 100 * np.sin(x + shift + phases) * np.cos(1.3 * y + phases)).astype(np.uint8) for shift in (0, 0.2)]


def load_plain_weights(network: PWCNet) -> None:
    """Give a dense network `plain_weights`."""
    parameters = network.parameters_dict()
    for here, there in published_names(network.variant).items():
        value = plain_weights(there, parameters[here].shape)
        if network.variant == "nvlabs":
            value = swap_red_and_blue(here, value)
        parameters[here].set_data(Tensor(value))


@pytest.mark.parametrize("variant", VARIANTS)
def test_flows_equal_the_published_network_s(variant: str, graph_mode: None) -> None:
    """Names, order of channels, conventions of warp and upsampling: all five flows agree."""
    network = PWCNet(variant)
    load_plain_weights(network)
    flows = network(*(to_network(Tensor(image[None])) for image in images()))
    kept = np.load(FILE)
    for level, flow in zip((6, 5, 4, 3, 2), flows, strict=True):
        expected = kept[f"{variant}-{level}"]
        assert abs(expected).max() > 0.03  # more than half a pixel
        np.testing.assert_allclose(flow.asnumpy()[0], expected, atol=5e-5)
