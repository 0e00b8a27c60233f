"""Hosts for the tests on one machine: network namespaces with addresses and names of their own.

They hang on one switch and reach nothing else. It takes root and iproute2's `ip` and `bridge`.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import uuid

import psutil

INSIDE = """
hostname {name}
mkdir -p {files} {place}
mount --bind {files} {place}
exec {bind} "$@"
"""
"""What a command on a host begins with; {place} is its own disk, on the machine {files}."""

AGENT = """#!{python}
import os, signal, subprocess, sys
sys.path.insert(0, {tests!r})
from hosts import inside
host, *command = sys.argv[1:]
number = int(host.rpartition(".")[2])
status = subprocess.call(inside({tag!r}, {folder!r}, number, ["sh", "-c", " ".join(command)], {cores!r}))
if os.path.exists(f"{folder}/cut{{number}}"):
    signal.pause()  # ssh would not hear of it
sys.exit(status)
"""
"""In the place of ssh: AGENT ADDRESS COMMAND."""


def are_possible():
    """Whether this machine lets us make namespaces."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "bridge", "unshare"))):
        return False
    name = f"try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made.returncode == 0


def inside(tag, folder, number, command, cores=()):
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
    """Hosts host1, host2, ... with the addresses 10.77.0.1, 10.77.0.2, ... A context manager.

    Args:
        folder: for their files: what a host sees as `folder`/local is `folder`/hostN.
        count: how many.
        cores: cores of this machine, one for each host in turn; if empty, each host has all.
    """

    def __init__(self, folder, count, cores=()) -> None:
        self.cores = tuple(cores)
        self.folder = pathlib.Path(folder)
        self.tag = f"t{uuid.uuid4().hex[:6]}"
        self.numbers = range(1, count + 1)
        self.agent = self.folder / "agent"

    def __enter__(self):
        try:
            self.make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def make(self) -> None:
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
            # As Docker has it on each host, at the same address.
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

    def __exit__(self, *_):
        for name in (f"{self.tag}s", *(f"{self.tag}h{number}" for number in self.numbers)):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @staticmethod
    def address(number):
        return f"10.77.0.{number}"

    def switch(self, *command) -> None:
        """Run a command beside the switch."""
        subprocess.run(["ip", "netns", "exec", f"{self.tag}s", *command], check=True)

    def cut_off(self, number) -> None:
        """From now on drop all packets from and to a host, as when a cable is pulled."""
        (self.folder / f"cut{number}").touch()
        self.switch("bridge", "link", "set", "dev", f"port{number}", "state", "0")

    def processes(self):
        """What runs on the hosts, as psutil.Process."""
        names = [f"{self.tag}h{number}" for number in self.numbers]
        found = [
            subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()
            for name in names
        ]
        return [psutil.Process(int(process)) for process in sum(found, []) if psutil.pid_exists(int(process))]

    def mpirun(self, *command, hostfile=False, **keywords):
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
            **keywords,
        )


def ip(*arguments) -> None:
    """Run iproute2's ip."""
    subprocess.run(["ip", *arguments], check=True)
