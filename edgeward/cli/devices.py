"""`edgeward device`: decide on devices that wait for approval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from edgeward.cli.context import TokenFile, Url, connect
from edgeward.cli.resources import age_of, clock, line, out
from edgeward.client import ControllerClient
from edgeward.errors import Conflict, NotFound

Name = Annotated[str, typer.Argument(help="The name that the device asked for.")]
Fingerprint = Annotated[
    str, typer.Option("--fingerprint", help="What the device shows of its key; the first digits are enough.")
]


def register(app: typer.Typer) -> None:
    device = typer.Typer(help="Devices that wait for approval.", no_args_is_help=True)
    device.command()(requests)
    device.command()(approve)
    device.command()(deny)
    app.add_typer(device, name="device")


def requests(
    url: Annotated[str | None, Url] = None, token_file: Annotated[Path | None, TokenFile] = None
) -> None:
    """Show which devices wait. Example: `edgeward device requests`"""
    with connect(url, token_file) as client:
        items = client.enrollment_requests()
    if not items:
        line("no device waits for approval")
        return
    view = Table("NAME", "SITE", "KEY", "LABELS", "AGE", box=None, pad_edge=False, header_style="bold")
    for item in items:
        labels = ",".join(f"{key}={value}" for key, value in sorted(item["labels"].items()))
        waited = age_of(clock.now() - item["createdAt"])
        view.add_row(item["name"], item["site"], item["fingerprint"][:16], labels, waited)
    out.print(view)


def approve(
    name: Name,
    fingerprint: Fingerprint = "",
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Let a device in that waits. Example: `edgeward device approve line-1a --fingerprint 9f86d081`"""
    _decide(name, fingerprint, "approve", url, token_file)


def deny(
    name: Name,
    fingerprint: Fingerprint = "",
    url: Annotated[str | None, Url] = None,
    token_file: Annotated[Path | None, TokenFile] = None,
) -> None:
    """Turn a device away that waits; its token is spent. Example: `edgeward device deny line-1a`"""
    _decide(name, fingerprint, "deny", url, token_file)


def _decide(name: str, fingerprint: str, decision: str, url: str | None, token_file: Path | None) -> None:
    with connect(url, token_file) as client:
        found = _request(client, name)["fingerprint"]
        if not found.startswith(fingerprint.lower()):
            raise Conflict(
                f"the request for {name!r} is of another key, {found}",
                hint="compare it with what the device shows",
            )
        client.decide_enrollment(name, decision, found)
    line(f"device {name} {'approved' if decision == 'approve' else 'denied'} (key {found[:16]})")


def _request(client: ControllerClient, name: str) -> dict[str, Any]:
    for item in client.enrollment_requests():
        if item["name"] == name:
            return item
    raise NotFound(f"no device waits for approval as {name!r}", hint="see `edgeward device requests`")
