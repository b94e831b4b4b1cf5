"""The device's durable state but for its outbox: one SQLite file, WAL, synchronous=FULL."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from agent.attempts import Attempt
from agent.lifecycle import Verdict
from edgeward.storage import transaction
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import SlotReport, StreamReport, VariantMeasure
from edgeward.wire.slots import SlotPolicy

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS slot (name TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS verdict (digest TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS measurement (key TEXT PRIMARY KEY, value BLOB NOT NULL, at REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempt (key TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
"""

MEASUREMENTS_KEPT = 256

_encode = msgspec.msgpack.Encoder().encode


class SlotRecord(msgspec.Struct, frozen=True):
    """What a slot runs and ran: survives every restart. `refused` names a target that failed here.

    `policy`, `variant` and `batchable` are how `running` was activated, `previous_variant` and
    `previous_batchable` how `previous` was, `blob` and `previous_blob` the digests of the variants' blobs,
    and `variants` what the choice was made from.
    """

    running: ModelRef | None = None
    previous: ModelRef | None = None
    refused: ModelRef | None = None
    reason: str = ""
    message: str = ""
    measured: float | None = None
    limit: float | None = None
    policy: SlotPolicy = SlotPolicy()
    variant: str = ""
    batchable: bool = False
    blob: str = ""
    previous_blob: str = ""
    previous_variant: str = ""
    previous_batchable: bool = False
    variants: list[VariantMeasure] = []


class Measurement(msgspec.Struct, frozen=True):
    """One variant on this device: latency of one example in milliseconds, resident memory of its worker."""

    provider: str
    p50_ms: float
    p95_ms: float
    memory_bytes: int


class State:
    """Thread-safe. Writes belong into `transaction`, which is durable when it is left."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._lock = threading.RLock()
        where = f"file:{path}?mode=ro" if read_only else str(path)
        self._db = sqlite3.connect(
            where, isolation_level=None, check_same_thread=False, timeout=30, uri=read_only
        )
        if not read_only:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        else:
            # Fails while the agent is just making the file: this table comes last.
            self._db.execute("SELECT 1 FROM attempt LIMIT 1")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with self._lock, transaction(self._db):
            yield

    # small facts

    def _meta(self, key: str) -> bytes | int | None:
        with self._lock:
            row = self._db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return None if row is None else row[0]

    def _set_meta(self, key: str, value: bytes | int) -> None:
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?,?)", (key, value))

    def next_boot(self) -> int:
        """Count this start of the agent."""
        boot = int(self._meta("boot") or 0) + 1
        self._set_meta("boot", boot)
        return boot

    def time_floor(self) -> float:
        """The latest time (seconds since 1970) that signed evidence is known to prove over."""
        return float(int(self._meta("time_floor") or 0))

    def keep_time_floor(self, at: float) -> None:
        self._set_meta("time_floor", int(at))

    def desired(self) -> bytes | None:
        """The newest accepted desired state, as signed."""
        value = self._meta("desired")
        return value if isinstance(value, bytes) else None

    def generation(self) -> int:
        """The highest generation ever accepted: it never goes back."""
        return int(self._meta("generation") or 0)

    def accept_desired(self, generation: int, raw: bytes) -> None:
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('generation', ?)", (generation,))
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('desired', ?)", (raw,))

    # what was reported

    def stream_reports(self) -> tuple[float, list[StreamReport]]:
        """When the newest report on the streams was made, and what it said; 0 and nothing without one."""
        value = self._meta("streams")
        try:
            if isinstance(value, bytes):
                return msgspec.msgpack.decode(value, type=tuple[float, list[StreamReport]])
        except msgspec.DecodeError:  # another version of the agent wrote it
            pass
        return 0.0, []

    def set_stream_reports(self, at: float, reports: list[StreamReport]) -> None:
        self._set_meta("streams", _encode((at, reports)))

    def slot_reports(self) -> dict[str, SlotReport]:
        """How far the newest wish for each slot was, and why, when that last changed."""
        value = self._meta("reports")
        try:
            if isinstance(value, bytes):
                return msgspec.msgpack.decode(value, type=dict[str, SlotReport])
        except msgspec.DecodeError:  # another version of the agent wrote it
            pass
        return {}

    def set_slot_reports(self, reports: dict[str, SlotReport]) -> None:
        self._set_meta("reports", _encode(reports))

    # slots

    def slots(self) -> dict[str, SlotRecord]:
        with self._lock:
            rows = self._db.execute("SELECT name, record FROM slot").fetchall()
        return {name: msgspec.msgpack.decode(record, type=SlotRecord) for name, record in rows}

    def set_slot(self, name: str, record: SlotRecord) -> None:
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO slot VALUES (?,?)", (name, _encode(record)))

    def staged(self, name: str) -> ModelRef | None:
        """The model that was verified for a slot and then had to wait; an older wish's may stand here."""
        value = self._meta(f"staged:{name}")
        return msgspec.msgpack.decode(value, type=ModelRef) if isinstance(value, bytes) else None

    def set_staged(self, name: str, ref: ModelRef) -> None:
        self._set_meta(f"staged:{name}", _encode(ref))

    def quarantine(self, digest: str, verdict: Verdict) -> None:
        with self.transaction():
            self._condemn(digest, verdict)

    def roll_back(self, name: str, record: SlotRecord, digest: str, verdict: Verdict) -> None:
        """The slot runs its predecessor, and `digest` is never tried again: both or neither."""
        with self.transaction():
            self._condemn(digest, verdict)
            self._db.execute("INSERT OR REPLACE INTO slot VALUES (?,?)", (name, _encode(record)))

    def _condemn(self, digest: str, verdict: Verdict) -> None:
        self._db.execute("INSERT OR IGNORE INTO verdict VALUES (?,?)", (digest, _encode(verdict)))

    def quarantined(self) -> dict[str, Verdict]:
        """Why, by digest, in the order of their times."""
        with self._lock:
            rows = self._db.execute("SELECT digest, record FROM verdict").fetchall()
        found = {digest: msgspec.msgpack.decode(record, type=Verdict) for digest, record in rows}
        return dict(sorted(found.items(), key=lambda item: (item[1].at, item[0])))

    def measurement(self, key: str) -> Measurement | None:
        """What was measured under `key` before; None also for what another version of the agent wrote."""
        with self._lock:
            row = self._db.execute("SELECT value FROM measurement WHERE key=?", (key,)).fetchone()
        try:
            return None if row is None else msgspec.msgpack.decode(row[0], type=Measurement)
        except msgspec.DecodeError:
            return None

    def set_measurement(self, key: str, value: Measurement, at: float) -> None:
        """Keep it; the oldest beyond MEASUREMENTS_KEPT are forgotten."""
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO measurement VALUES (?,?,?)", (key, _encode(value), at))
            self._db.execute(
                "DELETE FROM measurement WHERE key NOT IN (SELECT key FROM measurement ORDER BY at DESC LIMIT ?)",
                (MEASUREMENTS_KEPT,),
            )

    # attempts

    def attempts(self) -> dict[str, Attempt]:
        """What was begun and has not come to its end, without what another version of the agent wrote."""
        with self._lock:
            rows = self._db.execute("SELECT key, record FROM attempt").fetchall()
        found = {}
        for key, record in rows:
            try:
                found[key] = msgspec.msgpack.decode(record, type=Attempt)
            except msgspec.DecodeError:
                continue
        return found

    def set_attempts(self, changes: Mapping[str, Attempt | None]) -> None:
        with self.transaction():
            for key, attempt in changes.items():
                if attempt is None:
                    self._db.execute("DELETE FROM attempt WHERE key=?", (key,))
                else:
                    self._db.execute("INSERT OR REPLACE INTO attempt VALUES (?,?)", (key, _encode(attempt)))
