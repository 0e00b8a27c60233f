"""launch/retry.sh with real commands: what is restarted and what is not."""

import os
import pathlib
import signal
import subprocess
import time

import pytest
import tiny

COMMAND = """#!/bin/bash
# Each start adds a checkpoint until there are GOAL, and exits with STATUS; then with END.
mkdir -p "$2/checkpoints"
echo start >> "$2/starts"
trap 'echo TERM >> "$2/signals"; exit 143' TERM
trap 'echo INT >> "$2/signals"; exit 130' INT
trap 'echo USR1 >> "$2/signals"; exit 1' USR1
made=$(ls "$2/checkpoints" | wc -l)
if [ -n "$WAIT" ]; then sleep 60 >/dev/null 2>&1 & wait; fi
[ "$made" -lt "$GOAL" ] && touch "$2/checkpoints/step-0000000$made.ckpt" && exit "$STATUS"
exit "$END"
"""


def retry(
    folder: pathlib.Path, *options: object, status: int = 1, goal: int = 0, end: int = 0, wait: int = 0
) -> subprocess.Popen[str]:
    """Start retry.sh with options, COMMAND and `--out folder/run`."""
    command = folder / "command"
    command.write_text(COMMAND)
    command.chmod(0o755)
    settings = {"STATUS": str(status), "GOAL": str(goal), "END": str(end), "WAIT": "yes" if wait else ""}
    return subprocess.Popen(
        [str(word) for word in (tiny.ROOT / "launch/retry.sh", *options, command, "--out", folder / "run")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )


def starts(folder: pathlib.Path) -> int:
    """Number of times the command was started."""
    return len((folder / "run" / "starts").read_text().splitlines())


@pytest.mark.parametrize(
    "restarts,options,status,started,words",
    [
        (5, {"goal": 3}, 0, 4, "restart 3 of 5"),  # each restart makes progress until the command succeeds
        (2, {"goal": 9, "status": 7}, 7, 3, "it has been restarted 2 time(s)"),
        (5, {"end": 1}, 1, 2, "made no progress"),
        (5, {"goal": 1, "end": 1}, 1, 2, "made no progress"),
        (5, {"end": 2}, 2, 1, "its command line is invalid"),
        (5, {"end": 130}, 130, 1, ""),  # the user stopped it
        (0, {"goal": 3}, 1, 1, "it has been restarted 0 time(s)"),
    ],
)
def test_a_command_is_restarted_while_it_makes_progress(
    tmp_path: pathlib.Path, restarts: int, options: dict[str, int], status: int, started: int, words: str
) -> None:
    """At most N times, unless the user stopped it or its command line is invalid."""
    done = retry(tmp_path, "--delay", 0, restarts, **options)
    _, err = done.communicate(timeout=60)
    assert done.returncode == status and starts(tmp_path) == started and words in err, err


def test_each_delay_is_twice_the_last(tmp_path: pathlib.Path) -> None:
    began = time.monotonic()
    _, err = retry(tmp_path, "--delay", 1, 2, goal=9).communicate(timeout=60)
    assert time.monotonic() > began + 3 and "in 1 s" in err and "in 2 s" in err


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1"])
def test_a_command_ended_by_a_forwarded_signal_is_not_restarted(tmp_path: pathlib.Path, name: str) -> None:
    done = retry(tmp_path, "--delay", 0, 5, wait=1)
    while not (tmp_path / "run" / "starts").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    done.send_signal(getattr(signal, f"SIG{name}"))
    done.communicate(timeout=60)
    assert (tmp_path / "run" / "signals").read_text() == f"{name}\n" and starts(tmp_path) == 1
    assert done.returncode == {"INT": 130, "TERM": 143, "USR1": 1}[name]


def test_a_signal_during_the_delay_prevents_the_restart(tmp_path: pathlib.Path) -> None:
    done = retry(tmp_path, "--delay", 60, 5, goal=9)
    assert done.stderr and done.stderr.readline()
    time.sleep(0.2)
    done.terminate()
    assert done.wait(timeout=10) == 143 and starts(tmp_path) == 1


@pytest.mark.parametrize(
    "words,problem",
    [
        (["x", "true"], "expected the number of restarts"),
        (["3"], "expected a command"),
        (["3", "true"], "no --out"),
        (["--delay", "soon", "3", "true"], "whole seconds"),
        (["--delay", "08", "09", "true"], "no --out"),
        (["--often", "3", "true"], "unknown option"),
    ],
)
def test_an_invalid_command_line_starts_nothing(words: list[str], problem: str) -> None:
    done = subprocess.run([tiny.ROOT / "launch/retry.sh", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 1
