"""A watchdog beside each rank: it ends the whole job soon after a failure, and says what failed.

The process that mpirun started becomes the watchdog and the rank its child, so that a process survives to report a
killed rank, or to kill one that hangs in C++. Each watchdog judges its own rank, and is connected with rank 0's, the
leader. The leader prints the first failure and exits after a grace period; mpirun then ends the others.
"""

import collections
import contextlib
import dataclasses
import enum
import json
import math
import os
import signal
import socket
import time
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from launch.errors import print_error
from launch.launcher import end_launcher, is_mpirun_or_daemon, print_on_mpirun
from launch.logs import last_line
from launch.processes import adopt_orphans, end_with_parent
from launch.ranks import Rank

HEARTBEAT, POLL = 2, 0.05
"""Seconds between heartbeats, and between checks of the rank."""
SILENCE = 20
"""Seconds without a heartbeat after which a host counts as cut off; also the limit for a stopped process."""
STALLED = 45
"""Seconds without a training step, or with all ranks in one collective, after which the job is stuck."""
SLOW_STEPS = 5
"""A part of a step may take this many times as long as the slowest recent one, if that is more than STALLED."""
GRACE = 5
"""Seconds for rank 0 to finish a checkpoint, and for mpirun to end by itself, after a failure."""
MPIRUN_GRACE = 0.1
"""Seconds for news of a failure to arrive after SIGTERM from mpirun, which kills the watchdogs after a third of
a second. Without such news, the user interrupted the job."""
FORWARDED = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


class Phase(enum.Enum):
    """What a rank is doing: a description, and the seconds it may take without progress."""

    # Not longer: mpirun's own keep-alive gives up after eight minutes, with status 0.
    STARTING = "starting up", 400
    RUNNING = "running", math.inf
    COMPILING = "compiling the network", 1800
    TRAINING = "training", STALLED
    LOADING = "waiting for training data", STALLED
    VALIDATING = "validating", 300
    SAVING = "writing a checkpoint", 900

    def __init__(self, description: str, limit: float) -> None:
        self.description = description
        self.limit = limit


@dataclasses.dataclass
class RankState:
    """What a rank has reported; every report counts as progress."""

    phase: Phase = Phase.STARTING
    step: int | None = None
    """The last training step."""
    waiting: bool = False
    """Whether it waits for other ranks in a collective."""
    log: str = ""
    """Path of its log file, once that is open."""
    reason: str | None = None
    """Why it is about to exit; "" if the user has been told."""
    since: float = dataclasses.field(default_factory=time.monotonic)
    """When it last reported something."""
    recent: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=100))
    """Seconds that the parts of recent steps took."""

    def update(self, phase: str | None = None, **changes: Any) -> None:
        if self.is_in_step:
            self.recent.append(self.idle)
        self.phase = Phase[phase] if phase else self.phase
        vars(self).update(changes, since=time.monotonic())

    @property
    def idle(self) -> float:
        """Seconds without progress."""
        return time.monotonic() - self.since

    @property
    def wait(self) -> float:
        """Seconds that it has been waiting for other ranks."""
        return self.idle if self.waiting else 0

    @property
    def is_in_step(self) -> bool:
        return self.phase in (Phase.TRAINING, Phase.LOADING) and not self.waiting

    @property
    def is_overdue(self) -> bool:
        """Whether this rank is late; while it waits, others are."""
        slowest = max(self.recent, default=0) if self.is_in_step else 0
        return not self.waiting and self.idle > max(self.phase.limit, SLOW_STEPS * slowest)

    def __str__(self) -> str:
        return self.phase.description + ("" if self.step is None else f", after step {self.step}")


class Reporter:
    """A rank's connection to its watchdog."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def report(self, **changes: Any) -> None:
        """Tell the watchdog which fields of `RankState` change."""
        with contextlib.suppress(OSError):  # without its watchdog this process is about to be killed
            self._connection.send(json.dumps(changes).encode())

    def hand_over(self, name: str, connection: socket.socket) -> None:
        """Give the watchdog a connection to the watchdog of the rank with this name."""
        socket.send_fds(self._connection, [json.dumps(name).encode()], [connection.fileno()])
        connection.close()


def watch(rank: Rank) -> Reporter:
    """Fork: this process becomes the watchdog, its child the rank.

    Returns:
        In the child, its Reporter. The watchdog does not return: it exits with the job's status.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    adopt_orphans()  # those of the rank
    child = os.fork()
    if child == 0:
        end_with_parent(parent)
        return Reporter(theirs)
    status = 1
    try:  # `theirs` stays open: closed, it would be the end of `ours`
        status = Watchdog(rank, child, ours).run()
    finally:
        os._exit(status)


@dataclasses.dataclass
class Peer:
    """What another rank's watchdog has sent."""

    name: str
    heard: float = dataclasses.field(default_factory=time.monotonic)
    waiting: float = 0
    """Seconds that its rank has been waiting for others."""
    finished: bool = False
    """Whether its rank has exited without a failure."""


class Watchdog:
    """Watches a rank and, through the other watchdogs, the job.

    Args:
        rank: the rank.
        child: its process.
        connection: to its Reporter.
    """

    def __init__(self, rank: Rank, child: int, connection: socket.socket) -> None:
        self.rank = rank
        self.is_leader = rank.rank == 0
        self.child = psutil.Process(child)
        self.connection = connection
        self.connection.setblocking(False)
        self.launcher = os.getppid()
        self.state = RankState()
        self.last_running = time.monotonic()
        self.has_exited = False
        self.peers: dict[Connection, Peer] = {}
        """On the leader all other watchdogs, on the others the leader; empty until they are connected."""
        self.failure: tuple[int, str] | None = None
        """The first failure known here: exit status, and what to tell the user, if anything."""
        self.deadline = math.inf
        """When to exit after a failure."""
        self.terminated = math.inf
        """When mpirun sent SIGTERM."""

    def run(self) -> int:
        """Watch until the job is over; returns the exit status, which is that of the first failure."""
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        check = heartbeat = time.monotonic()
        while not self.is_over():
            for ready in wait([self.connection, *self.peers], POLL):
                self.hear(ready) if isinstance(ready, Connection) else self.receive()
            if time.monotonic() < check:
                continue
            check = time.monotonic() + POLL
            while info := signal.sigtimedwait(FORWARDED, 0):
                self.forward(info)
            self.check_rank()
            self.check_peers()
            if time.monotonic() > heartbeat:
                heartbeat += HEARTBEAT
                self.send_state()
        self.kill_rank()
        if self.failure and self.rank.local_rank == 0 and not self.rank.single_host:
            # mpirun must hear of a failed rank first: if it only lost its daemons, it exits with 0.
            end_launcher(GRACE if self.is_leader else 2 * GRACE)
        return self.failure[0] if self.failure else 0

    def is_over(self) -> bool:
        """Whether there is nothing left to watch or to wait for."""
        if os.getppid() != self.launcher or time.monotonic() > self.deadline:
            return True
        return self.has_exited and not self.failure and not (self.is_leader and self.peers)

    def forward(self, info: signal.struct_siginfo) -> None:
        """Pass a signal to the rank, unless the launcher sent it, which signals the rank as well.

        After SIGTERM mpirun soon kills both. Slurm waits (KillWait, 30 s by default), so the rank can save a
        checkpoint.
        """
        if info.si_pid != self.launcher:
            if not self.has_exited:
                self.child.send_signal(info.si_signo)
        elif info.si_signo == signal.SIGTERM and is_mpirun_or_daemon(self.launcher):
            self.terminated = time.monotonic()

    # --- Messages -----------------------------------------------------------------------------------

    def receive(self) -> None:
        """Read what the rank has reported or handed over."""
        with contextlib.suppress(BlockingIOError):  # there is no more
            while True:
                data, descriptors, _, _ = socket.recv_fds(self.connection, 1 << 16, 1)
                message = json.loads(data)
                if descriptors:
                    self.peers[Connection(descriptors[0])] = Peer(message)
                else:
                    self.state.update(**message)

    def hear(self, connection: Connection) -> None:
        """Read a message of another watchdog."""
        peer = self.peers[connection]
        try:
            peer.waiting, peer.finished, failure = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            self.lose([connection], "" if peer.finished else "was killed, and its watchdog with it")
            return
        peer.heard = time.monotonic()
        if failure:
            self.fail(*failure)

    def send_state(self) -> None:
        """Tell the other watchdogs what this one knows."""
        finished = self.has_exited and not self.failure
        for connection in self.peers:
            with contextlib.suppress(OSError):  # `hear` finds out
                connection.send_bytes(json.dumps([self.state.wait, finished, self.failure]).encode())

    # --- Checks -------------------------------------------------------------------------------------

    def check_rank(self) -> None:
        """Find out whether the rank has exited, is stopped or makes no progress."""
        if self.failure or self.has_exited:
            return
        if self.terminated < math.inf:  # so is the rank
            if time.monotonic() > self.terminated + MPIRUN_GRACE:
                text = "interrupted; the same command resumes from the newest checkpoint, if there is one"
                self.fail(128 + signal.SIGTERM, text)
            return
        process, wait_status = os.waitpid(self.child.pid, os.WNOHANG)
        if process:
            self.receive()  # its last message
            self.has_exited = True
            if status := os.waitstatus_to_exitcode(wait_status):
                self.fail_rank(status if status > 0 else 128 - status, self.explain_exit(status))
            else:
                self.send_state()
            return
        if self.child.status() != psutil.STATUS_STOPPED:
            self.last_running = time.monotonic()
        if time.monotonic() > self.last_running + SILENCE:
            self.fail_rank(1, f"its process has been stopped (SIGSTOP) for {SILENCE} s while {self.state}")
        elif self.state.is_overdue and (self.peers or self.is_leader):
            starting = self.state.phase is Phase.STARTING
            hint = "; check that all hosts are up and can reach each other" if starting else ""
            self.fail_rank(1, f"no progress for {self.state.idle:.0f} s while {self.state}{hint}")

    def explain_exit(self, status: int) -> str:
        """Why the rank has exited; a negative status is the signal that killed it."""
        if status > 0 and self.state.reason is not None:
            return self.state.reason
        # Not `session` ended it, but Open MPI or a crash, for example.
        if status < 0:
            reason = f"killed by signal {-status} ({signal.strsignal(-status)})"
        else:
            reason = f"ended with status {status}"
        line = "" if status == -signal.SIGKILL else last_line(self.state.log)
        return f"{reason}; last log line: {line}" if line else reason

    def check_peers(self) -> None:
        """Find out whether other watchdogs are silent or, on the leader, all ranks wait for each other."""
        silence = {connection: time.monotonic() - peer.heard for connection, peer in self.peers.items()}
        if max(silence.values(), default=0) > SILENCE:
            lost = [connection for connection in silence if silence[connection] > SILENCE - 2 * HEARTBEAT]
            self.lose(lost, f"has not answered for {SILENCE} s: check its host and the network")
        if self.is_leader and min([self.state.wait, *(peer.waiting for peer in self.peers.values())]) > STALLED:
            self.fail(
                1,
                f"{self.rank}: all ranks have been waiting for each other for {STALLED} s while {self.state}: Open "
                "MPI's messages do not get through; open the TCP ports from 1024 on between the hosts, or name "
                "the interface to use in OMPI_MCA_btl_tcp_if_include",
            )

    # --- The end ------------------------------------------------------------------------------------

    def lose(self, lost: list[Connection], problem: str) -> None:
        """Forget watchdogs that have gone; a problem ends the job."""
        name, *others = (self.peers.pop(connection).name for connection in lost)
        if problem:
            # If the leader has gone, one rank of each host reports it, and one of the leader's.
            is_reporter = self.is_leader or self.rank.local_rank == 0 or self.rank.rank == 1
            more = f" (and {len(others)} more)" if others else ""
            self.fail(1, f"{name}{more} {problem}" if is_reporter else "")
        if not self.is_leader:
            self.deadline = 0

    def fail_rank(self, status: int, reason: str) -> None:
        """End the job because of this rank."""
        log = f"; see {self.state.log}" if self.state.log else ""
        self.fail(status, f"{self.rank}: {reason}{log}" if reason else "")

    def fail(self, status: int, reason: str) -> None:
        """End the job: the leader prints the reason, if any, and ends soon; the others end when it does."""
        if self.failure:
            return  # this is a consequence of the first
        self.failure = status, reason
        self.send_state()  # now: mpirun may leave no time later
        decides = self.is_leader or not self.peers
        if decides:
            self.deadline = time.monotonic() + (GRACE if self.is_leader and not self.has_exited else 0)
        if reason and self.terminated == math.inf and decides:
            print_error(reason)
        elif reason and self.terminated < math.inf and self.rank.local_rank == 0:
            print_on_mpirun(self.launcher, f"error: {reason}")

    def kill_rank(self) -> None:
        """Kill the rank and all that it has left behind."""
        with contextlib.suppress(psutil.Error):
            while children := psutil.Process().children():
                for process in children:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                psutil.wait_procs(children, timeout=GRACE)
