"""A server that misbehaves on a real socket, and a small disk."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgeward.client.transport import Transport
from tests.agent.conftest import Watched, wait_until

#: Answers one request: gets the connection, and where the Range begins (0 without one).
Answer = Callable[[socket.socket, int], None]


class Server:
    """HTTP/1.1 by hand: each connection brings one request, `answer` does what it likes with it."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.offsets: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        request = b""
        with connection:
            while b"\r\n\r\n" not in request:
                part = connection.recv(65536)
                if not part:
                    return
                request += part
            found = re.search(rb"(?i)\r\nrange: bytes=(\d+)-\r\n", request)
            offset = int(found[1]) if found else 0
            self.offsets.append(offset)
            try:
                self.answer(connection, offset)
            except OSError:
                return  # the client has had enough

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for thread in self._threads:
            thread.join()


def head(size: int, offset: int = 0, *, status: str = "", content_range: str = "") -> bytes:
    """The head of an answer with the bytes from `offset` on."""
    status = status or ("206 Partial Content" if offset else "200 OK")
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {size - offset}"]
    if offset:
        lines.append(f"Content-Range: {content_range or f'bytes {offset}-{size - 1}/{size}'}")
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], tuple[Server, Transport]]]:
    """Start a server that answers like that, and a transport to it."""
    opened: list[tuple[Server, Transport]] = []

    def start(answer: Answer) -> tuple[Server, Transport]:
        server = Server(answer)
        opened.append((server, Transport(server.url)))
        return opened[-1]

    yield start
    for server, transport in opened:
        transport.close()
        server.close()


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in `folder`; skips where none can be mounted."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


@pytest.fixture
def engine() -> Iterator[Watched]:
    made = Watched()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def until() -> Callable[..., Any]:
    return wait_until
