"""Give agents of the same site the blobs that are whole here; nothing else, and nobody else."""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agent.fetch import BlobStore
from agent.peers.credentials import Credentials
from agent.peers.probe import RECEIVED, WANTED
from agent.peers.settings import Address
from edgeward.clock import Clock
from edgeward.errors import EdgewardError, TrustError, UsageError

log = logging.getLogger(__name__)

_PIECE = 64 << 10
_REQUEST = re.compile(rb"(GET|HEAD) /blobs/([0-9a-f]{64}) HTTP/1\.1\r\n")
_RANGE = re.compile(rb"\r\nrange:[ \t]*([^\r\n]*?)[ \t]*\r\n", re.IGNORECASE)
_PART = re.compile(rb"bytes=([0-9]{1,15})-([0-9]{0,15})")


@dataclass(frozen=True)
class Bounds:
    """Times in seconds, sizes in bytes.

    `connections` at once at all, `uploads` at once of which `per_device` for one. TLS and the request must be
    there after `request`; a reader that takes less than `rate` bytes per second over `window` is cut off.
    """

    connections: int = 32
    uploads: int = 4
    per_device: int = 2
    request: float = 5.0
    head: int = 4096
    rate: float = 16384.0
    window: float = 10.0


class _Refused(Exception):  # an answer, not an error
    def __init__(self, status: str, *fields: str) -> None:
        super().__init__(status)
        self.status = status
        self.fields = fields


class Server:
    """A thread for each connection, one request on each: GET or HEAD `/blobs/{sha256}`, one Range.

    The certificate in TLS decides who is answered; the request names a digest, never a file.
    """

    def __init__(
        self,
        listen: Address,
        blobs: BlobStore,
        credentials: Credentials,
        clock: Clock,
        *,
        received: Callable[[str], int | None] = lambda digest: None,
        wanted: Callable[[str], bool] = lambda digest: False,
        may_serve: Callable[[str], bool] = lambda digest: True,
        pace: Callable[[int], None] = lambda size: None,
        bounds: Bounds | None = None,
    ) -> None:
        """`received` and `wanted` as of Peers; `may_serve` says no to what is quarantined; `pace` is called with the size of
        each piece before it is sent, and may wait to keep to a rate.

        Raises UsageError when `listen` cannot be had.
        """
        self._blobs = blobs
        self._credentials = credentials
        self._clock = clock
        self._received = received
        self._wanted = wanted
        self._may_serve = may_serve
        self._pace = pace
        self._bounds = bounds or Bounds()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._uploads: dict[str, int] = {}
        try:
            family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
            self._listener = socket.create_server(listen, family=family)
        except OSError as error:
            raise UsageError(
                f"peers cannot be served at {listen}: {error.strerror or error}",
                hint="choose another --peers-listen",
            ) from None
        self.address = Address(*self._listener.getsockname()[:2])
        self._threads: set[threading.Thread] = set()
        self._accepting = threading.Thread(target=self._accept, name="peers", daemon=True)
        self._stopped = threading.Event()

    def start(self) -> None:
        self._accepting.start()

    def stop(self) -> None:
        """Cut all connections."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        # Ends an accept() that waits; close alone does not.
        _cut(self._listener)
        self._listener.close()
        with self._lock:
            opened, threads = list(self._open), list(self._threads)
            for connection in opened:
                _cut(connection)
        if self._accepting.is_alive():
            self._accepting.join()
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._stopped.wait(0.1):  # too many open files goes by
                    return
                continue
            with self._lock:
                if len(self._open) >= self._bounds.connections or self._stopped.is_set():
                    connection.close()
                    continue
                self._open.add(connection)
                thread = threading.Thread(target=self._run, args=(connection,), name="peer", daemon=True)
                self._threads.add(thread)
                thread.start()

    def _run(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        except (OSError, EdgewardError) as error:
            log.debug("a peer's connection ended: %s", error)
        finally:
            with self._lock:
                self._open.discard(connection)
                self._threads.discard(threading.current_thread())
                connection.close()

    def _serve(self, plain: socket.socket) -> None:
        end = self._clock.monotonic() + self._bounds.request
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 << 10)
        plain.settimeout(self._bounds.request)
        context = self._credentials.context(server=True)
        # A descriptor of its own: `plain` stays what stop() can cut.
        with context.wrap_socket(plain.dup(), server_side=True, do_handshake_on_connect=False) as connection:
            connection.settimeout(self._bounds.request)
            connection.do_handshake()
            try:
                device = self._credentials.whose(connection.getpeercert(binary_form=True) or b"")
            except TrustError as error:
                log.warning("a peer is refused: %s", error)
                return
            head = self._head(connection, end)
            try:
                self._answer(connection, device, head)
            except _Refused as refused:
                fields = "".join(f"{field}\r\n" for field in refused.fields)
                connection.sendall(
                    f"HTTP/1.1 {refused.status}\r\nContent-Length: 0\r\n{fields}Connection: close\r\n\r\n".encode()
                )

    def _head(self, connection: ssl.SSLSocket, end: float) -> bytes:
        head = b""
        while b"\r\n\r\n" not in head:
            left = end - self._clock.monotonic()
            if left <= 0 or len(head) > self._bounds.head:
                raise TimeoutError("no request in time")
            connection.settimeout(left)
            part = connection.recv(4096)
            if not part:
                raise ConnectionError("closed before a request")
            head += part
        return head

    def _answer(self, connection: ssl.SSLSocket, device: str, head: bytes) -> None:
        found = _REQUEST.match(head)
        if found is None:
            raise _Refused("400 Bad Request")
        digest = found[2].decode()
        received = self._received(digest)
        try:
            if not self._may_serve(digest):
                raise FileNotFoundError
            # A whole blob only has its bare digest for a name. Once open, it may be removed meanwhile.
            fd = os.open(self._blobs.path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            if received is None:
                wanted = [WANTED] if self._wanted(digest) else []
                raise _Refused("404 Not Found", *wanted) from None
            raise _Refused("503 Service Unavailable", "Retry-After: 1", f"{RECEIVED}: {received}") from None
        try:
            size = os.fstat(fd).st_size
            begin, end, partial = _part(head, size)
            fields = f"Content-Length: {end - begin}\r\nAccept-Ranges: bytes\r\nConnection: close\r\n"
            if partial:
                fields += f"Content-Range: bytes {begin}-{end - 1}/{size}\r\n"
            status = "206 Partial Content" if partial else "200 OK"
            with self._upload(device, hold=found[1] == b"GET"):
                connection.settimeout(self._bounds.window)
                connection.sendall(f"HTTP/1.1 {status}\r\n{fields}\r\n".encode())
                if found[1] == b"GET":
                    self._send(connection, fd, begin, end, device)
        finally:
            os.close(fd)

    def _send(self, connection: ssl.SSLSocket, fd: int, begin: int, end: int, device: str) -> None:
        mark, since = self._clock.monotonic(), 0
        while begin < end:
            piece = os.pread(fd, min(_PIECE, end - begin), begin)
            if not piece:
                raise ConnectionError("the file has become shorter")
            self._pace(len(piece))
            view = memoryview(piece)
            while view:
                # Not sendall: its time-out is for each part, and a reader may take a byte of each.
                sent = connection.send(view)
                view = view[sent:]
                since += sent
                now = self._clock.monotonic()
                if now - mark >= self._bounds.window:
                    if since < self._bounds.rate * (now - mark):
                        raise TimeoutError(f"{device} reads slower than {self._bounds.rate:g} B/s")
                    mark, since = now, 0
            begin += len(piece)

    @contextmanager
    def _upload(self, device: str, *, hold: bool) -> Iterator[None]:
        """A slot for one transfer, if it is to be held. Raises _Refused when there is none."""
        with self._lock:
            running = self._uploads.get(device, 0)
            if sum(self._uploads.values()) >= self._bounds.uploads or running >= self._bounds.per_device:
                raise _Refused("503 Service Unavailable", "Retry-After: 2")
            if hold:
                self._uploads[device] = running + 1
        if not hold:
            yield
            return
        try:
            yield
        finally:
            with self._lock:
                self._uploads[device] -= 1
                if not self._uploads[device]:
                    del self._uploads[device]


def _part(head: bytes, size: int) -> tuple[int, int, bool]:
    """Begin, end and whether it is a part (RFC 9110, 14.2: what is no single range is the whole).

    Raises _Refused behind the end.
    """
    asked = _RANGE.search(head)
    found = _PART.fullmatch(asked[1]) if asked else None
    if found is None:
        return 0, size, False
    begin = int(found[1])
    end = min(int(found[2]) + 1, size) if found[2] else size
    if found[2] and int(found[2]) < begin:
        return 0, size, False
    if begin >= size:
        raise _Refused("416 Range Not Satisfiable", f"Content-Range: bytes */{size}")
    return begin, end, True


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was over already
