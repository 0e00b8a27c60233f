"""The keeper of a rank: it sees to it that a job ends as a whole, soon, and with the reason.

The process that mpirun started becomes the keeper and the rank itself its child, so that there is
somebody left to speak when the rank is killed, and to end it when MindSpore's C++ waits for a rank
that is gone. The keepers tell each other every two seconds that they are there, over TCP, in a star
around that of rank 0. That one hears of the first failure, prints it and has all others end.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time

from launch.logs import last_words
from prep.errors import report

BEAT = 2
"""Seconds between two signs of life."""
SILENCE = 20
"""Seconds without one after which a host counts as cut off."""
GATHERING = 400
"""Seconds for all ranks to begin, while nobody can tell one that is late from a host that is cut off. Not
more: mpirun's own keep-alive takes eight minutes by its defaults, and ends with status 0."""
FAREWELL = 5
"""Seconds for the other ranks to end by themselves, and to finish a checkpoint, after one failed."""
PATIENCE = 10
"""Seconds to wait for rank 0's keeper to say that the job ends."""
MOURNING = 5
"""Seconds for a rank to end after a process that ends with it."""
HESITATION = 0.1
"""Seconds in which to hear of a failure for which mpirun ends the job, before that is taken for the user's
word; mpirun kills the keepers after a third of a second."""
CONNECT = 3
"""Seconds to try an address."""
TICK = 0.1
MPIRUN = ("mpirun", "mpiexec", "mpirun.openmpi", "mpiexec.openmpi", "prterun", "orterun",
          "orterun_wrapper")
LAUNCHERS = (*MPIRUN, "prted", "orted")
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIOCGIFADDR = 0x8915


def part(here):
    """Make this process the keeper, and a child of it the rank.

    Args:
        here: the rank's `launch.cluster.Place`.

    Returns:
        In the child, its `Line` to the keeper. The keeper does not return: it ends with the status of
        its rank.
    """
    listener = socket.create_server(("", 0), backlog=here.ranks) if here.rank == 0 else None
    ours, theirs = socket.socketpair()
    keeper = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a rank leaves behind comes to its keeper
    rank = os.fork()
    if rank == 0:
        ours.close()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a rank ends with its keeper
        if os.getppid() != keeper:
            os._exit(1)
        return Line(Channel(theirs), listener and listener.getsockname()[1])
    theirs.close()
    status = 1
    try:
        status = Keeper(here, rank, Channel(ours), listener).keep()
    finally:
        os._exit(status)


class Line:
    """What a rank can say to its keeper."""

    def __init__(self, channel, port):
        self.channel = channel
        self.port = port
        """Where the keeper of rank 0 listens, on that rank."""

    def join(self, addresses, port, secret, log):
        """Have the keeper enter the star.

        Args:
            addresses: of rank 0's host, to be tried in this order.
            port: of rank 0's keeper.
            secret: a text that only this job knows.
            log: the rank's log file, or None.

        Returns:
            Those of the addresses at which rank 0's keeper answered, and this host's own address on
            the way there.
        """
        self.channel.send(join=addresses, port=port, secret=secret, log=log and str(log))
        while True:
            for message in self.channel.receive(None) or []:
                return message["reached"], message["own"]

    def watch(self, name, process):
        """Have the job fail when this process ends before the rank does.

        Args:
            name: what the process is, for the message.
            process: its number.
        """
        self.channel.send(watch=name, process=process)

    def fail(self, text):
        """Say why this rank is about to end."""
        self.channel.send(failed=text)


class Channel:
    """Messages, dicts that JSON can hold, over a connected socket."""

    def __init__(self, connection):
        self.socket = connection
        self.socket.settimeout(CONNECT)
        self.rest = b""
        self.heard = time.monotonic()
        self.name = None
        """Whose it is; None until it said so."""
        self.ended = False
        """Whether that rank has ended, after which it has nothing more to say."""

    def send(self, **message):
        """Send, or do nothing if the other end is gone: its silence is dealt with elsewhere."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout=0):
        """The messages that came within so many seconds (None: wait for one); None at the end."""
        try:
            if not select.select([self.socket], [], [], timeout)[0]:
                return []
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def silent(self, soon=0):
        """Whether the other end has said nothing for too long, or will have so many seconds later."""
        return time.monotonic() - self.heard > SILENCE - soon


class Keeper:
    """Watches a rank, and through the other keepers the whole job.

    Args:
        here: the rank's `launch.cluster.Place`.
        rank: the rank's process number.
        line: the `Channel` to it.
        listener: a listening socket, with rank 0.
    """

    def __init__(self, here, rank, line, listener):
        self.here = here
        self.name = f"rank {here.rank} on {socket.gethostname()}"
        self.rank = rank
        self.line = line
        self.listener = listener
        self.parent = os.getppid()
        self.chief = None
        """The channel to rank 0's keeper, with the others."""
        self.others = []
        """With rank 0: the channels to the others."""
        self.secret = None
        self.log = None
        self.reason = None
        """What the rank said before it ended."""
        self.watched = []
        """[name, process, when it ended] of what must not end before the rank."""
        self.ended = None
        """The rank's exit status."""
        self.status = 0
        """That of the job."""
        self.deadline = None
        """When to end, once the job has failed."""
        self.cut = False
        """Whether it failed because a host was cut off."""
        self.began = time.monotonic()
        self.terminated = None
        """When mpirun asked this process to end."""

    def keep(self):
        """Watch until the job is over.

        Returns:
            The exit status: 0, or that of what failed first.
        """
        signals = {signal.SIGCHLD, *PASSED_ON}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        beat = time.monotonic()
        while not self.over():
            if info := signal.sigtimedwait(signals, TICK):
                self.pass_on(info)
            self.listen()
            if self.ended is None:
                self.look_after_rank()
            self.look_around()
            if time.monotonic() >= beat:
                beat += BEAT
                for channel in self.neighbours():
                    channel.send(beat=self.name)
        for channel in self.others:
            channel.send(end=self.status, cut=self.cut)
        self.clear()
        if self.cut and self.here.local_rank == 0:
            end_launcher(FAREWELL if self.listener else 2 * FAREWELL)
        return self.status

    def over(self):
        """Whether nothing is left to wait for."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            return True
        if self.ended is None:
            return False
        if self.listener:
            return all(channel.ended or not channel.name for channel in self.others)
        return self.status == 0 or self.chief is None

    def neighbours(self):
        return [channel for channel in (self.chief, *self.others) if channel]

    def pass_on(self, info):
        """Give a signal to the rank, unless mpirun sent it, which reaches the whole group."""
        if info.si_pid == self.parent:
            if info.si_signo == signal.SIGTERM:
                self.terminated = self.terminated or time.monotonic()
        elif info.si_signo in PASSED_ON and self.ended is None:
            os.kill(self.rank, info.si_signo)

    def listen(self):
        """Hear the rank, and the other keepers."""
        for message in self.line.receive() or [] if self.ended is None else []:
            self.hear_rank(message)
        while self.listener and select.select([self.listener], [], [], 0)[0]:
            self.others.append(Channel(self.listener.accept()[0]))
        for channel in list(self.others) if self.secret else []:  # before, it knows nobody
            self.hear_other(channel, channel.receive())
        if self.chief:
            self.hear_chief(self.chief.receive())

    def hear_rank(self, message):
        if "join" in message:
            self.secret, self.log = message["secret"], message["log"]
            reached, own = self.join(message["join"], message["port"])
            self.line.send(reached=reached, own=own)
        elif "watch" in message:
            try:
                process = os.pidfd_open(message["process"])
                self.watched.append([message["watch"], process, None])
            except ProcessLookupError:
                self.fail(f"{self.name}: {message['watch']} was ended")
        elif "failed" in message:
            self.reason = message["failed"]

    def join(self, addresses, port):
        """Connect with rank 0's keeper at the first address that works, and try the others."""
        if self.listener:
            return addresses, addresses[0]
        reached = {}
        for address in addresses:
            with contextlib.suppress(OSError):
                channel = Channel(socket.create_connection((address, port), timeout=CONNECT))
                channel.send(secret=self.secret, name=self.name)
                if channel.receive(CONNECT):
                    reached[address] = channel
                    self.chief = self.chief or channel
        own = self.chief and self.chief.socket.getsockname()[0]
        for channel in reached.values():
            if channel is not self.chief:
                channel.send(ended=0)
                channel.socket.close()
        return list(reached), own

    def hear_other(self, channel, messages):
        """With rank 0: what another rank's keeper says."""
        if messages is None:
            self.others.remove(channel)
            if channel.name and not channel.ended:
                self.fail(f"{channel.name} was ended, and its keeper with it")
            return
        for message in messages:
            if channel.name is None:
                if message.get("secret") != self.secret:
                    self.others.remove(channel)  # a stranger's
                    return
                channel.name = message["name"]
                channel.send(welcome=True)
            elif "ended" in message:
                channel.ended = True
                if message["ended"]:
                    self.fail(message["reason"], message["ended"])

    def hear_chief(self, messages):
        """What rank 0's keeper says."""
        if messages is None:
            self.lose_chief("rank 0 was ended, and its keeper with it")
        for message in messages or []:
            if message.get("end"):
                self.status, self.cut, self.deadline = message["end"], message["cut"], 0

    def lose_chief(self, text):
        self.chief = None
        if self.ended is None or self.status:
            if self.here.local_rank == 0 and not self.status:
                report(f"{self.name}: {text}")
            self.status = self.status or 1
            self.deadline = 0

    def look_after_rank(self):
        """See whether the rank has ended, and say so."""
        process, status = os.waitpid(self.rank, os.WNOHANG)
        if not process:
            return
        for message in self.line.receive() or []:  # its last
            self.hear_rank(message)
        self.ended = os.waitstatus_to_exitcode(status)
        reason = self.reason
        if self.ended < 0:
            number = -self.ended
            self.ended = 128 + number
            reason = f"killed by signal {number} ({signal.strsignal(number)})"
            if self.terminated and number == signal.SIGTERM:
                self.interrupt()
                return
            words = last_words(self.log) if number != signal.SIGKILL else ""
            if words:
                reason += f"; its last words: {words}"
        self.watched.clear()
        if reason:
            reason = self.with_log(f"{self.name}: {reason}")
        if self.chief:
            self.chief.send(ended=self.ended, reason=reason)
            if self.ended:
                self.status = self.ended
                self.deadline = time.monotonic() + PATIENCE
        elif self.ended:
            self.fail(reason, self.ended)

    def with_log(self, reason):
        """The reason and the name of the log file."""
        return f"{reason}; its log: {self.log}" if self.log else reason

    def look_around(self):
        """See whether all that this rank depends on is still there."""
        if os.getppid() != self.parent:
            self.status = self.status or 1
            self.deadline = 0
        for watched in list(self.watched):
            name, process, gone = watched
            if gone and time.monotonic() > gone + MOURNING:
                self.watched.remove(watched)
                self.fail(self.with_log(f"{self.name}: {name} was ended"))
            elif not gone and select.select([process], [], [], 0)[0]:
                watched[2] = time.monotonic()
        if self.terminated and time.monotonic() > self.terminated + HESITATION:
            self.interrupt()
        limit = GATHERING + (PATIENCE if self.here.rank else 0)  # rank 0's line will do, if it can speak
        if self.secret is None and time.monotonic() > self.began + limit:
            self.cut = True
            self.fail(f"{self.name}: not all ranks have begun after {limit} s: are all hosts up, and the "
                      "network?" if self.here.local_rank == 0 else None)
        expected = [channel for channel in self.others if channel.name and not channel.ended]
        if any(channel.silent() for channel in expected):
            silent = [channel for channel in expected if channel.silent(2 * BEAT)]
            for channel in silent:
                channel.ended = self.cut = True
            others = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
            self.fail(f"{silent[0].name}{others} has not answered for {SILENCE} s: is its host up, and "
                      "the network?")
        if self.chief and self.chief.silent():
            self.cut = True
            self.lose_chief(f"rank 0 has not answered for {SILENCE} s: is its host up, and the "
                            "network?")

    def interrupt(self):
        """End since the user told mpirun to, and say on its own stderr that the run is not lost: what its
        ranks print it no longer passes on."""
        if self.status:
            return
        self.status = 128 + signal.SIGTERM
        self.deadline = time.monotonic() + FAREWELL
        if self.here.local_rank == 0 and read(self.parent, "comm").strip() in MPIRUN:
            with (contextlib.suppress(OSError),  # a socket
                  open(f"/proc/{self.parent}/fd/2", "a", encoding="utf-8") as stream,
                  contextlib.redirect_stderr(stream)):
                report("interrupted; the same command goes on from the newest checkpoint, if there is "
                       "one")

    def fail(self, reason, status=1):
        """End the job: at once where a rank is alone, else when the others have had their time."""
        if self.status:
            return  # what follows from the first
        self.status = status
        self.deadline = time.monotonic() + (FAREWELL if self.others else 0)
        if reason:
            report(reason)

    def clear(self):
        """Kill what is left of the rank."""
        for process in children():
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def end_launcher(delay):
    """Have mpirun, or its daemon on this host, end: it waits for ever for a host that is cut off.

    A process of its own does that, since mpirun kills the keepers first.

    Args:
        delay: seconds for it to end by itself. mpirun must have heard from a rank that failed, and not
            only have lost its daemons, after which it ends with status 0.
    """
    launcher = find_launcher()
    if not launcher or os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # mpirun waits for the end of its ranks' output, too
        os.dup2(null, number)
    os.closerange(3, null)
    # With mpirun go the connections to other hosts that it has opened.
    own = {os.getpid(), os.getppid()}
    ends = [os.pidfd_open(process) for process in (launcher, *descendants(launcher, own))]
    for pause in (delay, *[1] * FAREWELL):
        if select.select(ends[:1], [], [], pause)[0]:
            break
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(ends[0], signal.SIGTERM)  # the second time it does not wait
    for process in ends:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    os._exit(0)


def find_launcher():
    """Number of the process of mpirun, or of its daemon on this host, above this one; None if none is."""
    process = os.getppid()
    while process > 1 and read(process, "comm").strip() not in LAUNCHERS:
        process = int(read(process, "stat").rpartition(")")[2].split()[1])
    return process if process > 1 else None


def descendants(process, without):
    """Numbers of the processes below one, leaving out some with all below them."""
    for child in map(int, read(process, f"task/{process}/children").split()):
        if child not in without:
            yield child
            yield from descendants(child, without)


def read(process, name):
    """A file of a process in /proc, "" if it is gone."""
    try:
        with open(f"/proc/{process}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def children():
    """Numbers of this process's children, until there are none: those of a killed one follow it."""
    while True:
        found = read(os.getpid(), f"task/{os.getpid()}/children").split()
        if not found:
            return
        yield from map(int, found)


def addresses():
    """This host's IPv4 addresses: of each interface one, the loopback's last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without one
                answer = fcntl.ioctl(query, SIOCGIFADDR, struct.pack("256s", name.encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    return sorted(found, key=lambda address: address.startswith("127."))


def prctl(option, value):
    """Linux's prctl(2) for this process."""
    ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)
