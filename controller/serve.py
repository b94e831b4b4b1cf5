"""The controller's process: socket, embedded broker, web server, and a clean end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from controller.api.app import build
from controller.downloads import Limits
from controller.service import Controller, Settings
from edgeward.broker import EmbeddedBroker, accepts
from edgeward.errors import EdgewardError, MissingDependency, UsageError
from edgeward.mqtt import Broker

if TYPE_CHECKING:
    from edgeward.object_store import S3Settings

log = logging.getLogger(__name__)

_WATCH_EVERY = 2.0


class Server(uvicorn.Server):
    """Says when it serves, and lets open event streams go when it is told to end."""

    def __init__(self, config: uvicorn.Config, controller: Controller, url: str) -> None:
        super().__init__(config)
        self._controller = controller
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"edgeward controller ready at {self._url}", flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._controller.stopping.set()
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises EdgewardError when the port is taken, UsageError for a bad address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise UsageError(f"--host: {host!r} is not an address of this machine") from None
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(1)  # a second bind with SO_REUSEADDR fails only once somebody listens
    except OSError as error:
        made.close()
        raise EdgewardError(
            f"cannot listen on {host} port {port}: {error.strerror}", hint="choose another --port"
        ) from None
    return made


def serve(
    data: Path,
    host: str,
    port: int,
    *,
    broker: str | None,
    broker_port: int,
    broker_port_311: int | None,
    database: str,
    downloads: Limits,
    renewal_grace: float,
    artifacts: str,
    credentials: Path | None,
) -> None:
    """Run until SIGTERM or SIGINT. Raises EdgewardError when something is missing or a port is taken."""
    if broker is not None:
        Broker(broker).endpoint()
    s3 = _s3(artifacts, credentials) if artifacts else None
    with ExitStack() as stack:
        sock = stack.enter_context(listen(host, port))
        url = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
        embedded = None
        if broker is None:
            data.mkdir(parents=True, exist_ok=True, mode=0o700)
            embedded = EmbeddedBroker(data / "broker", broker_port, host, broker_port_311)
            stack.enter_context(embedded)
        settings = Settings(
            data,
            broker or _local_url(embedded),
            database,
            broker_on_this_host=embedded is not None and host in ("0.0.0.0", "::"),
            downloads=downloads,
            renewal_grace=renewal_grace,
            s3=s3,
        )
        controller = Controller(settings)
        stack.callback(controller.stop)
        token = controller.ensure_admin_token()
        log.info("the admin token is in %s; the broker is at %s", token, settings.broker)
        controller.start()
        if embedded is not None:
            watch = threading.Thread(target=_keep_up, args=(embedded, controller), daemon=True)
            watch.start()
            stack.callback(watch.join, 20)
            stack.callback(controller.stopping.set)
        config = uvicorn.Config(
            build(controller),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
            server_header=False,
            lifespan="off",
        )
        # uvicorn raises the signal again when it has ended; the rest here shall still be put away.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        Server(config, controller, url).run(sockets=[sock])


def _s3(address: str, credentials: Path | None) -> S3Settings:
    """Raises MissingDependency, and what `settings_from` raises."""
    try:
        from edgeward.object_store import settings_from
    except ImportError as error:
        raise MissingDependency(
            f"artifacts in S3 need {error.name}", hint="pip install 'edgeward[controller,s3]'"
        ) from None
    found = settings_from(address, os.environ, credentials)
    if found.endpoint.startswith("http://"):
        log.warning("%s: devices that reach the controller over https do not follow it to http", found.shown)
    return found


def _local_url(embedded: EmbeddedBroker | None) -> str:
    assert embedded is not None
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(embedded.host, embedded.host)
    return f"mqtt://{host}:{embedded.port}"


def _keep_up(embedded: EmbeddedBroker, controller: Controller) -> None:
    """Start the embedded broker again if it died."""
    while not controller.stopping.wait(_WATCH_EVERY):
        if accepts(embedded.host, embedded.port):
            continue
        log.warning("the embedded broker is gone, starting it again")
        embedded.stop()
        try:
            embedded.start()
        except EdgewardError as error:
            log.error("%s", error)
