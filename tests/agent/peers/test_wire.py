"""What the server of blobs answers, byte by byte."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agent.peers.credentials import Credentials
from agent.peers.server import Server
from agent.peers.settings import Address, parse_address
from edgeward.errors import UsageError
from edgeward.storage import sha256_hex
from tests.agent.peers.conftest import Site

CONTENT = bytes(range(256)) * 10
DIGEST = sha256_hex(CONTENT)


def asked(
    address: Address, digest: str, credentials: Credentials, method: str = "GET", *fields: str
) -> tuple[int | None, dict[str, str], bytes]:
    """Status, fields and body; None for a connection that brings no answer."""
    lines = "".join(f"{field}\r\n" for field in fields)
    return raw(address, f"{method} /blobs/{digest} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode(), credentials)


def raw(
    address: Address, request: bytes, credentials: Credentials
) -> tuple[int | None, dict[str, str], bytes]:
    answer = b""
    try:
        with (
            socket.create_connection(address) as plain,
            credentials.context(server=False).wrap_socket(plain) as connection,
        ):
            connection.sendall(request)
            while part := connection.recv(65536):
                answer += part
    except OSError:
        if not answer:
            return None, {}, b""
    if not answer:
        return None, {}, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *fields = head.decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, v in (f.split(": ", 1) for f in fields)}, body


@pytest.mark.parametrize(
    ("asked_range", "status", "begin", "end"),
    [
        ("", 200, 0, 2560),
        ("bytes=0-", 206, 0, 2560),
        ("bytes=100-", 206, 100, 2560),
        ("bytes=100-199", 206, 100, 200),
        ("bytes=100-99999", 206, 100, 2560),
        ("bytes=2559-2559", 206, 2559, 2560),
        ("bytes=9-3", 200, 0, 2560),
        ("bytes=-5", 200, 0, 2560),
        ("bytes=1-2,4-5", 200, 0, 2560),
        ("bytes=2560-", 416, 0, 0),
        ("bytes=999999999999999-", 416, 0, 0),
        ("bytes=" + "9" * 100 + "-", 200, 0, 2560),
    ],
)
def test_a_whole_blob_or_one_range_of_it(
    site: Site, tmp_path: Path, asked_range: str, status: int, begin: int, end: int
) -> None:
    here = site.agent("here", site.controller())
    here.put(CONTENT)
    own = site.authority.credentials(tmp_path / "own", "own")
    fields = [f"Range: {asked_range}"] if asked_range else []
    got, answered, body = asked(here.server.address, DIGEST, own, "GET", *fields)
    assert (got, body) == (status, CONTENT[begin:end])
    assert answered["content-length"] == str(end - begin)
    if status == 206:
        assert answered["content-range"] == f"bytes {begin}-{end - 1}/2560"
    head = asked(here.server.address, DIGEST, own, "HEAD", *fields)
    assert head[0] == status and head[2] == b"" and head[1] == answered


def test_nothing_is_served_but_whole_blobs_that_may_be(site: Site, tmp_path: Path) -> None:
    quarantined = sha256_hex(b"quarantined")
    here = site.agent("here", site.controller(), may_serve=lambda digest: digest != quarantined)
    own = site.authority.credentials(tmp_path / "own", "own")
    here.blobs.path(quarantined).write_bytes(b"quarantined")
    partial, from_peer = sha256_hex(b"partial"), sha256_hex(b"from a peer")
    here.blobs.path(partial).with_suffix(".part").write_bytes(b"part")
    here.blobs.path(from_peer).with_suffix(".peer").write_bytes(b"from")
    linked = sha256_hex(b"linked")
    here.blobs.path(linked).symlink_to(here.blobs.folder.parent / "identity.key")
    for digest in (quarantined, partial, from_peer, linked, sha256_hex(b"never here")):
        assert asked(here.server.address, digest, own)[0] == 404
    with here.peers._among(here.peers._coming, partial):
        status, fields, body = asked(here.server.address, partial, own)
        assert (status, fields["edgeward-received"], body) == (503, "4", b"")
    assert asked(here.server.address, partial, own)[0] == 404
    assert "edgeward-wanted" not in asked(here.server.address, partial, own)[1]
    with here.peers._among(here.peers._wanted, partial):
        status, fields, _ = asked(here.server.address, partial, own)
        assert (status, fields["edgeward-wanted"]) == (404, "1")


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET /blobs/../identity.key HTTP/1.1",
        b"GET /blobs/" + DIGEST.encode() + b".part HTTP/1.1",
        b"GET /blobs/" + DIGEST.upper().encode() + b" HTTP/1.1",
        b"GET /blobs/%2e%2e/identity.key HTTP/1.1",
        b"GET http://x/blobs/" + DIGEST.encode() + b" HTTP/1.1",
        b"GET //blobs/" + DIGEST.encode() + b" HTTP/1.1",
        b"POST /blobs/" + DIGEST.encode() + b" HTTP/1.1",
        b"GET /blobs/" + DIGEST.encode() + b"?x HTTP/1.1",
        b"GET / HTTP/1.1",
        b"\x00\xff",
    ],
)
def test_a_request_for_anything_else_is_a_bad_one(site: Site, tmp_path: Path, request_line: bytes) -> None:
    here = site.agent("here", site.controller())
    here.put(CONTENT)
    own = site.authority.credentials(tmp_path / "own", "own")
    status, _, body = raw(here.server.address, request_line + b"\r\n\r\n", own)
    assert (status, body) == (400, b"")


def test_an_address_that_is_taken_is_said_at_once(site: Site) -> None:
    here = site.agent("here", site.controller())
    with pytest.raises(UsageError, match="Address already in use") as caught:
        Server(here.server.address, here.blobs, here.credentials, here.clock)
    assert "--peers-listen" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.7:8472", Address("10.0.0.7", 8472)),
        ("[fd00::7]:8472", Address("fd00::7", 8472)),
        ("peers.edgeward.svc:1", Address("peers.edgeward.svc", 1)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text, "--peer") == address
    assert parse_address(str(address), "--peer") == address


@pytest.mark.parametrize("text", ["", "x", "x:", ":1", "x:0", "x:65536", "x:99999999", "http://x:1", "x:١"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="--peer"):
        parse_address(text, "--peer")
