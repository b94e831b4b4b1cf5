"""The care for what runs: a model in a crash loop or one that breaks its guard gives way to its predecessor."""

from __future__ import annotations

import logging
from dataclasses import replace

from agent import lifecycle
from agent.lifecycle import DISK_RETRY_MAX, Event, Verdict, step
from agent.slots.activation import Activation
from agent.slots.active import ActiveModel, make_active
from agent.slots.board import Board, runner_name
from agent.slots.disk import Disk
from agent.slots.guard import Breach, crash_loop_breach
from agent.slots.records import fallback
from agent.state import State
from edgeward.errors import EdgewardError
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase

log = logging.getLogger(__name__)


class Care:
    def __init__(self, board: Board, state: State, activation: Activation, disk: Disk) -> None:
        self._board = board
        self._state = state
        self._activation = activation
        self._disk = disk
        #: When a slot that could not give way may try again, in monotonic seconds.
        self._again_at: dict[str, float] = {}

    def crash_looped(self, name: str, losses: int, seconds: float) -> None:
        """A model's worker was lost `losses` times within `seconds`; for the engine, does not wait."""
        with self._board.lock:
            for slot, model in self._board.active.items():
                # A candidate of the same name, or another slot with the same model, has its own count.
                if model.runner.restarts < losses or runner_name(model.ref) != name:
                    continue
                self._board.looping[slot] = losses
                state = self._board.candidates.get(slot)
                if state is not None and state.phase is Phase.ACTIVE:
                    self._board.candidates[slot] = lifecycle.crash_loop(
                        state, losses, self._board.clock.now()
                    )
                log.error("slot %s: %s is in a crash loop: %d losses in %.0f s", slot, name, losses, seconds)
        self._board.changed()

    def recovered(self, name: str) -> None:
        """A model's crash loop is over; for the engine, does not wait."""
        with self._board.lock:
            for slot in [
                slot for slot in self._board.looping if runner_name(self._board.active[slot].ref) == name
            ]:
                del self._board.looping[slot]
                state = self._board.candidates.get(slot)
                if state is not None and state.phase is Phase.DEGRADED:
                    self._board.candidates[slot] = lifecycle.recovered(state, self._board.clock.now())
                log.info("slot %s: %s has recovered from its crash loop", slot, name)
        self._board.changed()

    def look_after(self) -> None:
        """Let a model give way that breaks its guard's policy."""
        now = self._board.clock.monotonic()
        for name, model in list(self._board.active.items()):
            try:
                self._look_after(name, model, now)
            except Exception as error:
                # The disk, most likely: each try loads the predecessor. A bug over one must not cost the others.
                self._again_at[name] = now + DISK_RETRY_MAX
                log.exception("slot %s: %s cannot give way yet: %s", name, runner_name(model.ref), error)

    def _look_after(self, name: str, model: ActiveModel, now: float) -> None:
        breach = self._breach(name, model, now)
        if breach is None:
            if self._board.alone.pop(name, ""):
                self._recover(name)
            return
        if self._board.alone.get(name) == breach.reason or now < self._again_at.get(name, 0.0):
            return
        self._give_way(name, model, breach)
        self._again_at.pop(name, None)

    def _breach(self, name: str, model: ActiveModel, now: float) -> Breach | None:
        losses = self._board.looping.get(name)
        if losses and model.policy.guard.crash_loop:
            return crash_loop_breach(losses)
        return model.guard.look(model.health, now) if model.guard is not None else None

    def _give_way(self, name: str, model: ActiveModel, breach: Breach) -> None:
        """To the predecessor, loaded before anything is changed; durable first, then visible."""
        record = self._board.records[name]
        log.error("slot %s: %s breaks its guard: %s", name, runner_name(model.ref), breach.message)
        self._tell(name, model.ref, Event.BREACHED, breach)
        back = fallback(record)
        if back is None or back.running is None or back.running.digest in self._state.quarantined():
            self._left_alone(name, model.ref, breach, "there is no model to go back to")
            return
        try:
            opened = self._activation.reopen(back.running, back)
        except EdgewardError as error:  # of the model; what the disk says now (OSError) may change
            self._left_alone(name, model.ref, breach, f"its predecessor cannot run: {error}")
            return
        verdict = Verdict(
            breach.reason, self._board.clock.now(), breach.message, breach.measured, breach.limit
        )
        try:
            self._state.roll_back(name, back, model.ref.digest, verdict)
        except BaseException:
            opened.runner.stop()
            raise
        with self._board.lock:
            self._board.records[name] = back
            self._board.active[name] = make_active(opened, back.policy, self._board.clock)
            self._board.tables[name] = opened.table
            self._board.looping.pop(name, None)
            self._board.alone.pop(name, None)
        # Also where a newer wish makes it no step of the slot's: servers must let go of the other worker now.
        self._board.changed()
        self._tell(name, model.ref, Event.ROLLED_BACK, breach)
        log.warning("slot %s: %s runs again", name, runner_name(back.running))
        model.runner.stop()
        self._disk.sweep()
        self._disk.collect()

    def _left_alone(self, name: str, ref: ModelRef, breach: Breach, why: str) -> None:
        log.error("slot %s: %s goes on: %s", name, runner_name(ref), why)
        self._board.alone[name] = breach.reason
        self._tell(name, ref, Event.ALONE, replace(breach, message=f"{breach.message}; {why}"))

    def _recover(self, name: str) -> None:
        with self._board.lock:
            state = self._board.candidates.get(name)
            if state is None or state.phase is not Phase.DEGRADED:
                return
            self._board.candidates[name] = step(
                state,
                Event.RECOVERED,
                self._board.clock.now(),
                reason="Recovered",
                message="its guard is kept again",
            )
        self._board.changed()

    def _tell(self, name: str, ref: ModelRef, event: Event, breach: Breach) -> None:
        """Take the step in the slot's state, unless that is about a newer wish already."""
        with self._board.lock:
            state = self._board.candidates.get(name)
            if state is None or state.target != ref or (state.phase, event) not in lifecycle.TABLE:
                return
            self._board.candidates[name] = step(
                state,
                event,
                self._board.clock.now(),
                reason=breach.reason,
                message=breach.message,
                measured=breach.measured,
                limit=breach.limit,
            )
        self._board.changed()
