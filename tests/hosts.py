"""Hosts for the tests on one machine: network namespaces with their own addresses and names.

They are connected to one switch and reach nothing else. This needs root and iproute2's `ip` and `bridge`.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable

import psutil

INSIDE = """
hostname {name}
mkdir -p {files} {place}
mount --bind {files} {place}
exec {bind} "$@"
"""
"""Runs before each command on a host; {place} is its own disk, which is {files} on the machine."""

AGENT = """#!{python}
import os, signal, subprocess, sys
sys.path.insert(0, {tests!r})
from hosts import inside
host, *command = sys.argv[1:]
number = int(host.rpartition(".")[2])
status = subprocess.call(inside({tag!r}, {folder!r}, number, ["sh", "-c", " ".join(command)], {cores!r}))
if os.path.exists(f"{folder}/cut{{number}}"):
    signal.pause()  # ssh would not notice
sys.exit(status)
"""
"""Replaces ssh: AGENT ADDRESS COMMAND."""


def are_possible() -> bool:
    """Whether this machine allows network namespaces."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "bridge", "unshare"))):
        return False
    name = f"try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made.returncode == 0


def inside(
    tag: str, folder: pathlib.Path | str, number: int, command: Iterable[object], cores: tuple[int, ...] = ()
) -> list[str]:
    """The command line that runs a command on a host, which has one of `cores`, or all if that is empty."""
    bind = f"taskset -c {cores[(number - 1) % len(cores)]}" if cores else ""
    script = INSIDE.format(name=f"host{number}", files=f"{folder}/host{number}", place=f"{folder}/local", bind=bind)
    return [
        "ip",
        "netns",
        "exec",
        f"{tag}h{number}",
        "unshare",
        "--uts",
        "--mount",
        "sh",
        "-ec",
        script,
        "sh",
        *map(str, command),
    ]


class Hosts:
    """A context manager of hosts host1, host2, ... with addresses 10.77.0.1, 10.77.0.2, ...

    Args:
        folder: for their files: what host N sees as `folder`/local is `folder`/hostN.
        count: how many.
        cores: cores of this machine, one for each host in turn; if empty, each host has all.
    """

    def __init__(self, folder: pathlib.Path | str, count: int, cores: Iterable[int] = ()) -> None:
        self.cores = tuple(cores)
        self.folder = pathlib.Path(folder)
        self.tag = f"t{uuid.uuid4().hex[:6]}"
        self.numbers = range(1, count + 1)
        self.agent = self.folder / "agent"

    def __enter__(self) -> "Hosts":
        try:
            self.make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def make(self) -> None:
        """Create the switch and the hosts."""
        ip("netns", "add", f"{self.tag}s")
        self.switch("ip", "link", "add", "name", "bridge", "type", "bridge")
        self.switch("ip", "link", "set", "bridge", "up")
        for number in self.numbers:
            name = f"{self.tag}h{number}"
            ip("netns", "add", name)
            ip(
                "link",
                "add",
                "eth0",
                "netns",
                name,
                "type",
                "veth",
                "peer",
                "name",
                f"port{number}",
                "netns",
                f"{self.tag}s",
            )
            self.switch("ip", "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            # Docker creates such a bridge on every host, with the same address.
            ip("-n", name, "link", "add", "docker0", "type", "bridge")
            ip("-n", name, "address", "add", "172.17.0.1/16", "dev", "docker0")
            for interface in ("lo", "docker0", "eth0"):
                ip("-n", name, "link", "set", interface, "up")
        self.agent.write_text(
            AGENT.format(
                python=sys.executable,
                tests=str(pathlib.Path(__file__).parent),
                tag=self.tag,
                folder=str(self.folder),
                cores=self.cores,
            )
        )
        self.agent.chmod(0o755)

    def __exit__(self, *_: object) -> None:
        for name in (f"{self.tag}s", *(f"{self.tag}h{number}" for number in self.numbers)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @staticmethod
    def address(number: int) -> str:
        return f"10.77.0.{number}"

    def switch(self, *command: str) -> None:
        """Run a command in the switch's namespace."""
        subprocess.run(["ip", "netns", "exec", f"{self.tag}s", *command], check=True)

    def cut_off(self, number: int) -> None:
        """Drop all packets from and to a host from now on, as if its cable were pulled."""
        (self.folder / f"cut{number}").touch()
        self.switch("bridge", "link", "set", "dev", f"port{number}", "state", "0")

    def processes(self) -> list[psutil.Process]:
        """All processes on the hosts, but for those that have ended and wait for init to notice."""
        numbers: list[str] = []
        for number in self.numbers:
            command = ["ip", "netns", "pids", f"{self.tag}h{number}"]
            numbers += subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return [
            process
            for process in psutil.process_iter(["status"])
            if str(process.pid) in numbers and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def remaining(self, seconds: float = 2) -> list[psutil.Process]:
        """Processes that do not end within some seconds; what ends a job may outlive mpirun by a moment."""
        deadline = time.monotonic() + seconds
        while (processes := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return processes

    def mpirun(
        self, *command: object, hostfile: bool = False, cwd: pathlib.Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a command with a rank on each host by the mpirun of host1; a Popen."""
        addresses = [self.address(number) for number in self.numbers]
        file = self.folder / "hostfile"
        file.write_text("".join(f"{address} slots=1\n" for address in addresses))
        where = ["--hostfile", file] if hostfile else ["--host", ",".join(addresses)]
        start = ["mpirun", "--prtemca", "plm_ssh_agent", self.agent, *where, *command]
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return subprocess.Popen(
            inside(self.tag, self.folder, 1, start, self.cores),
            env={**os.environ, **root},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
        )


def ip(*arguments: str) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *arguments], check=True)
