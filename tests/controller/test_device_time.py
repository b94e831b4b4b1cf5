"""A device with a wrong clock talks to a real controller: it learns the time, and from nobody else."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from agent.fetch import BlobStore
from agent.identity import LOOK_EVERY, Identity, enroll
from agent.state import State
from agent.trusted_clock import TrustedClock
from agent.verify import Verifier
from controller.api.app import build
from edgeward.broker import free_port
from edgeward.client.controller import DeviceClient
from edgeward.client.transport import Transport
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import Forbidden, InvalidDocument, TrustError, Unavailable
from edgeward.trust import certificates, dsse
from edgeward.trust.keys import generate_key, private_pem
from edgeward.wire.signed_time import PAYLOAD_TYPE, SignedTime, encode

YEAR = 365 * 86400.0
NONCE = "0" * 32


class Device:
    """An enrolled agent's identity on a machine whose clock is the test's."""

    def __init__(self, plant: Any, folder: Path) -> None:
        enroll(folder, plant.url, plant.client.create_enrollment_token(["north"]), "d1", {})
        self.folder = folder
        self.state = State(folder / "state.db")

    def boot(self, wall: float) -> Identity:
        self.machine = ManualClock(wall)
        self.clock = TrustedClock(self.machine, self.state)
        return Identity(self.folder, self.clock)


@pytest.fixture
def device(plant: Any, tmp_path: Path) -> Iterator[Device]:
    plant.begin()
    made = Device(plant, tmp_path / "d1")
    yield made
    made.state.close()


class Rounds(threading.Event):
    """Ends `keep_fresh` after so many looks; the machine's time passes meanwhile."""

    def __init__(self, machine: ManualClock, count: int) -> None:
        super().__init__()
        self._machine = machine
        self._left = count

    def wait(self, timeout: float | None = None) -> bool:
        self._left -= 1
        if self._left > 0:
            self._machine.advance(timeout or 0.0)
        return self._left <= 0


def test_held_back_metadata_costs_a_release_nothing_but_time(
    device: Device, plant: Any, tmp_path: Path
) -> None:
    """TrustError would quarantine it for good; Unavailable is tried again."""
    identity = device.boot(SystemClock().now())
    root = identity.enrollment.trust.tuf_root.encode()
    verifier = Verifier(
        tmp_path / "tuf", root, BlobStore(tmp_path / "blobs"), identity.transport, device.clock
    )
    one = plant.publish(1)
    timestamp = plant.folder / "data" / "tuf" / "timestamp.json"
    old = timestamp.read_bytes()
    two = plant.publish(2)
    new = timestamp.read_bytes()
    timestamp.write_bytes(old)
    assert verifier.target_length(one) > 0
    with pytest.raises(Unavailable, match="not in the release metadata"):
        verifier.target_length(two)
    for damaged in (new[:-20], new.replace(b"snapshot.json", b"snapshat.json"), b"{}"):
        timestamp.write_bytes(damaged)
        with pytest.raises(Unavailable, match="does not verify"):
            verifier.target_length(two)
    timestamp.write_bytes(new)
    assert verifier.target_length(two) > 0
    timestamp.write_bytes(old)
    with pytest.raises(Unavailable, match="does not verify"):
        verifier.target_length(two)
    timestamp.write_bytes(new)


@pytest.mark.parametrize("off", [10 * YEAR, -10 * YEAR, None])
def test_it_gets_through_with_any_clock(device: Device, off: float | None) -> None:
    now = SystemClock().now()
    identity = device.boot(0.0 if off is None else now + off)
    if off is not None and off > 0:
        with pytest.raises(Forbidden, match="clock is off"):
            identity.client.desired(newer_than=99, wait=0.0)
    identity.keep_fresh(Rounds(device.machine, 1), threading.Event())
    assert abs(device.clock.now() - now) < 60
    assert identity.client.desired(newer_than=99, wait=0.0) is None, "its token holds"
    # A clock that breaks while the agent runs is found out at the next look, and costs nothing meanwhile.
    device.machine.set_wall(now + 3 * YEAR)
    assert identity.client.desired(newer_than=99, wait=0.0) is None
    assert device.clock.should_ask()
    identity.keep_fresh(Rounds(device.machine, 1), threading.Event())
    assert not device.clock.should_ask() and LOOK_EVERY <= 60


@contextmanager
def over_tls(plant: Any, folder: Path, now: float, until: Any) -> Iterator[tuple[str, ssl.SSLContext]]:
    """The same controller over HTTPS with a certificate for the day after `now`, and who trusts that."""
    ca_key, key = generate_key(), generate_key()
    ca = certificates.make_ca(ca_key, now)
    issued = certificates.issue_server(ca, ca_key, key.public_key(), ["127.0.0.1"], now, lifetime=86400)
    (folder / "server.pem").write_text(certificates.to_pem(issued))
    (folder / "server.key").write_bytes(private_pem(key))
    config = uvicorn.Config(
        build(plant.controller),
        port=free_port(),
        log_level="warning",
        lifespan="off",
        ssl_certfile=folder / "server.pem",
        ssl_keyfile=folder / "server.key",
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"https://127.0.0.1:{config.port}", ssl.create_default_context(cadata=certificates.to_pem(ca))
    finally:
        server.should_exit = True
        thread.join()


def test_tls_is_no_obstacle_for_a_wrong_clock(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    """The controller lives 110 days ahead, so this machine's clock, by which OpenSSL goes, is that wrong."""
    world = ManualClock(SystemClock().now() + 100 * 86400)
    with start(tmp_path, clock=world) as plant:
        plant.begin()
        device = Device(plant, tmp_path / "d1")
        world.advance(10 * 86400)  # what the device's own certificate proves is too early for the server's
        with over_tls(plant, tmp_path, world.now(), until) as (url, context):
            (device.folder / "controller.url").write_text(url)
            monkeypatch.setattr("httpx.create_ssl_context", lambda **_: context)
            identity = device.boot(SystemClock().now())
            with pytest.raises(Unavailable, match="not for now"):
                identity.client.desired(newer_than=99, wait=0.0)
            identity.keep_fresh(Rounds(device.machine, 1), threading.Event())
            assert not device.clock.should_ask()
            assert identity.client.desired(newer_than=99, wait=0.0) is None
        device.state.close()


def test_the_first_certificate_is_the_first_evidence(device: Device) -> None:
    """A device that has never been told the time knows at least when it was enrolled, by a signature."""
    device.boot(0.0)
    assert abs(device.clock.now() - SystemClock().now()) < 400
    assert abs(device.state.time_floor() - SystemClock().now()) < 400


def test_a_certificate_from_elsewhere_is_no_evidence(device: Device, plant: Any, tmp_path: Path) -> None:
    path = device.folder / "enrollment.json"
    other = path.read_text()
    stranger = plant.controller.authority.ca_pem  # any certificate that the CA did not issue to a device
    certificate = other.split('"certificate":"')[1].split('"')[0]
    path.write_text(other.replace(certificate, stranger.replace("\n", "\\n")))
    with pytest.raises(TrustError):
        device.boot(0.0)
    assert device.state.time_floor() == 0


def test_a_forged_or_recorded_answer_changes_nothing(
    device: Device, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = device.boot(0.0)
    before = device.clock.now()
    later = SystemClock().now() + 10 * YEAR
    key = plant.controller._desired_key
    answers = {
        "by a stranger": lambda nonce: dsse.sign(
            encode(SignedTime(nonce, later)), PAYLOAD_TYPE, generate_key()
        ),
        "to another question": lambda nonce: dsse.sign(encode(SignedTime(NONCE, later)), PAYLOAD_TYPE, key),
        "of another kind": lambda nonce: dsse.sign(encode(SignedTime(nonce, later)), "text/plain", key),
        "nothing": lambda nonce: b"",
    }
    for says, made in answers.items():
        monkeypatch.setattr(plant.controller, "signed_time", made)
        with pytest.raises(TrustError):
            identity.ask_time()
        identity.keep_fresh(Rounds(device.machine, 1), threading.Event())
        assert device.clock.now() - before < 1000, says


def test_only_a_nonce_is_signed(plant: Any) -> None:
    client = DeviceClient(Transport(plant.url))
    for text in ("", "0" * 31, "0" * 65, "Z" * 32, "A" * 32, "../" + "0" * 32):
        with pytest.raises(InvalidDocument, match="hex"):
            client.time(text)
    signed = dsse.verify(client.time(NONCE), PAYLOAD_TYPE, plant.controller.desired_keys, SignedTime)
    assert signed.nonce == NONCE and abs(signed.at - SystemClock().now()) < 60
    client.http.close()


def test_the_question_carries_no_credential() -> None:
    """A token minted by a clock that is ahead would be good for somebody later."""
    seen: list[Any] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        transport = Transport(f"http://127.0.0.1:{server.server_port}", credential=lambda: "secret")
        DeviceClient(transport).time(NONCE)
        transport.request("GET", "/")
        transport.close()
        server.shutdown()
        thread.join()
    assert [headers.get("Authorization") for headers in seen] == [None, "Bearer secret"]
