"""Model slots: the shell around the lifecycle. What runs goes on running until its successor has passed."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Unpack

from agent import delta, lifecycle
from agent.fetch import NoRoom
from agent.lifecycle import DISK_RETRY_MAX, RETRY_MAX, Details, Event, SlotState, Verdict, due, step
from agent.runtime.engine import Engine
from agent.slots.activation import Activation, Opened, Refused, Setup
from agent.slots.active import ActiveModel, conditions, make_active
from agent.slots.guard import Breach, crash_loop_breach
from agent.slots.records import fallback, kept_beside, kept_blobs, needed, recorded
from agent.state import SlotRecord, State
from agent.verify import VerifiedPackage, Verifier
from edgeward.clock import Clock
from edgeward.errors import DigestMismatch, EdgewardError, PackageError, RuntimeFault, TrustError, Unavailable
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.reports import Condition, Phase, SlotReport, VariantMeasure

log = logging.getLogger(__name__)

#: Why a model that is fine by itself was refused: a stream of its slot does not fit it.
MISMATCH = "StreamMismatch"

#: How often what runs is looked after.
LOOK_SECONDS = 0.5

_HELD = (Phase.ACTIVE, Phase.DEGRADED)


class Slots:
    """One thread walks every slot's candidate through the lifecycle; `active` is what streams use."""

    def __init__(
        self,
        state: State,
        verifier: Verifier,
        engine: Engine,
        runtimes: dict[str, str],
        clock: Clock,
        changed: Callable[[], None],
        setup: Setup | None = None,
        problem: Callable[[str, Opened], str] = lambda slot, opened: "",
    ) -> None:
        """`changed` is called after every change, from any of the agent's threads. `problem` says why a
        tested model must not enter a slot after all: a stream of that slot cannot feed it."""
        self._state = state
        self._verifier = verifier
        self._activation = Activation(state, verifier, engine, runtimes, clock, setup)
        self._clock = clock
        self._changed = changed
        self._problem = problem
        self._lock = threading.Condition()
        self._records = state.slots()
        self._candidates: dict[str, SlotState] = {}
        self._active: dict[str, ActiveModel] = {}
        self._tables: dict[str, tuple[VariantMeasure, ...]] = {}
        #: Slots whose running model is in a crash loop, with the losses that made it one.
        self._looping: dict[str, int] = {}
        #: Slots that break their guard and have nothing to go back to, with the reason.
        self._alone: dict[str, str] = {}
        #: When a slot that could not give way may try again, in monotonic seconds.
        self._again_at: dict[str, float] = {}
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="slots", daemon=True)

    def start(self) -> None:
        """Load again what ran before, from verified bytes on disk and without a network; then follow wishes."""
        for name, record in self._records.items():
            if record.running is not None:
                try:
                    opened = self._activation.reopen(record.running, record)
                except (EdgewardError, OSError) as error:
                    log.error("slot %s: %s cannot run again: %s", name, record.running.model, error)
                    continue
                self._active[name] = make_active(opened, record.policy, self._clock)
                self._tables[name] = opened.table
        for model in self._active.values():
            # What the last run was killed before it could remove.
            self._drop_losers(model.package)
        self._sweep()
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            if self._stop:
                return
            self._stop = True
            self._lock.notify_all()
        self._thread.join(30)
        for model in self._active.values():
            model.runner.stop()

    def active(self, slot: str) -> ActiveModel | None:
        return self._active.get(slot)

    def wish(self, targets: dict[str, SlotTarget]) -> None:
        """Whole wanted state; a slot that is not in it keeps what it runs and gets no candidate."""
        quarantined = self._state.quarantined()
        now = self._clock.now()
        with self._lock:
            for name, target in targets.items():
                wanted = (target.active, target.policy)
                running, candidate = self._active.get(name), self._candidates.get(name)
                held = running is not None and (running.ref, running.policy) == wanted
                known = candidate is not None and (candidate.target, candidate.policy) == wanted
                if known and candidate is not None and (candidate.phase in _HELD) == held:
                    mismatched = candidate.reason == MISMATCH  # the streams may be others now
                    if not mismatched:
                        continue
                if held:
                    losses = self._looping.get(name, 0)
                    self._candidates[name] = lifecycle.holds(*wanted, losses, now)
                else:
                    self._candidates[name] = lifecycle.wish(target.active, quarantined, now, target.policy)
            for name in set(self._candidates) - set(targets):
                del self._candidates[name]
            self._lock.notify_all()
        self._changed()

    def retry(self) -> None:
        """Try again at once what waits for its next try."""
        with self._lock:
            for name, state in self._candidates.items():
                self._candidates[name] = lifecycle.at_once(state)
            self._lock.notify_all()

    def settled(self) -> bool:
        """Whether every wish has come to its end, good or bad."""
        with self._lock:
            ended = (*_HELD, Phase.QUARANTINED)
            return all(state.phase in ended for state in self._candidates.values())

    def crash_looped(self, name: str, losses: int, seconds: float) -> None:
        """A model's worker was lost `losses` times within `seconds`; for the engine, does not wait."""
        with self._lock:
            for slot, model in self._active.items():
                # A candidate of the same name, or another slot with the same model, has its own count.
                if model.runner.restarts < losses or _runner_name(model.ref) != name:
                    continue
                self._looping[slot] = losses
                state = self._candidates.get(slot)
                if state is not None and state.phase is Phase.ACTIVE:
                    self._candidates[slot] = lifecycle.crash_loop(state, losses, self._clock.now())
                log.error("slot %s: %s is in a crash loop: %d losses in %.0f s", slot, name, losses, seconds)
        self._changed()

    def recovered(self, name: str) -> None:
        """A model's crash loop is over; for the engine, does not wait."""
        with self._lock:
            for slot in [slot for slot in self._looping if _runner_name(self._active[slot].ref) == name]:
                del self._looping[slot]
                state = self._candidates.get(slot)
                if state is not None and state.phase is Phase.DEGRADED:
                    self._candidates[slot] = lifecycle.recovered(state, self._clock.now())
                log.info("slot %s: %s has recovered from its crash loop", slot, name)
        self._changed()

    def conditions(self) -> list[Condition]:
        """What is unusual about what runs: one condition of each type, naming the slots."""
        with self._lock:
            return conditions(dict(self._active))

    def report(self) -> dict[str, SlotReport]:
        with self._lock:
            names = set(self._candidates) | set(self._active)
            return {name: self._report_one(name) for name in sorted(names)}

    def _report_one(self, name: str) -> SlotReport:
        candidate, active = self._candidates.get(name), self._active.get(name)
        record = self._records.get(name, SlotRecord())
        unwished = Phase.DEGRADED if name in self._looping else Phase.ACTIVE
        return SlotReport(
            phase=candidate.phase if candidate else unwished,
            reason=candidate.reason if candidate else "",
            message=candidate.message if candidate else "",
            measured=candidate.measured if candidate else None,
            limit=candidate.limit if candidate else None,
            since=candidate.since if candidate else 0.0,
            deadline=(candidate.retry_at or None) if candidate else None,
            target=candidate.target if candidate else None,
            running=active.ref if active else None,
            previous=record.previous,
            variant=active.package.variant.name if active else "",
            provider=active.runner.provider if active else "",
            variants=list(self._tables.get(name, ())),
        )

    # the candidate's way

    def _work(self) -> None:
        while True:
            self._look_after()
            with self._lock:
                if self._stop:
                    return
                due = self._next_due()
                if due is None:
                    self._lock.wait(LOOK_SECONDS)
                    continue
            # A newer wish may come while the reason for stopping is being written down.
            with contextlib.suppress(_Replaced):
                self._advance(*due)

    def _next_due(self) -> tuple[str, SlotState] | None:
        now = self._clock.now()
        for name, candidate in self._candidates.items():
            if due(candidate, now):
                return name, candidate
        return None

    def _advance(self, name: str, candidate: SlotState) -> None:
        """Walk one candidate as far as it goes; every stop carries its reason."""
        walk = _Walk(self, name, candidate)
        try:
            self._try(walk)
        except (EdgewardError, OSError, sqlite3.Error) as error:
            # A full disk, for example, wherever it was noticed: what runs goes on, and this is tried again.
            log.exception("slot %s: %s", name, error)
            patience = RETRY_MAX if isinstance(error, EdgewardError) else DISK_RETRY_MAX
            walk.to(Event.UNAVAILABLE, reason=type(error).__name__, message=str(error), patience=patience)

    def _try(self, walk: _Walk) -> None:
        name, target, policy = walk.name, walk.state.target, walk.state.policy
        try:
            walk.to(Event.BEGUN)
            manifest = self._verifier.fetch_manifest(target)
            self._activation.fetch(manifest, policy, delta.earlier(self._records, name, target.model))
            walk.to(Event.FETCHED)
            self._activation.verify(target, manifest, policy)
            walk.to(Event.VERIFIED)
            walk.to(Event.TESTING)
            opened = self._activation.open(target, manifest, policy, walk.check)
            if problem := self._problem(name, opened):
                opened.runner.stop()
                raise Refused(MISMATCH, problem, table=opened.table)
            self._activate(walk, opened)
        except NoRoom as error:
            walk.to(
                Event.UNAVAILABLE,
                reason="NoRoom",
                message=str(error),
                measured=float(error.measured),
                limit=float(error.limit),
                patience=DISK_RETRY_MAX,
            )
        except Unavailable as error:
            asked = error.retry_after or 0.0
            walk.to(Event.UNAVAILABLE, reason="Unavailable", message=str(error), asked=asked)
        except Refused as error:
            self._refuse(walk, error)
        except (DigestMismatch, TrustError) as error:
            # Of the link, the peer or the disk, not of the release: what was signed may still come.
            log.warning("slot %s: %s", name, error)
            walk.to(Event.UNAVAILABLE, reason=type(error).__name__, message=str(error))
        except (PackageError, RuntimeFault) as error:
            self._refuse(walk, Refused(type(error).__name__, str(error), lasting=True))

    def _activate(self, walk: _Walk, opened: Opened) -> None:
        """Durable first, then visible; the old worker ends after its last call has returned."""
        name, policy = walk.name, walk.state.policy
        before = self._records.get(name, SlotRecord())
        record = recorded(before, opened, policy)
        try:
            walk.check()
            self._state.set_slot(name, record)
            try:
                with self._lock:
                    walk.take(
                        Event.PASSED, reason="SelfTestPassed", measured=opened.measured, limit=opened.limit
                    )
                    old = self._active.get(name)
                    self._records[name] = record
                    self._active[name] = make_active(opened, policy, self._clock)
                    self._tables[name] = opened.table
                    self._looping.pop(name, None)
                    self._alone.pop(name, None)
            except _Replaced:
                self._state.set_slot(name, before)
                raise
        except BaseException:
            opened.runner.stop()
            raise
        walk.tell()
        if old is not None:
            old.runner.stop()
        self._drop_losers(opened.package)
        self._sweep()
        self._collect()

    # what runs

    def _look_after(self) -> None:
        """Let a model give way that breaks its guard's policy."""
        now = self._clock.monotonic()
        for name, model in list(self._active.items()):
            breach = self._breach(name, model, now)
            if breach is None:
                if self._alone.pop(name, ""):
                    self._recover(name)
                continue
            if self._alone.get(name) == breach.reason or now < self._again_at.get(name, 0.0):
                continue
            try:
                self._give_way(name, model, breach)
                self._again_at.pop(name, None)
            except (EdgewardError, OSError, sqlite3.Error) as error:
                # The disk, most likely: each try loads the predecessor.
                self._again_at[name] = now + DISK_RETRY_MAX
                log.exception("slot %s: %s cannot give way yet: %s", name, _runner_name(model.ref), error)

    def _breach(self, name: str, model: ActiveModel, now: float) -> Breach | None:
        losses = self._looping.get(name)
        if losses and model.policy.guard.crash_loop:
            return crash_loop_breach(losses)
        return model.guard.look(model.health, now) if model.guard is not None else None

    def _give_way(self, name: str, model: ActiveModel, breach: Breach) -> None:
        """To the predecessor, loaded before anything is changed; durable first, then visible."""
        record = self._records[name]
        log.error("slot %s: %s breaks its guard: %s", name, _runner_name(model.ref), breach.message)
        self._tell(name, model.ref, Event.BREACHED, breach)
        back = fallback(record)
        if back is None or back.running is None or back.running.digest in self._state.quarantined():
            self._left_alone(name, model.ref, breach, "there is no model to go back to")
            return
        try:
            opened = self._activation.reopen(back.running, back)
        except (EdgewardError, OSError) as error:
            self._left_alone(name, model.ref, breach, f"its predecessor cannot run: {error}")
            return
        verdict = Verdict(breach.reason, self._clock.now(), breach.message, breach.measured, breach.limit)
        try:
            self._state.roll_back(name, back, model.ref.digest, verdict)
        except BaseException:
            opened.runner.stop()
            raise
        with self._lock:
            self._records[name] = back
            self._active[name] = make_active(opened, back.policy, self._clock)
            self._tables[name] = opened.table
            self._looping.pop(name, None)
            self._alone.pop(name, None)
        self._tell(name, model.ref, Event.ROLLED_BACK, breach)
        log.warning("slot %s: %s runs again", name, _runner_name(back.running))
        model.runner.stop()
        self._sweep()
        self._collect()

    def _left_alone(self, name: str, ref: ModelRef, breach: Breach, why: str) -> None:
        log.error("slot %s: %s goes on: %s", name, _runner_name(ref), why)
        self._alone[name] = breach.reason
        self._tell(name, ref, Event.ALONE, replace(breach, message=f"{breach.message}; {why}"))

    def _recover(self, name: str) -> None:
        with self._lock:
            state = self._candidates.get(name)
            if state is None or state.phase is not Phase.DEGRADED:
                return
            self._candidates[name] = step(
                state,
                Event.RECOVERED,
                self._clock.now(),
                reason="Recovered",
                message="its guard is kept again",
            )
        self._changed()

    def _tell(self, name: str, ref: ModelRef, event: Event, breach: Breach) -> None:
        """Take the step in the slot's state, unless that is about a newer wish already."""
        with self._lock:
            state = self._candidates.get(name)
            if state is None or state.target != ref or (state.phase, event) not in lifecycle.TABLE:
                return
            self._candidates[name] = step(
                state,
                event,
                self._clock.now(),
                reason=breach.reason,
                message=breach.message,
                measured=breach.measured,
                limit=breach.limit,
            )
        self._changed()

    def _refuse(self, walk: _Walk, refusal: Refused) -> None:
        target = walk.state.target
        log.error("slot %s: refused %s:%s: %s", walk.name, target.model, target.version, refusal)
        # What fails under this policy only may pass under another.
        if refusal.lasting:
            verdict = Verdict(
                refusal.reason, self._clock.now(), str(refusal), refusal.measured, refusal.limit
            )
            self._state.quarantine(target.digest, verdict)
        with self._lock:
            walk.take(
                Event.REFUSED,
                reason=refusal.reason,
                message=str(refusal),
                measured=refusal.measured,
                limit=refusal.limit,
            )
            self._tables[walk.name] = refusal.table
        walk.tell()
        self._sweep()
        self._collect()

    def _collect(self) -> None:
        """Remove the blobs of models that no slot runs, may go back to, or is on its way to."""
        try:
            condemned = self._state.quarantined()
            with self._lock:
                targets = [state.target for state in self._candidates.values()]
                models = needed(self._records.values(), targets, condemned)
            freed = self._verifier.collect(models)
        except (EdgewardError, OSError, sqlite3.Error) as error:
            log.warning("old blobs stay on the disk: %s", error)
            return
        if freed:
            log.info("%d KiB of old models are removed from the disk", freed >> 10)

    def _sweep(self) -> None:
        """Compiled forms stay with the blobs that a slot runs or may go back to."""
        self._activation.sweep(kept_blobs(self._records.values(), self._active.values()))

    def _drop_losers(self, package: VerifiedPackage) -> None:
        keep = kept_beside(package, self._records.values(), self._active.values())
        if keep is not None:
            self._activation.drop_losers(package.manifest, keep)


def _runner_name(ref: ModelRef) -> str:
    return f"{ref.model}:{ref.version}"


class _Replaced(Exception):
    """A newer wish has taken the candidate's place, or the agent stops."""


class _Walk:
    """One candidate on its way; stops when a newer wish has come."""

    def __init__(self, slots: Slots, name: str, state: SlotState) -> None:
        self._slots = slots
        self.name = name
        self.state = state

    def check(self) -> None:
        """Raises _Replaced when there is nothing to go on for."""
        slots = self._slots
        with slots._lock:
            if slots._stop or slots._candidates.get(self.name) != self.state:
                raise _Replaced

    def take(self, event: Event, **details: Unpack[Details]) -> None:
        """One step, not told to anyone yet. Raises _Replaced."""
        slots = self._slots
        after = step(self.state, event, slots._clock.now(), **details)
        with slots._lock:
            self.check()
            slots._candidates[self.name] = self.state = after

    def tell(self) -> None:
        target, after = self.state.target, self.state
        log.info(
            "slot %s: %s:%s is %s %s", self.name, target.model, target.version, after.phase, after.message
        )
        # Never with the lock held: whoever is told asks for a report.
        self._slots._changed()

    def to(self, event: Event, **details: Unpack[Details]) -> None:
        self.take(event, **details)
        self.tell()
