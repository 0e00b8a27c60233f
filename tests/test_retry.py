"""launch/retry.sh with real commands: what is restarted, and what ends it."""

import os
import pathlib
import signal
import subprocess
import time

import pytest
import tiny

COMMAND = """#!/bin/bash
# retry.sh's command: each start makes a checkpoint until there are GOAL, and fails with STATUS.
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
    folder: pathlib.Path, *options: object, status: int = 1, goal: int = 0, end: int = 0, wait: str = ""
) -> subprocess.Popen:
    """Start retry.sh with options, COMMAND and `--out folder/run`."""
    command = folder / "command"
    command.write_text(COMMAND)
    command.chmod(0o755)
    settings = {"STATUS": str(status), "GOAL": str(goal), "END": str(end), "WAIT": wait}
    return subprocess.Popen(
        [str(word) for word in (tiny.ROOT / "launch/retry.sh", *options, command, "--out", folder / "run")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )


def starts(folder: pathlib.Path) -> int:
    """How often the command was started."""
    return len((folder / "run" / "starts").read_text().splitlines())


@pytest.mark.parametrize(
    "restarts,options,status,started,words",
    [
        (5, {"goal": 3}, 0, 4, "restart 3 of 5"),  # each restart gains a step, until it ends well
        (2, {"goal": 9, "status": 7}, 7, 3, "it has been restarted 2 time(s)"),
        (5, {"end": 1}, 1, 2, "made no progress"),
        (5, {"goal": 1, "end": 1}, 1, 2, "made no progress"),
        (5, {"end": 2}, 2, 1, "its command line is invalid"),
        (5, {"end": 130}, 130, 1, ""),  # the user stopped it
        (0, {"goal": 3}, 1, 1, "it has been restarted 0 time(s)"),
    ],
)
def test_restarts(tmp_path: pathlib.Path, restarts, options, status, started, words) -> None:
    """Up to N restarts, as long as each gains a checkpoint and nobody stopped the command."""
    done = retry(tmp_path, "--delay", 0, restarts, **options)
    _, err = done.communicate(timeout=60)
    assert done.returncode == status and starts(tmp_path) == started and words in err, err


def test_delays_increase(tmp_path: pathlib.Path) -> None:
    """From the first one each is twice the last."""
    began = time.monotonic()
    _, err = retry(tmp_path, "--delay", 1, 2, goal=9).communicate(timeout=60)
    assert time.monotonic() > began + 3 and "in 1 s" in err and "in 2 s" in err


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1"])
def test_signals_end_the_command_for_good(tmp_path: pathlib.Path, name) -> None:
    """They are passed on, and what they ended is not restarted."""
    done = retry(tmp_path, "--delay", 0, 5, wait="yes")
    while not (tmp_path / "run" / "starts").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    done.send_signal(getattr(signal, f"SIG{name}"))
    done.communicate(timeout=60)
    assert (tmp_path / "run" / "signals").read_text() == f"{name}\n" and starts(tmp_path) == 1
    assert done.returncode == {"INT": 130, "TERM": 143, "USR1": 1}[name]


def test_a_signal_between_two_starts_ends_it(tmp_path: pathlib.Path) -> None:
    """No start follows, and the pause is cut short."""
    done = retry(tmp_path, "--delay", 60, 5, goal=9)
    done.stderr.readline()
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
        (["--often", "3", "true"], "unknown option"),
    ],
)
def test_a_wrong_command_line(words, problem) -> None:
    """One line and status 2, without a start."""
    done = subprocess.run([tiny.ROOT / "launch/retry.sh", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 1
