"""What a site's store keeps about forwarding: what the central store has, and what was decided and why.

Losing this file loses no rows: all is offered again, and the central store drops what it has. The decisions
are counted before what they are about is sent, and become records of a hash chain that only grows.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from edgeward.errors import EdgewardError
from edgeward.identifiers import DeviceName
from edgeward.intervals import Interval, missing, size, union
from edgeward.wire.residency import MAX_SPANS, Decision, Span, digest, encode
from edgeward.wire.rows import Batch
from edgeward.wire.topics import Lane
from trends.databases import Database, Sqlite
from trends.outgoing import shares
from trends.sequence import SequenceId, Settled

_SCHEMA = (
    "forward_cursor (site TEXT, device TEXT, epoch TEXT, lane TEXT, expected {long} NOT NULL, above {bytes} NOT NULL,"
    " policy TEXT NOT NULL, decided {bytes} NOT NULL, PRIMARY KEY (site, device, epoch, lane))",
    "forward_tally (site TEXT, lane TEXT, policy TEXT, device TEXT, epoch TEXT, first_seq {long}, last_seq {long},"
    " forwarded {long}, withheld {long}, lost {long}, bytes {long}, since {double},"
    " PRIMARY KEY (site, lane, policy, device, epoch))",
    "residency_decision (number {long} PRIMARY KEY, body {bytes} NOT NULL)",
    "forward_meta (key TEXT PRIMARY KEY, value {long} NOT NULL)",
)
_TYPES = {"double": "DOUBLE PRECISION"}

_intervals = msgspec.msgpack.Decoder(list[Interval]).decode
_pack = msgspec.msgpack.Encoder().encode


class Counts(Struct, frozen=True):
    """Rows of one lane of one site by one policy: since when (seconds, 1970), how many."""

    site: str
    lane: Lane
    policy: str
    since: float
    forwarded: int
    withheld: int
    lost: int
    bytes: int


class Ledger:
    """Thread-safe. `now` is seconds since 1970 everywhere."""

    def __init__(self, database: Database | Path, now: float) -> None:
        """A path is that of a SQLite file, made when it is missing."""
        self._lock = threading.RLock()
        self._db = Sqlite(database) if isinstance(database, Path) else database
        with self._lock, self._db.transaction():
            self._db.alone("forwarding schema")
            for declared in _SCHEMA:
                self._db.run(f"CREATE TABLE IF NOT EXISTS {declared.format(**self._db.types, **_TYPES)}")
            self._db.run(
                "INSERT INTO forward_meta VALUES ('chain', ?) ON CONFLICT DO NOTHING", (int(now * 1e6),)
            )

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # what the central store has

    def cursors(self) -> dict[SequenceId, Settled]:
        """What the central store said that it has or knows to be lost."""
        with self._lock:
            found = self._db.run("SELECT site, device, epoch, lane, expected, above FROM forward_cursor")
        return {
            SequenceId(DeviceName(site, device), epoch, lane): Settled(expected, _intervals(above))
            for site, device, epoch, lane, expected, above in found
        }

    def acknowledged(self, said: Mapping[SequenceId, Settled]) -> None:
        """Durable when it returns."""
        with self._lock, self._db.transaction():
            for sequence, settled in said.items():
                self._db.run(
                    "INSERT INTO forward_cursor (site, device, epoch, lane, expected, above, policy, decided)"
                    " VALUES (?,?,?,?,?,?,'',?) ON CONFLICT (site, device, epoch, lane) DO UPDATE SET"
                    " expected = excluded.expected, above = excluded.above",
                    (*_columns(sequence), settled.expected, _pack(settled.above), _pack([])),
                )

    # what was decided

    def decide(self, made: Iterable[tuple[SequenceId, str, Batch]], now: float) -> None:
        """Count batches before they are sent: each number once for each policy (its digest)."""
        with self._lock, self._db.transaction():
            for sequence, policy, batch in made:
                self._decide(sequence, policy, batch, now)

    def _decide(self, sequence: SequenceId, policy: str, batch: Batch, now: float) -> None:
        (site, device), epoch, lane = sequence.name, sequence.epoch, sequence.lane
        found = self._db.run(
            "SELECT policy, decided FROM forward_cursor WHERE site=? AND device=? AND epoch=? AND lane=?",
            (site, device, epoch, lane),
        )
        known = _intervals(found[0][1]) if found and found[0][0] == policy else []
        first, last = batch.first_seq, batch.first_seq + batch.count - 1
        fresh = missing(known, first, last)
        if not fresh:
            return
        self._db.run(
            "INSERT INTO forward_cursor (site, device, epoch, lane, expected, above, policy, decided)"
            " VALUES (?,?,?,?,0,?,?,?) ON CONFLICT (site, device, epoch, lane) DO UPDATE SET"
            " policy = excluded.policy, decided = excluded.decided",
            (*_columns(sequence), _pack([]), policy, _pack(union(known, first, last))),
        )
        counts = (*shares(batch, fresh), len(batch.rows) * size(fresh) // batch.count)
        self._db.run(
            "INSERT INTO forward_tally (site, lane, policy, device, epoch, first_seq, last_seq, forwarded, withheld,"
            " lost, bytes, since) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)"
            " ON CONFLICT (site, lane, policy, device, epoch) DO UPDATE SET"
            " first_seq = CASE WHEN excluded.first_seq < forward_tally.first_seq THEN excluded.first_seq"
            " ELSE forward_tally.first_seq END,"
            " last_seq = CASE WHEN excluded.last_seq > forward_tally.last_seq THEN excluded.last_seq"
            " ELSE forward_tally.last_seq END,"
            " forwarded = forward_tally.forwarded + excluded.forwarded,"
            " withheld = forward_tally.withheld + excluded.withheld,"
            " lost = forward_tally.lost + excluded.lost, bytes = forward_tally.bytes + excluded.bytes",
            (site, lane, policy, device, epoch, fresh[0][0], fresh[-1][1], *counts, now),
        )

    def tallies(self) -> list[Counts]:
        """What was decided and is not yet in a record."""
        with self._lock:
            found = self._db.run(
                "SELECT site, lane, policy, min(since), sum(forwarded), sum(withheld), sum(lost), sum(bytes)"
                " FROM forward_tally GROUP BY site, lane, policy ORDER BY site, lane, policy"
            )
        return [Counts(row[0], row[1], row[2], row[3], *map(int, row[4:])) for row in found]

    def record(
        self, now: float, *, older_than: float = 0.0, going_on: Collection[tuple[str, str]] = ()
    ) -> int:
        """Turn what was counted into records, at once durable; how many were made.

        What has been counted for less than `older_than` seconds stays while its policy holds: `going_on` are
        the sites and digests of those that do.
        """
        with self._lock, self._db.transaction():
            groups: dict[tuple[str, Lane, str], list[Span]] = defaultdict(list)
            began: dict[tuple[str, Lane, str], float] = {}
            volumes: dict[tuple[str, Lane, str], list[int]] = defaultdict(list)
            for site, lane, policy, device, epoch, *numbers, volume, since in self._db.run(
                "SELECT site, lane, policy, device, epoch, first_seq, last_seq, forwarded, withheld, lost,"
                " bytes, since FROM forward_tally ORDER BY site, lane, policy, device, epoch"
            ):
                key = (site, lane, policy)
                groups[key].append(Span(device, epoch, *numbers))
                began[key] = min(since, began.get(key, since))
                volumes[key].append(volume)
            made = 0
            for (site, lane, policy), spans in groups.items():
                since = began[site, lane, policy]
                if (site, policy) in going_on and now - since < older_than:
                    continue
                for at in range(0, len(spans), MAX_SPANS):
                    volume = sum(volumes[site, lane, policy][at : at + MAX_SPANS])
                    part = spans[at : at + MAX_SPANS]
                    self._append(since, now, site, lane, policy, volume, part)
                    made += 1
                self._db.run(
                    "DELETE FROM forward_tally WHERE site=? AND lane=? AND policy=?", (site, lane, policy)
                )
        return made

    def _append(
        self, since: float, now: float, site: str, lane: Lane, policy: str, volume: int, spans: list[Span]
    ) -> None:
        newest = self._db.run("SELECT number, body FROM residency_decision ORDER BY number DESC LIMIT 1")
        number = newest[0][0] + 1 if newest else 1
        decision = Decision(
            chain=self._meta("chain"),
            number=number,
            previous=digest(_decision(newest[0][1])) if newest else "",
            since=since,
            until=now,
            site=site,
            lane=lane,
            policy=policy,
            forwarded=sum(span.forwarded for span in spans),
            withheld=sum(span.withheld for span in spans),
            lost=sum(span.lost for span in spans),
            bytes=volume,
            spans=spans,
        )
        self._db.run("INSERT INTO residency_decision VALUES (?,?)", (number, encode(decision)))

    def decisions(self, after: int = 0, limit: int = 1_000_000) -> list[Decision]:
        """Records with numbers above `after`, oldest first."""
        with self._lock:
            found = self._db.run(
                "SELECT body FROM residency_decision WHERE number>? ORDER BY number LIMIT ?", (after, limit)
            )
        return [_decision(row[0]) for row in found]

    @property
    def reported(self) -> int:
        """Up to which record the controller has them."""
        with self._lock:
            return self._meta("reported")

    def set_reported(self, number: int) -> None:
        with self._lock, self._db.transaction():
            self._db.run(
                "INSERT INTO forward_meta VALUES ('reported', ?)"
                " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (number,),
            )

    def _meta(self, key: str) -> int:
        found = self._db.run("SELECT value FROM forward_meta WHERE key=?", (key,))
        return int(found[0][0]) if found else 0


def _columns(sequence: SequenceId) -> tuple[str, str, str, str]:
    return (*sequence.name, sequence.epoch, sequence.lane)


def _decision(body: bytes) -> Decision:
    return msgspec.json.decode(body, type=Decision)


def check_chain(decisions: Iterable[Decision]) -> None:
    """Whether each record follows the one before. Raises EdgewardError naming the first that does not."""
    before: Decision | None = None
    for each in decisions:
        expected = (before.chain, before.number + 1, digest(before)) if before else (each.chain, 1, "")
        if (each.chain, each.number, each.previous) != expected:
            raise EdgewardError(
                f"decision {each.number} does not follow decision {before.number if before else 0}",
                hint="the log of residency decisions was changed: compare it with the controller's audit records",
            )
        before = each
