"""`edgeward trends forward-status` and `residency-log`: what a site's store sent to a central one, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from edgeward.errors import NotFound

if TYPE_CHECKING:
    from trends.ledger import Ledger
    from trends.store import Store

out = Console(highlight=False)

Folder = Annotated[Path, typer.Option("--dir", help="The trend store's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


def _ledger(store: Store) -> Ledger:
    from edgeward.clock import SystemClock

    if not store.forwards:
        raise NotFound(
            f"{store.folder} has forwarded nothing yet", hint="edgeward trends serve --forward-to ADDRESS"
        )
    return store.ledger(SystemClock())


def forward_status(folder: Folder, as_json: Json = False) -> None:
    """How much of each lane the central store has, what may leave, and what was decided.

    Example: `edgeward trends forward-status --dir store`
    """
    from edgeward.clock import SystemClock
    from trends.forward_status import forward_status as ask
    from trends.identity import Identity
    from trends.query_commands import open_store

    store, clock = open_store(folder), SystemClock()
    try:
        identity, ledger = Identity(folder, clock), _ledger(store)
        status = ask(store.journal, ledger, identity.store.sites, identity.residency, clock.now())
        ledger.close()
    finally:
        store.close()
    if as_json:
        print(msgspec.json.encode(status).decode())
        return
    for site in status.terms:
        may = ", ".join(site.forward) or "nothing"
        said = site.held or f"{may} may leave, by the {site.source}'s policy {site.policy[:16]}"
        out.print(f"{site.site}: {said}")
    for lane in status.lanes:
        out.print(
            f"{lane.site} {lane.lane}: {lane.here - lane.behind} of {lane.here} numbers are settled at the central store"
        )
    for each in status.open:
        out.print(
            f"{each.site} {each.lane}, policy {each.policy[:16]}: {each.forwarded} forwarded, {each.withheld} withheld,"
            f" {each.lost} lost before, {each.bytes} bytes (in no record yet)"
        )
    out.print(f"{status.records} records of decisions, {status.reported} reported to the controller")


def residency_log(folder: Folder) -> None:
    """The records of residency decisions, one JSON line each; exit code 1 when the chain is broken.

    Example: `edgeward trends residency-log --dir store`
    """
    from trends.ledger import check_chain
    from trends.query_commands import open_store

    store = open_store(folder)
    try:
        ledger = _ledger(store)
        decisions = ledger.decisions()
        ledger.close()
    finally:
        store.close()
    for each in decisions:
        print(msgspec.json.encode(each).decode())
    check_chain(decisions)
