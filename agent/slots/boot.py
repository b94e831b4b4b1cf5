"""At a start of the agent: what ran before runs again, unless that is what keeps the agent from running."""

from __future__ import annotations

import logging
import sqlite3

from agent.attempts import HEALTHY_SECONDS, Attempt, Attempts, Risk
from agent.lifecycle import Verdict
from agent.slots.activation import Activation
from agent.slots.active import make_active
from agent.slots.board import Board, runner_name
from agent.slots.records import fallback
from agent.state import SlotRecord, State
from edgeward.errors import EdgewardError

log = logging.getLogger(__name__)

#: Why a digest is refused that took the agent down again and again.
BOOT_LOOP = "BootLoop"

_TESTS = "test/"
_SLOTS = "slot/"


def candidate_key(digest: str) -> str:
    return f"{_TESTS}{digest}"


def slot_key(name: str) -> str:
    return f"{_SLOTS}{name}"


class Boot:
    """Before and on the slots' thread."""

    def __init__(self, board: Board, state: State, activation: Activation, attempts: Attempts) -> None:
        self._board = board
        self._state = state
        self._activation = activation
        self._attempts = attempts
        self._healthy_at: float | None = None

    def condemn(self) -> None:
        """Refuse for good the candidates whose test took the agent down again and again."""
        for key, attempt in self._attempts.all().items():
            if key.startswith(_TESTS) and attempt.spent:
                try:
                    self._state.quarantine(attempt.subject, self._verdict(attempt, "while it was tested"))
                except sqlite3.Error as error:
                    log.warning("%s is not refused yet: %s", key, error)
                    continue
                log.error("%s is refused for good: %s", key, attempt.why("while it was tested"))
                self._attempts.end(key)

    def reopen(self) -> None:
        """Load what ran before, from verified bytes on disk and without a network."""
        for name, record in list(self._board.records.items()):
            if record.running is None:
                continue
            spent = self._attempts.spent(slot_key(name), record.running.digest)
            if spent is not None:
                try:
                    record = self._give_up(name, record, spent)
                except sqlite3.Error as error:
                    log.exception("slot %s: stays without a model: %s", name, error)
                    continue
            self._reopen(name, record)
        self._healthy_at = self._board.clock.monotonic() + HEALTHY_SECONDS

    def look(self) -> None:
        """What has served for a while is in no loop."""
        if self._healthy_at is not None and self._board.clock.monotonic() >= self._healthy_at:
            self._healthy_at = None
            for key in self._attempts.all():
                if key.startswith(_SLOTS):
                    self._attempts.end(key)

    def stop(self) -> None:
        """In order: the models that ran have done nothing wrong."""
        for key in self._attempts.all():
            if key.startswith(_SLOTS):
                self._attempts.leave(key)

    def _reopen(self, name: str, record: SlotRecord) -> None:
        ref, key = record.running, slot_key(name)
        if ref is None:
            return
        self._begin(key, ref.digest, Risk.OPENING)
        try:
            opened = self._activation.reopen(ref, record)
        except (EdgewardError, OSError) as error:
            log.error("slot %s: %s cannot run again: %s", name, runner_name(ref), error)
            self._attempts.end(key)
            return
        self._board.active[name] = make_active(opened, record.policy, self._board.clock)
        self._board.tables[name] = opened.table
        if record.policy.isolation == "in-process":
            self._begin(key, ref.digest, Risk.SERVING)
        else:
            # From now on what it does costs its worker only.
            self._attempts.end(key)

    def _begin(self, key: str, subject: str, risk: Risk) -> None:
        try:
            self._attempts.begin(key, subject, risk)
        except sqlite3.Error as error:  # what runs must run on a full disk, too
            log.warning("%s is not written down: %s", key, error)

    def _give_up(self, name: str, record: SlotRecord, attempt: Attempt) -> SlotRecord:
        """To the predecessor, or to no model at all: better than an agent that never comes up."""
        what = "with it running, soon after the start"
        back = fallback(record)
        if back is None or back.running is None or back.running.digest in self._state.quarantined():
            back = SlotRecord()
        self._state.roll_back(name, back, attempt.subject, self._verdict(attempt, what))
        self._board.records[name] = back
        then = runner_name(back.running) if back.running is not None else "no model"
        log.error("slot %s: %s; %s runs now", name, attempt.why(what), then)
        self._attempts.end(slot_key(name))
        return back

    def _verdict(self, attempt: Attempt, what: str) -> Verdict:
        measured, limit = attempt.figures()
        return Verdict(BOOT_LOOP, self._board.clock.now(), attempt.why(what), measured, limit)
