"""`edgeward agent hold` and `release-hold`: what a person at the device decides, while its agent runs or not."""

from __future__ import annotations

import errno
import os
import pwd
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from agent.holds import Holds, lifted, placed
from edgeward.clock import Clock, SystemClock
from edgeward.errors import EdgewardError, NotFound, UsageError
from edgeward.identifiers import check_name
from edgeward.wire.reports import Hold

out = Console(highlight=False, soft_wrap=True)

Folder = Annotated[Path, typer.Option("--dir", help="The agent's folder.")]


def register(agent: typer.Typer) -> None:
    agent.command()(hold)
    agent.command()(release_hold)


def hold(
    folder: Folder,
    reason: Annotated[str, typer.Option("--reason", help="Why; the fleet's people read it.")],
    slot: Annotated[str, typer.Option("--slot", help="One slot; without it, all of them.")] = "",
    until: Annotated[
        str, typer.Option("--until", help="When it ends by itself, as 2026-12-01T06:00 (local time).")
    ] = "",
) -> None:
    """Keep the running models, whatever the fleet wishes for, until the hold is released.

    Downloads go on, and a model that breaks its guard still gives way to its predecessor. Nobody can lift the
    hold over the network.

    Example: `edgeward agent hold --dir agent --until 2026-12-01T06:00 --reason "audit at the press"`
    """
    if not reason.strip():
        raise UsageError("--reason: expected a text", hint="the fleet's people see it instead of asking you")
    if slot:
        check_name(slot, "--slot")
    clock = SystemClock()
    ends = parse_until(until, clock) if until else None
    new = Hold(slot, local_user(os.environ), reason.strip()[:500], clock.now(), ends)
    _change(folder, "hold", lambda before: placed(before, new))
    out.print(f"{line_of(new)}; a running agent knows within a second", markup=False)
    if slot and (there := _slots(folder)) and slot not in there:
        out.print(f"this device has no slot {slot} yet, only {', '.join(there)}", markup=False)


def release_hold(
    folder: Folder,
    slot: Annotated[str, typer.Option("--slot", help="The hold of one slot; without it, every hold.")] = "",
) -> None:
    """End holds: what waits goes on. Example: `edgeward agent release-hold --dir agent`"""
    gone: list[Hold] = []

    def change(before: tuple[Hold, ...]) -> tuple[Hold, ...]:
        after = lifted(before, slot or None)
        gone.extend(one for one in before if one not in after)
        return after

    left = _change(folder, "release-hold", change)
    if not gone:
        raise NotFound(f"nothing is held here{f' for slot {slot}' if slot else ''}", hint=_what(left))
    for one in gone:
        out.print(f"released: {line_of(one)}", markup=False)


def _what(holds: tuple[Hold, ...]) -> str:
    return "; ".join(map(line_of, holds)) or "see `edgeward agent status`"


def line_of(hold: Hold) -> str:
    """`slot press is held by anna until 2026-12-01 06:00: audit`."""
    ends = "" if hold.until is None else f" until {datetime.fromtimestamp(hold.until):%Y-%m-%d %H:%M}"
    what = f"slot {hold.slot} is" if hold.slot else "all slots are"
    return f"{what} held by {hold.by or 'nobody known'}{ends}: {hold.reason}"


def parse_until(text: str, clock: Clock) -> float:
    """Seconds since 1970; without an offset it is local time. Raises UsageError."""
    try:
        at = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(
            f"--until: {text!r} is no time", hint="expected 2026-12-01T06:00, or with an offset as +01:00"
        ) from None
    if at <= clock.now():
        raise UsageError(
            f"--until: {text} is over",
            hint=f"here it is {datetime.fromtimestamp(clock.now(), UTC).astimezone():%Y-%m-%dT%H:%M}",
        )
    return at


def local_user(environment: Mapping[str, str]) -> str:
    """Who sits there: with sudo the person, and whose rights they used. To be told, not to be trusted."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = f"user {os.getuid()}"
    person = environment.get("SUDO_USER", "")[:64]
    return f"{person} (as {user})" if person and person != user else user


def _change(
    folder: Path, command: str, change: Callable[[tuple[Hold, ...]], tuple[Hold, ...]]
) -> tuple[Hold, ...]:
    try:
        return _holds(folder, command).change(change)
    except OSError as error:
        raise EdgewardError(
            f"{folder}: nothing was changed, since it cannot be written: {error.strerror}",
            hint="make room on the disk, and try again" if error.errno == errno.ENOSPC else "",
        ) from None


def _slots(folder: Path) -> list[str]:
    """What the agent has told of; a hold for a slot that is still to come is a hold, too."""
    from agent.state import State

    path = folder / "state.db"
    if not path.exists():
        return []
    try:
        with closing(State(path, read_only=True)) as state:
            return sorted({*state.slots(), *state.slot_reports()})
    except sqlite3.Error:  # it is damaged, or just being made: the hold stands all the same
        return []


def _holds(folder: Path, command: str) -> Holds:
    if not folder.is_dir():
        raise NotFound(f"{folder} is no agent's folder", hint="run `edgeward agent enroll` first")
    owner = folder.stat().st_uid
    if owner != os.geteuid():
        raise UsageError(
            f"{folder} belongs to user {owner}, whose agent could not read what another user writes there",
            hint=f"sudo -u '#{owner}' edgeward agent {command} --dir {folder} ...",
        )
    return Holds(folder)
