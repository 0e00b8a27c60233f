"""Starting: what an environment lacks, what keeps ranks from starting together."""

import subprocess
import sys

import pytest
import tiny

from launch import cluster, keeper, requirements
from prep.errors import UserError


def test_this_environment_has_what_setup_cfg_asks_for():
    """Comments in setup.cfg are no requirements, and versions count."""
    wanted = requirements.wanted(["test"])
    assert "mindspore == 2.8.0" in wanted and not any(line.startswith("#") for line in wanted)
    assert requirements.missing(wanted) == []
    assert requirements.missing(["numpy >= 2", "no-such-package-anywhere"]) == [
        "numpy >= 2", "no-such-package-anywhere"]


def test_an_empty_environment_lacks_everything(tmp_path):
    """The check itself runs with nothing but the standard library."""
    done = subprocess.run([sys.executable, "-S", "-E", tiny.ROOT / "launch" / "requirements.py"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "mindspore" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("outcomes,words", [
    ([("a", {"x": "1"}, None), ("b", {"x": "1"}, None)], None),
    ([("a", {"x": "1"}, None), ("b", {"x": "2"}, None)], ["rank 1 on b", "x 2", "rank 0 on a"]),
    ([("a", {}, None), ("b", {}, "f.flo: cut short")], ["rank 1 on b: f.flo: cut short"]),
    ([("a", {}, "no recipe"), ("a", {}, "no recipe")], ["no recipe"]),
])
def test_ranks_that_disagree(outcomes, words):
    """The line names the rank and host that differs, unless all failed alike."""
    found = cluster.find_disagreement(outcomes)
    assert (found is None) == (words is None)
    for word in words or []:
        assert word in found


def test_slurms_variables_are_a_place(monkeypatch):
    """Ranks of srun --mpi=pmix; without PMIx they would all be rank 0 and write to the same run."""
    given = {"STEP_NUM_TASKS": "11", "STEP_TASKS_PER_NODE": "4(x2),3", "PROCID": "9", "LOCALID": "1",
             "NODEID": "2"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SystemExit):  # rank 0 says it
        cluster.place.__wrapped__()
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(UserError, match="srun --mpi=pmix"):
        cluster.place.__wrapped__()
    monkeypatch.setenv("SLURM_PROCID", "9")
    monkeypatch.setenv("PMIX_RANK", "9")
    place = cluster.place.__wrapped__()
    assert (place.rank, place.ranks, place.local_rank, place.local_ranks) == (9, 11, 1, 3)
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert cluster.place.__wrapped__().local_ranks == 4


def test_ranks_that_msrun_left_alone(monkeypatch):
    """Nobody would end them; how many a host has, only msrun's command line tells."""
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setattr(keeper, "read", lambda *_: "python\0/venv/bin/msrun\0--worker_num=2\0")
    with pytest.raises(UserError, match="--join=True"):
        cluster.place.__wrapped__()


@pytest.mark.parametrize("role", ["MS_WORKER", "MS_SCHED"])
def test_a_role_that_is_left_in_the_environment(monkeypatch, role):
    """A scheduler's would end a run of one rank without a word."""
    monkeypatch.setenv("MS_ROLE", role)
    with pytest.raises(UserError, match="unset MS_ROLE"):
        cluster.place.__wrapped__()


def test_more_ranks_than_gpus_are_refused():
    """In words, on each host, before MindSpore is imported; as is a machine without a driver."""
    with pytest.raises(UserError, match="GPU|driver"):
        cluster.check_device(cluster.Place(0, 100, 0, 100), "GPU")
