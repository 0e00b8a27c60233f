"""Checkpoints: what is restored from them, which of them are kept, and files that do not fit."""

import concurrent.futures
import json
import pathlib
import resource

import mindspore
import numpy as np
import pytest
from mindspore import Parameter, Tensor, float32, nn

from launch.errors import UserError
from model import weights
from model.losses import MultiScaleLoss
from model.pwcnet import PWCNet
from train import checkpoint
from train.run_folder import BEST, list_checkpoints
from train.step import TrainStep

pytestmark = pytest.mark.usefixtures("graph_mode")


class Weights(nn.Cell):
    """A Cell with so many weights."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.weights = Parameter(Tensor(np.zeros(count), float32), name="weights")


def test_a_network_is_restored_from_its_file(tmp_path: pathlib.Path) -> None:
    """Options and weights, from a file of the network, from one of the trainer, and from one without options."""
    options = {"variant": "nvlabs", "dense": False, "warp_mode": "nearest"}
    network = PWCNet(**options)
    weights.save_network(tmp_path / "network.ckpt", network, options)
    step = TrainStep(network, MultiScaleLoss())
    with checkpoint.Checkpoints(tmp_path, options, every=1) as checkpoints:
        checkpoints.save(3, step.state)
    of_trainer = tmp_path / "step-00000003.ckpt"
    for path in (tmp_path / "network.ckpt", of_trainer):
        loaded = weights.load_network(path)
        assert (loaded.variant, loaded.dense, loaded.warp.mode) == ("nvlabs", False, "nearest")
        for old, new in zip(network.get_parameters(), loaded.get_parameters(), strict=True):
            assert old.name == new.name
            np.testing.assert_array_equal(old.asnumpy(), new.asnumpy())
    assert checkpoints.restore(step.state) == 3

    before_variants = PWCNet(dense=False)
    weights.write(tmp_path / "old.ckpt", before_variants, {"model": json.dumps({"dense": False})})
    assert weights.load_network(tmp_path / "old.ckpt").variant == "irr"
    mindspore.save_checkpoint(PWCNet(), str(tmp_path / "bare.ckpt"))
    assert weights.load_network(tmp_path / "bare.ckpt").dense
    assert {path.suffix for path in tmp_path.iterdir()} == {".ckpt"}
    assert not list(tmp_path.glob("*.partial-*"))


def test_the_newest_checkpoints_are_kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last regular ones, and the newest two of all, so that one may be damaged; damaged ones of later steps are
    deleted."""
    cell = Weights()
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    monkeypatch.setattr(checkpoint, "KEPT", 2)
    with checkpoint.Checkpoints(tmp_path, {}, every=10) as checkpoints:

        def steps_after(*saved: int) -> list[int]:
            for step in saved:
                checkpoints.save(step, cell)
            checkpoints.wait()
            return list(list_checkpoints(tmp_path))

        assert checkpoints.is_due(10) and not checkpoints.is_due(11)
        assert steps_after(10, 20, 30) == [20, 30]
        checkpoints.save_if_best(30, cell, 2.0)
        assert steps_after() == [20, 30] and (tmp_path / BEST).exists()
        now = checkpoint.MAX_AGE + 1
        assert checkpoints.is_due(33)
        assert steps_after(33) == [20, 30, 33] and not checkpoints.is_due(34)
        assert steps_after(36) == [20, 30, 33, 36]
        (tmp_path / "step-00000040.ckpt").write_bytes(b"damaged")
        assert checkpoints.restore(cell) == 36
        assert steps_after(38) == [20, 30, 36, 38]
        assert steps_after(40) == [30, 38, 40]


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: pathlib.Path) -> None:
    """Its options are not those of its weights, or of another version, it has a NaN, or it is not a checkpoint."""
    path = tmp_path / "in.ckpt"
    weights.save_network(path, PWCNet(dense=False), {"variant": "nvlabs"})
    with pytest.raises(UserError, match=r"in.ckpt: .* 28 missing \(.*, ...\); .* of another shape"):
        weights.load_network(path)
    for options in ({"variant": "other"}, {"depth": 3}):
        weights.save_network(path, PWCNet(dense=False), options)
        with pytest.raises(UserError, match=r"options .* are unknown to this version"):
            weights.load_network(path)
    network = PWCNet(dense=False)
    bias = network.flow_estimators[0].conv2[0].bias
    for value in (np.nan, np.inf):
        bias.set_data(Tensor(np.full(bias.shape, value, np.float32)))
        weights.save_network(path, network, {"dense": False})
        with pytest.raises(UserError, match=r"in.ckpt: flow_estimators.0.conv2.0.bias holds NaN or infinity"):
            weights.load_network(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"in.ckpt: damaged or not a MindSpore checkpoint"):
        weights.load_network(path)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: pathlib.Path) -> None:
    """It is not skipped for an older one, as a damaged file is."""
    cell = Weights()
    with checkpoint.Checkpoints(tmp_path, {}, every=1) as checkpoints:
        checkpoints.save(1, cell)
        checkpoints.wait()
        weights.write(tmp_path / "step-00000002.ckpt", cell, {"step": 2, "format": weights.FORMAT + 1})
        with pytest.raises(UserError, match=rf"00002.ckpt: has format {weights.FORMAT + 1}, .*a newer one"):
            checkpoints.restore(cell)
    mindspore.save_checkpoint(cell, str(tmp_path / "old.ckpt"), append_dict={"step": 3}, crc_check=True)
    assert weights.read(tmp_path / "old.ckpt")["step"] == 3


def test_the_best_epe_survives_a_resume(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is that of best.ckpt, also if the run resumes from an earlier checkpoint; on another dataset there is none
    yet."""
    cell = Weights()
    with checkpoint.Checkpoints(tmp_path, {}, every=1, validation="a") as checkpoints:
        checkpoints.save_if_best(1, cell, 5.0)
        checkpoints.save(1, cell)
        checkpoints.save_if_best(2, cell, 10 / 3)  # and killed before the next checkpoint
    for name, best in (("a", 10 / 3), ("b", float("inf"))):
        with checkpoint.Checkpoints(tmp_path, {}, every=1, validation=name) as checkpoints:
            assert checkpoints.restore(cell) == 1 and checkpoints.best == best
    assert not capsys.readouterr().err


@pytest.mark.parametrize("damaged", [False, True])
def test_lost_best_weights_are_replaced_by_the_next_validated_ones(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], damaged: bool
) -> None:
    """A warning says so. Until then, evaluation of the run's best weights would fail."""
    cell, path = Weights(), tmp_path / "best.ckpt"
    with checkpoint.Checkpoints(tmp_path, {}, every=1) as checkpoints:
        checkpoints.save_if_best(1, cell, 2.0)
        checkpoints.save(1, cell)
    path.write_bytes(path.read_bytes()[:100])
    if not damaged:
        path.unlink()
    with checkpoint.Checkpoints(tmp_path, {}, every=1) as checkpoints:
        assert checkpoints.restore(cell) == 1
        checkpoints.save_if_best(2, cell, 3.0)
    assert weights.read(path)["step"] == 2
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "best.ckpt" in warning
    assert warning.endswith("; the next validation writes it anew\n")


def test_the_best_weights_on_another_dataset_are_kept(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under another name, with a note; those on the same dataset are replaced."""
    cell = Weights()
    for step, name, epe in ((1, "a", 2.0), (2, "a", 1.0), (3, "b", 5.0), (4, "b", 4.0)):
        with checkpoint.Checkpoints(tmp_path, {}, every=1, validation=name) as checkpoints:
            checkpoints.save_if_best(step, cell, epe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-a-step-00000002.ckpt", "best.ckpt"]
    assert weights.read(tmp_path / "best.ckpt")["step"] == 4
    assert capsys.readouterr().err == (
        "note: best.ckpt is now the best on b; best-a-step-00000002.ckpt has the best weights on a\n"
    )


def test_a_run_folder_that_is_gone_is_not_made_anew(tmp_path: pathlib.Path) -> None:
    """A checkpoint alone could not be resumed from."""
    run = tmp_path / "run"
    run.mkdir()
    with checkpoint.Checkpoints(run / "checkpoints", {}, every=1) as checkpoints:
        checkpoints.save(1, Weights())
        checkpoints.wait()
        run.rename(tmp_path / "moved")
        with pytest.raises(UserError, match=rf"{run}: was moved or removed during the run; .*--out"):
            checkpoints.save(2, Weights())
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: pathlib.Path) -> None:
    """The error comes with the next step and names the file, of which nothing is left."""
    cell = Weights(1_000_000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    failure = pytest.raises(OSError, match="File too large")
    with failure as failed, checkpoint.Checkpoints(tmp_path, {}, every=1) as checkpoints:
        checkpoints.save(1, cell)
        checkpoints.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
            checkpoints.save(2, cell)
            concurrent.futures.wait(checkpoints.writing)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        checkpoints.is_due(3)
    assert failed.value.filename == str(tmp_path / "step-00000002.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.ckpt"]
    with checkpoint.Checkpoints(tmp_path, {}, every=1) as checkpoints:
        assert checkpoints.restore(cell) == 1
