"""A watchdog beside each rank: it ends the whole job soon after a failure, and says what failed.

The process that mpirun started becomes the watchdog and the rank its child, so that somebody is left to
report a killed rank and to kill one that hangs in C++. The watchdogs connect to that of rank 0, the leader,
and exchange heartbeats with it. The leader prints the first failure and ends the job. A connection begins with
a fixed number of bytes that prove knowledge of the job's secret; nothing of a stranger's is parsed.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import enum
import hashlib
import hmac
import json
import os
import signal
import socket
import time
from typing import Any

import psutil

from launch.errors import print_error
from launch.launcher import end_launcher, print_on_mpirun
from launch.logs import last_line
from launch.ranks import Rank

HEARTBEAT, TICK = 2, 0.05
"""Seconds between two heartbeats, and between two looks at the rank."""
SILENCE = 20
"""Seconds without a heartbeat after which a host counts as cut off; also of a stopped process."""
STALLED = 45
"""Seconds without a training step, or with all ranks in one collective, after which the job is stuck."""
SLOW_STEPS = 5
"""A step may take this many times as long as the slowest of the last ones, if that is more than STALLED."""
GRACE = 5
"""Seconds for rank 0 to finish a checkpoint after another rank has failed."""
VERDICT = 10
"""Seconds in which the leader's word on a failure is awaited."""
MPIRUN_GRACE = 0.2
"""Seconds for news of a failure to arrive after SIGTERM from mpirun, which kills the watchdogs after a third of
a second. Without news it was the user who interrupted the job."""
CONNECT_TIMEOUT, JOIN_TIMEOUT = 3, 20
"""Seconds to connect to an address and to prove knowledge of the secret; seconds to try all addresses."""
STRANGERS = 256
"""Connections at a time without proof."""
FORWARDED = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Phase(enum.Enum):
    """What a rank does: the text for messages, and the seconds it may take without progress."""

    # Not longer: mpirun's own keep-alive gives up after eight minutes, with status 0.
    STARTING = "starting up", 400
    RUNNING = "running", None
    COMPILING = "compiling the network", 1800
    TRAINING = "training", STALLED
    LOADING = "waiting for training data", STALLED
    VALIDATING = "validating", 300
    SAVING = "writing a checkpoint", 900


class Reporter:
    """What a rank tells its watchdog, which listens on `port` if it is the leader."""

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
        """Say what this rank does next, and after which training step."""
        self._send(phase=phase.name, step=step)

    def waiting(self, waiting: bool) -> None:
        """Say that this rank enters a collective, or that it has left it."""
        self._send(waiting=waiting)

    def fail(self, text: str) -> None:
        """Say why this rank is about to exit; "" if the user has been told."""
        self._send(failed=text)


def watch(rank: Rank) -> Reporter:
    """Fork: this process becomes the watchdog, its child the rank.

    Returns:
        In the child, its Reporter. In the watchdog it does not return: that exits with the rank's status.
    """
    server = None
    if rank.rank == 0:
        server = socket.create_server(("127.0.0.1" if rank.single_host else "", 0), backlog=STRANGERS + rank.size)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a rank leaves behind becomes its watchdog's child
    child = os.fork()
    if child == 0:
        ours.close()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank ends with its watchdog
        if os.getppid() != parent:
            os._exit(1)
        return Reporter(theirs, server and server.getsockname()[1])
    theirs.close()
    status = 1
    try:
        status = asyncio.run(Watchdog(rank, child, ours, server).run())
    finally:
        os._exit(status)


@dataclasses.dataclass
class State:
    """What the rank last reported, and when."""

    phase: Phase = Phase.STARTING
    step: int | None = None
    since: float = dataclasses.field(default_factory=time.monotonic)
    waiting_since: float | None = None
    durations: list[float] = dataclasses.field(default_factory=list)
    """Seconds of the last training steps."""

    def update(self, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if "waiting" in message:
            self.waiting_since = now if message["waiting"] else None
            return
        if self.phase in (Phase.TRAINING, Phase.LOADING):
            self.durations = [*self.durations[-39:], now - self.since]
        self.phase, self.step, self.since = Phase[message["phase"]], message["step"], now

    def waiting(self) -> float:
        """Seconds for which the rank has been in one collective."""
        return time.monotonic() - self.waiting_since if self.waiting_since else 0

    def overdue(self) -> float:
        """Seconds without progress if they are too many, else 0. In a collective it is others who are late."""
        limit = self.phase.value[1]
        if limit == STALLED:
            limit = max(limit, SLOW_STEPS * max(self.durations, default=0))
        idle = time.monotonic() - self.since
        return idle if limit and idle > limit and not self.waiting_since else 0

    def __str__(self) -> str:
        return self.phase.value[0] + ("" if self.step is None else f", after step {self.step}")


class Peer:
    """Another rank's watchdog."""

    def __init__(self, writer: asyncio.StreamWriter, name: str) -> None:
        self._writer = writer
        self.name = name
        self.heard = time.monotonic()
        self.waiting = 0.0
        """Seconds for which its rank has been in one collective."""

    def send(self, **message: Any) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    def silent(self, seconds: float) -> bool:
        """Whether nothing has been heard for so long."""
        return time.monotonic() - self.heard > seconds


class Watchdog:
    """Watches a rank and, through the other watchdogs, the job.

    Args:
        rank: the rank.
        child: its process.
        connection: to its Reporter.
        server: the leader's listening socket.
    """

    def __init__(self, rank: Rank, child: int, connection: socket.socket, server: socket.socket | None) -> None:
        self.rank = rank
        self.name = f"rank {rank.rank} on {socket.gethostname()}"
        self.child = psutil.Process(child)
        self.connection = connection
        self.server = server
        self.launcher = os.getppid()
        self.secret: bytes | None = None
        self.leader: Peer | None = None
        self.followers: list[Peer] = []
        self.strangers = 0
        self.tasks: set[asyncio.Task] = set()
        self.state = State()
        self.stopped: float | None = None
        """When the rank's process was found stopped."""
        self.log: str | None = None
        self.reason: str | None = None
        """What the rank said before it exited; "" if the user has been told."""
        self.exited: int | None = None
        """The rank's exit status."""
        self.status = 0
        """That of the job."""
        self.deadline: float | None = None
        """When to end, once the job has failed."""
        self.cut_off = False
        """Whether the job failed because a host was cut off."""
        self.reported = False
        """Whether the leader has reported a failure."""
        self.terminated: float | None = None
        """When mpirun asked this process to end."""

    async def run(self) -> int:
        """Watch until the job is over; returns the exit status, that of what failed first."""
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        asyncio.get_running_loop().add_reader(self.connection, self.hear_rank)
        if self.server:
            await asyncio.start_server(self.serve, sock=self.server)
        heartbeat = time.monotonic()
        while not self.is_over():
            await asyncio.sleep(TICK)
            while info := signal.sigtimedwait(FORWARDED, 0):
                self.forward(info)
            if self.exited is None:
                self.check_rank()
            self.check_job()
            if time.monotonic() >= heartbeat:
                heartbeat += HEARTBEAT
                for peer in [*self.followers, *([self.leader] if self.leader else [])]:
                    peer.send(waiting=self.state.waiting())
        for peer in self.followers:
            peer.send(end=self.status, cut_off=self.cut_off)
        await asyncio.sleep(0)
        self.kill_rank()
        if self.cut_off and self.rank.local_rank == 0:
            # mpirun must hear of a failed rank first: if it only lost its daemons, it exits with 0.
            end_launcher(GRACE if self.server else 2 * GRACE)
        return self.status

    def is_over(self) -> bool:
        if self.deadline is not None and time.monotonic() > self.deadline:
            return True
        if self.exited is None:
            return False
        return not self.followers if self.server else self.status == 0 or self.leader is None

    def forward(self, info: Any) -> None:
        """Pass a signal to the rank, unless mpirun sent it, which signals the whole process group."""
        if info.si_pid != self.launcher:
            if self.exited is None:
                self.child.send_signal(info.si_signo)
        elif info.si_signo == signal.SIGTERM:
            self.terminated = self.terminated or time.monotonic()

    # --- Messages -----------------------------------------------------------------------------------

    def hear_rank(self) -> None:
        try:
            while data := self.connection.recv(1 << 16, socket.MSG_DONTWAIT):
                message = json.loads(data)
                if "join" in message:
                    self.start(self.join(**message))
                elif "failed" in message:
                    self.reason = message["failed"]
                else:
                    self.state.update(message)
        except BlockingIOError:
            return
        except OSError:
            pass
        asyncio.get_running_loop().remove_reader(self.connection)  # the rank has exited

    def start(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def join(self, join: list[str], port: int, secret: str, log: str | None) -> None:
        """Connect to the leader at the first address that answers, and tell the rank whether any did."""
        self.secret, self.log = hashlib.sha256(secret.encode()).digest(), log
        deadline = time.monotonic() + JOIN_TIMEOUT
        while not self.server and not self.leader and time.monotonic() < deadline:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                reader, writer = await asyncio.wait_for(asyncio.open_connection(join[0], port), CONNECT_TIMEOUT)
                writer.write(self.secret + json.dumps(self.name).encode() + b"\n")
                if await asyncio.wait_for(reader.readline(), CONNECT_TIMEOUT):
                    self.leader = Peer(writer, "rank 0")
                    self.start(self.listen(reader, self.leader))
                    break
            join = [*join[1:], join[0]]
            await asyncio.sleep(TICK)  # the leader may not know the secret yet
        self.connection.send(b"1" if self.server or self.leader else b"0")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """With the leader: take a new connection."""
        self.strangers += 1
        try:
            if not self.secret or self.strangers > STRANGERS:
                return
            proof = await asyncio.wait_for(reader.readexactly(len(self.secret)), CONNECT_TIMEOUT)
            if not hmac.compare_digest(proof, self.secret):
                return
            name = json.loads(await asyncio.wait_for(reader.readline(), CONNECT_TIMEOUT))
        except (OSError, ValueError, EOFError, asyncio.TimeoutError):
            return
        else:
            peer = Peer(writer, name)
            peer.send(welcome=True)
            self.followers.append(peer)
            self.start(self.listen(reader, peer))
            writer = None
        finally:
            self.strangers -= 1
            if writer:
                writer.transport.abort()

    async def listen(self, reader: asyncio.StreamReader, peer: Peer) -> None:
        """Hear a peer until its connection ends."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: a line is too long, or no JSON
            while line := await reader.readline():
                peer.heard = time.monotonic()
                message = json.loads(line)
                peer.waiting = message.get("waiting", 0)
                self.reported = self.reported or "failed" in message
                if message.get("end"):
                    self.status, self.cut_off, self.deadline = message["end"], message["cut_off"], 0
                if "exited" in message and peer in self.followers:
                    self.followers.remove(peer)
                    if message["exited"]:
                        self.fail(message["reason"], message["exited"])
        if peer in self.followers:
            self.followers.remove(peer)
            self.fail(f"{peer.name} was killed, and its watchdog with it")
        elif peer is self.leader:
            self.lose_leader("rank 0 was killed, and its watchdog with it")

    def lose_leader(self, text: str) -> None:
        self.leader = None
        if self.exited is None or self.status:
            if (self.rank.local_rank == 0 or self.rank.rank == 1) and not self.status and not self.reported:
                print_error(f"{self.name}: {text}")
            self.status, self.deadline = self.status or 1, 0

    # --- Checks -------------------------------------------------------------------------------------

    def check_rank(self) -> None:
        """Find out whether the rank has exited, is stopped or makes no progress."""
        process, wait_status = os.waitpid(self.child.pid, os.WNOHANG)
        if process:
            self.hear_rank()  # its last message
            self.bury(os.waitstatus_to_exitcode(wait_status))
            return
        is_stopped = self.child.status() == psutil.STATUS_STOPPED
        self.stopped = (self.stopped or time.monotonic()) if is_stopped else None
        seconds = self.state.overdue()
        if self.stopped and time.monotonic() > self.stopped + SILENCE:
            self.announce(1, f"its process has been stopped (SIGSTOP) for {SILENCE} s while {self.state}")
        elif seconds > (VERDICT if self.rank.rank and self.state.phase is Phase.STARTING else 0):
            self.cut_off = self.state.phase is Phase.STARTING and not self.rank.single_host
            hint = "; check that all hosts are up and can reach each other" if self.cut_off else ""
            self.announce(1, f"no progress for {seconds:.0f} s while {self.state}{hint}")

    def bury(self, status: int) -> None:
        """Announce how the rank ended."""
        reason = self.reason
        if status < 0:
            if self.terminated and -status == signal.SIGTERM:
                self.exited = 128 - status
                self.interrupt()
                return
            reason = f"killed by signal {-status} ({signal.strsignal(-status)})"
            if -status != signal.SIGKILL and (line := last_line(self.log)):
                reason += f"; last log line: {line}"
            status = 128 - status
        elif status and reason is None:  # not through `session`: Open MPI has aborted, for example
            reason = f"ended with status {status}"
            if line := last_line(self.log):
                reason += f"; last log line: {line}"
        self.announce(status, reason)

    def announce(self, exited: int, reason: str | None) -> None:
        """Tell the leader that the rank has exited, or that it is as good as gone."""
        self.exited = exited
        if reason:
            reason = f"{self.name}: {reason}" + (f"; see {self.log}" if self.log else "")
        if self.leader:
            self.leader.send(exited=exited, reason=reason)
            if exited:
                self.status, self.deadline = exited, time.monotonic() + VERDICT
        elif exited:
            self.fail(reason, exited)

    def check_job(self) -> None:
        """Find out whether the launcher and the peers are still there."""
        if os.getppid() != self.launcher:
            self.status, self.deadline = self.status or 1, 0
        if self.terminated and time.monotonic() > self.terminated + MPIRUN_GRACE:
            self.interrupt()
        if any(peer.silent(SILENCE) for peer in self.followers):
            silent = [peer for peer in self.followers if peer.silent(SILENCE - 2 * HEARTBEAT)]
            self.followers = [peer for peer in self.followers if peer not in silent]
            others = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
            self.cut_off = True
            self.fail(f"{silent[0].name}{others} has not answered for {SILENCE} s: check its host and the network")
        if self.leader and self.leader.silent(SILENCE):
            self.cut_off = True
            self.lose_leader(f"rank 0 has not answered for {SILENCE} s: check its host and the network")
        # Before the watchdogs are connected each decides for itself, rank 0's first.
        limit = STALLED + (VERDICT if self.rank.rank else 0)
        waits = [self.state.waiting(), *(peer.waiting for peer in self.followers)]
        if self.exited is None and not self.leader and min(waits) > limit:
            self.cut_off = not self.rank.single_host
            self.fail(
                f"{self.name}: all ranks have been waiting for each other for {limit} s while {self.state}: Open "
                "MPI's messages do not get through; open the TCP ports from 1024 on between the hosts, or name "
                "the interface to use in OMPI_MCA_btl_tcp_if_include"
            )

    def interrupt(self) -> None:
        """End because the user told mpirun to."""
        if self.status:
            return
        self.status, self.deadline = 128 + signal.SIGTERM, time.monotonic() + GRACE
        if self.rank.local_rank == 0:
            print_on_mpirun(
                self.launcher,
                "error: interrupted; the same command resumes from the newest checkpoint, if there is one",
            )

    def fail(self, reason: str | None, status: int = 1) -> None:
        """End the job, after a grace period for this watchdog's own rank."""
        if self.status:
            return  # a consequence of the first failure
        self.status, self.deadline = status, time.monotonic() + (GRACE if self.exited is None else 0)
        for peer in self.followers:  # mpirun may not leave the time for more
            peer.send(failed=True)
        if reason and self.terminated:
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


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2) for this process."""
    ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)
