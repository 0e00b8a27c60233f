"""Connects rank 0 with the other ranks, for their watchdogs.

Rank 0 listens on a TCP port until all ranks have connected: on the loopback interface if they are all on one host, else
on all interfaces. A connection must begin with a secret that only this job's ranks know; nothing is parsed before that.
"""

import contextlib
import hmac
import secrets
import socket
import time

import psutil

from launch.communicator import Communicator
from launch.errors import UserError
from launch.ranks import Rank

TIMEOUT = 5
"""Seconds to connect to an address, send the secret and get an answer."""


def connect(comm: Communicator, rank: Rank) -> dict[str, socket.socket]:
    """Return this rank's connections: rank 0's to all other ranks, theirs to rank 0, by the name of the other end.

    Raises:
        UserError: this rank cannot reach rank 0.
    """
    if rank.rank:
        leader, addresses, port, secret = comm.broadcast(None)
        return {leader: reach(leader, addresses, port, secret, str(rank))}
    with listen("127.0.0.1" if rank.single_host else "") as server:
        addresses = ["127.0.0.1"] if rank.single_host else own_addresses()
        secret = secrets.token_hex(16)
        comm.broadcast([str(rank), addresses, server.getsockname()[1], secret])
        return accept(server, secret, rank.size - 1, TIMEOUT * (1 + len(addresses)))


def listen(address: str) -> socket.socket:
    """Listen on a free port of an address, "" for all addresses."""
    server = socket.create_server((address, 0), backlog=1024)
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, TIMEOUT)  # silent strangers stay in the kernel
    return server


def accept(server: socket.socket, secret: str, count: int, seconds: float) -> dict[str, socket.socket]:
    """Accept connections that begin with the secret and a name, for some seconds; returns them by name."""
    accepted: dict[str, socket.socket] = {}
    deadline = time.monotonic() + seconds
    while len(accepted) < count and (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError):
            server.settimeout(left)
            connection = server.accept()[0]
            connection.settimeout(0.1)
            message = connection.recv(256)
            if hmac.compare_digest(message[: len(secret)], secret.encode()):
                connection.sendall(b"\n")
                connection.setblocking(True)
                accepted[message[len(secret) :].decode()] = connection
            else:
                connection.close()
    return accepted


def reach(leader: str, addresses: list[str], port: int, secret: str, name: str) -> socket.socket:
    """Connect to rank 0 at the first address that answers to the secret and this rank's name.

    Raises:
        UserError: none does.
    """
    for address in addresses:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, port), TIMEOUT)
            connection.sendall(secret.encode() + name.encode())
            if connection.recv(1):
                connection.setblocking(True)
                return connection
            connection.close()
    raise UserError(
        f"cannot reach {leader} at {' or '.join(addresses)}, port {port}: open the TCP ports from 1024 on between the "
        "hosts"
    )


def own_addresses() -> list[str]:
    """This host's IPv4 addresses, loopback last."""
    interfaces = psutil.net_if_addrs().values()
    found = [entry.address for entries in interfaces for entry in entries if entry.family == socket.AF_INET]
    return sorted(found, key=lambda address: address.startswith("127."))
