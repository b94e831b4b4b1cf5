"""`edgeward trends models`, `readers` and `api`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edgeward.cli.context import TokenFile, Url, connect
from edgeward.errors import UsageError
from trends.query_commands import Folder, open_store

out = Console(highlight=False)
_DAY = 86_400.0


def models(
    folder: Folder,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Make the table anew from results and trends.")
    ] = False,
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="table, csv, json, jsonl or arrow.")
    ] = "table",
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Write to a .csv, .json, .jsonl, .arrow or .parquet file.")
    ] = None,
) -> None:
    """Which models the tables know: digest, version, lineage, where and when they were seen.

    With --refresh and --url the controller is asked for the manifests of digests that are not described yet; each
    is checked against its digest. Without --url what is known stays.

    Example: `edgeward trends models --dir store --refresh --url http://127.0.0.1:8470 --token-file admin.token`
    """
    store = open_store(folder)
    from trends.deliver import batches_of, deliver, note, working
    from trends.models import dimension, fetch_manifests

    try:
        known = store.engine.models.table()
        if refresh:
            with working("reading results and trends"):
                seen = store.engine.seen()
            manifests = {}
            if url is not None:
                described = {row["digest"] for row in known.to_pylist() if row["model"] is not None}
                wanted = sorted({item["digest"] for item in seen} - described)
                with connect(url, token_file) as client, working(f"asking for {len(wanted)} manifests"):
                    manifests = fetch_manifests(
                        client, wanted, lambda digest: note(f"{digest[:12]}: the controller does not have it")
                    )
            known = dimension(seen, known, manifests)
            store.engine.models.write(known)
        elif not known.num_rows:
            note("nothing is known yet: use --refresh")
        deliver(batches_of(known), output, out_file)
    finally:
        store.close()


readers = typer.Typer(help="Who may ask this store over HTTP.", no_args_is_help=True)


@readers.command("add")
def add_reader(
    name: Annotated[str, typer.Argument(help="A name for the log, e.g. grafana.")],
    folder: Folder,
    site: Annotated[
        list[str] | None, typer.Option(help="Only this site; may be repeated. Default: all.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the token is good.")] = 90,
) -> None:
    """Make a token that may read. It is printed once; the store keeps its hash only.

    Example: `edgeward trends readers add grafana --dir store --site north > grafana.token`
    """
    from edgeward.clock import SystemClock
    from trends.identity import read_enrollment
    from trends.readers import Readers

    known = read_enrollment(folder).sites
    if unknown := sorted(set(site or []) - set(known)):
        raise UsageError(f"the store is not for site {unknown[0]}", hint=f"it is for {', '.join(known)}")
    sites = frozenset(site) if site else None
    print(Readers(folder).add(name, sites, SystemClock().now() + days * _DAY))


@readers.command("list")
def list_readers(folder: Folder) -> None:
    """Who may read, of which sites, until when."""
    import datetime

    from trends.readers import Readers

    for reader in Readers(folder).all():
        until = datetime.datetime.fromtimestamp(reader.expires_at, datetime.UTC).date()
        out.print(f"{reader.name}: {', '.join(reader.sites) if reader.sites else 'all sites'}, until {until}")


@readers.command("remove")
def remove_reader(name: Annotated[str, typer.Argument()], folder: Folder) -> None:
    """End a token at once."""
    from trends.readers import Readers

    Readers(folder).remove(name)
    out.print(f"removed {name}")


def api(
    folder: Folder,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:8480",
    tls_cert: Annotated[Path | None, typer.Option(help="The server's certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="Let in only clients with a certificate of this CA (mTLS).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="How long one query may take.")] = 60.0,
    rows: Annotated[int, typer.Option(min=1, max=10_000_000, help="Rows of one answer.")] = 1_000_000,
) -> None:
    """Answer queries over HTTP, as Arrow IPC streams, to readers with a token.

    Beside `edgeward trends serve`, which it does not disturb. Beyond this machine it wants TLS.

    Example: `edgeward trends api --dir store --listen 0.0.0.0:8480 --tls-cert store.pem --tls-key store.key`
    """
    import signal

    from edgeward.clock import SystemClock

    if (tls_cert is None) != (tls_key is None) or (client_ca is not None and tls_cert is None):
        raise UsageError("expected --tls-cert and --tls-key together, and --client-ca with them")
    host, port = _address(listen)
    store = open_store(folder)
    from trends.api import Api, Limits, Server, check_address, tls_context
    from trends.readers import Readers

    try:
        check_address(host, tls_cert is not None)
        tls = tls_context(tls_cert, tls_key, client_ca) if tls_cert and tls_key else None
        limits = Limits(seconds=seconds, rows=rows)
        served = Api(store.tables, store.journal, Readers(folder), SystemClock(), limits)
        try:
            server = Server((host, port), served, tls)
        except OSError as error:
            raise UsageError(f"cannot listen on {listen}: {error.strerror}") from None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        scheme = "http" if tls is None else "https"
        print(f"edgeward trend store answers on {scheme}://{host}:{server.server_address[1]}", flush=True)
        with server:
            server.serve_forever()
    finally:
        store.close()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--listen {text!r} is no address", hint="expected HOST:PORT, e.g. 127.0.0.1:8480")
    return host.strip("[]"), int(port)
