"""A lock that keeps two commands from writing to the same folder at the same time.

It uses flock(), which the kernel releases when the last process that holds it ends, for whatever reason. Over NFS
(Linux 2.6.12 and later), CephFS and GPFS, flock() covers all hosts. Some file systems lack it, or limit it to one host
(Lustre without the mount option "flock", NFS with "nolock" or "local_lock"). For those there is a heartbeat: the
holder updates the lock file's modification time every few seconds, and a process that finds another host's name in
the file watches that time before it takes over.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
import threading
import time
from typing import IO, Any, NoReturn

import psutil

from launch.errors import UserError
from launch.files import naming

HEARTBEAT = 3
"""Seconds between heartbeats."""
TIMEOUT = 10
"""Seconds without a heartbeat after which a holder on another host counts as dead."""
GRACE = 3
"""Seconds for the children of a killed holder to end."""


class Lock:
    """A lock on a folder, held until `release`, or until this process and its children have ended.

    Args:
        path: the lock file, created in an existing folder.
        purpose: what the holder is, for the error message, such as "training run".

    Raises:
        UserError: another process holds the lock; the message names folder, host and process.
        OSError: the file cannot be opened, or while this waited, its holder renamed the folder (FileNotFoundError).
    """

    def __init__(self, path: pathlib.Path, purpose: str) -> None:
        self.path, self.purpose = path, purpose
        self.file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open until `release`
        try:
            self.acquire()
        except BaseException:
            self.file.close()
            raise
        self.write_holder(f"{socket.gethostname()} {os.getpid()}")
        self.released = threading.Event()
        threading.Thread(target=self.send_heartbeats, daemon=True).start()

    def acquire(self) -> None:
        """Take the lock, or raise UserError."""
        supported, deadline = True, time.monotonic() + GRACE
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.refuse()
                time.sleep(0.1)
            except OSError:  # the file system lacks flock()
                supported = False
                break
        host, process = self.read_holder()
        if host == socket.gethostname():
            if not supported and process.isdecimal() and psutil.pid_exists(int(process)):
                self.refuse()
        elif host:  # it was killed, unless flock() does not reach that host
            seen, deadline = self.last_heartbeat(), time.monotonic() + TIMEOUT
            while time.monotonic() < deadline:
                time.sleep(0.5)
                if self.last_heartbeat() != seen:
                    self.refuse()

    def read_holder(self) -> tuple[str, str]:
        """Host and process ID in the lock file; empty if nobody holds it."""
        with open(self.path, encoding="utf-8", errors="replace") as file:
            host, _, process = file.read(1000).strip().partition(" ")
        return host, process

    def last_heartbeat(self) -> int:
        """Time of the last heartbeat in nanoseconds, by the file server's clock."""
        with open(self.path) as file:  # opening the file makes NFS ask its server
            return os.fstat(file.fileno()).st_mtime_ns

    def refuse(self) -> NoReturn:
        """Raise the UserError."""
        host, process = self.read_holder()
        raise UserError(
            f"{self.path.parent}: another {self.purpose} is writing to it, process {process} on {host}; wait until it "
            "ends, or choose another folder"
        )

    def write_holder(self, text: str) -> None:
        """Replace the content of the lock file."""
        with naming(self.path):
            self.file.seek(0)
            self.file.truncate()
            self.file.write(text)
            self.file.flush()

    def send_heartbeats(self) -> None:
        """Update the file's modification time until the lock is released."""
        while not self.released.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Release the lock. The file stays, empty, as another process may have opened it."""
        self.released.set()
        with contextlib.suppress(OSError):
            self.write_holder("")
        self.file.close()


def wait_for_lock(file: IO[Any]) -> None:
    """Wait until no other process has this file locked, and lock it until it is closed.

    It does nothing on the network file systems that have no locks.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
