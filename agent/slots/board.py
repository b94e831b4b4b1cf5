"""What a device's slots wish for and run: shared by what tries candidates and what looks after the running."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from agent.lifecycle import SlotState
from agent.slots.active import ActiveModel
from agent.state import SlotRecord
from edgeward.clock import Clock
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase, ShadowReport, SlotReport, VariantMeasure

log = logging.getLogger(__name__)

#: What is wished for runs.
RUNNING = (Phase.ACTIVE, Phase.DEGRADED)
#: No slot's name holds it: behind it, a slot's candidate that is to run without acting for as long as it is wished.
BESIDE = "@shadow"


class Board:
    """Change it with `lock` held only; call `changed` afterwards, without it.

    `candidates` is how far the newest wish for each slot is, `active` what runs, `records` what is written
    down of it, and `tables` what the newest choice of a variant was made from. `looping` holds the slots
    whose running model is in a crash loop, with the losses that made it one, and `alone` those that break
    their guard and have nothing to go back to, with the reason. `shadows` is the newest run of each without
    acting; under a slot's name with BESIDE is a candidate that shall never act. `untidy`: the disk may hold what no slot
    needs, since a killed agent could not remove it or wishes have changed.
    """

    def __init__(self, records: Mapping[str, SlotRecord], clock: Clock, changed: Callable[[], None]) -> None:
        self.lock = threading.Condition()
        self.clock = clock
        self._changed = changed
        self.records = dict(records)
        self.candidates: dict[str, SlotState] = {}
        self.active: dict[str, ActiveModel] = {}
        self.tables: dict[str, tuple[VariantMeasure, ...]] = {}
        self.looping: dict[str, int] = {}
        self.alone: dict[str, str] = {}
        self.shadows: dict[str, ShadowReport] = {}
        self.untidy = False
        self.stop = False

    def changed(self) -> None:
        """Tell it, without the lock. Never raises: what somebody makes of a change is no part of it."""
        try:
            self._changed()
        except Exception:
            log.exception("telling that the slots have changed")

    def report(self) -> dict[str, SlotReport]:
        with self.lock:
            names = {name.removesuffix(BESIDE) for name in self.candidates} | set(self.active)
            return {name: self._report_one(name) for name in sorted(names)}

    def _report_one(self, name: str) -> SlotReport:
        candidate, active = self.candidates.get(name), self.active.get(name)
        record = self.records.get(name, SlotRecord())
        unwished = Phase.DEGRADED if name in self.looping else Phase.ACTIVE
        return SlotReport(
            phase=candidate.phase if candidate else unwished,
            reason=candidate.reason if candidate else "",
            message=candidate.message if candidate else "",
            measured=candidate.measured if candidate else None,
            limit=candidate.limit if candidate else None,
            since=candidate.since if candidate else 0.0,
            deadline=_deadline(candidate) if candidate else None,
            target=candidate.target if candidate else None,
            running=active.ref if active else None,
            previous=record.previous,
            variant=active.package.variant.name if active else "",
            provider=active.runner.provider if active else "",
            variants=list(self.tables.get(name, ())),
            shadow=self._shadow(name),
        )

    def _shadow(self, name: str) -> ShadowReport | None:
        beside = self.candidates.get(name + BESIDE)
        if beside is None:
            return self.shadows.get(name)
        made = self.shadows.get(name + BESIDE)
        if made is not None and made.digest == beside.target.digest and beside.phase is not Phase.PENDING:
            return made
        reason = ": ".join(part for part in (str(beside.phase), beside.reason, beside.message) if part)
        refused = beside.phase is Phase.QUARANTINED
        return ShadowReport(beside.target.digest, "refused" if refused else "paused", reason)


def _deadline(candidate: SlotState) -> float | None:
    shadow = candidate.policy.shadow
    if candidate.phase is Phase.SHADOW and shadow is not None:
        return candidate.since + shadow.deadline
    return candidate.until or candidate.retry_at or None


def runner_name(ref: ModelRef) -> str:
    return f"{ref.model}:{ref.version}"
