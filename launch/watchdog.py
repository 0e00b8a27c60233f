"""A watchdog beside each rank: it ends the whole job soon after a failure, and says what failed.

The process that mpirun started becomes the watchdog and the rank its child, so that a process survives to
report a killed rank, or to kill one that hangs in C++. The watchdogs connect to rank 0's, the leader, and exchange
heartbeats with it. The leader prints the first failure, sends its verdict to the others, and exits after a grace
period; the others exit when it does. A connection must begin with the job's secret; nothing is parsed before that.
"""

import asyncio
import collections
import contextlib
import dataclasses
import enum
import hmac
import json
import math
import os
import signal
import socket
import time
from typing import Any, NamedTuple

import psutil

from launch.errors import print_error
from launch.launcher import end_launcher, print_on_mpirun
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
"""A step may take this many times as long as the slowest recent one, if that is more than STALLED."""
GRACE = 5
"""Seconds for rank 0 to finish a checkpoint after another rank has failed."""
LEADER_TIMEOUT = 10
"""Seconds to wait for the leader to act on a failure."""
MPIRUN_GRACE = 0.2
"""Seconds for news of a failure to arrive after SIGTERM from mpirun, which kills the watchdogs after a third of
a second. Without such news, the user interrupted the job."""
CONNECT_TIMEOUT, JOIN_TIMEOUT = 3, 20
"""Seconds to connect to one address and send the secret; seconds to try all addresses."""
MAX_STRANGERS = 256
"""Simultaneous connections that have not sent the secret."""
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


STEP_PHASES = (Phase.TRAINING, Phase.LOADING)


class Verdict(NamedTuple):
    """How the job ends."""

    status: int
    cut_off: bool
    """Whether a host is cut off, for which mpirun would wait forever."""


class Reporter:
    """A rank's connection to its watchdog, which listens on `port` if it is the leader."""

    def __init__(self, connection: socket.socket, port: int | None) -> None:
        self._socket = connection
        self.port = port

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # without its watchdog this process is about to be killed
            self._socket.send(json.dumps(message).encode())

    def join(self, addresses: list[str], port: int, secret: str, log: str | None) -> bool:
        """Have the watchdog connect to the leader; returns whether it could.

        Args:
            addresses: the leader's addresses, in the order to try.
            port: the leader's port.
            secret: a text that only this job's ranks know.
            log: this rank's log file.
        """
        self._send(join=addresses, port=port, secret=secret, log=log)
        return self._socket.recv(1) == b"1"

    def progress(self, phase: Phase, step: int | None = None) -> None:
        """Report what this rank does next; `step` is the last training step, if new."""
        self._send(phase=phase.name, step=step)

    def waiting(self, waiting: bool) -> None:
        """Report that this rank enters a collective, or has left it."""
        self._send(waiting=waiting)

    def fail(self, reason: str) -> None:
        """Report why this rank is about to exit; "" if the user has been told."""
        self._send(failed=reason)


def watch(rank: Rank) -> Reporter:
    """Fork: this process becomes the watchdog, its child the rank.

    Returns:
        In the child, its Reporter. The watchdog does not return: it exits with the job's status.
    """
    server = None
    if rank.rank == 0:
        server = socket.create_server(("127.0.0.1" if rank.single_host else "", 0), backlog=MAX_STRANGERS + rank.size)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    adopt_orphans()  # those of the rank
    child = os.fork()
    if child == 0:
        ours.close()
        end_with_parent(parent)
        return Reporter(theirs, server.getsockname()[1] if server else None)
    theirs.close()
    status = 1
    try:  # not asyncio.run, which would cancel the tasks that listen
        status = asyncio.new_event_loop().run_until_complete(Watchdog(rank, child, ours, server).run())
    finally:
        os._exit(status)


@dataclasses.dataclass
class RankState:
    """What the rank last reported, and when."""

    phase: Phase = Phase.STARTING
    step: int | None = None
    since: float = dataclasses.field(default_factory=time.monotonic)
    waiting_since: float = math.inf
    step_seconds: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=40))

    def update(self, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if "waiting" in message:
            self.waiting_since = now if message["waiting"] else math.inf
            return
        if self.phase in STEP_PHASES:
            self.step_seconds.append(now - self.since)
        self.phase, self.since = Phase[message["phase"]], now
        self.step = self.step if message["step"] is None else message["step"]

    def waiting(self) -> float:
        """Seconds the rank has spent in its present collective."""
        return max(0.0, time.monotonic() - self.waiting_since)

    def overdue(self) -> float:
        """Seconds by which progress is late, if positive; in a collective, it is other ranks that are late."""
        slowest = max(self.step_seconds, default=0) if self.phase in STEP_PHASES else 0
        limit = max(self.phase.limit, SLOW_STEPS * slowest)
        return min(self.waiting_since, time.monotonic()) - self.since - limit

    def __str__(self) -> str:
        return self.phase.description + ("" if self.step is None else f", after step {self.step}")


@dataclasses.dataclass(eq=False)
class Peer:
    """Another rank's watchdog."""

    name: str
    writer: asyncio.StreamWriter
    heard: float = dataclasses.field(default_factory=time.monotonic)
    waiting: float = 0
    """Seconds its rank has spent in its present collective."""

    def send(self, **message: Any) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")

    def silence(self) -> float:
        """Seconds since it was last heard."""
        return time.monotonic() - self.heard


class Watchdog:
    """Watches a rank and, through the other watchdogs, the job.

    Args:
        rank: the rank.
        child: its process.
        connection: to its Reporter.
        server: the leader's listening socket; None on other ranks.
    """

    def __init__(self, rank: Rank, child: int, connection: socket.socket, server: socket.socket | None) -> None:
        self.rank = rank
        self.name = f"rank {rank.rank} on {socket.gethostname()}"
        self.child = psutil.Process(child)
        self.connection = connection
        self.server = server
        self.launcher = os.getppid()
        self.log: str | None = None
        self.secret: bytes | None = None
        self.strangers = 0
        self.peers: list[Peer] = []
        """On the leader, all connected watchdogs; elsewhere the leader, once connected."""
        self.state = RankState()
        self.last_running = time.monotonic()
        self.reason: str | None = None
        """What the rank said before it exited; "" if the user has been told."""
        self.exit_status: int | None = None
        self.verdict: Verdict | None = None
        self.deadline = math.inf
        self.is_terminating = False
        """Whether mpirun asked this process to end."""

    async def run(self) -> int:
        """Watch until the job is over; returns the exit status, which is that of the first failure."""
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        asyncio.get_running_loop().add_reader(self.connection, self.receive)
        if self.server:
            await asyncio.start_server(self.serve, sock=self.server)
        heartbeat = time.monotonic()
        while not self.is_over():
            await asyncio.sleep(POLL)
            while info := signal.sigtimedwait(FORWARDED, 0):
                self.forward(info)
            if self.exit_status is None:
                self.check_rank()
            self.check_job()
            if time.monotonic() >= heartbeat:
                heartbeat += HEARTBEAT
                for peer in self.peers:
                    peer.send(waiting=self.state.waiting())
        self.kill_rank()
        if self.verdict and self.verdict.cut_off and self.rank.local_rank == 0:
            # mpirun must hear of a failed rank first: if it only lost its daemons, it exits with 0.
            end_launcher(GRACE if self.server else 2 * GRACE)
        return self.status

    @property
    def status(self) -> int:
        """Exit status of the job as far as this watchdog knows."""
        return self.verdict.status if self.verdict else self.exit_status or 0

    def is_over(self) -> bool:
        if time.monotonic() > self.deadline:
            return True
        if self.exit_status is None:
            return False
        return not self.peers or (not self.server and self.status == 0)

    def forward(self, info: signal.struct_siginfo) -> None:
        """Pass a signal to the rank, unless mpirun sent it, which signals the whole process group."""
        if info.si_pid != self.launcher:
            if self.exit_status is None:
                self.child.send_signal(info.si_signo)
        elif info.si_signo == signal.SIGTERM:
            self.is_terminating = True
            asyncio.get_running_loop().call_later(MPIRUN_GRACE, self.interrupt)

    # --- Messages -----------------------------------------------------------------------------------

    def receive(self) -> None:
        """Read the rank's messages."""
        try:
            while data := self.connection.recv(1 << 16, socket.MSG_DONTWAIT):
                message = json.loads(data)
                if "join" in message:
                    self.joining = asyncio.get_running_loop().create_task(self.join(**message))
                elif "failed" in message:
                    self.reason = message["failed"]
                else:
                    self.state.update(message)
        except BlockingIOError:
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(self.connection)  # the rank has exited

    async def join(self, join: list[str], port: int, secret: str, log: str | None) -> None:
        """Connect to the leader at the first address that answers, tell the rank whether any did, and listen."""
        self.secret, self.log = secret.encode(), log
        deadline = time.monotonic() + JOIN_TIMEOUT
        addresses = collections.deque(join)
        while not self.server and time.monotonic() < deadline:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                reader, writer = await asyncio.wait_for(asyncio.open_connection(addresses[0], port), CONNECT_TIMEOUT)
                writer.write(self.secret + self.name.encode() + b"\n")
                if await asyncio.wait_for(reader.readline(), CONNECT_TIMEOUT):
                    self.connection.send(b"1")
                    await self.listen(reader, Peer("rank 0", writer))
                    return
            addresses.rotate(-1)
            await asyncio.sleep(POLL)  # the leader may not know the secret yet
        self.connection.send(b"1" if self.server else b"0")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """On the leader, accept a connection whose first line is the secret and a name, and listen."""
        line, secret = b"", self.secret or b""
        if secret and self.strangers < MAX_STRANGERS:
            self.strangers += 1
            with contextlib.suppress(OSError, ValueError, asyncio.TimeoutError):  # ValueError: the line is too long
                line = await asyncio.wait_for(reader.readline(), CONNECT_TIMEOUT)
            self.strangers -= 1
        if not line or not hmac.compare_digest(line[: len(secret)], secret):
            writer.transport.abort()
            return
        peer = Peer(line[len(secret) :].decode().strip(), writer)
        peer.send()  # accepted
        await self.listen(reader, peer)

    async def listen(self, reader: asyncio.StreamReader, peer: Peer) -> None:
        """Read a peer's messages until its connection ends."""
        self.peers.append(peer)
        with contextlib.suppress(OSError, ValueError):  # ValueError: a line is too long, or not JSON
            while line := await reader.readline():
                peer.heard = time.monotonic()
                message = json.loads(line)
                peer.waiting = message.get("waiting", 0)
                if "verdict" in message and not self.verdict:
                    self.verdict = Verdict(*message["verdict"])
                    self.deadline = time.monotonic() + LEADER_TIMEOUT
                if "exited" in message and peer in self.peers:
                    self.peers.remove(peer)
                    if message["exited"]:
                        self.end_job(message["exited"], message["reason"])
        if peer in self.peers:
            self.lose([peer], "was killed, and its watchdog with it")

    # --- Checks -------------------------------------------------------------------------------------

    @property
    def extra_time(self) -> int:
        """Seconds by which other ranks report later than rank 0 what all can see, before they are connected."""
        return 0 if self.server or self.peers else LEADER_TIMEOUT

    def check_rank(self) -> None:
        """Find out whether the rank has exited, is stopped or makes no progress."""
        process, wait_status = os.waitpid(self.child.pid, os.WNOHANG)
        if process:
            self.receive()  # its last message
            self.report_exit(os.waitstatus_to_exitcode(wait_status))
            return
        if self.child.status() != psutil.STATUS_STOPPED:
            self.last_running = time.monotonic()
        if time.monotonic() > self.last_running + SILENCE:
            self.report_end(1, f"its process has been stopped (SIGSTOP) for {SILENCE} s while {self.state}")
        elif self.state.overdue() > self.extra_time:
            cut_off = self.state.phase is Phase.STARTING and not self.rank.single_host
            hint = "; check that all hosts are up and can reach each other" if cut_off else ""
            self.report_end(
                1, f"no progress for {time.monotonic() - self.state.since:.0f} s while {self.state}{hint}", cut_off
            )

    def report_exit(self, status: int) -> None:
        """Report how the rank exited; a negative status is the signal that killed it."""
        if status == -signal.SIGTERM and self.is_terminating:
            self.exit_status = 128 + signal.SIGTERM
            self.interrupt()
            return
        reason = self.reason
        if status < 0 or (status and reason is None):  # not by `session`: Open MPI has aborted, for example
            signalled = f"killed by signal {-status} ({signal.strsignal(-status)})"
            reason = signalled if status < 0 else f"ended with status {status}"
            if status != -signal.SIGKILL and (line := last_line(self.log)):
                reason += f"; last log line: {line}"
        self.report_end(status if status >= 0 else 128 - status, reason)

    def report_end(self, status: int, reason: str | None, cut_off: bool = False) -> None:
        """Tell the leader that the rank has exited, or is as good as gone."""
        self.exit_status = status
        if reason:
            reason = f"{self.name}: {reason}" + (f"; see {self.log}" if self.log else "")
        if self.peers and not self.server:
            self.peers[0].send(exited=status, reason=reason)
            if status:
                self.deadline = min(self.deadline, time.monotonic() + LEADER_TIMEOUT)
        elif status:
            self.end_job(status, reason, cut_off)

    def check_job(self) -> None:
        """Find out whether the launcher and the peers are still there."""
        if os.getppid() != self.launcher:
            self.end_job(1, None)
            self.deadline = 0
        if any(peer.silence() > SILENCE for peer in self.peers):
            lost = [peer for peer in self.peers if peer.silence() > SILENCE - 2 * HEARTBEAT]
            self.lose(lost, f"has not answered for {SILENCE} s: check its host and the network", cut_off=True)
        if self.exit_status is not None or (self.peers and not self.server):
            return
        limit = STALLED + self.extra_time
        if min([self.state.waiting(), *(peer.waiting for peer in self.peers)]) > limit:
            self.end_job(
                1,
                f"{self.name}: all ranks have been waiting for each other for {limit} s while {self.state}: Open "
                "MPI's messages do not get through; open the TCP ports from 1024 on between the hosts, or name "
                "the interface to use in OMPI_MCA_btl_tcp_if_include",
                cut_off=not self.rank.single_host,
            )

    # --- The end ------------------------------------------------------------------------------------

    def lose(self, lost: list[Peer], problem: str, cut_off: bool = False) -> None:
        """End the job because of peers that have gone."""
        self.peers = [peer for peer in self.peers if peer not in lost]
        others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        reason = f"{lost[0].name}{others} {problem}"
        if self.server:
            self.end_job(1, reason, cut_off)
        elif self.exit_status != 0:
            # One rank of each host, and one of the leader's, reports the loss.
            is_reporter = self.exit_status is None and (self.rank.local_rank == 0 or self.rank.rank == 1)
            self.end_job(self.exit_status or 1, f"{self.name}: {reason}" if is_reporter else None, cut_off)
            self.deadline = 0

    def interrupt(self) -> None:
        """End because the user told mpirun to, which has told the other watchdogs itself."""
        if self.verdict:
            return
        # Even if the rank has exited: the others would report a leader that ends before mpirun kills them.
        self.verdict, self.deadline = Verdict(128 + signal.SIGTERM, False), time.monotonic() + GRACE
        if self.rank.local_rank == 0:
            text = "interrupted; the same command resumes from the newest checkpoint, if there is one"
            print_on_mpirun(self.launcher, f"error: {text}")

    def end_job(self, status: int, reason: str | None, cut_off: bool = False) -> None:
        """End the job, after a grace period for this watchdog's own rank, and print the reason, if any."""
        if self.verdict:
            return  # a consequence of the first failure
        self.verdict = Verdict(status, cut_off)
        self.deadline = time.monotonic() + (GRACE if self.exit_status is None else 0)
        for peer in self.peers if self.server else []:  # now: mpirun may leave no time later
            peer.send(verdict=self.verdict)
        if reason and self.is_terminating:
            print_on_mpirun(self.launcher, f"error: {reason}")
        elif reason:
            print_error(reason)

    def kill_rank(self) -> None:
        """Kill the rank and all that it has left behind."""
        with contextlib.suppress(psutil.Error):
            while children := psutil.Process().children():
                for process in children:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                psutil.wait_procs(children, timeout=GRACE)
