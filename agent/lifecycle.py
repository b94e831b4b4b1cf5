"""A slot's lifecycle: one table, pure. `step` decides, the shell in `agent/slots/` acts.

The running model is not part of the phase: it keeps serving until a candidate has become Active.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypedDict

import msgspec

from agent.runtime import recovery
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase, WaitReason
from edgeward.wire.slots import SlotPolicy


class Event(StrEnum):
    """What can happen to a candidate, and to what runs."""

    WISHED = "wished"
    BEGUN = "begun"
    FETCHED = "fetched"
    VERIFIED = "verified"
    TESTING = "testing"
    SHADOWING = "shadowing"
    PASSED = "passed"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    CRASH_LOOP = "crash-loop"
    RECOVERED = "recovered"
    BREACHED = "breached"
    ROLLED_BACK = "rolled-back"
    ALONE = "alone"
    CLOSED = "closed"
    HELD = "held"
    RELEASED = "released"


#: (phase, event) -> phase. Whatever is not here cannot happen, and `step` says so.
TABLE: dict[tuple[Phase, Event], Phase] = {
    (Phase.PENDING, Event.BEGUN): Phase.DOWNLOADING,
    (Phase.DOWNLOADING, Event.FETCHED): Phase.VERIFYING,
    (Phase.DOWNLOADING, Event.UNAVAILABLE): Phase.PENDING,
    (Phase.DOWNLOADING, Event.REFUSED): Phase.QUARANTINED,
    (Phase.VERIFYING, Event.VERIFIED): Phase.STAGED,
    (Phase.VERIFYING, Event.REFUSED): Phase.QUARANTINED,
    (Phase.VERIFYING, Event.UNAVAILABLE): Phase.PENDING,
    (Phase.STAGED, Event.TESTING): Phase.SELF_TEST,
    (Phase.SELF_TEST, Event.PASSED): Phase.ACTIVE,
    (Phase.SELF_TEST, Event.REFUSED): Phase.QUARANTINED,
    (Phase.SELF_TEST, Event.UNAVAILABLE): Phase.PENDING,
    # On live inputs, beside what runs and without acting.
    (Phase.SELF_TEST, Event.SHADOWING): Phase.SHADOW,
    (Phase.SHADOW, Event.PASSED): Phase.ACTIVE,
    (Phase.SHADOW, Event.REFUSED): Phase.QUARANTINED,
    (Phase.SHADOW, Event.UNAVAILABLE): Phase.PENDING,
    (Phase.ACTIVE, Event.CRASH_LOOP): Phase.DEGRADED,
    (Phase.DEGRADED, Event.RECOVERED): Phase.ACTIVE,
    # Not the time for it, or somebody at the device says no: what has been done so far stays.
    (Phase.PENDING, Event.CLOSED): Phase.PENDING,
    (Phase.DOWNLOADING, Event.CLOSED): Phase.PENDING,
    (Phase.STAGED, Event.CLOSED): Phase.STAGED,
    (Phase.SELF_TEST, Event.CLOSED): Phase.STAGED,
    (Phase.SHADOW, Event.CLOSED): Phase.STAGED,
    (Phase.STAGED, Event.HELD): Phase.HELD,
    (Phase.SELF_TEST, Event.HELD): Phase.HELD,
    (Phase.SHADOW, Event.HELD): Phase.HELD,
    (Phase.HELD, Event.HELD): Phase.HELD,
    (Phase.HELD, Event.RELEASED): Phase.STAGED,
    # The guard's policy is broken: the predecessor takes over, or there is none that can.
    (Phase.ACTIVE, Event.BREACHED): Phase.ROLLING_BACK,
    (Phase.DEGRADED, Event.BREACHED): Phase.ROLLING_BACK,
    (Phase.ROLLING_BACK, Event.ROLLED_BACK): Phase.QUARANTINED,
    (Phase.ROLLING_BACK, Event.ALONE): Phase.DEGRADED,
    # A new wish may come at any time and begins at the start.
    **{(phase, Event.WISHED): Phase.PENDING for phase in Phase},
}


@dataclass(frozen=True)
class SlotState:
    """The newest wish for a slot, how far it is, and why. Times are seconds since 1970; `until` is when a
    window opens or a hold ends, 0 when nobody knows."""

    target: ModelRef
    policy: SlotPolicy = field(default_factory=SlotPolicy)
    phase: Phase = Phase.PENDING
    reason: str = ""
    message: str = ""
    measured: float | None = None
    limit: float | None = None
    since: float = 0.0
    retry_at: float = 0.0
    failures: int = 0
    until: float = 0.0


RETRY_BASE, RETRY_MAX = 1.0, 300.0
#: The device's own disk need not be spared, and may have room again at any moment.
DISK_RETRY_MAX = 30.0
#: A peer that asks for more patience than this is not believed.
ASKED_MAX = 3600.0
#: A float ends where a device has been offline for some days.
_DOUBLINGS = 20
_WAITS = frozenset(WaitReason)


class Verdict(msgspec.Struct, frozen=True):
    """Why a digest is never tried again on this device, with the figures; `at` is seconds since 1970."""

    reason: str
    at: float
    message: str = ""
    measured: float | None = None
    limit: float | None = None


def due(state: SlotState, now: float) -> bool:
    """Whether a Pending candidate may try (again). A time beyond any wait was set by a clock since put right."""
    return state.phase is Phase.PENDING and not now < state.retry_at <= now + max(RETRY_MAX, ASKED_MAX)


def waits(state: SlotState) -> bool:
    """Whether it is the site's hours or a hold that it waits for, and not a next try."""
    return state.phase in (Phase.STAGED, Phase.HELD) or (
        state.phase is Phase.PENDING and state.reason in _WAITS
    )


def wish(
    target: ModelRef, quarantined: Mapping[str, Verdict], now: float, policy: SlotPolicy | None = None
) -> SlotState:
    """The state for a new wish; a quarantined digest is refused at once, without fetching it again."""
    policy = policy or SlotPolicy()
    verdict = quarantined.get(target.digest)
    if verdict is None:
        return SlotState(target, policy, since=now)
    return SlotState(
        target,
        policy,
        Phase.QUARANTINED,
        verdict.reason,
        f"refused on this device before: {verdict.message}".removesuffix(": "),
        verdict.measured,
        verdict.limit,
        verdict.at,
    )


def at_once(state: SlotState) -> SlotState:
    """The state whose next try is now: what was unavailable has come."""
    if state.phase is not Phase.PENDING:
        return state
    # What waits for a window to download in may be here already.
    return replace(state, retry_at=0.0, until=0.0, reason="" if waits(state) else state.reason)


def holds(target: ModelRef, policy: SlotPolicy, losses: int, now: float) -> SlotState:
    """The state when what is wished for runs already; with `losses` it is in a crash loop."""
    state = SlotState(target, policy, Phase.ACTIVE, since=now)
    return crash_loop(state, losses, now) if losses else state


def crash_loop(state: SlotState, losses: int, now: float) -> SlotState:
    """The running model's worker is lost again and again: `losses` within recovery.LOOP_SECONDS."""
    return step(
        state,
        Event.CRASH_LOOP,
        now,
        reason="CrashLoop",
        message=f"the model's worker was lost {losses} times within {recovery.LOOP_SECONDS:.0f} s",
        measured=float(losses),
        limit=float(recovery.LOOP_LOSSES),
    )


def recovered(state: SlotState, now: float) -> SlotState:
    """The crash loop is over."""
    message = f"no worker was lost for {recovery.LOOP_SECONDS:.0f} s"
    return step(state, Event.RECOVERED, now, reason="Recovered", message=message)


class Details(TypedDict, total=False):
    """What `step` may be told besides the event."""

    reason: str
    message: str
    measured: float | None
    limit: float | None
    asked: float
    patience: float
    until: float


def step(
    state: SlotState,
    event: Event,
    now: float,
    *,
    reason: str = "",
    message: str = "",
    measured: float | None = None,
    limit: float | None = None,
    asked: float = 0.0,
    patience: float = RETRY_MAX,
    until: float = 0.0,
) -> SlotState:
    """The state after `event`. Raises ValueError when the table has no such step.

    After UNAVAILABLE the next try waits, twice as long each time, up to `patience` seconds; never less than
    the `asked` seconds that the peer wants to be left alone (up to ASKED_MAX).
    """
    phase = TABLE.get((state.phase, event))
    if phase is None:
        raise ValueError(f"no step for {event} in phase {state.phase}")
    failures = state.failures + 1 if event is Event.UNAVAILABLE else state.failures
    wait = min(RETRY_BASE * 2 ** min(max(failures - 1, 0), _DOUBLINGS), patience)
    wait = max(wait, min(asked, ASKED_MAX))
    retry_at = now + wait if event is Event.UNAVAILABLE else 0.0
    return replace(
        state,
        phase=phase,
        reason=reason,
        message=message,
        measured=measured,
        limit=limit,
        since=now if phase is not state.phase else state.since,
        retry_at=retry_at,
        failures=failures,
        until=until,
    )
