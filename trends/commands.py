"""`edgeward trends`: the on-premises trend store."""

from __future__ import annotations

import json
import logging
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from edgeward.cli.context import naming, read_secret
from trends.access_commands import api, models, readers
from trends.bridges import commands as bridges
from trends.forward_commands import forward_status, residency_log
from trends.query_commands import Folder, open_store, query

if TYPE_CHECKING:
    from trends.sender import Forward
    from trends.store import Store

out = Console(highlight=False)


def register(app: typer.Typer) -> None:
    trends = typer.Typer(help="The on-premises trend store: ingest, tables, queries.", no_args_is_help=True)
    trends.command()(enroll)
    trends.command()(serve)
    trends.command()(query)
    trends.command()(models)
    trends.command()(api)
    trends.add_typer(readers, name="readers")
    trends.command()(verify)
    bridges.register(trends)
    trends.command()(forward_status)
    trends.command()(residency_log)
    app.add_typer(trends, name="trends")


def enroll(
    url: Annotated[str, typer.Option("--url", envvar="EDGEWARD_URL", help="The controller's address.")],
    token_file: Annotated[Path, typer.Option("--token-file", help="File with a token of role `store`.")],
    name: Annotated[str, typer.Option("--name", help="The trend store's name.")],
    folder: Folder,
) -> None:
    """Get this trend store its identity.

    Example: `edgeward trends enroll --url http://127.0.0.1:8470 --token-file store.token --name plant --dir store`
    """
    from trends.identity import enroll as do

    token = read_secret(token_file)
    with naming(token_file):
        answer = do(folder, url, token, name)
    out.print(f"enrolled trend store {answer.name} for {', '.join(answer.sites)}")


def serve(
    folder: Folder,
    broker: Annotated[
        str | None, typer.Option(help="mqtt:// or mqtts:// address; default: as enrolled.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TABLE=DAYS",
            help="How long a table is kept, by event time; may be repeated. Default: for ever.",
        ),
    ] = None,
    quota: Annotated[
        float, typer.Option(min=1, help="Rows per second and device, on average over a minute.")
    ] = 100_000.0,
    forward_to: Annotated[
        str | None,
        typer.Option(help="mqtt:// or mqtts:// address of a central store's broker: send it what may leave."),
    ] = None,
    forward_ca: Annotated[
        Path | None, typer.Option(help="CA certificate (PEM) of that broker; default: the system's.")
    ] = None,
    accept_forwarded: Annotated[
        bool, typer.Option(help="Be a central store: take what the sites' trend stores forward.")
    ] = False,
    tables: Annotated[
        str,
        typer.Option(
            metavar="s3://BUCKET[/PREFIX]",
            help="Keep the tables in S3. Remembered; endpoint, region and keys: the AWS_ variables.",
        ),
    ] = "",
    tables_credentials: Annotated[
        Path | None,
        typer.Option(
            envvar="AWS_SHARED_CREDENTIALS_FILE",
            help="A file like ~/.aws/credentials with the keys, mode 0600; AWS_PROFILE chooses the section.",
        ),
    ] = None,
) -> None:
    """Take in what the devices send, acknowledge it once it is durable, and keep the tables.

    Example: `edgeward trends serve --dir store --keep results=90 --keep samples=14`

    With --forward-to, what the Sites' `residency` allows also goes to a central store, which is one of these
    with --accept-forwarded; see docs/forwarding.md.

    With `--tables s3://bucket/prefix` once, they lie there from then on (docs/storage.md).

    Several of these share the work when each is enrolled in a folder of its own and EDGEWARD_TRENDS_JOURNAL
    names one PostgreSQL database for all: postgresql://user@host:5432/database, the password in PGPASSFILE.
    """
    from edgeward.clock import SystemClock
    from trends.quota import Quota
    from trends.upkeep import parse_retention

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    retention = parse_retention(keep or [])
    store = open_store(folder, tables, tables_credentials)
    stop, ready = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def announce() -> None:
        ready.wait()
        print(f"edgeward trend store {store.enrollment.name} ready in {folder}", flush=True)

    threading.Thread(target=announce, daemon=True).start()
    try:
        store.serve(
            broker, SystemClock(), stop, ready, retention, Quota(rows=quota),
            forward=_forward(forward_to, forward_ca), central=accept_forwarded,
        )  # fmt: skip
    finally:
        store.close()


def _forward(url: str | None, ca_file: Path | None) -> Forward | None:
    from edgeward.mqtt import Broker
    from trends.sender import Forward

    if url is None:
        return None
    broker = Broker(url, ca_file=ca_file)
    broker.endpoint()
    return Forward(broker)


def verify(
    folder: Folder,
    produced: Annotated[
        Path | None,
        typer.Option(
            help="Compare with what was produced; JSON lines: device, stream, epoch, first_seq, last_seq."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Check that everything is stored exactly once. Exit code 1 when it is not.

    Without --produced: that of every lane of every device each number is stored once, or in one gap with its
    reason. With it: that every produced sample is a result exactly once.

    Examples: `edgeward trends verify --dir store`
    `edgeward trends verify --dir store --produced produced.jsonl`
    """
    store = open_store(folder)
    try:
        good = (
            _verify_lanes(store, as_json) if produced is None else _verify_produced(store, produced, as_json)
        )
    finally:
        store.close()
    if not good:
        raise typer.Exit(1)


def _verify_produced(store: Store, produced: Path, as_json: bool) -> bool:
    from trends.verify import read_produced
    from trends.verify import verify as check

    verdict = check(store.queries, read_produced(produced))
    if as_json:
        print(json.dumps({field: getattr(verdict, field) for field in verdict.__struct_fields__}))
    else:
        out.print(
            f"produced {verdict.produced}, stored {verdict.stored}, lost {verdict.lost}, duplicated {verdict.duplicated}"
        )
    return not (verdict.lost or verdict.duplicated)


def _verify_lanes(store: Store, as_json: bool) -> bool:
    from trends.completeness import lanes

    found = lanes(store.queries)
    if as_json:
        print(
            json.dumps([{field: getattr(lane, field) for field in lane.__struct_fields__} for lane in found])
        )
    else:
        for lane in found:
            said = "ok" if not (lane.missing or lane.twice) else f"{lane.missing} missing, {lane.twice} twice"
            out.print(
                f"{lane.site}/{lane.device} {lane.lane} {lane.epoch}: {lane.first} to {lane.last},"
                f" {lane.stored} stored, {lane.in_gaps} in gaps: {said}",
                highlight=False,
            )
        if not found:
            out.print("nothing is stored yet")
    return not any(lane.missing or lane.twice for lane in found)
