"""`edgeward agent`: the daemon on an edge device."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console

from agent import hold_commands
from edgeward.cli import bundle
from edgeward.cli.context import naming, read_secret
from edgeward.cli.resources import parse_labels
from edgeward.errors import MissingDependency, NotFound, UsageError
from edgeward.wire.reports import Phase, SlotReport

if TYPE_CHECKING:
    from agent.peers.settings import Settings as PeerSettings
    from agent.serving.settings import Settings
    from edgeward.wire.enrollment import EnrollPending
    from edgeward.wire.reports import StreamReport

out = Console(highlight=False, soft_wrap=True)

Folder = Annotated[Path, typer.Option("--dir", help="The agent's folder: identity, models, outbox.")]


def register(app: typer.Typer) -> None:
    agent = typer.Typer(help="The daemon on an edge device.", no_args_is_help=True)
    agent.command()(enroll)
    agent.command()(run)
    agent.command()(status)
    hold_commands.register(agent)
    app.add_typer(agent, name="agent")
    bundle.extend(app, "import", import_)


def enroll(
    url: Annotated[str, typer.Option("--url", envvar="EDGEWARD_URL", help="The controller's address.")],
    token_file: Annotated[Path, typer.Option("--token-file", help="File with a single-use token.")],
    name: Annotated[str, typer.Option("--name", help="The device's name, unique in the fleet.")],
    folder: Folder,
    label: Annotated[str, typer.Option(help="Labels, as key=value,key=value.")] = "",
) -> None:
    """Get this device its identity. Where a person must approve it first, this waits; it may be run again.

    Example: `edgeward agent enroll --url http://127.0.0.1:8470 --token-file token --name line-1a --dir agent`
    """
    from agent.identity import enroll as do

    token = read_secret(token_file)
    told: list[EnrollPending] = []

    def wait(pending: EnrollPending) -> None:
        if not told:
            told.append(pending)
            out.print(
                f"{pending.name} waits for approval at site {pending.site}; its key is {pending.fingerprint}"
            )
            out.print(f"an admin lets it in: edgeward device approve {pending.name}")
        time.sleep(min(max(pending.retry_after, 1.0), 60.0))

    with naming(token_file):
        answer = do(folder, url, token, name, parse_labels(label), wait=wait)
    out.print(f"enrolled device {answer.name} at site {answer.sites[0]}")


def run(
    folder: Folder,
    broker: Annotated[
        str | None, typer.Option(help="mqtt:// or mqtts:// address; default: as enrolled.")
    ] = None,
    report_interval: Annotated[float, typer.Option(min=0.5, help="Seconds between health reports.")] = 10.0,
    serve: Annotated[
        str, typer.Option(help="HOST:PORT for local applications: Open Inference Protocol v2 over HTTP.")
    ] = "",
    serve_grpc: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The port for the same over gRPC, on the same host.")
    ] = None,
    serve_socket: Annotated[
        Path | None, typer.Option(help="A Unix socket for the same over HTTP; user and group may use it.")
    ] = None,
    peers_listen: Annotated[
        str,
        typer.Option(help="HOST:PORT where other agents of this site may fetch what is here (mutual TLS)."),
    ] = "",
    peer: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of another agent of this site; may be repeated.")
    ] = None,
    peers_dns: Annotated[
        str, typer.Option(help="NAME:PORT whose addresses are this site's agents: a headless Service on K3s.")
    ] = "",
    peers_mdns: Annotated[
        bool,
        typer.Option("--peers-mdns", help="Find agents, and be found, by multicast DNS on this network."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run the agent until it is told to end (SIGTERM or SIGINT). A kill at any instant loses nothing.

    Example: `edgeward agent run --dir agent --serve 127.0.0.1:8000`
    """
    from edgeward.clock import SystemClock

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("tuf").setLevel(logging.WARNING)
    if not folder.is_dir():
        raise NotFound(f"{folder} is not enrolled", hint="run `edgeward agent enroll` first")
    from agent.runtime.memory import share_one_heap

    try:
        from agent.daemon import Daemon
    except ImportError as error:
        raise MissingDependency(
            f"{error.name} is not installed", hint="pip install 'edgeward[agent]'"
        ) from None
    share_one_heap()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serving = _serving(serve, serve_grpc, serve_socket)
    daemon = Daemon(
        folder,
        SystemClock(),
        broker=broker,
        report_interval=report_interval,
        serving=serving,
        peers=_peers(peers_listen, peer or [], peers_dns, peers_mdns),
    )
    print(f"edgeward agent {daemon.name} ready in {folder}", flush=True)
    daemon.run(stop)


def _peers(listen: str, static: list[str], dns: str, mdns: bool) -> PeerSettings | None:
    if not (listen or static or dns or mdns):
        return None
    from agent.peers.settings import Settings, parse_address

    return Settings(
        listen=parse_address(listen, "--peers-listen") if listen else None,
        static=tuple(parse_address(text, "--peer") for text in static),
        dns=parse_address(dns, "--peers-dns") if dns else None,
        mdns=mdns,
    )


def _serving(address: str, grpc_port: int | None, unix_socket: Path | None) -> Settings | None:
    if not address and grpc_port is None and unix_socket is None:
        return None
    from agent.serving.settings import Settings

    host, port = "127.0.0.1", None
    if address:
        host, colon, digits = address.rpartition(":")
        if not colon or not digits.isdigit() or not host or int(digits) > 65535:
            raise UsageError(
                f"--serve: {address!r} is no address", hint="expected HOST:PORT, as 127.0.0.1:8000"
            )
        host, port = host.strip("[]"), int(digits)
    return Settings(host=host, port=port, grpc_port=grpc_port, unix_socket=unix_socket)


def status(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what the device holds, while its agent runs or not. Example: `edgeward agent status --dir agent`"""
    from agent.holds import Holds
    from agent.outbox.status import status as outbox_status
    from agent.peers.figures import FIGURES, read_figures
    from agent.state import State
    from edgeward.clock import SystemClock

    path = folder / "state.db"
    if not path.exists():
        raise NotFound(f"{folder} holds no agent's state", hint="run `edgeward agent run` first")
    now = SystemClock().now()
    holds = [hold for hold in Holds(folder).current() if hold.until is None or now < hold.until]
    obtained = read_figures(folder / FIGURES)
    state = State(path, read_only=True)
    try:
        reported_at, streams = state.stream_reports()
        reports = state.slot_reports()
        facts = {
            "generation": state.generation(),
            "timeFloor": state.time_floor(),
            "slots": {name: msgspec.to_builtins(record) for name, record in state.slots().items()},
            "quarantined": {
                digest: msgspec.to_builtins(verdict) for digest, verdict in state.quarantined().items()
            },
            "reports": {name: msgspec.to_builtins(report) for name, report in reports.items()},
            "shadows": {
                name: msgspec.to_builtins(report.shadow) for name, report in reports.items() if report.shadow
            },
            "streams": {"reported_at": reported_at, "reports": msgspec.to_builtins(streams)},
            "holds": msgspec.to_builtins(holds),
            "obtained": msgspec.to_builtins(obtained),
            **outbox_status(folder / "outbox.db"),
        }
    finally:
        state.close()
    if as_json:
        print(json.dumps(facts))
        return
    out.print(f"desired generation {facts['generation']}")
    for hold in holds:
        out.print(hold_commands.line_of(hold), markup=False)
    running_slots = dict(state_slots(facts))
    for name in sorted({*running_slots, *reports}):
        record = running_slots.get(name, {})
        running = record.get("running") or {}
        out.print(f"slot {name}: {running.get('model', 'nothing')}:{running.get('version', '-')}")
        for row in record.get("variants") or []:
            out.print(f"  {variant_line(row)}", markup=False)
        if (report := reports.get(name)) is not None and (line := wish_line(report)):
            out.print(f"  {line}", markup=False)
        if (shadow := dict(facts["shadows"]).get(name)) is not None:
            out.print(f"  {shadow_line(shadow)}", markup=False)
    for digest, verdict in dict(facts["quarantined"]).items():
        message = f": {verdict['message']}" if verdict["message"] else ""
        out.print(f"refused for good: {digest[:12]} {verdict['reason']}{message}", markup=False)
    for stream in streams:
        out.print(stream_line(stream), markup=False)
    if obtained.peer_blobs or obtained.controller_blobs:
        out.print(
            f"files: {obtained.peer_blobs} from peers ({bundle.size(obtained.peer_bytes)}), "
            f"{obtained.controller_blobs} from the controller ({bundle.size(obtained.controller_bytes)})"
        )
    for lane, numbers in dict(facts["outbox"]).items():
        lost = f", {numbers['lost']} were lost" if numbers["lost"] else ""
        out.print(f"outbox {lane}: {numbers['rows']} rows wait ({numbers['bytes'] / 1e6:.1f} MB){lost}")


def import_(
    file: Annotated[Path, typer.Argument(help="A bundle that `edgeward bundle export` wrote.")],
    folder: Folder,
) -> None:
    """Take a bundle on the device, while its agent runs or not.

    Everything in it is verified as if it came over the network; on any doubt nothing changes. The same
    bundle twice does no harm, and an import that was interrupted is simply run again.

    Example: `edgeward bundle import /media/stick/plant.edgeward-bundle --dir agent`
    """
    from edgeward.clock import SystemClock

    logging.getLogger("tuf").setLevel(logging.ERROR)
    if not folder.is_dir():
        raise NotFound(f"{folder} is not enrolled", hint="run `edgeward agent enroll` first")
    owner = folder.stat().st_uid
    if owner != os.geteuid():
        raise UsageError(
            f"{folder} belongs to user {owner}, whose agent could not use what another user writes there",
            hint=f"sudo -u '#{owner}' edgeward bundle import {file} --dir {folder}",
        )
    try:
        from agent.bundle import import_bundle
    except ImportError as error:
        raise MissingDependency(
            f"{error.name} is not installed", hint="pip install 'edgeward[agent]'"
        ) from None
    done = import_bundle(file, folder, SystemClock())
    models = ", ".join(f"{ref.model}:{ref.version}" for ref in done.models)
    out.print(f"verified {file} for {done.device}: generation {done.generation}, {models or 'no models'}")
    out.print(
        f"  took {done.taken} files ({bundle.size(done.bytes)}), {done.present} were here already, "
        f"{done.left} are for other devices"
    )
    if not done.news:
        out.print("  this generation was accepted here before; its files are at hand now")
    out.print("a running agent takes it within seconds, otherwise its next start does:")
    out.print(f"  edgeward agent status --dir {folder}")


def wish_line(report: SlotReport) -> str:
    """How far a slot is with what it shall run, and why; empty when that runs and nothing is to be said of it."""
    if report.target is None or (report.phase is Phase.ACTIVE and report.running == report.target):
        return ""
    why = ": ".join(part for part in (report.reason, report.message) if part)
    since, until = (
        f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M}" if at else "" for at in (report.since, report.deadline)
    )
    parts = [f"{report.target.model}:{report.target.version} is {report.phase}"]
    parts += [f"since {since}"] if since else []
    parts += [f"until {until}"] if until else []
    return " ".join(parts) + (f": {why}" if why else "")


def shadow_line(report: dict[str, Any]) -> str:
    """One run without acting (ShadowReport as builtins)."""
    parts = [f"shadow {report['digest'][:12]} {report['state']}"]
    parts.append(f"{report['agreed']} of {report['seen']} agreed")
    parts += [
        f"{report[key]} {key.replace('_', ' ')}" for key in ("failed", "not_finite", "skipped") if report[key]
    ]
    if report["psi"] is not None:
        parts.append(f"PSI {report['psi']:.3f}")
    if "p95" in report["latency_ms"]:
        parts.append(f"p95 {report['latency_ms']['p95']:.3g} ms")
    if report["memory_bytes"]:
        parts.append(f"{report['memory_bytes'] >> 20} MiB")
    return "  ".join([*parts, report["reason"]]).rstrip()


def variant_line(row: dict[str, Any]) -> str:
    """One row of the table that a variant was chosen from (VariantMeasure as builtins)."""
    parts = [f"{'*' if row['chosen'] else ' '} {row['name']}", row["provider"] or row["runtime"]]
    if row["p95_ms"] is not None:
        parts.append(f"p50 {row['p50_ms']:.3g} ms, p95 {row['p95_ms']:.3g} ms")
    if row["memory_bytes"]:
        parts.append(f"{row['memory_bytes'] >> 20} MiB")
    if row["quality"] is not None:
        parts.append(f"quality {row['quality']:.6g}")
    return "  ".join([*parts, row["reason"]]).rstrip()


def stream_line(report: StreamReport) -> str:
    """One stream in its newest report."""
    if report.reason:
        return f"stream {report.stream}: does not run: {report.reason}"
    counts = {"rows": report.rows, "alarms": report.alarms, "late": report.late, "rejected": report.rejected}
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "rows")
    return f"stream {report.stream}: {said} in the newest report"


def state_slots(facts: dict[str, object]) -> list[tuple[str, dict[str, Any]]]:
    slots = facts["slots"]
    return sorted(slots.items()) if isinstance(slots, dict) else []
