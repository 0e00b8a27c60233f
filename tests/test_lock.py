"""The lock on a folder: who holds it, and what a killed holder leaves."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny

from launch import lock
from launch.errors import UserError

HOLDER = """
import os, sys, time
from launch.lock import Lock
held = Lock(sys.argv[1], "test")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: pathlib.Path):
    return tmp_path / "lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path], cwd=tiny.ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_holder_is_told_who_the_first_is(path, holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets the lock as soon as that one was killed, even with -9."""
    monkeypatch.setattr(lock, "GRACE", 0.2)
    with pytest.raises(UserError) as refused:
        lock.Lock(path, "test")
    for word in (str(path.parent), f"process {holder.pid}", socket.gethostname(), "another test"):
        assert word in str(refused.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    held = lock.Lock(path, "test")
    assert path.read_text() == f"{socket.gethostname()} {os.getpid()}"
    held.release()
    assert path.read_text() == ""
    lock.Lock(path, "test").release()


def test_a_host_that_flock_does_not_reach(path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows by its heartbeat; without one it is dead."""
    monkeypatch.setattr(lock, "WATCH", 2)
    path.write_text("elsewhere 7")
    beating = subprocess.Popen(["sh", "-c", 'while sleep 0.3; do touch "$0"; done', path])
    try:
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            lock.Lock(path, "test")
    finally:
        beating.kill()
        beating.wait()
    time.sleep(0.4)  # its last touch
    lock.Lock(path, "test").release()


def test_the_heart_beats(path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    held = lock.Lock(path, "test")
    before = held.beaten()
    time.sleep(0.5)
    assert held.beaten() > before
    held.release()
