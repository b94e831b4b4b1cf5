"""One short question to a peer: has it this blob?"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

from agent.peers.choice import Answer
from agent.peers.credentials import Credentials
from agent.peers.settings import Address
from edgeward.clock import Clock
from edgeward.errors import Unavailable

#: Seconds for all of it, the connection included.
SECONDS = 3.0
_MOST = 4096
#: With a 503: how many bytes of the blob the peer has received by now.
RECEIVED = "Edgeward-Received"
#: With a 404: the peer wants the blob itself, and has not begun.
WANTED = "Edgeward-Wanted: 1"


@dataclass(frozen=True)
class Probed:
    name: str
    answer: Answer


def probe(address: Address, digest: str, credentials: Credentials, clock: Clock) -> Probed:
    """Ask `HEAD /blobs/{digest}`.

    Raises OSError when there is no answer in time (ssl.SSLCertVerificationError when it is not a device of
    this site), Unavailable when it makes no sense.
    """
    end = clock.monotonic() + SECONDS

    def left() -> float:
        remaining = end - clock.monotonic()
        if remaining <= 0:
            raise TimeoutError(f"{address} does not answer within {SECONDS:g} s")
        return remaining

    context = credentials.context(server=False)
    with (
        socket.create_connection((address.host, address.port), timeout=SECONDS) as plain,
        context.wrap_socket(_bounded(plain, left()), do_handshake_on_connect=False) as connection,
    ):
        connection.do_handshake()
        name = credentials.whose(connection.getpeercert(binary_form=True) or b"")
        connection.settimeout(left())
        connection.sendall(f"HEAD /blobs/{digest} HTTP/1.1\r\nHost: {address.host}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            connection.settimeout(left())
            part = connection.recv(_MOST)
            head += part
            if not part or len(head) > _MOST:
                raise Unavailable(f"peer {name} at {address} gives no proper answer")
    return Probed(name, _answer(head, name))


def _bounded(connection: socket.socket, seconds: float) -> socket.socket:
    connection.settimeout(seconds)
    return connection


def _answer(head: bytes, name: str) -> Answer:
    found = re.match(rb"HTTP/1\.1 ([0-9]{3}) ", head)
    status = int(found[1]) if found else 0
    if status == 200:
        return Answer("has")
    if status == 404:
        return Answer("wants" if f"\r\n{WANTED}\r\n".encode() in head else "missing")
    if status == 503:
        received = re.search(rb"\r\n%s: ([0-9]{1,15})\r\n" % RECEIVED.encode(), head, re.IGNORECASE)
        return Answer("coming", int(received[1])) if received else Answer("full")
    raise Unavailable(f"peer {name} answers {status}")
