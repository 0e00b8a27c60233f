"""Goodput: how much of a run's wall time went into steps that counted, and where the rest went.

A run may have several starts. Each keeps one record in `goodput.json`, with the time from the start of
its process on, by what it was spent on. A start that was killed is accounted for by its last record; time
between starts, and a start that ended before its first record, are not counted.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator

from launch.files import write_json

PHASES = ("startup", "compilation", "validation", "checkpoints")
"""What time goes to beside steps: startup is all before the first compilation, with the imports;
compilation that of the training step (the validation's own is part of validation); checkpoints the
copying of the state, as it is written meanwhile."""
EVERY = 5
"""Seconds between two records, unless something else asks for one."""


def process_start() -> float:
    """When this process started, on the clock of `now`."""
    fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def now() -> float:
    """Seconds since the machine was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Goodput:
    """The record of this start, beside those of earlier ones.

    Time is spent on one thing at a time: on steps, unless `spending` says otherwise.

    Args:
        path: of goodput.json; None on ranks that do not write it.
        started: when the process started, by `now`.
        first: how many steps lie behind.
    """

    def __init__(self, path: pathlib.Path | None, started: float, first: int) -> None:
        self.path = path
        self.earlier = read(path) if path else []
        self.seconds = {"steps": 0.0, **dict.fromkeys(PHASES, 0.0)}
        self.phase, self.mark = "startup", started
        self.first = self.step = first
        self.recorded = -EVERY
        self.record(first)
        self.phase = "steps"

    @contextlib.contextmanager
    def spending(self, phase: str) -> Iterator[None]:
        """A context whose time goes to one of PHASES."""
        self.switch(phase)
        try:
            yield
        finally:
            self.switch("steps")

    def switch(self, phase: str) -> None:
        moment = now()
        self.seconds[self.phase] += moment - self.mark
        self.phase, self.mark = phase, moment

    def record(self, step: int, at_once: bool = True) -> None:
        """Write how far the start has come; if not `at_once`, only where the last record is old."""
        self.step = step
        self.switch(self.phase)
        if self.path and (at_once or self.mark - self.recorded > EVERY):
            self.recorded = self.mark
            with contextlib.suppress(OSError):  # it must not end a run
                write_json(self.path, self.starts())

    def starts(self) -> list[dict]:
        """The records of all starts, with this one's last."""
        return [*self.earlier, {"first": self.first, "step": self.step, "seconds": self.seconds}]

    def summary(self) -> dict:
        """The account of the run so far: see `account`."""
        self.switch(self.phase)
        return account(self.starts())


def read(path: pathlib.Path) -> list[dict]:
    """The records of earlier starts; none if the file is not there or damaged."""
    try:
        starts = json.loads(path.read_text())
        account(starts)
        return starts
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def account(starts: list[dict]) -> dict:
    """What the time of all starts went into.

    A step counts if no later start did it again. A start's steps are taken to be of equal length.

    Args:
        starts: a dict for each: `first` and `step`, how many steps lay behind at its begin and at its
            last record, and `seconds` by phase.

    Returns:
        goodput: share of the wall time spent on steps that counted, in [0, 1].
        wall: seconds of all starts.
        starts: their number.
        seconds: a dict with `steps` (that counted), `lost_steps` and each of PHASES; sums up to wall.
    """
    seconds = {"steps": 0.0, "lost_steps": 0.0, **dict.fromkeys(PHASES, 0.0)}
    counted = float("inf")  # steps up to here were not done again
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


def describe(summary: dict) -> str:
    """An `account` as a line of text."""
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
