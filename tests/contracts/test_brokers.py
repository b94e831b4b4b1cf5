"""One suite over every broker: what Edgeward relies on, on the embedded one and on real Mosquitto."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from edgeward.broker import EmbeddedBroker, accepts, free_port
from edgeward.clock import SystemClock
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link, Message, Will
from edgeward.trust import certificates, keys
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity
from edgeward.trust.tls import PeerTime
from edgeward.wire import topics

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
ROOT = Path(__file__).parents[2]

needs_mosquitto = [
    pytest.mark.mosquitto,
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (apt-get install mosquitto)"),
]


class RealBroker(Protocol):
    url: str

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


class Mosquitto:
    """The real server on a free port of loopback."""

    def __init__(self, folder: Path, extra: str = "allow_anonymous true\n", scheme: str = "mqtt") -> None:
        self.port = free_port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._config = folder / "mosquitto.conf"
        self._config.write_text(f"listener {self.port} 127.0.0.1\npersistence false\nuser root\n{extra}")
        self._log = folder / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert MOSQUITTO is not None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stdout=log, stderr=log)
        wait_for(lambda: accepts("127.0.0.1", self.port), f"mosquitto: {self._log.read_text()}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for: {what}"
        time.sleep(0.02)


class Inbox:
    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes, bool]] = []
        self.lock = threading.Lock()

    def __call__(self, message: Message) -> None:
        with self.lock:
            self.messages.append((message.topic, message.payload, message.retained))
        message.acknowledge()

    def payloads(self, topic: str) -> list[bytes]:
        with self.lock:
            return [payload for where, payload, _ in self.messages if where == topic]


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=needs_mosquitto)])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RealBroker]:
    server: RealBroker = EmbeddedBroker(tmp_path) if request.param == "embedded" else Mosquitto(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., Link]]:
    links: list[Link] = []

    def make(url: str, name: str, **options: object) -> Link:
        link = Link(Broker(url), name, max_reconnect_delay=1, **options)  # type: ignore[arg-type]
        links.append(link)
        link.start()
        wait_for(lambda: link.connected, f"{name} to connect")
        return link

    yield make
    for link in links:
        link.stop()


def test_retained_state_reaches_a_late_subscriber(broker: RealBroker, connect: Callable[..., Link]) -> None:
    inbox = Inbox()
    first = connect(broker.url, "writer")
    first.publish("a/desired", b"1", retain=True)
    first.publish("a/desired", b"2", retain=True)
    early = Inbox()
    connect(broker.url, "early", subscriptions=("a/desired",), on_message=early)
    wait_for(lambda: early.payloads("a/desired")[-1:] == [b"2"], "the retained message")
    connect(broker.url, "late", subscriptions=("a/+",), on_message=inbox)
    wait_for(lambda: inbox.messages == [("a/desired", b"2", True)], "one retained message, marked as such")


def test_the_will_of_a_lost_client_is_published(broker: RealBroker, connect: Callable[..., Link]) -> None:
    inbox = Inbox()
    connect(broker.url, "watcher", subscriptions=("a/status",), on_message=inbox)
    lost = connect(broker.url, "lost", will=Will("a/status", b"offline"))
    sock = lost._client.socket()
    assert sock is not None
    # An address change or a pulled cable ends in a cut socket, without DISCONNECT.
    lost._client.reconnect_delay_set(60, 60)
    sock.shutdown(2)
    wait_for(lambda: inbox.payloads("a/status") == [b"offline"], "the last will")


def test_a_clean_stop_publishes_no_will(broker: RealBroker, connect: Callable[..., Link]) -> None:
    inbox = Inbox()
    watcher = connect(broker.url, "watcher", subscriptions=("a/#",), on_message=inbox)
    leaving = connect(broker.url, "leaving", will=Will("a/status", b"offline"))
    leaving.stop()
    watcher.publish("a/after", b"x")
    wait_for(lambda: inbox.payloads("a/after") == [b"x"], "a later message")
    assert inbox.payloads("a/status") == []


def test_links_come_back_after_a_killed_broker(broker: RealBroker, connect: Callable[..., Link]) -> None:
    inbox, connects = Inbox(), []
    reader = connect(
        broker.url, "reader", subscriptions=("a/#",), on_message=inbox, on_connect=lambda: connects.append(1)
    )
    reader.subscribe("b/#")
    writer = connect(broker.url, "writer")
    broker.kill()
    wait_for(lambda: not reader.connected and not writer.connected, "both to notice")
    broker.start()
    wait_for(lambda: reader.connected and writer.connected and len(connects) == 2, "both to return")

    def arrives(topic: str) -> bool:
        writer.publish(topic, b"x")
        return bool(inbox.payloads(topic))

    wait_for(lambda: arrives("a/1"), "a subscription given at the start")
    wait_for(lambda: arrives("b/1"), "a subscription added later")


def test_order_and_large_messages(broker: RealBroker, connect: Callable[..., Link]) -> None:
    inbox = Inbox()
    connect(broker.url, "reader", subscriptions=("a/#",), on_message=inbox, manual_ack=True)
    writer = connect(broker.url, "writer")
    sent = [b"%d" % index for index in range(300)]
    for payload in sent:
        writer.publish("a/n", payload)
    writer.publish("a/big", bytes(4_000_000))
    wait_for(lambda: len(inbox.payloads("a/big")) == 1, "a message of 4 MB")
    wait_for(lambda: inbox.payloads("a/n") == sent, "all messages, in order")


@pytest.mark.mosquitto
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (apt-get install mosquitto)")
def test_mutual_tls_and_acl_pin_a_device_to_its_own_root(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The configuration in deploy/mosquitto, on real certificates."""
    now = SystemClock().now()
    ca_key = keys.generate_key()
    ca = certificates.make_ca(ca_key, now)
    (tmp_path / "ca.pem").write_text(certificates.to_pem(ca))
    server_key = keys.generate_key()
    server = certificates.issue_server(ca, ca_key, server_key.public_key(), ["127.0.0.1"], now, lifetime=3600)
    (tmp_path / "server.pem").write_text(certificates.to_pem(server))
    (tmp_path / "server.key").write_bytes(keys.private_pem(server_key))
    acl = tmp_path / "acl"
    acl.write_text((ROOT / "deploy/mosquitto/acl").read_text())
    acl.chmod(0o600)
    shipped = (ROOT / "deploy/mosquitto/mosquitto.conf").read_text()
    kept = [line for line in shipped.splitlines() if not line.startswith(("listener", "persistence"))]
    settings = "\n".join(kept).replace("/etc/mosquitto/edgeward", str(tmp_path)) + "\n"
    broker = Mosquitto(tmp_path, settings, scheme="mqtts")
    broker.start()
    request.addfinalizer(broker.stop)

    def join(identity: Identity, **options: object) -> Link:
        key = keys.generate_key()
        certificate = certificates.issue(ca, ca_key, key.public_key(), identity, now, lifetime=3600)
        name = identity.common_name
        (tmp_path / f"{name}.pem").write_text(certificates.to_pem(certificate))
        (tmp_path / f"{name}.key").write_bytes(keys.private_pem(key))
        settings = Broker(broker.url, tmp_path / "ca.pem", tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        link = Link(settings, name, **options)  # type: ignore[arg-type]
        link.start()
        request.addfinalizer(link.stop)
        wait_for(lambda: link.connected, f"{name} to connect")
        return link

    inbox = Inbox()
    join(StoreIdentity("plant-store", frozenset({"north"})), subscriptions=(topics.ALL_UP,), on_message=inbox)
    honest, other = DeviceName("north", "turbine-1"), DeviceName("north", "turbine-2")
    device = join(DeviceIdentity(honest))
    device.publish(topics.up(other, "result"), b"forged")
    device.publish(topics.up(honest, "result"), b"own")
    wait_for(lambda: inbox.payloads(topics.up(honest, "result")) == [b"own"], "the device's own message")
    assert inbox.payloads(topics.up(other, "result")) == []

    stranger = Link(Broker(broker.url, tmp_path / "ca.pem"), "stranger")
    stranger.start()
    request.addfinalizer(stranger.stop)
    wait_for(lambda: "peer did not return a certificate" in broker._log.read_text(), "the refusal")
    assert not stranger.connected


@pytest.mark.mosquitto
@pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed (apt-get install mosquitto)")
def test_a_machine_with_a_wrong_clock_reaches_a_broker_over_tls(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The broker's certificate is of ten years ahead, as it looks from a machine that is ten years behind."""
    then = SystemClock().now() + 10 * 365 * 86400.0
    ca_key, key = keys.generate_key(), keys.generate_key()
    ca = certificates.make_ca(ca_key, then)
    server = certificates.issue_server(ca, ca_key, key.public_key(), ["127.0.0.1"], then, lifetime=3600)
    (tmp_path / "ca.pem").write_text(certificates.to_pem(ca))
    (tmp_path / "server.pem").write_text(certificates.to_pem(server))
    (tmp_path / "server.key").write_bytes(keys.private_pem(key))
    settings = f"allow_anonymous true\ncertfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key\n"
    broker = Mosquitto(tmp_path, settings, scheme="mqtts")
    broker.start()
    request.addfinalizer(broker.stop)
    known = [then + 7200]
    times = {
        "usual": None,
        "knows better": PeerTime(lambda: then + 60),
        "knows worse": PeerTime(lambda: known[0]),
    }
    links = {}
    for name, peer_time in times.items():
        links[name] = Link(
            Broker(broker.url, tmp_path / "ca.pem", peer_time=peer_time), name.replace(" ", "-")
        )
        links[name].start()
        request.addfinalizer(links[name].stop)
    wait_for(lambda: links["knows better"].connected, "the one that knows better")
    # OpenSSL's alert of the usual one, and the other's end right after a handshake that was fine for it.
    wait_for(lambda: "bad certificate" in broker._log.read_text(), "the refusal")
    assert not links["usual"].connected and not links["knows worse"].connected
    known[0] = then + 60
    wait_for(lambda: links["knows worse"].connected, "the other, which has learned the time")
    assert not links["usual"].connected
