"""What the local server listens on and what it tolerates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Sizes in bytes, times in seconds.

    `port` and `grpc_port`: 0 takes a free one, None does not listen. `unix_socket` is made with mode 0660.
    `max_json_bytes` bounds the JSON part of a request: it is parsed on the engine's loop, where a long parse
    delays every model; large tensors belong into the binary extension, up to `max_body_bytes`.
    `max_held_bytes` bounds the bodies of all requests being received or computed.

    A request must be complete within `request_seconds`; a connection may be idle for `idle_seconds`; a
    client that does not read its answers is cut off after `write_seconds`. `stop` waits `drain_seconds`
    for answers that are due. Answers are compressed, when asked for, from `compress_from_bytes` on.
    """

    host: str = "127.0.0.1"
    port: int | None = 8000
    unix_socket: Path | None = None
    grpc_port: int | None = None
    max_header_bytes: int = 16 << 10
    max_body_bytes: int = 64 << 20
    max_json_bytes: int = 8 << 20
    max_held_bytes: int = 256 << 20
    max_connections: int = 512
    max_pipelined: int = 16
    request_seconds: float = 30.0
    idle_seconds: float = 75.0
    write_seconds: float = 30.0
    drain_seconds: float = 10.0
    compress_from_bytes: int = 4 << 10
