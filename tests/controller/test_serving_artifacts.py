"""The artifact endpoint on real sockets: bytes, ranges, the cap, slow readers, and all else goes on meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from starlette.routing import Mount

from controller.api import connection
from controller.downloads import Limits
from edgeward.errors import Unavailable
from edgeward.trust import certificates, keys, tokens

#: More than the buffers of a connection take, so that a reader who does not read holds the sender up.
LARGE = os.urandom(1 << 20) * 24
SMALL = bytes(range(256)) * 40

#: A reader who takes nothing is cut off at the second window's end.
DRIP = Limits(minimum_rate=1e5, window=0.5)

Start = Callable[..., AbstractContextManager[Any]]
SERVERS = [("httptools", "uvloop"), ("httptools", "asyncio"), ("h11", "uvloop"), ("h11", "asyncio")]


def upload(plant: Any, data: bytes) -> str:
    path: Path = plant.folder / "blob"
    path.write_bytes(data)
    digest: str = plant.client.upload_artifact(path)
    return digest


@pytest.fixture
def sendfiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every size that the real sendfile(2) reported."""
    sent: list[int] = []

    def spy(out: int, source: int, offset: int, count: int) -> int:
        size = os_sendfile(out, source, offset, count)
        sent.append(size)
        return size

    os_sendfile = os.sendfile
    monkeypatch.setattr(connection.os, "sendfile", spy)
    return sent


class Reader:
    """A device's connection that asks for an artifact and reads as little as it likes."""

    def __init__(self, plant: Any, digest: str, token: str, headers: str = "", path: str = "") -> None:
        self.socket = socket.create_connection(("127.0.0.1", int(plant.url.rpartition(":")[2])))
        self.socket.settimeout(60)
        self.token = token
        self.ask(path or f"/artifacts/{digest}", headers)

    def ask(self, path: str, headers: str = "") -> None:
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.token}\r\n{headers}\r\n"
        self.socket.sendall(head.encode())

    def head(self) -> bytes:
        """Up to the blank line, not one byte of the body."""
        got = b""
        while not got.endswith(b"\r\n\r\n"):
            byte = self.socket.recv(1)
            assert byte, got
            got += byte
        return got

    def read(self, size: int) -> str:
        """Exactly `size` bytes; their SHA-256."""
        found = hashlib.sha256()
        while size:
            data = self.socket.recv(min(size, 1 << 20))
            assert data, "cut off"
            found.update(data)
            size -= len(data)
        return found.hexdigest()

    def until_cut(self) -> int:
        """Read to the end; the number of bytes."""
        size = 0
        try:
            while data := self.socket.recv(1 << 20):
                size += len(data)
        except ConnectionError:
            pass
        return size

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """As a crashed host would: RST, not FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def mint(device: Any) -> str:
    return tokens.mint(device.identity, time.time())


def renewal(device: Any) -> str:
    return certificates.make_csr(device.key, device.name.device)


def held(plant: Any, digest: str) -> int:
    """Descriptors of the artifact's file and of connections to the server, which is in this process."""
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += path.readlink().name.startswith((digest, "socket:"))
    return count


# the bytes


@pytest.mark.parametrize(("http", "loop"), SERVERS)
def test_whole_files_and_parts_arrive_by_sendfile(
    start: Start, tmp_path: Path, sendfiles: list[int], http: str, loop: str
) -> None:
    with start(tmp_path, http=http, loop=loop) as plant:
        digest = upload(plant, LARGE)
        url = f"{plant.url}/artifacts/{digest}"
        # One connection for all: each answer must leave it in order for the next.
        with httpx.Client(headers={"Authorization": f"Bearer {plant.token}"}, trust_env=False) as client:
            whole = client.get(url)
            assert whole.status_code == 200 and hashlib.sha256(whole.content).hexdigest() == digest
            assert whole.headers["etag"] == f'"{digest}"' and whole.headers["accept-ranges"] == "bytes"
            part = client.get(url, headers={"Range": "bytes=1000-2000999"})
            assert (part.status_code, part.content) == (206, LARGE[1000:2001000])
            assert part.headers["content-range"] == f"bytes 1000-2000999/{len(LARGE)}"
            end = client.get(url, headers={"Range": "bytes=-5", "If-Range": f'"{digest}"'})
            assert (end.status_code, end.content) == (206, LARGE[-5:])
            other = client.get(url, headers={"Range": "bytes=-5", "If-Range": '"other"'})
            assert (other.status_code, len(other.content)) == (200, len(LARGE))
            behind = client.get(url, headers={"Range": f"bytes={len(LARGE)}-"})
            assert (behind.status_code, behind.headers["content-range"]) == (416, f"bytes */{len(LARGE)}")
            head = client.head(url, headers={"Range": "bytes=-5"})
            assert (head.status_code, head.headers["content-length"]) == (200, str(len(LARGE)))
            assert client.get(f"{plant.url}/healthz").status_code == 200
        assert sum(sendfiles) == 2 * len(LARGE) + 2_000_000 + 5


@pytest.mark.parametrize(("http", "loop"), SERVERS)
def test_pipelined_requests_get_their_answers_in_order(
    start: Start, tmp_path: Path, http: str, loop: str
) -> None:
    with start(tmp_path, http=http, loop=loop) as plant, ExitStack() as stack:
        digest = upload(plant, SMALL)
        reader = Reader(plant, digest, plant.token, "Range: bytes=0-99\r\n")
        stack.callback(reader.close)
        reader.ask(f"/artifacts/{digest}", "Range: bytes=100-299\r\nConnection: close\r\n")
        got = b""
        while data := reader.socket.recv(65536):
            got += data
        first, second = got.split(b"HTTP/1.1 206")[1:]
        assert first.endswith(SMALL[:100]) and second.endswith(SMALL[100:300])


@pytest.mark.parametrize(("http", "loop"), SERVERS)
def test_no_byte_of_a_file_overtakes_what_was_sent_before_it(
    start: Start, tmp_path: Path, http: str, loop: str
) -> None:
    with start(tmp_path, http=http, loop=loop) as plant, ExitStack() as stack:
        digest = upload(plant, SMALL)
        file = stack.enter_context(plant.controller.artifacts.path(digest).open("rb"))
        filled: queue.Queue[tuple[int, int]] = queue.Queue()
        read = threading.Event()

        async def mixed(scope: Any, receive: Any, send: Any) -> None:
            length = str(len(LARGE) + len(SMALL)).encode()
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]}
            )
            found: connection.Connection = scope["extensions"][connection.EXTENSION]
            at = left = 0
            while not left:  # until the socket is full and a piece waits in the transport's buffer
                await send({"type": "http.response.body", "body": LARGE[at : at + 50_000], "more_body": True})
                at += 50_000
                for _ in range(3):
                    await asyncio.sleep(0)
                left = found._transport.get_write_buffer_size()
            threads = plant.application.state.download_threads
            work = asyncio.create_task(found.send_file(threads, file.fileno(), 0, len(SMALL), lambda _: None))
            await asyncio.sleep(0)
            filled.put((at, left))
            read.wait(60)  # the loop stands still: whoever does not wait for it would be first now
            await work
            await send({"type": "http.response.body", "body": LARGE[at:], "more_body": False})

        plant.application.router.routes.insert(0, Mount("/mixed", mixed))
        reader = Reader(plant, digest, plant.token, path="/mixed/")
        stack.callback(reader.close)
        stack.callback(read.set)
        at, left = filled.get(timeout=60)
        reader.head()
        first = reader.read(at - left)
        assert first == hashlib.sha256(LARGE[: at - left]).hexdigest()
        read.set()
        assert reader.read(left) == hashlib.sha256(LARGE[at - left : at]).hexdigest()
        assert reader.read(len(SMALL)) == digest
        assert reader.read(len(LARGE) - at) == hashlib.sha256(LARGE[at:]).hexdigest()


def test_an_empty_artifact_is_an_answer(plant: Any) -> None:
    digest = upload(plant, b"")
    got = httpx.get(
        f"{plant.url}/artifacts/{digest}", headers={"Authorization": f"Bearer {plant.token}"}, trust_env=False
    )
    assert (got.status_code, got.content, got.headers["content-length"]) == (200, b"", "0")


def certificate(folder: Path) -> tuple[Path, Path]:
    key, name = keys.generate_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    paths = folder / "tls.crt", folder / "tls.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths


@pytest.mark.parametrize(("http", "loop"), SERVERS)
def test_over_tls_it_goes_in_pieces_with_the_same_limits(
    start: Start, tmp_path: Path, sendfiles: list[int], until: Any, caplog: Any, http: str, loop: str
) -> None:
    crt, key = certificate(tmp_path)
    tls = {"ssl_certfile": crt, "ssl_keyfile": key}
    with start(tmp_path, http=http, loop=loop, downloads=DRIP, **tls) as plant:
        digest = plant.controller.artifacts.add(LARGE)
        url = plant.url.replace("http://127.0.0.1", "https://localhost") + f"/artifacts/{digest}"
        headers = {"Authorization": f"Bearer {plant.token}"}
        context = ssl.create_default_context(cafile=str(crt))
        with httpx.Client(headers=headers, trust_env=False, verify=context) as client:
            whole = client.get(url)
            assert hashlib.sha256(whole.content).hexdigest() == digest
            part = client.get(url, headers={"Range": "bytes=5-9"})
            assert (part.status_code, part.content) == (206, LARGE[5:10])
            with client.stream("GET", url) as drip:
                until(lambda: "its reader took" in caplog.text, 60)
                with pytest.raises(httpx.TransportError):
                    drip.read()
        assert sendfiles == [] and "Traceback" not in caplog.text


# the cap


def refused(device: Any, digest: str) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        device.http.http.request("GET", f"/artifacts/{digest}")
    return caught.value


def test_above_the_cap_a_device_is_told_when_to_come_again(start: Start, tmp_path: Path) -> None:
    with start(tmp_path, downloads=Limits(downloads=2, per_holder=1)) as plant, ExitStack() as stack:
        digest = upload(plant, LARGE)
        plant.begin()
        one, two, three = (plant.enroll(name) for name in ("d1", "d2", "d3"))
        first, second = (Reader(plant, digest, mint(device)) for device in (one, two))
        stack.callback(first.close)
        stack.callback(second.close)
        assert b" 200 " in first.head() and b" 200 " in second.head()
        full = refused(three, digest)
        assert "2 downloads are running" in full.message and full.retry_after is not None
        assert full.retry_after >= 1
        again = refused(one, digest)
        assert "device north/d1 has 1" in again.message and again.retry_after is not None
        assert three.http.http.request("HEAD", f"/artifacts/{digest}").status_code == 200, "needs no slot"
        first.read(len(LARGE))
        got = three.http.http.request("GET", f"/artifacts/{digest}")
        assert hashlib.sha256(got.content).hexdigest() == digest, "a slot was given back"
        assert second.read(len(LARGE)) == digest, "whoever was served before is not disturbed"


def test_the_control_api_answers_while_every_slot_has_a_reader_who_does_not_read(
    start: Start, tmp_path: Path
) -> None:
    many = 48  # more than the threads in which the API's handlers run
    with start(tmp_path, downloads=Limits(downloads=many, per_holder=many)) as plant, ExitStack() as stack:
        digest = upload(plant, LARGE)
        plant.begin()
        device = plant.enroll("d1")
        for _ in range(many):
            reader = Reader(plant, digest, plant.token)
            stack.callback(reader.close)
            assert b" 200 " in reader.head()
        assert f"{many} downloads are running" in refused(device, digest).message
        assert plant.client.health()["status"] == "ok"
        assert plant.client.find("Site") and device.http.desired(newer_than=9, wait=0.0) is None
        assert device.http.http.request("POST", "/device/v1/renew", json={"csr": renewal(device)}).content


# readers who do not read


@pytest.mark.parametrize(("http", "loop"), SERVERS)
@pytest.mark.parametrize(
    ("limits", "why"),
    [
        (DRIP, "its reader took"),
        (Limits(minimum_rate=0, window=0.5, deadline=1.0), "not finished within 1 s"),
    ],
)
def test_a_slot_is_not_held_for_ever(
    start: Start, tmp_path: Path, until: Any, caplog: Any, limits: Limits, why: str, http: str, loop: str
) -> None:
    with start(tmp_path, http=http, loop=loop, downloads=limits) as plant, ExitStack() as stack:
        digest = upload(plant, LARGE)
        reader = Reader(plant, digest, plant.token)
        stack.callback(reader.close)
        reader.head()
        until(lambda: plant.slots.open == 0, 60)
        assert reader.until_cut() < len(LARGE)
        assert why in caplog.text and "person admin" in caplog.text
        assert "Traceback" not in caplog.text and "ERROR" not in caplog.text
        assert plant.client.health()["status"] == "ok"


def test_only_what_the_reader_has_taken_counts(
    start: Start, tmp_path: Path, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[connection.Connection] = []
    real = connection.Connection.__init__
    monkeypatch.setattr(
        connection.Connection, "__init__", lambda self, *more: (made.append(self), real(self, *more))[1]
    )
    with start(tmp_path) as plant, ExitStack() as stack:
        digest = upload(plant, LARGE)
        made.clear()
        reader = Reader(plant, digest, plant.token)
        stack.callback(reader.close)
        reader.head()
        until(
            lambda: made[0].unread() > 100_000
        )  # what the sender's buffer swallowed is not on the other side
        assert reader.read(len(LARGE)) == digest
        until(lambda: made[0].unread() == 0)


@pytest.mark.parametrize(("http", "loop"), SERVERS)
def test_readers_who_go_away_leave_nothing_behind(
    start: Start, tmp_path: Path, until: Any, caplog: Any, http: str, loop: str
) -> None:
    with start(tmp_path, http=http, loop=loop, downloads=Limits(per_holder=8)) as plant:
        digest = upload(plant, LARGE)
        plant.client.health()
        before = held(plant, digest)
        for how in (Reader.close, Reader.reset):
            readers = [Reader(plant, digest, plant.token) for _ in range(4)]
            for reader in readers:
                reader.head()
                how(reader)
        until(lambda: plant.slots.open == 0)
        until(lambda: held(plant, digest) <= before)
        assert "Traceback" not in caplog.text and "ERROR" not in caplog.text


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_the_server_ends_in_the_middle_of_a_download(
    start: Start, tmp_path: Path, until: Any, loop: str
) -> None:
    with ExitStack() as stack:
        with start(tmp_path, loop=loop) as plant:
            digest = upload(plant, LARGE)
            reader = Reader(plant, digest, plant.token)
            stack.callback(reader.close)
            reader.head()
        assert reader.until_cut() < len(LARGE)
        assert plant.slots.open == 0


def test_a_file_that_is_cut_on_disk_cuts_the_answer(
    start: Start, tmp_path: Path, until: Any, caplog: Any
) -> None:
    with start(tmp_path) as plant, ExitStack() as stack:
        digest = upload(plant, LARGE)
        reader = Reader(plant, digest, plant.token)
        stack.callback(reader.close)
        reader.head()
        os.truncate(plant.controller.artifacts.path(digest), 1 << 20)
        assert reader.until_cut() < len(LARGE)
        until(lambda: "the file is shorter than it was" in caplog.text)
        assert plant.client.health()["status"] == "ok"
