"""Goodput: the account of a run's time over its starts."""

import json
import os
import pathlib
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import goodput


def start(first: int, step: int, steps: float = 0.0, **phases: float) -> dict[str, Any]:
    """A start's record."""
    return {"first": first, "step": step, "seconds": {"steps": steps, **dict.fromkeys(goodput.PHASES, 0.0), **phases}}


def test_goodput_of_three_starts_by_hand() -> None:
    """30 of the first start's 100 steps were repeated, and then 10 of these once more."""
    found = goodput.account(
        [
            start(0, 100, 50.0, startup=5.0),
            start(70, 80, 10.0, compilation=1.0),
            start(70, 120, 25.0, validation=4.0, checkpoints=5.0),
        ]
    )
    assert found["seconds"] == {
        "steps": 35.0 + 25.0,
        "lost_steps": 15.0 + 10.0,
        "startup": 5.0,
        "compilation": 1.0,
        "validation": 4.0,
        "checkpoints": 5.0,
    }
    assert found["wall"] == 100.0 and found["goodput"] == 0.6 and found["starts"] == 3
    assert goodput.describe(found).startswith("goodput 60 % of 100 s in 3 starts; the rest: lost steps 25 %")


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30)), max_size=8))
def test_every_step_counts_once(runs: list[tuple[float, int]]) -> None:
    """At a second per step, with each start resuming from any earlier step: a step counts for the last start that did
    it."""
    starts, step, owner = [], 0, {}
    for share, done in runs:
        first = int(share * step)
        step = first + done
        owner = {number: by for number, by in owner.items() if number < first}
        owner |= dict.fromkeys(range(first, step), len(starts))
        starts.append(start(first, step, float(done)))
    found = goodput.account(starts)
    assert found["seconds"]["steps"] == pytest.approx(len(owner)) == pytest.approx(step)
    assert found["wall"] == pytest.approx(sum(done for _, done in runs))


def test_the_phases_add_up_to_the_time_since_the_start(tmp_path: pathlib.Path) -> None:
    """And each record is on the disk at once."""
    path = tmp_path / "goodput.json"
    begun = goodput.now() - 2.0
    spent = goodput.Goodput(path, begun, 5)
    assert json.loads(path.read_text())[0]["seconds"]["startup"] >= 2.0
    with spent.spending("validation"):
        time.sleep(0.05)
    spent.record(7)
    (written,) = json.loads(path.read_text())
    assert (written["first"], written["step"]) == (5, 7)
    assert 0.05 <= written["seconds"]["validation"] < 1.0
    assert sum(written["seconds"].values()) == pytest.approx(goodput.now() - begun, abs=0.5)
    spent.record(8, at_once=False)  # the last one is fresh
    assert json.loads(path.read_text())[0]["step"] == 7

    later = goodput.Goodput(path, goodput.now(), 6)
    records = json.loads(path.read_text())
    assert [(record["first"], record["step"]) for record in records] == [(5, 7), (6, 6)]
    assert later.summary()["starts"] == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", "[{}]", '{"first": 1}', '[{"first": "a", "step": 1}]'])
def test_a_damaged_record_does_not_end_a_run(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "goodput.json"
    path.write_text(text)
    assert goodput.Goodput(path, goodput.now(), 0).summary()["starts"] == 1


def test_the_process_start_lies_between_boot_and_now() -> None:
    """And agrees with the kernel."""
    assert 0 < goodput.process_start() < goodput.now()
    began = os.stat("/proc/self").st_ctime  # made when first looked at
    assert time.time() - (goodput.now() - goodput.process_start()) <= began + 1
