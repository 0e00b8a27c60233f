"""Goodput: the share of a run's wall time spent on steps that counted, and where the rest went.

A run may have several starts. Each keeps one record in `goodput.json`: the time since the start of its process, by
phase. A start that was killed counts up to its last record; the time between starts, and a start that ended before
its first record, do not count.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from launch.files import write_json

PHASES = ("startup", "compilation", "validation", "checkpoints")
"""Where time goes besides steps: startup is everything before the first compilation, imports included; compilation is
that of the training step (validation includes its own); checkpoints is the copying of the state, which is written in
the background."""
INTERVAL = 5
"""Seconds between two records, unless one is asked for at once."""


def process_start() -> float:
    """When this process started, on the clock of `now`.

    Not by psutil, whose create_time() adds the boot time in whole seconds.
    """
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def now() -> float:
    """Seconds since the machine booted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


PROCESS_START = process_start()
"""When this process started. Read on import: in a job of several ranks, a rank later runs in a child of it."""


class Goodput:
    """The record of this start, beside those of earlier ones.

    All time goes to steps, except inside `spending`.

    Args:
        path: of goodput.json; None on ranks that do not write it.
        started: when the process started, on the clock of `now`.
        first: number of steps done before this start.
    """

    def __init__(self, path: pathlib.Path | None, started: float, first: int) -> None:
        self.path = path
        self.earlier = read(path) if path else []
        self.seconds: dict[str, float] = {"steps": 0.0, **dict.fromkeys(PHASES, 0.0)}
        self.phase, self.mark = "startup", started
        self.first = self.step = first
        self.saved = 0
        self.recorded = -float(INTERVAL)
        self.record(first)
        self.phase = "steps"

    @contextlib.contextmanager
    def spending(self, phase: str) -> Iterator[None]:
        """A context whose time goes to `phase`, one of PHASES."""
        self.switch(phase)
        try:
            yield
        finally:
            self.switch("steps")

    def switch(self, phase: str) -> None:
        """Begin a phase."""
        moment = now()
        self.seconds[self.phase] += moment - self.mark
        self.phase, self.mark = phase, moment

    def record(self, step: int, at_once: bool = True, saved: int = 0) -> None:
        """Record that this start has reached a step; unless `at_once`, only if the last record is old.

        `saved` is the newest step on the disk: a run whose checkpoints are missing must not start again unnoticed.
        """
        self.step, self.saved = step, max(self.saved, saved)
        self.switch(self.phase)
        if self.path and (at_once or self.mark - self.recorded > INTERVAL):
            self.recorded = self.mark
            with contextlib.suppress(OSError):  # a run must not end because of this
                write_json(self.path, self.starts())

    def starts(self) -> list[dict[str, Any]]:
        """The records of all starts, this one last."""
        return [*self.earlier, {"first": self.first, "step": self.step, "saved": self.saved, "seconds": self.seconds}]

    def summary(self) -> dict[str, Any]:
        """The `account` of the run so far."""
        self.switch(self.phase)
        return account(self.starts())


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of earlier starts; none if the file is missing or damaged."""
    try:
        starts = json.loads(path.read_text())
        account(starts)
        return starts
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def account(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the time of all starts went.

    A step counts if no later start repeated it. All steps of a start are assumed to take equally long.

    Args:
        starts: of each start, `first` and `step`, the steps done at its beginning and at its last record, and
            `seconds` by phase.

    Returns:
        goodput: share of the wall time spent on steps that counted, in [0, 1].
        wall: seconds of all starts.
        starts: their number.
        seconds: by `steps` (those that counted), `lost_steps` and each of PHASES; they add up to wall.
    """
    seconds = {"steps": 0.0, "lost_steps": 0.0, **dict.fromkeys(PHASES, 0.0)}
    counted = float("inf")  # steps up to here were not repeated
    for start in reversed(starts):
        done = start["step"] - start["first"]
        kept = min(max(min(start["step"], counted) - start["first"], 0), done)
        spent = start["seconds"]["steps"]
        seconds["steps"] += spent * kept / done if done > 0 else 0.0
        seconds["lost_steps"] += spent * (done - kept) / done if done > 0 else spent
        for phase in PHASES:
            seconds[phase] += start["seconds"][phase]
        counted = min(counted, start["first"])
    wall = sum(seconds.values())
    return {
        "goodput": seconds["steps"] / wall if wall else 0.0,
        "wall": wall,
        "starts": len(starts),
        "seconds": seconds,
    }


def describe(summary: dict[str, Any]) -> str:
    """An `account` as one line."""
    wall = summary["wall"] or 1.0
    rest = ", ".join(
        f"{name.replace('_', ' ')} {100 * value / wall:.0f} %"
        for name, value in summary["seconds"].items()
        if name != "steps"
    )
    number = summary["starts"]
    return (
        f"goodput {100 * summary['goodput']:.0f} % of {summary['wall']:.0f} s in {number} "
        f"start{'s' if number != 1 else ''}; the rest: {rest}"
    )
