"""The agent's side of its site: credentials, hints, what it takes and what it gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from agent.fetch import BlobStore
from agent.identity import Identity
from agent.peers.credentials import Credentials
from agent.peers.discovery import Directory, Mdns
from agent.peers.figures import FIGURES, Figures
from agent.peers.obtain import Peers
from agent.peers.server import Server
from agent.peers.settings import Settings
from edgeward.clock import Clock


class Site:
    """Listens from the beginning, so that a port that is taken is said before the agent runs."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        identity: Identity,
        blobs: BlobStore,
        clock: Clock,
        may_serve: Callable[[str], bool],
    ) -> None:
        """Raises UsageError when the address is taken, MissingDependency for multicast DNS without zeroconf."""
        self._ending = threading.Event()
        self._pace = blobs.pace
        credentials = Credentials(
            folder, identity.name, identity.enrollment.trust.ca, identity.signer, clock.now
        )
        self._server: Server | None = None
        self._mdns: Mdns | None = None
        if settings.listen is not None:
            self._server = Server(
                settings.listen,
                blobs,
                credentials,
                clock,
                received=lambda digest: self.peers.received(digest),
                wanted=lambda digest: self.peers.wanted(digest),
                may_serve=may_serve,
            )
        if settings.mdns:
            self._mdns = Mdns(self._server.address.port if self._server else None)
        self.peers = Peers(
            blobs,
            Directory(settings, clock, self._mdns),
            credentials,
            clock,
            self._wait,
            Figures(folder / FIGURES),
        )

    def start(self) -> None:
        if self._server is not None:
            self._server.start()

    def _wait(self, seconds: float) -> bool:
        """For a peer that may take a quarter of an hour, or longer under a cap: what runs is looked after."""
        if self._pace is not None:
            self._pace.meanwhile()
        return self._ending.wait(seconds)

    def stop(self) -> None:
        """Whoever waits for a peer, and whom this agent serves, must begin anew elsewhere."""
        self._ending.set()
        if self._mdns is not None:
            self._mdns.stop()
        if self._server is not None:
            self._server.stop()
