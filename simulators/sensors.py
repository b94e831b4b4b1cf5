"""A sensor that replays rows of a CSV file over MQTT until the agent has every one of them durably.

Message: a JSON array of `{"epoch", "seq", "t", "values"}`; ack on `{topic}/ack`: `{"epoch", "seq"}`.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from edgeward.clock import Clock, SystemClock
from edgeward.errors import EdgewardError, InvalidDocument
from edgeward.mqtt import Broker, Link, Message
from simulators import sender

log = logging.getLogger(__name__)

#: Never sent: a sensor does not know whether its machine is failing.
LABEL = "label"

#: Seconds between two looks at the event clock; also the pause when nothing is to be sent.
_TICK = 0.02


@dataclass(frozen=True)
class Replay:
    """What to send, where, and how fast.

    `rate` is rows per second of real time, `speed` how many times faster than real time the event clock
    runs: two rows lie `speed / rate` seconds of event time apart. `start` is the event time of the first
    row (seconds since 1970); None: so that the last row happens now. `window` rows may be unacknowledged.
    A `plain` sensor numbers nothing and waits for no ack, as most do: each row is sent once.
    """

    topic: str
    device: str
    stream: str
    rate: float
    speed: float = 1.0
    batch: int = 16
    window: int = 512
    start: float | None = None
    plain: bool = False


@dataclass(frozen=True)
class Progress:
    sent: int
    acked: int
    total: int
    repeats: int
    connected: bool

    def __str__(self) -> str:
        state = "" if self.connected else ", broker away"
        return f"sent {self.sent}/{self.total}, durable {self.acked}, repeats {self.repeats}{state}"


def parse_rows(text: str, total: int) -> tuple[int, int]:
    """`a:b` as row numbers of a file with `total` rows; with a dot in either, as shares of it.

    Raises InvalidDocument.
    """
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        if "." in text:
            low, high = float(first or 0), float(last or 1)
            begin, end = math.floor(low * total + 1e-9), math.floor(high * total + 1e-9)
        else:
            begin, end = int(first or 0), int(last or total)
        if not 0 <= begin < end <= total:
            raise ValueError
    except (ValueError, OverflowError):
        raise InvalidDocument(
            f"{text!r} selects no rows of {total}", source="--rows", hint="e.g. 0:1000, or 0.7:1.0 for shares"
        ) from None
    return begin, end


def read_samples(path: Path, rows: str = ":") -> list[dict[str, float]]:
    """The selected rows without the label; an empty cell is a missing value and is left out.

    Raises InvalidDocument naming the file, the line and the column.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if not header or len(set(header)) != len(header):
                raise InvalidDocument("expected a first line with distinct column names", source=str(path))
            lines = [(reader.line_num, line) for line in reader if line]
    except OSError as error:
        raise InvalidDocument(f"cannot read it: {error.strerror}", source=str(path)) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidDocument(f"not a CSV file in UTF-8: {error}", source=str(path)) from None
    begin, end = parse_rows(rows, len(lines))
    return [_sample(path, header, number, line) for number, line in lines[begin:end]]


def _sample(path: Path, header: list[str], number: int, line: list[str]) -> dict[str, float]:
    if len(line) != len(header):
        raise InvalidDocument(f"expected {len(header)} columns, found {len(line)}", source=f"{path}:{number}")
    values = {}
    for column, cell in zip(header, line, strict=True):
        if column == LABEL or not cell.strip():
            continue
        try:
            values[column] = float(cell)
        except ValueError:
            raise InvalidDocument(
                f"{cell!r} is not a number", source=f"{path}:{number}", field=column
            ) from None
    return values


class ProducedLog:
    """What the sensor produced, as JSON lines, written before the sample first leaves it."""

    def __init__(self, path: Path | None, device: str, stream: str, epoch: str) -> None:
        self._file: TextIO | None = path.open("a", encoding="utf-8", buffering=1) if path else None
        self._fixed = {"device": device, "stream": stream, "epoch": epoch}
        self._highest = -1

    def note(self, last: int) -> None:
        """Samples up to `last` exist now; a repeat adds nothing."""
        if last <= self._highest:
            return
        if self._file is not None:
            line = self._fixed | {"first_seq": self._highest + 1, "last_seq": last}
            self._file.write(json.dumps(line) + "\n")
        self._highest = last

    def __enter__(self) -> ProducedLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


class Sensor:
    """Sends `samples` and returns from `run` when the agent has acknowledged all of them."""

    def __init__(
        self,
        broker: Broker,
        replay: Replay,
        samples: list[dict[str, float]],
        *,
        produced: Path | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.epoch = secrets.token_hex(8)
        self._replay, self._samples, self._produced = replay, samples, produced
        self._clock = clock or SystemClock()
        self._period = replay.speed / replay.rate
        self._start = (
            self._clock.now() - len(samples) * self._period if replay.start is None else replay.start
        )
        self._state = sender.SenderState(total=len(samples))
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._link = Link(
            broker,
            f"sensor-{replay.device}-{self.epoch}",
            subscriptions=() if replay.plain else (f"{replay.topic}/ack",),
            on_message=self._acked,
            on_connect=self._reconnected,
            max_reconnect_delay=1.0,
        )

    def progress(self) -> Progress:
        with self._lock:
            state = self._state
        return Progress(state.sent + 1, state.acked + 1, state.total, state.repeats, self._link.connected)

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def run(self, *, report: Callable[[Progress], None] = lambda progress: None) -> Progress:
        """Raises EdgewardError when stopped before everything was acknowledged."""
        replay = self._replay
        with ProducedLog(self._produced, replay.device, replay.stream, self.epoch) as produced:
            self._link.start()
            try:
                began = reported = self._clock.monotonic()
                while not self._state.done and not self._stopping:
                    now = self._clock.monotonic()
                    if now - reported >= 1.0:
                        reported = now
                        report(self.progress())
                    released = min(len(self._samples), int((now - began) * replay.rate) + 1)
                    self._pump(produced, released, now)
                    self._wake.wait(_TICK)
                    self._wake.clear()
            finally:
                self._link.stop()
        progress = self.progress()
        if progress.acked < progress.total:
            raise EdgewardError(f"stopped before the agent had everything: {progress}")
        return progress

    def _pump(self, produced: ProducedLog, released: int, now: float) -> None:
        # A sensor goes on measuring while the broker is away: what exists is noted, sent later.
        produced.note(released - 1)
        while self._link.connected and not self._stopping:
            with self._lock:
                self._state, chosen = sender.send(
                    self._state, now, released=released, batch=self._replay.batch, window=self._replay.window
                )
            if chosen is None:
                return
            plain = self._replay.plain
            self._link.publish(self._replay.topic, self._encode(chosen), qos=0 if plain else 1)
            if plain:
                with self._lock:
                    self._state = sender.acknowledge(self._state, chosen.last, now)

    def _encode(self, chosen: sender.Range) -> bytes:
        return json.dumps(
            [
                ({} if self._replay.plain else {"epoch": self.epoch, "seq": seq})
                | {
                    "t": round(self._start + seq * self._period, 6),
                    "values": self._samples[seq],
                }
                for seq in range(chosen.first, chosen.last + 1)
            ],
            separators=(",", ":"),
        ).encode()

    def _acked(self, message: Message) -> None:
        try:
            ack = json.loads(message.payload)
            epoch, seq = ack["epoch"], ack["seq"]
        except (ValueError, KeyError, TypeError):
            log.warning("%s: not an ack; ignored", message.topic)
            return
        # Another epoch's ack is for a sensor that was here before.
        if epoch != self.epoch or not isinstance(seq, int):
            return
        with self._lock:
            self._state = sender.acknowledge(self._state, seq, self._clock.monotonic())
        self._wake.set()

    def _reconnected(self) -> None:
        with self._lock:
            self._state = sender.rewind(self._state, self._clock.monotonic())
        self._wake.set()
