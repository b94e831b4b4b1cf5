"""A whole controller on loopback: real HTTP server, real broker, real signatures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from fastapi import FastAPI
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from controller.api.app import build
from controller.downloads import Downloads, Limits
from controller.identity import RENEWAL_GRACE
from controller.service import Controller, Settings
from edgeward.broker import EmbeddedBroker, free_port
from edgeward.client import ControllerClient
from edgeward.client.controller import DeviceClient
from edgeward.client.transport import Transport
from edgeward.clock import Clock, SystemClock
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link
from edgeward.object_store import S3Settings
from edgeward.storage import sha256_hex
from edgeward.trust import certificates, keys, tokens
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import API_VERSION, topics
from edgeward.wire.desired import ModelRef
from edgeward.wire.enrollment import EnrollRequest
from edgeward.wire.envelope import seal
from edgeward.wire.package import (
    Blob,
    Golden,
    GoldenVectors,
    Lineage,
    Manifest,
    TensorSpec,
    Variant,
    target_path,
)
from edgeward.wire.reports import Hold, Phase, Reported, SlotReport, Status
from edgeward.wire.resources import Resource, parse_resource

ONNX = b"\x08\x08\x12\x04test" + bytes(64)


def wait_until(condition: Callable[[], Any], timeout: float = 15.0) -> Any:
    """Poll until `condition` holds; its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not reached within {timeout} s"
        time.sleep(0.02)
    return value


def resource(kind: str, name: str, **spec: Any) -> Resource:
    document = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}
    return parse_resource(document)


class ReleaseTool:
    """Signs releases as a releaser would, with real TUF metadata."""

    def __init__(self) -> None:
        self.root_signer = CryptoSigner(keys.generate_key())
        self.targets_signer = CryptoSigner(keys.generate_key())
        self.targets = Targets(
            version=1, expires=datetime.now(UTC).replace(microsecond=0) + timedelta(days=365)
        )

    def root(self, online: dict[str, Any], **changes: Any) -> bytes:
        root = Root(version=1, expires=datetime.now(UTC).replace(microsecond=0) + timedelta(days=365))
        root.add_key(self.root_signer.public_key, "root")
        root.add_key(self.targets_signer.public_key, "targets")
        for keyid, key in online.items():
            for role in ("snapshot", "timestamp"):
                root.add_key(SSlibKey.from_dict(keyid, dict(key)), role)
        for name, value in changes.items():
            setattr(root, name, value)
        metadata = Metadata(root)
        metadata.sign(self.root_signer)
        return metadata.to_bytes()

    def signed_targets(self, signer: CryptoSigner | None = None) -> bytes:
        metadata = Metadata(self.targets)
        metadata.sign(signer or self.targets_signer)
        return metadata.to_bytes()

    def add(self, manifest: bytes, model: str, version: int) -> bytes:
        path = target_path(model, version)
        self.targets.targets[path] = TargetFile(len(manifest), {"sha256": sha256_hex(manifest)}, path)
        self.targets.version += 1
        return self.signed_targets()

    def init(self, client: ControllerClient) -> None:
        client.init_release_root(self.root(client.trust()["onlineKeys"]), self.signed_targets())


def make_package(
    folder: Path, model: str, version: int, onnx: bytes = ONNX, golden: bytes | None = None
) -> tuple[bytes, list[Path]]:
    """A manifest and its blob files."""
    if golden is None:
        golden = msgspec.msgpack.encode(GoldenVectors([], []))
    paths = []
    for data in (onnx + bytes([version]), golden):
        path = folder / sha256_hex(data)
        path.write_bytes(data)
        paths.append(path)
    blob = Blob(paths[0].name, paths[0].stat().st_size)
    tensor = TensorSpec("x", "float32", [-1, 1])
    manifest = Manifest(
        api_version=API_VERSION,
        model=model,
        version=version,
        created_at="2026-11-24T00:00:00Z",
        features=["a"],
        variants=[Variant("onnx-fp32", "onnx", blob, [tensor], [tensor])],
        golden=Golden(Blob(paths[1].name, paths[1].stat().st_size), 1e-5, 1e-4),
        lineage=Lineage("test", {}, "none", "0" * 64, 1, "all", {}),
    )
    return msgspec.json.encode(manifest, order="deterministic"), paths


class Device:
    """An enrolled device's identity and a voice; what it says is up to the test."""

    def __init__(self, url: str, name: DeviceName, key: keys.PrivateKey, response: Any) -> None:
        self.name = name
        self.key = key
        self.response = response
        der = certificates.to_der(certificates.load_certificate_pem(response.certificate))
        self.identity = SigningIdentity(key, der)
        self.http = DeviceClient(Transport(url, credential=lambda: tokens.mint(self.identity, time.time())))
        self.n = 0

    def birth(self, boot: int = 1, state: str = "online") -> tuple[str, bytes]:
        self.n += 1
        message = Status(boot=boot, n=self.n, at=time.time(), state=state, agent_version="test")
        topic = topics.status(self.name)
        return topic, seal(message, topic, self.identity, with_certificate=True)

    def reported(
        self,
        generation: int,
        slots: dict[str, SlotReport],
        quarantined: list[str] | None = None,
        holds: list[Hold] | None = None,
    ) -> tuple[str, bytes]:
        self.n += 1
        message = Reported(1, self.n, time.time(), generation, slots, [], quarantined or [], holds or [])
        topic = topics.reported(self.name)
        return topic, seal(message, topic, self.identity)

    def runs(self, model: ModelRef, generation: int = 99) -> tuple[str, bytes]:
        return self.reported(generation, {"default": SlotReport(Phase.ACTIVE, target=model, running=model)})

    def close(self) -> None:
        self.http.http.close()


class Plant:
    """A running controller and what a test does with it."""

    def __init__(
        self,
        folder: Path,
        controller: Controller,
        application: FastAPI,
        url: str,
        broker: EmbeddedBroker | None,
    ) -> None:
        self.folder = folder
        self.controller = controller
        self.application = application
        self.url = url
        self.broker = broker
        self.token = controller.ensure_admin_token().read_text().strip()
        self.client = ControllerClient(url, self.token)
        self.releases = ReleaseTool()
        self._devices: list[Device] = []

    @property
    def slots(self) -> Downloads:
        return self.application.state.downloads  # type: ignore[no-any-return]

    def begin(self) -> None:
        self.releases.init(self.client)
        mqtt = {"topic": "t"}
        self.client.apply(
            [
                resource("Site", "north"),
                resource("Stream", "s1", source={"mqtt": mqtt}, features=["a"]),
                resource("Fleet", "line", matchLabels={"site": "north"}, streams=["s1"]),
            ]
        )

    def enroll(self, device: str, **wish: Any) -> Device:
        token = self.client.create_enrollment_token(["north"])
        key = keys.generate_key()
        response = self.client.enroll(
            EnrollRequest(token, device, certificates.make_csr(key, device), **wish)
        )
        made = Device(self.url, DeviceName("north", device), key, response)
        self._devices.append(made)
        return made

    def publish(self, version: int, model: str = "m") -> ModelRef:
        manifest, paths = make_package(self.folder, model, version)
        for path in paths:
            self.client.upload_artifact(path)
        answer = self.client.publish_release(self.releases.add(manifest, model, version), manifest)
        return ModelRef(model, version, answer["digest"])

    def device(self, name: str) -> dict[str, Any]:
        return self.client.get("Device", name)

    @contextmanager
    def stranger(self, **options: Any) -> Iterator[Link]:
        """A client of the broker without any key."""
        assert self.broker is not None
        link = Link(Broker(self.broker.url), "stranger", **options)
        link.start()
        wait_until(lambda: link.connected)
        try:
            yield link
        finally:
            link.stop()

    def close(self) -> None:
        for device in self._devices:
            device.close()
        self.client.close()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def running(
    folder: Path,
    *,
    broker: EmbeddedBroker | None = None,
    database: str = "",
    downloads: Limits | None = None,
    clock: Clock | None = None,
    renewal_grace: float = RENEWAL_GRACE,
    s3: S3Settings | None = None,
    **options: Any,
) -> Iterator[Plant]:
    """`options` go to uvicorn; with a certificate it serves TLS, which `plant.client` does not speak then."""
    address = broker.url if broker else f"mqtt://127.0.0.1:{free_port()}"
    settings = Settings(
        folder / "data",
        address,
        database,
        downloads=downloads or Limits(),
        renewal_grace=renewal_grace,
        s3=s3,
    )
    controller = Controller(settings, clock or SystemClock())
    port = free_port()
    application = build(controller)
    config = uvicorn.Config(
        application,
        port=port,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=2,
        **options,
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    if broker is None:
        controller.reconciler.start()  # without the link, which would sleep between attempts
    else:
        controller.start()
    plant = Plant(folder, controller, application, f"http://127.0.0.1:{port}", broker)
    try:
        yield plant
    finally:
        plant.close()
        controller.stopping.set()
        server.should_exit = True
        thread.join()
        controller.stop()


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    """Without a broker; devices speak HTTP."""
    with running(tmp_path) as made:
        yield made


@pytest.fixture
def plant_with_broker(tmp_path: Path) -> Iterator[Plant]:
    with EmbeddedBroker(tmp_path / "broker") as broker, running(tmp_path, broker=broker) as made:
        wait_until(lambda: made.controller.link.connected)
        yield made


@pytest.fixture
def until() -> Callable[..., Any]:
    return wait_until


@pytest.fixture
def start() -> Any:
    """`running`, for tests that start and stop a controller themselves."""
    return running


@pytest.fixture
def make() -> Callable[..., Resource]:
    """`resource(kind, name, **spec)`."""
    return resource


@pytest.fixture
def package() -> Any:
    return make_package


@pytest.fixture
def rollout() -> Callable[..., Resource]:
    def build_one(name: str, version: int, **more: Any) -> Resource:
        return resource("Rollout", name, fleet="line", model="m", version=version, **more)

    return build_one
