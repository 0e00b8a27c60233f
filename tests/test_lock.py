"""The lock on a folder: who holds it, and what happens when the holder is killed."""

import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import tiny

from launch import lock, logs
from launch.errors import UserError

HOLDER = """
import os, sys, time
from launch.lock import Lock
held = Lock(sys.argv[1], "test")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "lock"


@pytest.fixture
def holder(path: pathlib.Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path], cwd=tiny.ROOT, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_that_is_held_is_refused_until_its_holder_ends(
    path: pathlib.Path, holder: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the holder; a killed one (-9) leaves no lock."""
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


def test_a_holder_out_of_flock_s_reach_keeps_the_lock_by_heartbeats(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "TIMEOUT", 2)
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


def test_a_full_disk_is_named(path: pathlib.Path) -> None:
    """By the lock and by the log of a rank; writing to an open file does not name it."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
        with pytest.raises(OSError, match=f"'{path}'"):
            lock.Lock(path, "test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with pytest.raises(OSError, match="'/dev/full'"), logs.log_to(pathlib.Path("/dev/full")):
        pass


def test_a_holder_sends_heartbeats(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    held = lock.Lock(path, "test")
    before = held.last_heartbeat()
    time.sleep(0.5)
    assert held.last_heartbeat() > before
    held.release()
