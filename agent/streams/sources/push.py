"""Samples posted to the agent: `POST /v1/streams/{stream}/samples`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from agent.streams.decode.decoder import decoder_for
from agent.streams.decode.sequence import Position
from agent.streams.sources.port import Sink
from edgeward.clock import Clock
from edgeward.errors import InvalidDocument
from edgeward.wire.streams import Check, HttpSource, PayloadFormat

MAX_BODY: Final = 8 * 1024 * 1024

_TYPES: Final[dict[str, PayloadFormat]] = {
    "application/json": "json",
    "text/json": "json",
    "text/csv": "csv",
    "application/csv": "csv",
    "application/msgpack": "msgpack",
    "application/x-msgpack": "msgpack",
    "application/vnd.msgpack": "msgpack",
}

Response = tuple[int, bytes]


class SourcePosition(msgspec.Struct):
    epoch: str
    seq: int


class Taken(msgspec.Struct):
    """What became of a request: `taken` samples wait for the model; `position` is durable (numbered sources).

    A sender keeps its samples until a later response, to an empty array as well, says their position.
    """

    taken: int
    position: SourcePosition | None
    error: str = ""


class PushSource:
    """No thread of its own: `handle` runs on the server's, any number at a time."""

    def __init__(
        self,
        spec: HttpSource,
        features: Sequence[str],
        quality: Mapping[str, Check],
        clock: Clock,
        position: Position | None = None,
    ) -> None:
        """Raises InvalidDocument or MissingDependency when the payload format cannot be decoded."""
        self._format = spec.format
        self._clock = clock
        self._decoder = decoder_for(spec, features, quality, self._count)
        self._position = SourcePosition(*position) if position is not None else None
        self._sink: Sink | None = None
        # One request at a time: parts of a message stay together, and Sparkplug has a state.
        self._turn = threading.Lock()

    def start(self, sink: Sink) -> None:
        with self._turn:
            self._sink = sink

    def stop(self) -> None:
        # Whoever holds the turn finishes its `take` first.
        with self._turn:
            self._sink = None

    def committed(self, epoch: str, seq: int) -> None:
        self._position = SourcePosition(epoch, seq)

    def handle(self, headers: Mapping[str, str], body: bytes) -> Response:
        """The status and JSON body for a request. `headers` by lower-case name.

        200 taken, 400 no samples, 413 too large, 415 another format. 429 no room, 503 not running, with the
        reason: nothing, or the first `taken` samples only, were taken.
        """
        if len(body) > MAX_BODY:
            return self._answer(413, 0, f"{len(body)} bytes, at most {MAX_BODY}")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if _TYPES.get(kind, self._format) != self._format:
            return self._answer(415, 0, f"this stream takes {self._format}, not {kind}")
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            return self._answer(415, 0, f"content-encoding {headers['content-encoding']!r} is not supported")
        with self._turn:
            return self._take(body)

    def _take(self, body: bytes) -> Response:
        sink = self._sink
        if sink is None:
            return self._answer(503, 0, "the stream is not running")
        try:
            parts = self._decoder.decode(body, self._clock.now())
        except InvalidDocument as error:
            sink.count("rejected", 1)
            return self._answer(400, 0, str(error))
        taken = 0
        for samples in parts:
            if not sink.take(samples):
                sink.count("refused", sum(map(len, parts)) - taken)
                if blocked := sink.blocked:
                    return self._answer(503, taken, f"the stream does not run: {blocked}")
                return self._answer(429, taken, "the stream's queue is full")
            taken += len(samples)
        return self._answer(200, taken)

    def _answer(self, status: int, taken: int, error: str = "") -> Response:
        return status, msgspec.json.encode(Taken(taken, self._position, error))

    def _count(self, what: str, number: int) -> None:
        if self._sink is not None:
            self._sink.count(what, number)
