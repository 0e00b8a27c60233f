"""Starting: what an environment lacks, what keeps ranks from starting together."""

import subprocess
import sys

import pytest
import tiny

from launch import cluster, requirements


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
