"""A question to a trend store, as the command line, the HTTP API and the Python client put it."""

from __future__ import annotations

import datetime
from typing import Literal

import msgspec
from msgspec import Struct

from edgeward.errors import InvalidDocument

Group = Literal["site", "device", "stream", "series", "model", "version", "digest", "variant", "provider"]
Measure = Literal["count", "missing", "mean", "stddev", "minimum", "maximum", "histogram"]
Source = Literal["trends", "results"]

GROUPS: tuple[Group, ...] = (
    "site", "device", "stream", "series", "model", "version", "digest", "variant", "provider",
)  # fmt: skip
MEASURES: tuple[Measure, ...] = ("count", "missing", "mean", "stddev", "minimum", "maximum", "histogram")
DEFAULT_MEASURES: tuple[Measure, ...] = ("count", "missing", "mean", "stddev", "minimum", "maximum")

MAX_LIMIT = 10_000_000
#: So that a request of many megabytes is not planned.
MAX_VALUES = 1000
MAX_TEXT = 256
MAX_QUANTILES = 20

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHORTEST, _LONGEST = 1, 90 * 86_400


class TrendQuery(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Merged statistics of series per group and bucket of event time.

    `series` are `output:NAME` or `feature:NAME`. `since` (included) and `until` (not included) are ISO 8601,
    UTC where no zone is given. `rollup` is a width such as `1m`, `1h`, `7d`, from 1 s to 90 days, empty for one
    figure over the whole time; buckets begin at multiples of the width since Monday 1970-01-05T00:00Z, so
    that weeks begin on Mondays. `filters` keep rows whose column is one of the values; a digest may be given
    by its beginning. `quantiles` lie between 0 and 1 and come from the KLL sketches of `trends`.
    """

    series: list[str]
    source: Source = "trends"
    since: str = ""
    until: str = ""
    rollup: str = "1h"
    group_by: list[Group] = []
    measures: list[Measure] = msgspec.field(default_factory=lambda: list(DEFAULT_MEASURES))
    quantiles: list[float] = []
    filters: dict[Group, list[str]] = {}
    limit: int = 100_000


class LineageQuery(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Everything that a model decided: its predictions one by one, by event time.

    `digest` is a manifest digest or its beginning (at least 6 characters), `filters` as in TrendQuery.
    """

    digest: str
    since: str = ""
    until: str = ""
    filters: dict[Group, list[str]] = {}
    limit: int = MAX_LIMIT


class Checked(Struct, frozen=True):
    """What the texts of a query mean: times and `width` in microseconds (since 1970), None where open."""

    since: int | None
    until: int | None
    width: int | None


def width_us(text: str, field: str = "rollup") -> int:
    """`1m`, `6h`, `90d` in microseconds. Raises InvalidDocument."""
    number, unit = text[:-1], text[-1:]
    if unit in _SECONDS and number.isascii() and number.isdigit() and len(number) < 9:
        seconds = int(number) * _SECONDS[unit]
        if _SHORTEST <= seconds <= _LONGEST:
            return seconds * 1_000_000
    raise InvalidDocument(
        f"{text!r} is not a width of time",
        field=field,
        hint="expected a number and s, m, h or d, from 1s to 90d, e.g. 10m",
    )


def time_us(text: str, field: str) -> int:
    """ISO 8601 in microseconds since 1970; UTC where it names no zone. Raises InvalidDocument."""
    try:
        at = datetime.datetime.fromisoformat(text)
        if at.tzinfo is None:
            at = at.replace(tzinfo=datetime.UTC)
        return (at - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)
    except (ValueError, OverflowError):
        raise InvalidDocument(
            f"{text!r} is not a time", field=field, hint="expected e.g. 2026-03-01 or 2026-03-01T06:00Z"
        ) from None


def check_query(query: TrendQuery) -> Checked:
    """Raises InvalidDocument with the field that is wrong and what it may be."""
    if not query.series:
        raise InvalidDocument("names no series", field="series", hint="expected output:NAME or feature:NAME")
    for name in query.series:
        kind, _, rest = name.partition(":")
        if kind not in ("output", "feature") or not rest:
            raise InvalidDocument(
                f"{name!r} is not a series", field="series", hint="expected output:NAME or feature:NAME"
            )
        if query.source == "results" and kind != "output":
            raise InvalidDocument(
                f"{name!r} is not in results", field="series", hint="ask trends for features"
            )
    _few("series", query.series)
    if len(set(query.group_by)) != len(query.group_by):
        raise InvalidDocument("a column stands there twice", field="groupBy")
    if not (query.measures or query.quantiles):
        raise InvalidDocument("asks for nothing", field="measures", hint=f"any of {', '.join(MEASURES)}")
    if len(query.quantiles) > MAX_QUANTILES:
        raise InvalidDocument(f"more than {MAX_QUANTILES}", field="quantiles")
    for point in query.quantiles:
        if not 0 < point < 1:
            raise InvalidDocument(
                f"{point!r} is no quantile", field="quantiles", hint="between 0 and 1, e.g. 0.95"
            )
    if query.source == "results" and (query.quantiles or "histogram" in query.measures):
        raise InvalidDocument(
            "results have neither sketches nor histograms", field="source", hint="ask trends for them"
        )
    since, until = _range(query.since, query.until, query.filters, query.limit)
    return Checked(since, until, width_us(query.rollup) if query.rollup else None)


def check_lineage(query: LineageQuery) -> Checked:
    """Raises InvalidDocument."""
    if not 6 <= len(query.digest) <= 64 or set(query.digest) - set("0123456789abcdef"):
        raise InvalidDocument(
            f"{query.digest[:80]!r} is not a digest",
            field="digest",
            hint="its first 6 to 64 hexadecimal digits",
        )
    since, until = _range(query.since, query.until, query.filters, query.limit)
    return Checked(since, until, None)


def _range(
    since: str, until: str, filters: dict[Group, list[str]], limit: int
) -> tuple[int | None, int | None]:
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidDocument(f"{limit} is out of range", field="limit", hint=f"1 to {MAX_LIMIT}")
    if "series" in filters:
        raise InvalidDocument("is no filter", field="filters.series", hint="name them in `series`")
    for name, values in filters.items():
        _few(f"filters.{name}", values)
    first = time_us(since, "since") if since else None
    last = time_us(until, "until") if until else None
    if first is not None and last is not None and first >= last:
        raise InvalidDocument(f"{until} is not after {since}", field="until")
    return first, last


def _few(field: str, values: list[str]) -> None:
    if len(values) > MAX_VALUES:
        raise InvalidDocument(f"more than {MAX_VALUES} values", field=field)
    if any(len(value) > MAX_TEXT or "\0" in value for value in values):
        raise InvalidDocument(f"a value is longer than {MAX_TEXT} characters or holds a NUL", field=field)


def decode_question(data: bytes) -> TrendQuery | LineageQuery:
    """A request's body: `{"trend": {...}}` or `{"lineage": {...}}`. Raises InvalidDocument."""
    try:
        question = msgspec.json.decode(data, type=Question)
    except msgspec.DecodeError as error:
        raise InvalidDocument(str(error), source="the query") from None
    if (question.trend is None) == (question.lineage is None):
        raise InvalidDocument("expected either trend or lineage", source="the query")
    if question.trend is not None:
        check_query(question.trend)
        return question.trend
    assert question.lineage is not None
    check_lineage(question.lineage)
    return question.lineage


class Question(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    trend: TrendQuery | None = None
    lineage: LineageQuery | None = None
