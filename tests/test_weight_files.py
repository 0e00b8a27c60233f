"""Files of weights without PyTorch: what they say of their network, and files that hold none."""

import pytest

from model import weights
from model.pwcnet import PWCNet
from prep.errors import UserError

pytestmark = pytest.mark.usefixtures("graph_mode")


def test_what_a_file_says_of_its_network(network, tmp_path):
    """What it leaves out has the defaults with which it is built."""
    path = tmp_path / "in.ckpt"
    defaults = {"variant": "irr", "dense": True, "normalize_features": False, "warp_mode": "bilinear"}
    for options in ({"dense": False}, {"normalize_features": True, "warp_mode": "nearest"}, defaults):
        weights.save_network(path, network, options)
        assert weights.network_options(path) == {**defaults, **options}
    weights.write(path, network, {})
    assert weights.network_options(path) == defaults
    assert PWCNet(**defaults).variant == "irr"


@pytest.mark.parametrize("options", [
    {"depth": 3}, {"variant": "other"}, {"dense": 1}, {"warp_mode": ["nearest"]}, [1], "irr"])
def test_options_of_another_version(network, tmp_path, options):
    weights.save_network(tmp_path / "in.ckpt", network, options)
    with pytest.raises(UserError, match=r"in.ckpt: .*options .* are unknown to this version"):
        weights.network_options(tmp_path / "in.ckpt")
