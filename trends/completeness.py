"""Whether every number of every lane is accounted for: stored once, or in one gap with its reason.

A lane numbers its rows from 0 without a hole, so the store can tell by itself: what is stored and what
is in gaps must tile the numbers from the first that it knows to the last.
"""

from __future__ import annotations

from msgspec import Struct

from trends.query import Queries
from trends.schemas import TABLE_OF

#: Runs of consecutive numbers ("gaps and islands"), then the gaps (one record for each reason: their counts add
#: up to the range), then what each begins after.
_LANES = """
WITH stored AS ({stored}),
numbered AS (
    SELECT *, seq - row_number() OVER (PARTITION BY site, device, epoch, lane ORDER BY seq) AS run FROM stored
),
spans AS (
    SELECT site, device, epoch, lane, min(seq) AS first, max(seq) AS last, sum(times) AS rows,
        sum(times) - count(*) AS again, 0 AS lost, 0 AS unclear
    FROM numbered GROUP BY site, device, epoch, lane, run
    UNION ALL
    SELECT site, device, epoch, lane, first_seq, last_seq, 0, greatest(total - length, 0), total,
        greatest(length - total, 0)
    FROM (
        SELECT site, device, epoch, lane, first_seq, last_seq, sum(count) AS total,
            last_seq - first_seq + 1 AS length
        FROM gaps GROUP BY site, device, epoch, lane, first_seq, last_seq)
),
reached AS (
    SELECT *, max(last) OVER (
        PARTITION BY site, device, epoch, lane ORDER BY first, last
        ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
    FROM spans
)
SELECT site, device, epoch, lane, min(first) AS first, max(last) AS last,
    sum(rows)::BIGINT AS stored,
    sum(lost)::BIGINT AS in_gaps,
    (sum(unclear) + coalesce(sum(first - before - 1) FILTER (first > before + 1), 0))::BIGINT AS missing,
    (sum(again) + coalesce(sum(least(last, before) - first + 1) FILTER (first <= before), 0))::BIGINT AS twice
FROM reached GROUP BY ALL ORDER BY ALL
"""

_STORED = " UNION ALL ".join(
    f"SELECT site, device, epoch, '{lane}' AS lane, seq, count(*) AS times FROM {table} GROUP BY ALL"  # noqa: S608  # names of this module only
    for lane, table in TABLE_OF.items()
)


class Lane(Struct, frozen=True):
    """One lane of one device's epoch: numbers `first .. last`, of which so many are `stored` or `in_gaps`.

    `missing` are those in between of which nothing is known (yet: what is on its way, too), `twice` those
    that are stored again, or stored and in a gap.
    """

    site: str
    device: str
    epoch: str
    lane: str
    first: int
    last: int
    stored: int
    in_gaps: int
    missing: int
    twice: int


def lanes(queries: Queries) -> list[Lane]:
    """Every lane that the store knows, by site, device, epoch and lane."""
    return [Lane(**row) for row in queries.sql(_LANES.format(stored=_STORED)).to_pylist()]
