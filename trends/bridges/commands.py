"""`edgeward trends bridge`: hand on what the trend store holds."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from edgeward.errors import MissingDependency, UsageError
from trends.query_commands import JOURNAL, Folder

if TYPE_CHECKING:
    from edgeward.clock import Clock
    from edgeward.mqtt import Broker
    from trends.bridges.bridge import Target
    from trends.bridges.cursor import Cursor

out = Console(highlight=False)

#: Where the rows go; an address on the command line would be seen by all.
POSTGRES = "EDGEWARD_BRIDGE_POSTGRES"
TABLES = ("results", "alarms", "trends", "samples", "gaps")

Wanted = Annotated[
    list[str] | None,
    typer.Option("--table", metavar="TABLE", help="A table to hand on; may be repeated. Default: all."),
]
Name = Annotated[
    str | None, typer.Option("--name", help="The bridge's name: what it remembers is kept under it.")
]
FromNow = Annotated[
    bool, typer.Option("--from-now", help="Begin with what comes next, not with what is there already.")
]
Once = Annotated[bool, typer.Option("--once", help="End when all that is there was handed on.")]
Ca = Annotated[Path | None, typer.Option("--ca", help="PEM file of the CAs of the broker's certificate.")]
Cert = Annotated[Path | None, typer.Option("--cert", help="PEM file of the bridge's certificate.")]
Key = Annotated[Path | None, typer.Option("--key", help="PEM file of the certificate's key.")]
Mqtt = Annotated[str, typer.Option("--broker", help="mqtt://host:port or mqtts://host:port.")]


def register(trends: typer.Typer) -> None:
    bridge = typer.Typer(help="Hand on what is stored to other systems.", no_args_is_help=True)
    bridge.command()(kafka)
    bridge.command()(postgres)
    bridge.command("cloudevents-mqtt")(cloudevents_mqtt)
    bridge.command()(sparkplug)
    bridge.command()(status)
    trends.add_typer(bridge, name="bridge")


def kafka(
    folder: Folder,
    properties: Annotated[
        Path, typer.Option(help="librdkafka's settings, NAME=VALUE a line; readable by its owner only.")
    ],
    tables: Wanted = None,
    name: Name = None,
    encoding: Annotated[str, typer.Option(help="json, cloudevents or cloudevents-binary.")] = "json",
    prefix: Annotated[
        str, typer.Option(help="What a topic's name begins with; the table follows.")
    ] = "edgeward.",
    from_now: FromNow = False,
    once: Once = False,
) -> None:
    """To Kafka: at least once, under keys site/device/lane/epoch/seq.

    Example: `edgeward trends bridge kafka --dir store --properties kafka.properties --table alarms`
    """
    _need_tables()
    from trends.bridges.kafka import KafkaTarget, read_properties

    settings = read_properties(properties)
    _run(
        folder,
        _Run("kafka", name, tables, from_now, once),
        lambda made: KafkaTarget(settings, made.stop, encoding, prefix),
    )


def postgres(
    folder: Folder,
    tables: Wanted = None,
    name: Name = None,
    schema: Annotated[
        str, typer.Option(help="The schema that holds the tables; made when missing.")
    ] = "edgeward",
    once: Once = False,
) -> None:
    """To PostgreSQL or TimescaleDB: exactly once. EDGEWARD_BRIDGE_POSTGRES holds the address.

    That is postgresql://user@host:5432/database; the password comes best from PGPASSFILE.

    Example: `edgeward trends bridge postgres --dir store --table results --table alarms`
    """
    _need_tables()
    from trends.bridges.postgres import PostgresTarget

    url = os.environ.get(POSTGRES, "")
    if not url:
        raise UsageError(
            f"{POSTGRES} is not set",
            hint="expected postgresql://user@host:port/database, the password in PGPASSFILE",
        )
    _run(
        folder,
        _Run("postgres", name, tables, False, once),
        lambda made: PostgresTarget(url, made.cursor.name, schema),
    )


def cloudevents_mqtt(
    folder: Folder,
    broker: Mqtt,
    tables: Wanted = None,
    name: Name = None,
    mode: Annotated[str, typer.Option(help="structured or binary.")] = "structured",
    prefix: Annotated[str, typer.Option(help="What a topic begins with.")] = "edgeward/events",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    from_now: FromNow = False,
    once: Once = False,
) -> None:
    """To an MQTT broker as CloudEvents 1.0: at least once, by id.

    Example: `edgeward trends bridge cloudevents-mqtt --dir store --broker mqtts://broker.site:8883 --table alarms`
    """
    _need_tables()
    from trends.bridges.mqtt import CloudEventsTarget

    where = _broker(broker, ca, cert, key)
    _run(
        folder,
        _Run("cloudevents-mqtt", name, tables, from_now, once),
        lambda made: CloudEventsTarget(where, made.cursor.name, made.stop, mode=mode, prefix=prefix),
    )


def sparkplug(
    folder: Folder,
    broker: Mqtt,
    group: Annotated[str, typer.Option(help="The Sparkplug group id.")],
    node: Annotated[
        str | None, typer.Option(help="The edge node id; default: the trend store's name.")
    ] = None,
    tables: Annotated[
        list[str] | None,
        typer.Option("--table", metavar="TABLE", help="May be repeated. Default: results and alarms."),
    ] = None,
    name: Name = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    from_now: FromNow = False,
    once: Once = False,
) -> None:
    """To an MQTT broker as a Sparkplug B edge node, one Sparkplug device for each device.

    Example: `edgeward trends bridge sparkplug --dir store --broker mqtt://broker.site --group plant --from-now`
    """
    _need_tables()
    from trends.bridges.mqtt import SparkplugTarget

    if "gaps" in (tables or ()):
        raise UsageError("gaps have no values that Sparkplug could tell", hint="leave --table gaps out")
    where = _broker(broker, ca, cert, key)
    _run(
        folder,
        _Run("sparkplug", name, tables or ["results", "alarms"], from_now, once),
        lambda made: SparkplugTarget(
            where, group, node or made.store, made.clock, made.stop, made.cursor.next_birth
        ),
    )


def status(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """How far each bridge is, what it could not hand on, and what keeps it.

    Example: `edgeward trends bridge status --dir store`
    """
    _need_tables()
    from trends.bridges.status import bridge_status

    found = bridge_status(folder, os.environ.get(JOURNAL, ""))
    if as_json:
        import msgspec

        print(msgspec.json.encode(found).decode())
        return
    view = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("bridge", "to", "table", "rows", "commits behind", "skipped", "last", "state"):
        view.add_column(column)
    for line in found:
        view.add_row(
            line.bridge, line.target, line.table, str(line.rows), str(line.behind), str(line.skipped_rows),
            line.last, line.problem or ("running" if line.running else "stopped"),
        )  # fmt: skip
    out.print(view if found else "no bridge has run here yet")


def _need_tables() -> None:
    try:
        import trends.store  # noqa: F401  # it and all below it need the extra
    except ImportError as error:
        raise MissingDependency(
            f"{error.name} is not installed", hint="pip install 'edgeward[trends]'"
        ) from None


@dataclass(frozen=True)
class _Run:
    kind: str
    name: str | None
    tables: list[str] | None
    from_now: bool
    once: bool


@dataclass(frozen=True)
class _Made:
    """What a target is made from."""

    store: str
    cursor: Cursor
    clock: Clock
    stop: threading.Event


def _broker(url: str, ca: Path | None, cert: Path | None, key: Path | None) -> Broker:
    from urllib.parse import urlsplit

    from edgeward.mqtt import Broker

    if urlsplit(url).password:
        raise UsageError("an address with a password would be seen by all", hint="use --cert and --key")
    if (cert is None) != (key is None):
        raise UsageError("a certificate needs its key", hint="pass --cert and --key")
    broker = Broker(url, ca, cert, key)
    broker.endpoint()
    return broker


def _run(folder: Path, run: _Run, make: Callable[[_Made], Target]) -> None:
    from edgeward.clock import SystemClock
    from trends.bridges.bridge import Bridge
    from trends.bridges.cursor import Cursor
    from trends.bridges.feed import Feed
    from trends.store import Store

    tables = list(dict.fromkeys(run.tables or TABLES))
    for table in tables:
        if table not in TABLES:
            raise UsageError(f"there is no table {table}", hint=f"one of {', '.join(TABLES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    store = Store(folder, journal=os.environ.get(JOURNAL, ""))
    try:
        cursor = Cursor(folder, run.name or run.kind)
        with cursor.alone():
            clock = SystemClock()
            if cursor.state.kind not in ("", run.kind):
                raise UsageError(
                    f"the bridge {cursor.name} is of kind {cursor.state.kind}",
                    hint="give this one a --name of its own",
                )
            target = make(_Made(store.enrollment.name, cursor, clock, stop))
            try:
                cursor.state.kind, cursor.state.target = run.kind, target.where
                cursor.save()
                feeds = [Feed(store.tables, store.journal, table) for table in tables]
                print(f"edgeward bridge {cursor.name} runs from {folder} to {target.where}", flush=True)
                bridge = Bridge(feeds, target, cursor, clock, stop, from_now=run.from_now)
                handed_on = bridge.run(once=run.once)
                print(f"edgeward bridge {cursor.name} ends, {handed_on} rows were handed on", flush=True)
            finally:
                target.close()
    finally:
        store.close()
