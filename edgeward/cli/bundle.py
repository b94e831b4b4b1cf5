"""`bundle`: models and decisions on a stick, for devices that no network reaches."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeward.bundle import SUFFIX
from edgeward.cli.context import TokenFile, Url, connect
from edgeward.cli.resources import line
from edgeward.client import ControllerClient
from edgeward.client.bundle import Exported, export
from edgeward.errors import NotFound, UsageError

NAME = "bundle"


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Models and desired states in one file, for a device without a network.",
                        no_args_is_help=True)  # fmt: skip
    group.command(name="export")(export_)
    app.add_typer(group, name=NAME)


def extend(app: typer.Typer, name: str, command: Callable[..., Any]) -> None:
    """Add a command of an application, such as the agent's `import`, to the group of `register`."""
    for group in app.registered_groups:
        if group.name == NAME and group.typer_instance is not None:
            group.typer_instance.command(name=name)(command)


def export_(
    out: Annotated[Path, typer.Option("--out", help=f"The file to write, NAME{SUFFIX}.")],
    device: Annotated[
        list[str] | None, typer.Option("--device", help="NAME or NAME,NAME; may be repeated.")
    ] = None,
    site: Annotated[str, typer.Option("--site", help="All devices of a site instead.")] = "",
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Write what devices are to run, with all signatures, into one file to be carried to them.

    Examples: `edgeward bundle export --device line-1a,line-1b --out line-1.edgeward-bundle` and
    `edgeward bundle export --site plant --out /media/stick/plant.edgeward-bundle`

    Then, on each device: `edgeward bundle import FILE --dir AGENT_DIR`
    """
    names = [name for text in device or [] for name in text.split(",") if name]
    if bool(names) == bool(site):
        raise UsageError("for which devices?", hint="pass either --device NAME[,NAME...] or --site SITE")
    if not out.name.endswith(SUFFIX):
        raise UsageError(f"{out}: a bundle's name ends in {SUFFIX}", hint=f"--out {out}{SUFFIX}")
    with connect(url, token_file) as client:
        exported = export(client, names or _at_site(client, site), out)
    for text in describe(out, exported):
        line(text)


def _at_site(client: ControllerClient, site: str) -> list[str]:
    client.get("Site", site)
    found = [
        str(item["metadata"]["name"])
        for item in client.find("Device")
        if item["spec"]["site"] == site and not item["spec"].get("revoked")
    ]
    if not found:
        raise NotFound(f"site {site} has no device", hint="`edgeward get devices` shows those there are")
    return found


def size(count: int) -> str:
    """Bytes for a person."""
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count / 1024:.1f} KiB"


def moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


def describe(out: Path, exported: Exported) -> list[str]:
    lines = [f"wrote {out}, {size(exported.size)}"]
    for name, state in exported.desired.items():
        wished = ", ".join(
            f"{slot}={target.active.model}:{target.active.version}"
            for slot, target in sorted(state.slots.items())
        )
        lines.append(
            f"  device {name}: generation {state.generation}, {wished or 'no models'}, "
            f"{len(state.streams)} streams"
        )
    for item in exported.models:
        lines.append(
            f"  model {item.ref.model}:{item.ref.version}: {size(item.size)}, {item.blobs} blobs, "
            f"for {', '.join(item.devices)}"
        )
    lines.append(
        f"  release metadata: {size(exported.metadata_size)}, timestamp version {exported.timestamp_version}"
    )
    lines.append(f"import it before {moment(exported.expires_at)}, when {exported.expires} expires:")
    lines.append(f"  edgeward bundle import {out} --dir AGENT_DIR")
    return lines
