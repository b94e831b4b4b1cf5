"""The listeners: TCP, a Unix socket, and gRPC where it is wanted."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Mapping
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING

from agent.serving.api import Api
from agent.serving.catalog import Catalog
from agent.serving.connection import Connection
from agent.serving.exchange import Shared
from agent.serving.messages import Handler
from agent.serving.settings import Settings
from edgeward.clock import Clock
from edgeward.errors import Conflict, Unavailable

if TYPE_CHECKING:
    from agent.serving.grpc_server import GrpcServer

_SWEEP_SECONDS = 1.0
_BACKLOG = 512


class Server:
    """Serves the catalog's models. Make it anywhere; `start` and `stop` run on the engine's loop.

    `port` is the TCP listener's, once started.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: Settings,
        clock: Clock,
        routes: Mapping[str, Handler] | None = None,
    ) -> None:
        """`routes`: path prefix -> a handler for what is not the protocol's (`/v1/streams`)."""
        self.api = Api(catalog, settings, clock, routes)
        self._settings = settings
        self._clock = clock
        self._shared = Shared(self.api.handle, settings, clock, self.api.statistics)
        self._listeners: list[asyncio.Server] = []
        self._sweeper: asyncio.TimerHandle | None = None
        self._socket_file: tuple[Path, int] | None = None
        self._grpc: GrpcServer | None = None
        self._stopped = False
        self.port = settings.port or 0

    @property
    def grpc_port(self) -> int:
        if self._grpc is None:
            raise Unavailable("gRPC is not enabled")
        return self._grpc.port

    async def start(self) -> None:
        """Listen. Raises Conflict when an address is taken, MissingDependency when gRPC is not installed."""
        loop = asyncio.get_running_loop()
        settings = self._settings
        self.sweep()
        try:
            if settings.port is not None:
                listener = await loop.create_server(
                    self._connect, settings.host, settings.port, backlog=_BACKLOG
                )
                self._listeners.append(listener)
                self.port = listener.sockets[0].getsockname()[1]
            if settings.unix_socket is not None:
                opened = open_unix_socket(settings.unix_socket)
                self._socket_file = (settings.unix_socket, settings.unix_socket.stat().st_ino)
                listener = await loop.create_unix_server(self._connect, sock=opened, backlog=_BACKLOG)
                self._listeners.append(listener)
            if settings.grpc_port is not None:
                from agent.serving.grpc_server import GrpcServer

                self._grpc = GrpcServer(self.api)
                await self._grpc.start()
        except OSError as error:
            await self.stop()
            if error.errno == errno.EADDRINUSE:
                raise Conflict(
                    f"{settings.host}:{settings.port} is taken",
                    hint="stop what listens there, or take another port",
                ) from None
            raise Unavailable(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Take no more requests, give the answers that are due within `drain_seconds`, and close."""
        self._stopped = True
        self.api.draining = self._shared.draining = True
        for listener in self._listeners:
            listener.close()
        if self._grpc is not None:
            await self._grpc.stop()
        self._remove_socket_file()
        connections = self._shared.connections
        emptied = asyncio.Event()
        self._shared.emptied = emptied.set
        for connection in list(connections):
            connection.drain()
        if connections:
            try:
                await asyncio.wait_for(emptied.wait(), self._settings.drain_seconds)
            except TimeoutError:
                for connection in list(connections):
                    connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def sweep(self) -> None:
        """Once a second: end connections that are too slow, and set the Date header."""
        self._shared.date = formatdate(self._clock.now(), usegmt=True).encode()
        now = self._clock.monotonic()
        for connection in list(self._shared.connections):
            connection.sweep(now)
        if not self._stopped or self._shared.connections:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self.sweep)

    def _connect(self) -> Connection:
        return Connection(self._shared)

    def _remove_socket_file(self) -> None:
        """Unless another server has put its own in that place."""
        if self._socket_file is not None:
            path, inode = self._socket_file
            self._socket_file = None
            try:
                if path.stat().st_ino == inode:
                    path.unlink()
            except FileNotFoundError:
                return


def open_unix_socket(path: Path) -> socket.socket:
    """A bound socket that only its user and group can use (0660), in the place of one that nobody serves.

    Raises Conflict when a server answers there, or when the file is no socket.
    """
    _remove_stale(path)
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Set on the socket, the mode holds from the file's first instant on; umask can only narrow it.
        os.fchmod(opened.fileno(), 0o660)
        opened.bind(str(path))
        path.chmod(0o660)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"{path} is taken") from None
        raise Unavailable(f"cannot make the socket {path}: {error.strerror}") from None
    return opened


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Conflict(f"{path} is not a socket", hint="choose another path for the socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.settimeout(1.0)
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Conflict(f"{path} is in use: {error.strerror}") from None
        else:
            raise Conflict(f"another server answers on {path}")
