"""A closed-loop HTTP load: `wrk` where it is installed, else a small client of our own (slower, same for all)."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np

_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


class Measured(msgspec.Struct, frozen=True):
    """Requests per second and latency in milliseconds; `errors` are answers other than 200."""

    rate: float
    p50_ms: float
    p99_ms: float
    errors: int


@dataclass(frozen=True)
class Request:
    url: str
    body: bytes
    headers: Mapping[str, str]


def client() -> str:
    return "wrk" if shutil.which("wrk") else "the benchmark's own client"


def run(request: Request, connections: int, seconds: float) -> Measured:
    """Every connection sends its next request when it has its answer. Raises RuntimeError."""
    if shutil.which("wrk"):
        return _wrk(request, connections, seconds)
    plan = msgspec.json.encode([request.url, request.body.hex(), dict(request.headers), connections, seconds])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"], input=plan, capture_output=True, check=True
    )
    return msgspec.json.decode(done.stdout, type=Measured)


def _wrk(request: Request, connections: int, seconds: float) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder) / "body"
        body.write_bytes(request.body)
        script = Path(folder) / "post.lua"
        headers = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in request.headers.items())
        script.write_text(
            f'wrk.method = "POST"\n{headers}local f = io.open("{body}", "rb")\nwrk.body = f:read("*a")\nf:close()\n'
        )
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "--latency",
            "--timeout",
            "30s",
        ]
        done = subprocess.run(
            [*command, "-s", str(script), request.url], capture_output=True, text=True, check=True
        )
    text = done.stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    latency = {share: _milliseconds(text, share) for share in ("50%", "99%")}
    if rate is None:
        raise RuntimeError(f"wrk said nothing useful: {text}{done.stderr}")
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    lost = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    errors = (int(bad[1]) if bad else 0) + (sum(map(int, lost.groups())) if lost else 0)
    return Measured(float(rate[1]), latency["50%"], latency["99%"], errors)


def _milliseconds(text: str, share: str) -> float:
    found = re.search(rf"{share}\s+([\d.]+)(us|ms|s)\b", text)
    return float(found[1]) * _UNITS[found[2]] if found else float("nan")


class _Connection(asyncio.Protocol):
    def __init__(
        self, wire: bytes, until: float, latencies: list[float], ended: asyncio.Future[None]
    ) -> None:
        self._wire, self._until, self._latencies, self._ended = wire, until, latencies, ended
        self._buffer = b""
        self.errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._began = time.perf_counter()
        self._transport.write(self._wire)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if length is None or len(rest) < int(length[1]):
            return
        self._latencies.append(time.perf_counter() - self._began)
        self.errors += not head.startswith(b"HTTP/1.1 200")
        self._buffer = b""
        if time.perf_counter() > self._until:
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


async def _own(url: str, body: bytes, headers: dict[str, str], connections: int, seconds: float) -> Measured:
    parts = urlsplit(url)
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    wire = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items())]).encode()
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    began = time.perf_counter()
    ends, made = [], []
    for _ in range(connections):
        ended = loop.create_future()
        ends.append(ended)
        _, protocol = await loop.create_connection(
            lambda ended=ended: _Connection(wire + b"\r\n\r\n" + body, began + seconds, latencies, ended),  # type: ignore[misc]
            parts.hostname or "127.0.0.1",
            parts.port or 80,
        )
        made.append(protocol)
    await asyncio.gather(*ends)
    spent = time.perf_counter() - began
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    return Measured(len(latencies) / spent, float(p50), float(p99), sum(item.errors for item in made))


if __name__ == "__main__":
    url_, body_, headers_, connections_, seconds_ = msgspec.json.decode(sys.stdin.buffer.read())
    result = asyncio.run(_own(url_, bytes.fromhex(body_), headers_, connections_, seconds_))
    sys.stdout.buffer.write(msgspec.json.encode(result))
