"""Files of a folder in the order of their names, each row once: replay at the events' clock or at full speed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from agent.streams.decode.sequence import Position
from agent.streams.samples import Samples
from agent.streams.sources.folder import Found, list_files, remaining
from agent.streams.sources.polling import Reported, start_thread
from agent.streams.sources.port import Sink
from agent.streams.sources.tables import Reader, csv_reader, parquet_reader
from agent.streams.sources.waiting import Backoff, offer
from edgeward.clock import Clock
from edgeward.wire.streams import FilesSource

log = logging.getLogger(__name__)

FOLLOW_S: Final = 0.5
# Short enough for a test's clock, and for an accelerated one.
_TICK_S: Final = 0.02


class FilesSampleSource:
    """Numbers the rows: the epoch is the file, the sequence its row, so a position survives any crash.

    Waits while the stream has no room. Counts `bad_files` (no table, no image, or broken halfway: what
    came before the break was taken), `late_files` (their name sorts before one that was read already;
    they are not read) and `errors` (the folder cannot be read; tried again).
    """

    def __init__(
        self, spec: FilesSource, features: Sequence[str], clock: Clock, position: Position | None = None
    ) -> None:
        """`position` is what the stream committed last. Raises MissingDependency for Parquet or images."""
        self._spec = spec
        self._clock = clock
        self._position = position
        self._read = self._reader(features)
        self._replay = Replay(clock, spec.speed) if spec.clock == "event" else None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._reported = Reported(f"files {spec.path}")
        self.finished = threading.Event()

    def _reader(self, features: Sequence[str]) -> Reader:
        spec = self._spec
        if spec.format == "csv":
            return csv_reader(spec, features, self._clock.now)
        if spec.format == "parquet":
            return parquet_reader(spec, features, self._clock.now)
        # An optional extra.
        from agent.streams.sources.images import read_image

        def read(path: Path, first: int) -> Iterator[Samples]:
            if first > 0:
                return
            # A picture's own time is when its file was written.
            at = np.array([path.stat().st_mtime_ns // 1000], dtype=np.int64)
            yield Samples(at, read_image(path, spec.width, spec.height))

        return read

    @property
    def position(self) -> Position | None:
        """How far the folder is read durably."""
        return self._position

    def start(self, sink: Sink) -> None:
        self._thread = start_thread(f"files {self._spec.path}", lambda: self._work(sink))

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def committed(self, epoch: str, seq: int) -> None:
        self._position = (epoch, seq)

    def _work(self, sink: Sink) -> None:
        files = self._list(sink)
        if files is None:
            return
        todo = remaining(files, self._position)
        for file in todo.changed:
            self._late(file, sink, "was changed after it was read")
        known = {file.epoch for file in files}
        newest = max((file.name for file in files), default="")
        self._read_all(todo.files, todo.skip, sink)
        while self._spec.follow and not self._stop.wait(FOLLOW_S):
            files = self._list(sink)
            if files is None:
                return
            new = [file for file in files if file.epoch not in known]
            known = {file.epoch for file in files}
            for file in new:
                if file.name <= newest:
                    self._late(file, sink, f"does not sort after {newest}, which was read already")
            self._read_all([file for file in new if file.name > newest], 0, sink)
            newest = max((newest, *(file.name for file in new)))
        self.finished.set()

    def _list(self, sink: Sink) -> list[Found] | None:
        """The files there are; waits for a folder that cannot be read. None when stopped."""
        backoff = Backoff()
        while not self._stop.is_set():
            try:
                files = list_files(Path(self._spec.path), self._spec.pattern)
            except OSError as error:
                sink.count("errors")
                self._reported.failed(str(error))
                self._stop.wait(backoff.delay())
                continue
            self._reported.works()
            return files
        return None

    def _late(self, file: Found, sink: Sink, reason: str) -> None:
        sink.count("late_files")
        log.warning("files %s: %s is not read: it %s", self._spec.path, file.name, reason)

    def _read_all(self, files: Sequence[Found], skip: int, sink: Sink) -> None:
        for file in files:
            self._read_one(file, skip, sink)
            skip = 0
            if self._stop.is_set():
                return

    def _read_one(self, file: Found, skip: int, sink: Sink) -> None:
        row = skip
        parts = self._read(file.path, skip)
        while True:
            try:
                part = next(parts, None)
            # Whatever a reader raises on a broken file: the next one is read all the same.
            except Exception as error:  # noqa: BLE001
                sink.count("bad_files")
                log.warning("files %s: %s, after %d rows: %s", self._spec.path, file.name, row, error)
                return
            if part is None:
                return
            seq = np.arange(row, row + len(part), dtype=np.int64)
            if not self._hand_over(replace(part, epoch=file.epoch, seq=seq), sink):
                return
            row += len(part)

    def _hand_over(self, samples: Samples, sink: Sink) -> bool:
        if self._replay is None:
            return offer(sink, samples, self._stop)
        at = 0
        while at < len(samples):
            due = self._replay.due(samples, at)
            if due == at:
                if self._stop.wait(self._replay.wait(samples, at)):
                    return False
                continue
            if not offer(sink, samples.take(np.arange(at, due)), self._stop):
                return False
            at = due
        return True


class Replay:
    """Rows become due at the distances of their event times, divided by `speed`, from the first one on."""

    def __init__(self, clock: Clock, speed: float) -> None:
        self._clock = clock
        self._speed = speed
        self._origin: tuple[float, float] | None = None

    def due(self, samples: Samples, start: int) -> int:
        """The index up to which rows from `start` on are due now.

        A row out of order is due with the ones before it, and so is one that has no time of its own.
        """
        at = start
        while at < len(samples) and (at in samples.problems or self._wait_s(samples, at) <= 0):
            at += 1
        return at

    def wait(self, samples: Samples, index: int) -> float:
        """Seconds to wait before looking again whether the row is due."""
        return min(max(self._wait_s(samples, index), 0.0), _TICK_S)

    def _wait_s(self, samples: Samples, index: int) -> float:
        event = float(samples.event_time[index]) / 1e6
        now = self._clock.monotonic()
        if self._origin is None:
            self._origin = (event, now)
        first, began = self._origin
        return (event - first) / self._speed - (now - began)
