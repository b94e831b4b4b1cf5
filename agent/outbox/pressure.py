"""Carries out what `agent/outbox/eviction.py` decides, a portion at a time: to be called in a transaction."""

from __future__ import annotations

import msgspec

from agent.outbox.eviction import Degree, DropOldest, Merge, Thin, mergeable, step, tallies, thinned
from agent.outbox.merging import merge
from agent.outbox.rows import event_time
from agent.outbox.tables import Held, LaneRow, OutboxTables
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.rows import GapReason, TrendRow

#: Rows of one portion: some ten milliseconds of a slow device.
PORTION = 2000

_encode = msgspec.msgpack.Encoder().encode
_trend = msgspec.msgpack.Decoder(TrendRow).decode


def relieve(tables: OutboxTables, lane: LaneRow) -> None:
    """One step down its ladder for one portion of a lane."""
    degree, todo = step(lane.name, lane.degree, lane.next_seq)
    if isinstance(todo, DropOldest):
        rows = list(tables.held(lane.id, 0, PORTION))
        _lose(tables, lane, rows[: max(1, len(rows) // 4)], "budget")
    elif isinstance(todo, Thin):
        rows = list(tables.held(lane.id, todo.at, PORTION))
        gone = set(thinned((row.seq for row in rows), todo.stride))
        _lose(tables, lane, [row for row in rows if row.seq in gone], "thinned")
        degree = Degree(degree.level, rows[-1].seq + 1 if len(rows) == PORTION else lane.next_seq)
    else:
        degree = Degree(degree.level, _merge(tables, lane, todo))
    tables.set_degree(lane.id, degree)


def _merge(tables: OutboxTables, lane: LaneRow, todo: Merge) -> int:
    """Merge trend rows; the number from which on to go on.

    Rows that were sent may be at the store: what another row says of their buckets would count twice there.
    """
    rows = list(tables.held(lane.id, todo.at, PORTION, unsent=True))
    by_number = {row.seq: row for row in rows}
    bad = [row for row in rows if row.data is None]
    gone: list[Held] = []
    decoded = [(row.seq, _trend(row.data)) for row in rows if row.data is not None]
    for group in mergeable(decoded, todo.width):
        # The newest number survives: the others' are never below what a later portion looks at.
        tables.replace(lane.id, group[-1][0], _encode(merge([row for _, row in group], todo.width)))
        gone += [by_number[seq] for seq, _ in group[:-1]]
    _lose(tables, lane, gone, "merged")
    _lose(tables, lane, bad, "corruption")
    return rows[-1].seq + 1 if len(rows) == PORTION else lane.next_seq


def expire(tables: OutboxTables, lane: LaneRow, policy: LanePolicy, now: int) -> bool:
    """A portion of the rows that are older than they are worth; True when there may be more."""
    below = tables.expired(lane.id, now - int(policy.time_to_live))
    rows = list(tables.held(lane.id, 0, PORTION, below=below))
    _lose(tables, lane, rows, "time-to-live")
    return len(rows) == PORTION


def _lose(tables: OutboxTables, lane: LaneRow, rows: list[Held], reason: GapReason) -> None:
    if rows:
        times = {row.seq: event_time(row.data) if row.data else 0 for row in rows}
        tables.lose(lane.id, rows, tallies(times, reason))
