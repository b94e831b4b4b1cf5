"""The embedded MQTT broker: rumqttd from the `iotcore` wheel, in a process of its own.

For demos, tests and a first site. It has no topic ACL and keeps nothing over a restart; that is safe
because every message is signed end to end and every row waits for the trend store's own ack.

rumqttd has a listener of its own for each version of the protocol: MQTT v5, and where it is wanted a second
port for MQTT 3.1.1, which many sensors and libraries speak by default. Both share topics, retained messages
and wills. A message with v5 properties cannot be told to a 3.1.1 client, whose connection rumqttd then ends;
Edgeward's own messages have none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from edgeward.clock import SystemClock
from edgeward.errors import EdgewardError, MissingDependency

_CONFIG = """\
id = 0

[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
initialized_filters = []

"""
_LISTENER = """
[{version}.1]
name = "{version}"
listen = "{host}:{port}"
next_connection_delay_ms = 1

[{version}.1.connections]
connection_timeout_ms = 60000
max_payload_size = 20971520
max_inflight_count = 200
dynamic_filters = true
"""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(host: str, port: int) -> bool:
    """Whether something accepts TCP connections there."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


class EmbeddedBroker:
    """Starts, stops and, for fault tests, kills the broker; it comes back on the same port."""

    def __init__(
        self, folder: Path, port: int = 0, host: str = "127.0.0.1", port_311: int | None = None
    ) -> None:
        """`port` is for MQTT v5, `port_311` for MQTT 3.1.1: 0 picks a free one, None has none for 3.1.1."""
        self.host = host
        self.port = port or free_port(host)
        self.port_311 = free_port(host) if port_311 == 0 else port_311
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://{self.host}:{self.port}"

    @property
    def _ports(self) -> dict[str, int]:
        """By rumqttd's name of the protocol version."""
        return {"v5": self.port} | ({} if self.port_311 is None else {"v4": self.port_311})

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, timeout: float = 15.0) -> None:
        """Return once connections are accepted.

        Raises MissingDependency without the wheel, EdgewardError when the port is taken or it ends.
        """
        if importlib.util.find_spec("iotcore") is None:
            raise MissingDependency(
                "the embedded broker is not installed",
                hint="pip install 'edgeward[broker]', or pass --broker",
            )
        for port in self._ports.values():
            if accepts(self.host, port):
                raise EdgewardError(
                    f"port {port} on {self.host} is taken", hint="choose another port, or pass --broker"
                )
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "rumqttd.toml"
        listeners = [
            _LISTENER.format(version=version, host=self.host, port=port)
            for version, port in self._ports.items()
        ]
        config.write_text("".join([_CONFIG, *listeners]))
        with (self._folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgeward.broker", str(config)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        clock = SystemClock()
        deadline = clock.monotonic() + timeout
        while not all(accepts(self.host, port) for port in self._ports.values()):
            if self._process.poll() is not None or clock.monotonic() > deadline:
                self.stop()
                raise EdgewardError(
                    "the embedded broker did not start", hint=f"see {self._folder}/broker.log"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would: SIGKILL, nothing flushed."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(how)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _serve(config: str) -> None:
    """Run the broker in this process until it is told to end or its parent closes our standard input."""
    # The native module, since iotcore.Broker would put a child of its own between us and the signal.
    from iotcore.iotcore import IotCoreBroker

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # rumqttd routes inside error_span!, which arrives here as one ERROR record for every packet.
    logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
    IotCoreBroker(config_path=config).run_forever()


if __name__ == "__main__":
    _serve(sys.argv[1])
