"""`edgeward trends query`, `models`, `readers` and `api`: questions to the trend store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from edgeward.errors import InvalidDocument, MissingDependency, UsageError
from edgeward.fields import explain, split_error
from edgeward.wire.trend_query import DEFAULT_MEASURES, LineageQuery, TrendQuery

if TYPE_CHECKING:
    import pyarrow as pa

    from trends.store import Store

Folder = Annotated[Path, typer.Option("--dir", help="The trend store's folder.")]
_LOOK = "What is asked"
_FORM = "Form of the answer"


def _need_extra() -> None:
    """Raises MissingDependency."""
    try:
        import deltalake  # noqa: F401
        import duckdb  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"{error.name} is not installed", hint="pip install 'edgeward[trends]'"
        ) from None


#: Where a journal that several ingesters share is; an address on the command line would be seen by all.
JOURNAL = "EDGEWARD_TRENDS_JOURNAL"


def open_store(folder: Path, tables: str = "", credentials: Path | None = None) -> Store:
    """`tables` as of `edgeward trends serve`; empty: where they have been. Raises MissingDependency, NotFound."""
    _need_extra()
    from trends.places import place_of
    from trends.store import Store

    place = place_of(folder, os.environ, tables, credentials)
    return Store(folder, journal=os.environ.get(JOURNAL, ""), place=place)


def query(
    folder: Folder,
    sql: Annotated[
        str | None,
        typer.Option(
            help="One SQL statement over results, alarms, trends, samples, gaps.", rich_help_panel=_LOOK
        ),
    ] = None,
    series: Annotated[
        list[str] | None,
        typer.Option(
            help="`output:NAME` or `feature:NAME`: its trend, merged; may be repeated.", rich_help_panel=_LOOK
        ),
    ] = None,
    source: Annotated[
        str,
        typer.Option(help="trends, or results: single predictions, for outputs only.", rich_help_panel=_LOOK),
    ] = "trends",
    rollup: Annotated[
        str,
        typer.Option(help="Width of a time bucket: 1m to 90d; `all` for one figure.", rich_help_panel=_LOOK),
    ] = "1h",
    group_by: Annotated[
        str,
        typer.Option(
            help="Comma-separated: site, device, stream, series, model, version, digest, variant, provider.",
            rich_help_panel=_LOOK,
        ),
    ] = "",
    measures: Annotated[
        str,
        typer.Option(
            help="Comma-separated: count, missing, mean, stddev, minimum, maximum, histogram.",
            rich_help_panel=_LOOK,
        ),
    ] = ",".join(DEFAULT_MEASURES),
    quantiles: Annotated[
        str, typer.Option(help="Comma-separated, between 0 and 1; empty for none.", rich_help_panel=_LOOK)
    ] = "0.5,0.95,0.99",
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE",
            help="Keep only these; the same column again is an `or`.",
            rich_help_panel=_LOOK,
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(help="First time, e.g. 2026-03-01 or 2026-03-01T06:00Z.", rich_help_panel=_LOOK),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="First time no longer included.", rich_help_panel=_LOOK)
    ] = None,
    digest: Annotated[
        str | None,
        typer.Option(
            help="Everything that a model digest (or its beginning) decided; with --series, its trend.",
            rich_help_panel=_LOOK,
        ),
    ] = None,
    top_movers: Annotated[
        str | None,
        typer.Option(
            metavar="SINCE",
            help="Groups that changed most from SINCE..--since to --since..--until.",
            rich_help_panel=_LOOK,
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="What --top-movers compares: mean, alarm-rate, or a quantile as p95.",
            rich_help_panel=_LOOK,
        ),
    ] = "mean",
    before_after: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION",
            help="MODEL@VERSION, a digest, or a rollout's name (needs --url): each site before and after it took over.",
            rich_help_panel=_LOOK,
        ),
    ] = None,
    days: Annotated[
        int, typer.Option(min=1, max=90, help="Of --before-after, on each side.", rich_help_panel=_LOOK)
    ] = 7,
    correlate: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="STREAM STREAM",
            help="Whether two trends move together. STREAM takes --series; or STREAM/output:NAME.",
            rich_help_panel=_LOOK,
        ),
    ] = None,
    max_lag: Annotated[
        int, typer.Option(min=0, max=500, help="Buckets by which --correlate shifts.", rich_help_panel=_LOOK)
    ] = 12,
    limit: Annotated[int, typer.Option(help="At most so many rows.", rich_help_panel=_FORM)] = 100_000,
    output: Annotated[
        str, typer.Option("-o", "--output", help="table, csv, json, jsonl or arrow.", rich_help_panel=_FORM)
    ] = "table",
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Write to a .csv, .json, .jsonl, .arrow or .parquet file.", rich_help_panel=_FORM
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", envvar="EDGEWARD_URL", help="The controller, for a rollout's name.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", envvar="EDGEWARD_TOKEN_FILE", help="API token for it.")
    ] = None,
) -> None:
    """Ask the trend store.

    Examples:

    Hour by hour, per device, for one model version:
    `edgeward trends query --dir store --series output:score --group-by device --where model=pump --where version=3`

    What moved most this week against last week:
    `edgeward trends query --dir store --series output:score --group-by site,stream`
    `  --top-movers 2026-03-02 --since 2026-03-09 --until 2026-03-16`

    What version 4 changed at each site:
    `edgeward trends query --dir store --series output:score --before-after pump@4`

    Everything that a digest decided, to a file:
    `edgeward trends query --dir store --digest 3fa9c1 --since 2026-03-01 --out decided.parquet`

    Whether one trend follows another (a hint where to look, not a cause):
    `edgeward trends query --dir store --series output:score --rollup 10m --correlate press oven`

    SQL: `edgeward trends query --dir store --sql "select count(*) from results where alarm"`
    """
    _need_extra()
    from trends import export
    from trends.deliver import batches_of, deliver, note, working

    if output not in ("table", "csv", "json", "jsonl", "arrow"):
        raise UsageError(f"unknown output {output!r}", hint="one of table, csv, json, jsonl, arrow")
    if out_file is not None:
        export.format_of(out_file)  # before hours of work, not after
    if sql is not None and (series or digest or top_movers or before_after or correlate):
        raise UsageError("expected either --sql or a question", hint="see `edgeward trends query --help`")
    if not (sql or series or digest or correlate):
        raise UsageError(
            "expected --series, --digest, --correlate or --sql", hint="see `edgeward trends query --help`"
        )
    if sum(given is not None for given in (top_movers, before_after, correlate)) > 1:
        raise UsageError("expected one of --top-movers, --before-after and --correlate")
    store = open_store(folder)
    try:
        if sql is not None:
            deliver(batches_of(store.queries.sql(sql)), output, out_file)
            return
        filters = _filters(where or [])
        if digest:
            filters["digest"] = [digest]
        if not series and not correlate:
            asked = _typed(
                {
                    "digest": digest,
                    "since": since or "",
                    "until": until or "",
                    "limit": limit,
                    "filters": _but(filters, "digest"),
                },
                LineageQuery,
            )
            _tell_model(store, asked.digest)
            deliver(_lineage(store, asked), output, out_file)
            return
        described = _typed(
            {
                "series": series or _correlated(correlate), "source": source, "rollup": "" if rollup == "all" else rollup,
                "groupBy": _words(group_by), "measures": _words(measures), "filters": filters, "limit": limit,
                "quantiles": [] if source == "results" else _numbers(quantiles), "since": since or "", "until": until or "",
            },
            TrendQuery,
        )  # fmt: skip
        with working("asking the tables"):
            if top_movers:
                answer = _movers(store, described, top_movers, by)
            elif before_after:
                answer = _before_after(store, described, before_after, days, url, token_file)
            elif correlate:
                answer = _correlation(store, described, correlate, bool(series), max_lag)
            else:
                answer = store.engine.ask(described)
        if not top_movers and not before_after and not correlate and answer.num_rows == limit:
            note(f"the answer was cut off after {limit} rows: ask for less, or raise --limit")
        deliver(batches_of(answer), output, out_file)
    finally:
        store.close()


def _typed(values: dict[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        text, field = split_error(error)
        raise InvalidDocument(explain(text, kind, field), field=field) from None


def _but(filters: dict[str, list[str]], name: str) -> dict[str, list[str]]:
    return {key: values for key, values in filters.items() if key != name}


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise UsageError(f"--quantiles: {text!r} is no list of numbers", hint="e.g. 0.5,0.95") from None


def _filters(texts: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(
                f"--where {text!r} names no value", hint="expected COLUMN=VALUE, e.g. site=north"
            )
        found.setdefault(name, []).append(value)
    return found


def _movers(store: Store, described: TrendQuery, before: str, by: str) -> pa.Table:
    from trends.queries.compare import top_movers as ask

    if by.startswith("p") and by[1:].replace(".", "", 1).isdigit():
        point = float(by[1:]) / 100
        return ask(
            store.engine,
            described,
            before_since=before,
            figure="quantile",
            quantile=point,
            top=described.limit,
        )
    return ask(store.engine, described, before_since=before, figure=by, top=described.limit)  # type: ignore[arg-type]  # it checks


def _before_after(
    store: Store, described: TrendQuery, what: str, days: int, url: str | None, token_file: Path | None
) -> pa.Table:
    from trends.queries.compare import before_after as ask
    from trends.queries.compare import digests_of

    name = what
    if url is not None:
        from edgeward.cli.context import connect
        from edgeward.errors import NotFound

        with connect(url, token_file) as client:
            try:
                spec = client.get("Rollout", what)["spec"]
                name = f"{spec['model']}@{spec['version']}"
            except NotFound:
                name = what  # a version, then
    (digest,) = digests_of(store.engine, name)
    return ask(store.engine, described, digest, days=days, quantiles=described.quantiles)


def _correlated(streams: tuple[str, str] | None) -> list[str]:
    return [text.partition("/")[2] for text in streams or ()]


def _correlation(
    store: Store, described: TrendQuery, streams: tuple[str, str], common: bool, max_lag: int
) -> pa.Table:
    from trends.deliver import note
    from trends.queries.correlate import correlation_of

    sides = []
    for text in streams:
        stream, _, own = text.partition("/")
        if not own and not common:
            raise UsageError(
                f"--correlate {text}: of which series?", hint="give --series, or STREAM/output:NAME"
            )
        sides.append((stream, own or described.series[0]))
    note(
        "a correlation is a hint where to look: a common cause, a shared shift or chance give the same figures"
    )
    return correlation_of(store.engine, described, sides[0], sides[1], max_lag)


def _lineage(store: Store, asked: LineageQuery) -> Iterator[pa.RecordBatch]:
    return store.engine.lineage(asked)


def _tell_model(store: Store, digest: str) -> None:
    """What is known of the model, before its predictions."""
    from trends.deliver import note

    for row in store.engine.models.table().to_pylist():
        if not row["digest"].startswith(digest):
            continue
        if row["model"] is None:
            note(
                f"{row['digest'][:12]}: nothing is known of it; `edgeward trends models --refresh` asks the controller"
            )
            continue
        note(
            f"{row['digest'][:12]}: {row['model']} version {row['version']}, made {row['created_at']} by {row['recipe']}"
            f" from {row['dataset']} ({row['dataset_digest'][:19]}, {row['dataset_rows']} rows, split {row['split']})"
        )
