"""From the controller over a real S3 server to the real agent: redirects, cuts, wrong bytes, what leaks."""

from __future__ import annotations

import base64
import json
import logging
import random
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest

from agent import delta
from agent.fetch import BlobStore
from controller.downloads import Limits as Cap
from edgeward.client.bundle import export
from edgeward.client.transport import Transport
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import DigestMismatch, EdgewardError, NotFound, Unavailable
from edgeward.object_store import S3Settings, settings_from
from edgeward.storage import sha256_hex
from edgeward.wire.package import Blob
from tests.servers.s3 import SECRET_KEY, S3Server

CONTENT = random.Random(5).randbytes(3 << 20)
DIGEST, SIZE = sha256_hex(CONTENT), len(CONTENT)
CLOCK = SystemClock()


class Link:
    """A TCP link to the S3 server, on which a test can cut each connection after so many bytes."""

    def __init__(self, endpoint: str) -> None:
        self._port = int(endpoint.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: Callable[[], int | None] = lambda: None
        self.seen: list[bytes] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            for work in ((client, server, None), (server, client, self.cut_after())):
                thread = threading.Thread(target=self._carry, args=work, daemon=True)
                thread.start()
                self._threads.append(thread)

    def _carry(self, source: socket.socket, target: socket.socket, left: int | None) -> None:
        try:
            while data := source.recv(16384):
                if source.getsockname()[1] == self._listener.getsockname()[1]:
                    self.seen.append(data)
                part = data if left is None else data[:left]
                target.sendall(part)
                if left is not None:
                    left -= len(part)
                    if left == 0:
                        target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        break
        except OSError:
            pass
        for end in (target, source):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()


@pytest.fixture
def link(s3_server: S3Server) -> Iterator[Link]:
    made = Link(s3_server.endpoint)
    yield made
    made.close()


@pytest.fixture
def settings(link: Link, s3_server: S3Server, s3_bucket: str) -> S3Settings:
    environment = s3_server.environment | {"AWS_ENDPOINT_URL_S3": link.endpoint}
    return settings_from(f"s3://{s3_bucket}/models", environment)


@pytest.fixture
def plant(start: Any, tmp_path: Path, settings: S3Settings) -> Iterator[Any]:
    with start(tmp_path, s3=settings) as made:
        yield made


def upload(plant: Any, data: bytes = CONTENT) -> str:
    path: Path = plant.folder / "blob"
    path.write_bytes(data)
    digest: str = plant.client.upload_artifact(path)
    return digest


def ask(plant: Any, digest: str, method: str = "GET", **headers: str) -> httpx.Response:
    headers.setdefault("Authorization", f"Bearer {plant.token}")
    return httpx.request(method, f"{plant.url}/artifacts/{digest}", headers=headers, trust_env=False)


def held(settings: S3Settings, digest: str) -> str:
    return f"{settings.prefix}{digest[:2]}/{digest}"


# the controller


def test_a_download_is_sent_to_s3_for_a_short_time_and_only_there(plant: Any) -> None:
    digest = upload(plant)
    plant.begin()
    device = plant.enroll("d1")
    for token in (plant.token, device.http.http._credential()):
        answer = ask(plant, digest, Authorization=f"Bearer {token}")
        assert answer.status_code == 307 and answer.content == b""
        assert answer.headers["cache-control"] == "no-store"
        location = answer.headers["location"]
        assert "X-Amz-Expires=900" in location and token not in location and SECRET_KEY not in location
        assert httpx.get(location, trust_env=False).content == CONTENT
        assert httpx.get(location.partition("?")[0], trust_env=False).status_code == 403
        other = location.replace(digest, sha256_hex(b"other"))
        assert httpx.get(other, trust_env=False).status_code == 403
        assert httpx.put(location, content=b"x", trust_env=False).status_code == 403
    head = ask(plant, digest, "HEAD")
    assert (head.status_code, head.headers["content-length"]) == (200, str(SIZE))
    assert head.headers["etag"] == f'"{digest}"' and "location" not in head.headers
    missing = ask(plant, sha256_hex(b"none"))
    assert missing.status_code == 404 and "location" not in missing.headers
    for wrong in ("", "Bearer x", "Bearer a.b.c"):
        refused = ask(plant, digest, Authorization=wrong)
        assert refused.status_code == 401 and "location" not in refused.headers


def test_an_object_that_is_gone_is_uploaded_again(
    plant: Any, s3_server: S3Server, s3_bucket: str, settings: S3Settings
) -> None:
    digest = upload(plant)
    obstore.delete(s3_server.store(s3_bucket), held(settings, digest))
    assert ask(plant, digest, "HEAD").status_code == 404
    assert upload(plant) == digest
    assert httpx.get(ask(plant, digest).headers["location"], trust_env=False).content == CONTENT


def test_downloads_that_run_at_s3_are_capped_for_as_long_as_they_should_take(
    start: Any, tmp_path: Path, settings: S3Settings
) -> None:
    clock = ManualClock(CLOCK.now())
    cap = Cap(downloads=1, per_holder=1, reserved_rate=SIZE / 10)
    with start(tmp_path, s3=settings, downloads=cap, clock=clock) as plant:
        plant.begin()
        digest = upload(plant)
        one, two = plant.enroll("d1"), plant.enroll("d2")

        def wanted(device: Any) -> httpx.Response:
            token = device.http.http._credential()
            return ask(plant, digest, Authorization=f"Bearer {token}")

        assert wanted(one).status_code == 307
        busy = wanted(two)
        assert busy.status_code == 503 and int(busy.headers["retry-after"]) >= 1
        assert "location" not in busy.headers
        assert wanted(one).status_code == 307, "who lost its connection may ask again"
        clock.advance(9.0)
        assert wanted(two).status_code == 503
        clock.advance(1.1)
        assert wanted(two).status_code == 307
        assert ask(plant, digest, "HEAD").status_code == 200, "needs no slot"


def test_releases_deltas_and_bundles_work_on_what_lies_in_s3(
    plant: Any, tmp_path: Path, rollout: Any, until: Any
) -> None:
    plant.begin()
    ref = plant.publish(1)
    base = bytearray(CONTENT)
    old = upload(plant, bytes(base))
    base[5000:5100] = bytes(100)
    new = upload(plant, bytes(base))
    for copy in (tmp_path / "data" / "artifacts-s3" / "copies").iterdir():
        copy.unlink()  # as if they had been crowded out
    device = plant.enroll("d1")
    blobs = BlobStore(tmp_path / "agent" / "blobs")
    transport = device.http.http
    blobs.fetch(transport, old, SIZE, CLOCK)
    came = delta.fetch(blobs, transport, Blob(new, SIZE), [Blob(old, SIZE)], CLOCK)
    assert came is not None and came < 2000
    assert blobs.read(new, SIZE) == base
    plant.client.apply([rollout("r1", 1)])
    until(lambda: _wishes_for(plant, ref), 60)
    exported = export(plant.client, ["d1"], tmp_path / "bundle")
    assert [(model.ref, model.blobs) for model in exported.models] == [(ref, 2)]


def _wishes_for(plant: Any, ref: Any) -> bool:
    try:
        return ref.digest.encode() in base64.b64decode(json.loads(plant.client.desired("d1"))["payload"])
    except EdgewardError:
        return False


def test_a_folder_is_moved_into_a_bucket_by_copying_it(
    start: Any, tmp_path: Path, settings: S3Settings, s3_server: S3Server, s3_bucket: str
) -> None:
    with start(tmp_path) as plant:
        plant.begin()
        ref = plant.publish(1)
    shutil.copytree(tmp_path / "data", tmp_path / "too-early" / "data")
    early = start(tmp_path / "too-early", s3=settings)
    with pytest.raises(NotFound, match="is not among the artifacts"), early:
        pass
    folder = tmp_path / "data" / "artifacts"
    for path in folder.glob("??/*"):
        key = f"{settings.prefix}{path.relative_to(folder)}"
        obstore.put(s3_server.store(s3_bucket), key, path.read_bytes())
    with start(tmp_path, s3=settings) as plant:
        assert sha256_hex(b"".join(plant.client.artifact(ref.digest))) == ref.digest


# the agent


def test_after_each_cut_the_next_try_goes_on_with_another_signature(
    plant: Any, link: Link, tmp_path: Path
) -> None:
    digest = upload(plant)
    transport = Transport(plant.url, credential=lambda: plant.token)
    blobs, chance, tries = BlobStore(tmp_path / "blobs"), random.Random(11), 0
    link.cut_after = lambda: chance.randint(1, SIZE // 10)
    link.seen.clear()
    while True:
        tries += 1
        try:
            path = blobs.fetch(transport, digest, SIZE, CLOCK)
            break
        except Unavailable as error:
            assert "X-Amz" not in str(error)
    transport.close()
    assert path.read_bytes() == CONTENT and tries > 10
    parts = [request for request in link.seen if b"\r\nRange: bytes=" in request]
    begins = [int(request.partition(b"\r\nRange: bytes=")[2].partition(b"-")[0]) for request in parts]
    assert len(begins) > 10 and begins == sorted(begins)
    assert not any(b"uthorization" in request for request in parts)
    assert not any(plant.token.encode() in request for request in link.seen)


@pytest.mark.parametrize("wrong", ["flipped", "longer", "shorter", "other"])
def test_wrong_bytes_in_the_bucket_are_refused_and_the_right_ones_taken_later(
    plant: Any, s3_server: S3Server, s3_bucket: str, settings: S3Settings, tmp_path: Path, wrong: str
) -> None:
    digest, bucket = upload(plant), s3_server.store(s3_bucket)
    bodies = {
        "flipped": CONTENT[:999] + bytes([CONTENT[999] ^ 1]) + CONTENT[1000:],
        "longer": CONTENT + b"x",
        "shorter": CONTENT[:-1],
        "other": b"something else",
    }
    obstore.put(bucket, held(settings, digest), bodies[wrong])
    transport, blobs = Transport(plant.url, credential=lambda: plant.token), BlobStore(tmp_path / "blobs")
    with pytest.raises((DigestMismatch, Unavailable)):
        blobs.fetch(transport, digest, SIZE, CLOCK)
    assert not blobs.path(digest).exists()
    obstore.put(bucket, held(settings, digest), CONTENT)
    while not blobs.path(digest).exists():
        with suppress(DigestMismatch):  # what the wrong object had left: it begins anew
            blobs.fetch(transport, digest, SIZE, CLOCK)
    assert blobs.read(digest, SIZE) == CONTENT
    transport.close()


def test_an_object_that_changes_in_the_middle_is_never_put_together(
    plant: Any, link: Link, s3_server: S3Server, s3_bucket: str, settings: S3Settings, tmp_path: Path
) -> None:
    digest, bucket = upload(plant), s3_server.store(s3_bucket)
    transport, blobs = Transport(plant.url, credential=lambda: plant.token), BlobStore(tmp_path / "blobs")
    obstore.put(bucket, held(settings, digest), bytes(SIZE))
    link.cut_after = lambda: SIZE // 2
    with pytest.raises(Unavailable):
        blobs.fetch(transport, digest, SIZE, CLOCK)
    link.cut_after = lambda: None
    obstore.put(bucket, held(settings, digest), CONTENT)  # its entity tag changes with it
    with pytest.raises(DigestMismatch):
        blobs.fetch(transport, digest, SIZE, CLOCK)
    assert blobs.fetch(transport, digest, SIZE, CLOCK).read_bytes() == CONTENT
    transport.close()


def test_no_signature_and_no_key_stands_in_any_log(plant: Any, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    digest = upload(plant)
    transport, blobs = Transport(plant.url, credential=lambda: plant.token), BlobStore(tmp_path / "blobs")
    blobs.fetch(transport, digest, SIZE, CLOCK)
    assert b"".join(plant.client.artifact(digest)) == CONTENT
    transport.close()
    assert "receive_response_headers" in caplog.text, "the libraries have logged"
    for signed in ("X-Amz-Signature", "X-Amz-Credential", "X-Amz-Date"):
        assert signed not in caplog.text
    assert SECRET_KEY not in caplog.text
