"""What a site's policy lets leave of its rows: pure.

Without a policy the default of a Site holds; one that has expired, or that does not name the site, lets
nothing leave until a newer one comes. Nothing is lost by waiting: rows are read back from the tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import get_args

import msgspec

from edgeward.wire.residency import ResidencyPolicy, digest
from edgeward.wire.resources import Residency
from edgeward.wire.rows import GapReason, Row, TrendRow
from edgeward.wire.topics import Lane

DEFAULT = Residency()

_FEATURE = "feature:"
#: `residency` is what this store alone says.
_REASONS = frozenset(get_args(GapReason)) - {"residency"}


@dataclass(frozen=True)
class Terms:
    """What holds for one site now. `residency` is None while nothing may be decided, and `held` says why."""

    residency: Residency | None
    policy: str = ""
    held: str = ""


def terms_for(site: str, policy: ResidencyPolicy | None, now: float) -> Terms:
    """`now` is seconds since 1970."""
    if policy is None:
        return Terms(DEFAULT, digest(DEFAULT))
    if now >= policy.expires_at:
        return Terms(None, held="the residency policy has expired: the controller must be reached")
    residency = policy.sites.get(site)
    if residency is None:
        return Terms(None, held=f"the residency policy does not name site {site}")
    return Terms(residency, digest(residency))


def outgoing(residency: Residency, lane: Lane, row: Row) -> Row | None:
    """The row as it may leave the site, None when it must stay."""
    if lane not in residency.forward:
        return None
    if isinstance(row, TrendRow):
        return _trend(residency, row)
    changes: dict[str, object] = {}
    if "key" in residency.redact:
        changes["key"] = ""
    if "source" in residency.redact:
        changes |= {"source_epoch": "", "source_seq": -1}
    return msgspec.structs.replace(row, **changes) if changes else row


def _trend(residency: Residency, row: TrendRow) -> TrendRow | None:
    if not any(fnmatchcase(row.series, pattern) for pattern in residency.series):
        return None
    # Only what says that it sums up outputs is taken for that: anything else may be an input.
    if row.series.startswith("output:") or residency.inputs == "full":
        return row
    if row.count == 0:
        return msgspec.structs.replace(row, mean=0.0, m2=0.0, minimum=0.0, maximum=0.0, sketch=b"")
    if row.count < residency.least_samples:
        # Mean and deviation of one or two values are those values.
        return None
    low, high = bounds(row.count, row.mean, row.m2)
    return msgspec.structs.replace(row, minimum=low, maximum=high, sketch=b"")


def bounds(count: int, mean: float, m2: float) -> tuple[float, float]:
    """Between which all of `count` values must lie, by their mean and squared deviations alone.

    Samuelson's inequality (1968): no value is further from the mean than sqrt(count - 1) times the standard
    deviation of the population. They take the place of the least and the greatest value, which are values.
    """
    away = math.sqrt(max(m2, 0.0) / count * (count - 1))
    low, high = mean - away, mean + away
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (mean, mean)


def outgoing_reason(reason: str) -> str:
    """A gap's reason as it may leave: one of the contract's words, since others hold what a sender wrote."""
    word = reason.partition(":")[0]
    return word if word in _REASONS or word == "refused" else "other"
