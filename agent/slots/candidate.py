"""The way of one candidate: fetched, verified, tested, and then active or refused."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Unpack

from agent import delta
from agent.attempts import Attempts, Risk
from agent.fetch import NoRoom
from agent.lifecycle import DISK_RETRY_MAX, RETRY_MAX, TABLE, Details, Event, SlotState, Verdict, due, step
from agent.slots.activation import Activation, Opened, Refused
from agent.slots.active import make_active
from agent.slots.board import Board
from agent.slots.boot import candidate_key
from agent.slots.disk import Disk
from agent.slots.records import recorded
from agent.state import SlotRecord, State
from agent.verify import Verifier
from edgeward.errors import DigestMismatch, PackageError, RuntimeFault, TrustError, Unavailable

log = logging.getLogger(__name__)

#: Why a model that is fine by itself was refused: a stream of its slot does not fit it.
MISMATCH = "StreamMismatch"


class Replaced(Exception):
    """A newer wish has taken the candidate's place, or the agent stops."""


class Candidates:
    """Walks one candidate at a time; from the slots' thread only."""

    def __init__(
        self,
        board: Board,
        state: State,
        verifier: Verifier,
        activation: Activation,
        disk: Disk,
        problem: Callable[[str, Opened], str],
        attempts: Attempts,
    ) -> None:
        """`problem` says why a tested model must not enter a slot after all."""
        self._board = board
        self._state = state
        self._verifier = verifier
        self._activation = activation
        self._disk = disk
        self._problem = problem
        self._attempts = attempts

    def next_due(self) -> tuple[str, SlotState] | None:
        """A candidate that may try now; with the board's lock held."""
        now = self._board.clock.now()
        for name, candidate in self._board.candidates.items():
            if due(candidate, now):
                return name, candidate
        return None

    def advance(self, name: str, candidate: SlotState) -> None:
        """Walk one candidate as far as it goes; every stop carries its reason."""
        walk = Walk(self._board, name, candidate)
        try:
            self._try(walk)
        except Replaced:
            raise
        except Exception as error:
            # A full disk, for example, wherever it was noticed: what runs goes on, and this is tried again.
            log.exception("slot %s: %s", name, error)
            if (walk.state.phase, Event.UNAVAILABLE) not in TABLE:
                return  # it has come to its end, only something behind it failed
            patience = DISK_RETRY_MAX if isinstance(error, OSError | sqlite3.Error) else RETRY_MAX
            walk.to(Event.UNAVAILABLE, reason=type(error).__name__, message=str(error), patience=patience)

    def _try(self, walk: Walk) -> None:
        name, target, policy = walk.name, walk.state.target, walk.state.policy
        try:
            walk.to(Event.BEGUN)
            manifest = self._verifier.fetch_manifest(target)
            self._activation.fetch(manifest, policy, delta.earlier(self._board.records, name, target.model))
            walk.to(Event.FETCHED)
            self._activation.verify(target, manifest, policy)
            walk.to(Event.VERIFIED)
            walk.to(Event.TESTING)
            with self._attempt(target.digest):
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

    @contextmanager
    def _attempt(self, digest: str) -> Iterator[None]:
        """Its code is run for the first time: if the agent does not survive that, its successor will know why."""
        key = candidate_key(digest)
        self._attempts.begin(key, digest, Risk.TESTING)
        try:
            yield
        except Replaced:
            self._attempts.leave(key)
            raise
        except BaseException:
            self._attempts.end(key)
            raise
        self._attempts.end(key)

    def _activate(self, walk: Walk, opened: Opened) -> None:
        """Durable first, then visible; the old worker ends after its last call has returned."""
        name, policy = walk.name, walk.state.policy
        before = self._board.records.get(name, SlotRecord())
        record = recorded(before, opened, policy)
        try:
            walk.check()
            self._state.set_slot(name, record)
            try:
                with self._board.lock:
                    walk.take(
                        Event.PASSED, reason="SelfTestPassed", measured=opened.measured, limit=opened.limit
                    )
                    old = self._board.active.get(name)
                    self._board.records[name] = record
                    self._board.active[name] = make_active(opened, policy, self._board.clock)
                    self._board.tables[name] = opened.table
                    self._board.looping.pop(name, None)
                    self._board.alone.pop(name, None)
            except Replaced:
                self._state.set_slot(name, before)
                raise
        except BaseException:
            opened.runner.stop()
            raise
        walk.tell()
        if old is not None:
            old.runner.stop()
        self._disk.sweep()
        self._disk.collect()

    def _refuse(self, walk: Walk, refusal: Refused) -> None:
        target = walk.state.target
        log.error("slot %s: refused %s:%s: %s", walk.name, target.model, target.version, refusal)
        # What fails under this policy only may pass under another.
        if refusal.lasting:
            verdict = Verdict(
                refusal.reason, self._board.clock.now(), str(refusal), refusal.measured, refusal.limit
            )
            self._state.quarantine(target.digest, verdict)
        with self._board.lock:
            walk.take(
                Event.REFUSED,
                reason=refusal.reason,
                message=str(refusal),
                measured=refusal.measured,
                limit=refusal.limit,
            )
            self._board.tables[walk.name] = refusal.table
        walk.tell()
        self._disk.sweep()
        self._disk.collect()


class Walk:
    """One candidate on its way; stops when a newer wish has come."""

    def __init__(self, board: Board, name: str, state: SlotState) -> None:
        self._board = board
        self.name = name
        self.state = state

    def check(self) -> None:
        """Raises Replaced when there is nothing to go on for."""
        board = self._board
        with board.lock:
            if board.stop or board.candidates.get(self.name) != self.state:
                raise Replaced

    def take(self, event: Event, **details: Unpack[Details]) -> None:
        """One step, not told to anyone yet. Raises Replaced."""
        board = self._board
        after = step(self.state, event, board.clock.now(), **details)
        with board.lock:
            self.check()
            board.candidates[self.name] = self.state = after

    def tell(self) -> None:
        target, after = self.state.target, self.state
        log.info(
            "slot %s: %s:%s is %s %s", self.name, target.model, target.version, after.phase, after.message
        )
        # Never with the lock held: whoever is told asks for a report.
        self._board.changed()

    def to(self, event: Event, **details: Unpack[Details]) -> None:
        self.take(event, **details)
        self.tell()
