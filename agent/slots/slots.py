"""Model slots: the shell around the lifecycle. What runs goes on running until its successor has passed."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

from agent import lifecycle
from agent.attempts import Attempts
from agent.lifecycle import Verdict
from agent.runtime.engine import Engine
from agent.slots.activation import Activation
from agent.slots.active import ActiveModel, conditions
from agent.slots.board import BESIDE, RUNNING, Board
from agent.slots.boot import Boot
from agent.slots.candidate import MISMATCH, Candidates
from agent.slots.care import Care
from agent.slots.disk import Disk
from agent.slots.gate import Gate
from agent.slots.heat import hottest
from agent.slots.opened import Opened, Setup
from agent.slots.walk import Replaced
from agent.state import State
from agent.trusted_clock import Moment
from agent.verify import Verifier
from edgeward.clock import Clock
from edgeward.wire.desired import SlotTarget
from edgeward.wire.reports import Condition, Hold, Phase, SlotReport
from edgeward.wire.schedule import Delivery

log = logging.getLogger(__name__)

#: How often what runs is looked after.
LOOK_SECONDS = 0.5


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
        attempts: Attempts | None = None,
        gate: Gate | None = None,
        temperature: Callable[[], float | None] = hottest,
    ) -> None:
        """`changed` is called after every change, from any of the agent's threads. `problem` says why a
        tested model must not enter a slot after all: a stream of that slot cannot feed it. `attempts`: those
        of this start of the agent, where others count there, too. `gate` knows the site's hours and holds.
        `temperature` gives degrees Celsius, None where nothing says."""
        self._state = state
        self._board = board = Board(state.slots(), clock, changed)
        self._activation = Activation(state, verifier, engine, runtimes, clock, setup)
        self._disk = disk = Disk(board, state, verifier, self._activation)
        self._gate = gate = gate or Gate(lambda: Moment(clock.now()))
        attempts = attempts or Attempts(state)
        self._boot = Boot(board, state, self._activation, attempts)
        self._candidates = Candidates(
            board, state, verifier, self._activation, disk, gate, problem, attempts, temperature
        )
        self._care = Care(board, state, self._activation, disk)
        gate.meanwhile(self._meanwhile)
        self._thread = threading.Thread(target=self._work, name="slots", daemon=True)

    def start(self) -> None:
        """Load again what ran before, from verified bytes on disk and without a network; then follow wishes."""
        self.open()
        self._thread.start()

    def open(self) -> None:
        """What `start` does before the thread begins; for a caller that takes every turn itself."""
        self._boot.condemn()
        self._boot.reopen()
        self._disk.sweep()

    def stop(self) -> None:
        with self._board.lock:
            if self._board.stop:
                return
            self._board.stop = True
            self._board.lock.notify_all()
        self._gate.stop()
        if self._thread.ident is not None:
            self._thread.join(30)
        self._candidates.stop()
        for model in self._board.active.values():
            model.runner.stop()
        self._boot.stop()

    def active(self, slot: str) -> ActiveModel | None:
        return self._board.active.get(slot)

    def wish(self, targets: dict[str, SlotTarget], delivery: Delivery | None = None) -> None:
        """Whole wanted state; a slot that is not in it keeps what it runs and gets no candidate."""
        self._gate.take(delivery or Delivery(), {name: target.terms for name, target in targets.items()})
        quarantined = self._state.quarantined()
        now = self._board.clock.now()
        with self._board.lock:
            for name, target in targets.items():
                wanted = (target.active, target.policy)
                running, candidate = self._board.active.get(name), self._board.candidates.get(name)
                held = running is not None and (running.ref, running.policy) == wanted
                known = candidate is not None and (candidate.target, candidate.policy) == wanted
                if known and candidate is not None and (candidate.phase in RUNNING) == held:
                    mismatched = candidate.reason == MISMATCH  # the streams may be others now
                    if not mismatched:
                        continue
                if held:
                    losses = self._board.looping.get(name, 0)
                    self._board.candidates[name] = lifecycle.holds(*wanted, losses, now)
                else:
                    self._board.candidates[name] = lifecycle.wish(
                        target.active, quarantined, now, target.policy
                    )
            beside = {name + BESIDE: target for name, target in targets.items() if target.shadow is not None}
            for name, target in beside.items():
                self._wish_beside(name, target, quarantined, now)
            for name in set(self._board.candidates) - set(targets) - set(beside):
                del self._board.candidates[name]
            self._board.untidy = True
            self._board.lock.notify_all()
        self._board.changed()

    def _wish_beside(
        self, name: str, target: SlotTarget, quarantined: dict[str, Verdict], now: float
    ) -> None:
        """A candidate that runs without acting for as long as it is wished."""
        wanted, known = target.shadow, self._board.candidates.get(name)
        same = known is not None and (known.target, known.policy) == (wanted, target.policy)
        # The streams may be others now.
        if wanted is None or (same and known is not None and known.reason != MISMATCH):
            return
        self._board.candidates[name] = lifecycle.wish(wanted, quarantined, now, target.policy)

    def retry(self) -> None:
        """Try again at once what waits for its next try."""
        with self._board.lock:
            for name, state in self._board.candidates.items():
                self._board.candidates[name] = lifecycle.at_once(state)
            self._board.lock.notify_all()

    def settled(self) -> bool:
        """Whether every wish has come to its end, good or bad."""
        with self._board.lock:
            ended = (*RUNNING, Phase.QUARANTINED)
            return all(
                state.phase in ended or (state.phase is Phase.SHADOW and name.endswith(BESIDE))
                for name, state in self._board.candidates.items()
            )

    def crash_looped(self, name: str, losses: int, seconds: float) -> None:
        """A model's worker was lost `losses` times within `seconds`; for the engine, does not wait."""
        self._care.crash_looped(name, losses, seconds)

    def recovered(self, name: str) -> None:
        """A model's crash loop is over; for the engine, does not wait."""
        self._care.recovered(name)

    def conditions(self) -> list[Condition]:
        """What is unusual about what runs: one condition of each type, naming the slots."""
        with self._board.lock:
            return conditions(dict(self._board.active))

    def holds(self) -> list[Hold]:
        """What somebody at the device holds now."""
        return list(self._gate.holds())

    def report(self) -> dict[str, SlotReport]:
        return self._board.report()

    def _meanwhile(self) -> None:
        """A download under a cap may take hours: nothing else waits for it. Raises Replaced when it is for nothing."""
        if threading.current_thread() is self._thread:
            self._boot.look()
            self._care.look_after()
            self._candidates.meanwhile()

    def turn(self) -> bool:
        """Look after what runs, then walk one candidate that is due; False when there is nothing to do now."""
        self._boot.look()
        self._care.look_after()
        self._candidates.look()
        self._candidates.look_after()
        with self._board.lock:
            if self._board.stop:
                return False
            due = self._candidates.next_due()
            if due is None and not self._board.untidy:
                return False
        if due is None:
            self._board.untidy = False
            self._disk.collect()
        else:
            # A newer wish may come while the reason for stopping is being written down.
            with contextlib.suppress(Replaced):
                self._candidates.advance(*due)
        return True

    def _work(self) -> None:
        while True:
            busy = failed = False
            try:
                busy = self.turn()
            except Exception:
                # A bug over one model must not leave all the others without care; nor take a core for itself.
                log.exception("the slots' turn failed")
                failed = True
            with self._board.lock:
                if self._board.stop:
                    return
                idle = not busy and self._candidates.next_due() is None and not self._board.untidy
                if failed or idle:
                    self._board.lock.wait(LOOK_SECONDS)
