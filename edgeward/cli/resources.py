"""`apply`, `get`, `delete`, `rollout` and `token`: the resources of a fleet."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edgeward.cli.context import TokenFile, Url, connect
from edgeward.client import ControllerClient
from edgeward.clock import SystemClock
from edgeward.errors import EdgewardError, InvalidDocument, UsageError
from edgeward.manifests import read_named
from edgeward.wire.resources import SPECS, kind_of

out = Console(highlight=False)
clock = SystemClock()

ENDED = ("Complete", "Halted", "Superseded")


def line(text: str) -> None:
    """One line stays one line, also for `grep` behind a pipe."""
    out.print(text, markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    app.command()(apply)
    app.command(name="get")(get_)
    app.command()(delete)
    rollout = typer.Typer(help="Follow and steer rollouts.", no_args_is_help=True)
    rollout.command(name="status")(rollout_status)
    rollout.command(name="pause")(rollout_pause)
    rollout.command(name="resume")(rollout_resume)
    app.add_typer(rollout, name="rollout")
    token = typer.Typer(help="Enrolment tokens for devices and trend stores.", no_args_is_help=True)
    token.command(name="create")(token_create)
    app.add_typer(token, name="token")


def apply(
    filename: Annotated[
        list[Path], typer.Option("-f", "--filename", help="File, folder, or - for standard input.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, change nothing.")] = False,
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Create or change resources from YAML, all of them or none.

    Example: `edgeward apply -f fleet_configs/demo`
    """
    named = read_named(filename)
    with connect(url, token_file) as client:
        try:
            results = client.apply([resource for _, resource in named], dry_run=dry_run)
        except InvalidDocument as error:
            # The controller names the resource; the person wrote a file.
            files = {f"{one.kind}/{one.metadata.name}": file for file, one in named}
            source = f"{files[error.source]}: {error.source}" if error.source in files else error.source
            raise InvalidDocument(error.problem, source=source, field=error.field, hint=error.hint) from None
    for result in results:
        line(f"{result['kind']}/{result['name']} {result['result']}{' (dry run)' if dry_run else ''}")


def get_(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(SPECS)} (any case, singular or plural).")],
    name: Annotated[str | None, typer.Argument(help="One resource; without it, all of the kind.")] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="table, json or yaml.")] = "table",
    selector: Annotated[str, typer.Option("-l", "--selector", help="Labels, as key=value,key=value.")] = "",
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Show resources.

    Examples: `edgeward get devices -l site=north` and `edgeward get rollout r1 -o yaml`
    """
    if output not in ("table", "json", "yaml"):
        raise UsageError(f"unknown output {output!r}", hint="one of table, json, yaml")
    kind = kind_of(kind)
    with connect(url, token_file) as client:
        items = [client.get(kind, name)] if name else client.find(kind, selector=parse_labels(selector))
    if output == "table":
        out.print(table(kind, items) if items else f"no {kind} found")
    elif output == "json":
        print(json.dumps(items[0] if name else items, indent=2))
    else:
        print(yaml.safe_dump_all(items, sort_keys=False), end="")


def delete(
    kind: Annotated[str, typer.Argument(help="The kind, as for `get`.")],
    name: Annotated[str, typer.Argument(help="The resource's name.")],
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Delete a resource that nothing refers to. Example: `edgeward delete fleet turbines`"""
    kind = kind_of(kind)
    with connect(url, token_file) as client:
        client.delete(kind, name)
    line(f"{kind}/{name} deleted")


def rollout_status(
    name: Annotated[str, typer.Argument(help="The rollout's name.")],
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Follow it live until it ends.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to watch at most.")] = 3600.0,
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Show a rollout: its waves, gates and timeline. Exit code 1 when it has halted.

    Example: `edgeward rollout status shuttle-v2 -w`
    """
    with connect(url, token_file) as client:
        rollout = client.get("Rollout", name)
        if watch:
            rollout = _watch(client, name, rollout, clock.monotonic() + timeout)
        else:
            line(rollout_view(rollout))
    if rollout["status"].get("phase") == "Halted":
        raise typer.Exit(1)


def _watch(client: ControllerClient, name: str, rollout: dict[str, Any], until: float) -> dict[str, Any]:
    """Poll once a second: live redraw on a terminal, new timeline lines only when piped."""
    printed = 0
    with Live(console=out, auto_refresh=False, transient=False) as live:
        while True:
            if out.is_terminal:
                live.update(rollout_view(rollout), refresh=True)
            else:
                timeline = rollout["status"].get("timeline", [])
                for event in timeline[printed:]:
                    line(event_line(event))
                printed = len(timeline)
            if rollout["status"].get("phase") in ENDED:
                break
            if clock.monotonic() > until:
                raise EdgewardError(
                    f"rollout {name} has not ended yet", hint="watch again, or raise --timeout"
                )
            time.sleep(1.0)
            rollout = client.get("Rollout", name)
    if not out.is_terminal:
        line(rollout_headline(rollout))
    return rollout


def _set_paused(name: str, paused: bool, url: str | None, token_file: Path | None) -> None:
    with connect(url, token_file) as client:
        rollout = client.get("Rollout", name)
        rollout["spec"]["paused"] = paused
        client.replace(rollout)
    line(f"Rollout/{name} {'paused' if paused else 'resumed'}")


def rollout_pause(
    name: Annotated[str, typer.Argument(help="The rollout's name.")],
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Start no further wave until resumed; devices that have begun finish."""
    _set_paused(name, True, url, token_file)


def rollout_resume(
    name: Annotated[str, typer.Argument(help="The rollout's name.")],
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Go on with a paused rollout."""
    _set_paused(name, False, url, token_file)


def token_create(
    site: Annotated[
        list[str], typer.Option("--site", help="The site; repeat it for a trend store of several.")
    ],
    role: Annotated[Literal["device", "store"], typer.Option(help="Whose token it is.")] = "device",
    ttl: Annotated[float, typer.Option(help="Seconds the token is valid.")] = 3600.0,
    label: Annotated[str, typer.Option(help="Labels the device gets, as key=value,key=value.")] = "",
    approval: Annotated[
        bool, typer.Option("--approval", help="The device waits until `edgeward device approve`.")
    ] = False,
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Print a single-use enrolment token. Example: `edgeward token create --site north > token`"""
    with connect(url, token_file) as client:
        labels = parse_labels(label)
        print(client.create_enrollment_token(site, role=role, ttl=ttl, labels=labels, approval=approval))


def parse_labels(text: str) -> dict[str, str]:
    """`a=1,b=2` as a mapping. Raises UsageError."""
    labels = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{pair!r} is not a label", hint="expected key=value,key=value")
        labels[key] = value
    return labels


def age_of(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(0, int(seconds))}s"


def table(kind: str, items: list[dict[str, Any]]) -> Table:
    """The columns that matter of each kind."""
    view = Table(box=None, pad_edge=False, header_style="bold")
    columns: dict[str, list[str]] = {
        "Device": ["NAME", "SITE", "ONLINE", "STATE", "CONDITIONS", "HELD", "MODELS", "AGE"],
        "Rollout": ["NAME", "FLEET", "MODEL", "PHASE", "UPDATED", "REASON", "AGE"],
        "ModelVersion": ["NAME", "MODEL", "VERSION", "DIGEST", "AGE"],
        "Fleet": ["NAME", "SELECTOR", "STREAMS", "AGE"],
        "Stream": ["NAME", "SOURCE", "RUNNING", "REASON", "AGE"],
    }
    for column in columns.get(kind, ["NAME", "LABELS", "AGE"]):
        view.add_column(column)

    def add(*cells: str) -> None:
        view.add_row(*map(Text, cells))  # what devices say is no markup

    now = clock.now()
    for item in items:
        metadata, spec, status = item["metadata"], item["spec"], item.get("status", {})
        age = age_of(now - metadata.get("creationTimestamp", now))
        name = metadata["name"]
        match kind:
            case "Device":
                running = ", ".join(
                    f"{slot}={(report.get('running') or {}).get('model', '-')}"
                    f":{(report.get('running') or {}).get('version', '-')}"
                    for slot, report in sorted(status.get("slots", {}).items())
                )
                add(
                    name,
                    spec["site"],
                    status.get("connection", "Unseen"),
                    "Revoked" if spec.get("revoked") else status.get("state", ""),
                    ", ".join(condition_word(one) for one in status.get("conditions", [])),
                    "; ".join(hold_word(one, now) for one in status.get("holds", [])),
                    running,
                    age,
                )
            case "Rollout":
                counts = f"{status.get('updated', 0)}/{status.get('devices', 0)}"
                add(
                    name,
                    spec["fleet"],
                    f"{spec['model']}:{spec['version']}",
                    status.get("phase", "Pending"),
                    counts,
                    status.get("reason", ""),
                    age,
                )
            case "Stream":
                reasons = status.get("reasons", [])
                add(
                    name,
                    next(iter(spec["source"]), ""),
                    f"{status.get('running', 0)}/{status.get('devices', 0)}",
                    f"{reasons[0]['device']}: {reasons[0]['reason']}" if reasons else "",
                    age,
                )
            case "ModelVersion":
                add(name, spec["model"], str(spec["version"]), spec["digest"][:16], age)
            case "Fleet":
                match = ",".join(f"{key}={value}" for key, value in spec["matchLabels"].items())
                add(name, match, ",".join(spec.get("streams", [])), age)
            case _:
                add(name, ",".join(f"{k}={v}" for k, v in metadata.get("labels", {}).items()), age)
    return view


def condition_word(condition: dict[str, Any]) -> str:
    """`ProviderFallback`, or `StreamsRunning=False` where the type names what should be."""
    kind, held = condition["type"], condition["status"]
    return f"{kind}" if held == "True" else f"{kind}={held}"


def hold_word(hold: dict[str, Any], now: float) -> str:
    """`press by anna for 2h: audit`: which slot (none: all), who set it, how long ago, and why."""
    whom = f"{hold['slot']} by" if hold["slot"] else "by"
    return f"{whom} {hold['by'] or 'nobody known'} for {age_of(now - hold['since'])}: {hold['reason']}"


def event_line(event: dict[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
    device = f" {event['device']}" if event.get("device") else ""
    return f"{at}  wave {event.get('wave', 0) + 1}{device}  {event['reason']}: {event['message']}"


def rollout_headline(rollout: dict[str, Any]) -> str:
    spec, status = rollout["spec"], rollout["status"]
    headline = (
        f"{rollout['metadata']['name']}: {spec['model']}:{spec['version']} to {spec['fleet']} — "
        f"{status.get('phase', 'Pending')}, {status.get('updated', 0)}/{status.get('devices', 0)} devices"
    )
    reason = ": ".join(part for part in (status.get("reason", ""), status.get("message", "")) if part)
    return f"{headline} ({reason})" if reason else headline


def rollout_view(rollout: dict[str, Any]) -> str:
    status = rollout["status"]
    lines = [rollout_headline(rollout)]
    for index, wave in enumerate(status.get("waves", [])):
        verdict = "passed" if wave.get("passedAt") else f"{wave['succeeded']} ok, {wave['failed']} failed"
        lines.append(
            f"  wave {index + 1}: {len(wave['devices'])} devices ({', '.join(wave['devices'][:8])}) {verdict}"
        )
    lines += [f"  {event_line(event)}" for event in status.get("timeline", [])[-20:]]
    return "\n".join(lines)
