"""A site: agents with real certificates, that serve and fetch over TLS on loopback, and a controller."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agent.peers.obtain
import agent.peers.probe
from agent.fetch import PEER, BlobStore, Limits, Origin
from agent.peers.choice import order
from agent.peers.credentials import Credentials
from agent.peers.figures import FIGURES, Figures
from agent.peers.obtain import Peers
from agent.peers.server import Bounds, Server
from agent.peers.settings import Address
from edgeward.client.transport import Transport
from edgeward.clock import Clock, SystemClock
from edgeward.identifiers import DeviceName
from edgeward.storage import sha256_hex
from edgeward.trust import certificates, keys
from edgeward.trust.certificates import DeviceIdentity, StoreIdentity
from tests.faults.conftest import Answer, head
from tests.faults.conftest import Server as ByHand

ANYWHERE = Address("127.0.0.1", 0)


class Authority:
    """A fleet's CA."""

    def __init__(self) -> None:
        self._key = keys.generate_key()
        self._now = SystemClock().now()
        self.certificate = certificates.make_ca(self._key, self._now)
        self.pem = certificates.to_pem(self.certificate)

    def credentials(
        self, folder: Path, name: str, site: str = "plant", *, lifetime: float = 86400.0, store: bool = False,
        now: Callable[[], float] | None = None,
    ) -> Credentials:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        key = keys.load_or_create(folder / "identity.key")
        whose = StoreIdentity(name, frozenset([site])) if store else DeviceIdentity(DeviceName(site, name))
        issued = certificates.issue(
            self.certificate, self._key, key.public_key(), whose, self._now - 3600, lifetime=lifetime + 3600
        )
        signer = keys.SigningIdentity(key, certificates.to_der(issued))
        return Credentials(
            folder, DeviceName(site, name), self.pem, lambda: signer, now or (lambda: self._now)
        )


class Controller:
    """Serves blobs over real HTTP and counts how often each, and how many bytes of it, were asked for."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = {sha256_hex(content): content for content in contents}
        self.asked: list[str] = []
        self.sent = 0
        #: Before the body: what a slow link is for.
        self.before: Callable[[], None] = lambda: None
        self.server = ByHand(self._answer)
        self._read_path()

    def _read_path(self) -> None:
        serve = self.server._serve
        here = threading.local()
        self._here = here

        def reading(connection: socket.socket) -> None:
            peeked = connection.recv(65536, socket.MSG_PEEK)
            here.digest = peeked.split(b" ")[1].decode().rpartition("/")[2]
            serve(connection)

        self.server._serve = reading  # type: ignore[method-assign]

    def _answer(self, connection: socket.socket, offset: int) -> None:
        digest = self._here.digest
        self.asked.append(digest)
        content = self.contents[digest]
        self.before()
        connection.sendall(head(len(content), offset) + content[offset:])
        self.sent += len(content) - offset


class Agent:
    """What an agent has of peers, without the rest of it."""

    def __init__(
        self, authority: Authority, folder: Path, name: str, controller: Controller, clock: Clock | None = None,
        wait: Callable[[float], bool] | None = None, site: str = "plant", **options: Any,
    ) -> None:  # fmt: skip
        self.name = name
        self.clock = clock or SystemClock()
        # Endless patience with the controller: what ends a peer's transfer is a limit of its own.
        self.blobs = BlobStore(folder / "blobs", reserve=0, limits=Limits(0.0, 3600.0, 1e6))
        self.credentials = authority.credentials(folder, name, site)
        self.hints: list[Address] = []
        # A machine that is busy with other tests must not make an honest peer a slow one.
        options.setdefault("bounds", Bounds(request=300.0, window=300.0))
        self.ending = threading.Event()
        self.figures = folder / FIGURES
        self.peers = Peers(
            self.blobs, self, self.credentials, self.clock, wait or self.ending.wait, Figures(self.figures)
        )
        self.server = Server(
            ANYWHERE,
            self.blobs,
            self.credentials,
            SystemClock(),
            received=self.peers.received,
            wanted=self.peers.wanted,
            **options,
        )
        self.server.start()
        self.transport = Transport(controller.server.url)

    def addresses(self) -> list[Address]:
        return self.hints

    def obtain(self, content: bytes) -> None:
        """Raises what obtaining raises; after it the store has the content."""
        digest, size = sha256_hex(content), len(content)
        self.peers.obtain(
            digest, size, lambda: self.blobs.fetch(self.transport, digest, size, self.clock) and None
        )
        assert self.blobs.read(digest, size) == content

    def put(self, content: bytes) -> None:
        self.blobs.path(sha256_hex(content)).write_bytes(content)

    def close(self) -> None:
        self.ending.set()
        self.server.stop()
        self.transport.close()


class Liar:
    """Has a device's certificate, and answers GETs as it likes; HEADs with yes unless told otherwise."""

    def __init__(
        self, credentials: Credentials, answer: Answer, to_head: bytes = b"HTTP/1.1 200 OK\r\n\r\n"
    ) -> None:
        self.gets = 0
        self.heads = 0
        self._answer = answer
        self.to_head = to_head
        self.says: Callable[[], bytes] = lambda: self.to_head
        self._server = ByHand(self._reply)
        serve = self._server._serve

        def over_tls(connection: socket.socket) -> None:
            context = credentials.context(server=True)
            try:
                with context.wrap_socket(connection, server_side=True) as secured:
                    serve(_Peeked(secured, self))  # type: ignore[arg-type]
            except OSError:
                return

        self._server._serve = over_tls  # type: ignore[method-assign]
        self.address = Address("127.0.0.1", int(self._server.url.rpartition(":")[2]))
        self.name = credentials.name.device

    def _reply(self, connection: Any, offset: int) -> None:
        if connection.method == b"HEAD":
            self.heads += 1
            connection.sendall(self.says())
        else:
            self.gets += 1
            self._answer(connection, offset)

    def close(self) -> None:
        self._server.close()


class _Peeked:
    """A TLS socket that remembers which method was asked for."""

    def __init__(self, secured: ssl.SSLSocket, liar: Liar) -> None:
        self._secured = secured
        self.method = b""

    def recv(self, size: int) -> bytes:
        part = self._secured.recv(size)
        self.method = self.method or part.partition(b" ")[0]
        return part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._secured, name)

    def __enter__(self) -> _Peeked:
        return self

    def __exit__(self, *_: object) -> None:
        return


class Site:
    """Makes agents and liars that know one another, and closes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority()
        self.agents: list[Agent] = []
        self.liars: list[Liar] = []
        self._controllers: list[Controller] = []

    def controller(self, *contents: bytes) -> Controller:
        self._controllers.append(Controller(*contents))
        return self._controllers[-1]

    def agent(self, name: str, controller: Controller, **options: Any) -> Agent:
        self.agents.append(Agent(self.authority, self.folder / name, name, controller, **options))
        self._introduce()
        return self.agents[-1]

    def liar(self, name: str, answer: Answer, **options: Any) -> Liar:
        self.liars.append(Liar(self.authority.credentials(self.folder / name, name), answer, **options))
        self._introduce()
        return self.liars[-1]

    def _introduce(self) -> None:
        # Oneself is among them, as with a headless Service.
        places = [one.server.address for one in self.agents] + [one.address for one in self.liars]
        for one in self.agents:
            one.hints = places

    def close(self) -> None:
        for one in [*self.agents, *self.liars]:
            one.close()
        for controller in self._controllers:
            controller.server.close()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(agent.peers.probe, "SECONDS", 300.0)
    patient = Origin(PEER.path, PEER.partial, exact=True, limits=Limits(16384.0, 300.0, 3000.0))
    monkeypatch.setattr(agent.peers.obtain, "PEER", patient)
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.close()


def first(content: bytes, names: list[str]) -> str:
    """Whose turn it is to go to the controller."""
    return order(sha256_hex(content), names)[0]
