"""A lock that keeps two commands from writing the same folder at the same time.

It rests on flock(), which the kernel gives back when the last process that holds it ends, however it
ends. Over NFS (Linux 2.6.12 and later), CephFS and GPFS it counts for all hosts. Where the file system
has none, or one for each host alone (Lustre without the mount option "flock", NFS with "nolock" or
"local_lock"), a heartbeat stands in: the holder sets the lock file's modification time every few
seconds, and whoever finds the name of another host in the file watches it before taking over.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
import threading
import time

from launch.errors import UserError

BEAT = 3
"""Seconds between two heartbeats."""
WATCH = 10
"""Seconds without one after which a holder on another host counts as dead."""
GRACE = 3
"""Seconds for the children of a killed holder to end."""


class Lock:
    """A lock on a folder, held until `release`, or until this process and its children have ended.

    Args:
        path: of the lock file, which is made; its folder is there.
        what: what the holder is, for the message: "training run".

    Raises:
        UserError: another process holds it; the message names folder, host and process.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: pathlib.Path, what: str) -> None:
        self.path, self.what = path, what
        self.file = open(path, "a+", encoding="utf-8")
        try:
            self.acquire()
        except BaseException:
            self.file.close()
            raise
        self.note(f"{socket.gethostname()} {os.getpid()}")
        self.released = threading.Event()
        threading.Thread(target=self.beat, daemon=True).start()

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
            except OSError:  # this file system has no locks
                supported = False
                break
        host, process = self.holder()
        if host == socket.gethostname():
            if not supported and pathlib.Path(f"/proc/{process}").exists():
                self.refuse()
        elif host:  # it was killed, unless flock() does not reach that host
            seen, deadline = self.beaten(), time.monotonic() + WATCH
            while time.monotonic() < deadline:
                time.sleep(0.5)
                if self.beaten() != seen:
                    self.refuse()

    def holder(self) -> tuple[str, str]:
        """Host and process number in the lock file, or empty texts."""
        with open(self.path, encoding="utf-8", errors="replace") as file:
            host, _, process = file.read(1000).strip().partition(" ")
        return host, process

    def beaten(self) -> int:
        """When the heart last beat, in nanoseconds of the file's server."""
        with open(self.path) as file:  # opening it makes NFS ask its server
            return os.fstat(file.fileno()).st_mtime_ns

    def refuse(self) -> None:
        """Raise the UserError."""
        host, process = self.holder()
        raise UserError(
            f"{self.path.parent}: another {self.what} is writing it, process {process} on "
            f"{host}; wait for its end, or give another folder"
        )

    def note(self, text: str) -> None:
        """Have the file say who holds it."""
        self.file.seek(0)
        self.file.truncate()
        self.file.write(text)
        self.file.flush()

    def beat(self) -> None:
        while not self.released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give the lock back; the file stays, empty, as another may have opened it."""
        self.released.set()
        with contextlib.suppress(OSError):
            self.note("")
        self.file.close()
