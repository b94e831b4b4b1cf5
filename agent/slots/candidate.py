"""The way of one candidate: fetched, verified, tested, and then active or refused."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable
from functools import partial

from agent import delta
from agent.fetch import NoRoom
from agent.lifecycle import DISK_RETRY_MAX, RETRY_MAX, Event, SlotState, Verdict, due
from agent.slots.activation import Activation, Opened, Refused
from agent.slots.active import make_active
from agent.slots.board import BESIDE, Board
from agent.slots.disk import Disk
from agent.slots.heat import hottest
from agent.slots.records import recorded
from agent.slots.shadow import Finding
from agent.slots.shadows import Run, Shadows
from agent.slots.walk import Replaced, Walk
from agent.state import SlotRecord, State
from agent.verify import Verifier
from edgeward.errors import DigestMismatch, EdgewardError, PackageError, RuntimeFault, TrustError, Unavailable

log = logging.getLogger(__name__)

#: Why a model that is fine by itself was refused: a stream of its slot does not fit it.
MISMATCH = "StreamMismatch"


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
        temperature: Callable[[], float | None] = hottest,
    ) -> None:
        """`problem` says why a tested model must not enter a slot after all, `temperature` how hot the device is."""
        self._board = board
        self._state = state
        self._verifier = verifier
        self._activation = activation
        self._disk = disk
        self._problem = problem
        self._shadows = Shadows(board, activation, temperature)

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
        self.guarded(walk, lambda: self._walk(walk))

    def guarded(self, walk: Walk, work: Callable[[], None]) -> None:
        """Do a part of the walk; whatever goes wrong becomes its step. Raises Replaced."""
        name = walk.name
        try:
            self._try(walk, work)
        except (EdgewardError, OSError, sqlite3.Error) as error:
            # A full disk, for example, wherever it was noticed: what runs goes on, and this is tried again.
            log.exception("slot %s: %s", name, error)
            patience = RETRY_MAX if isinstance(error, EdgewardError) else DISK_RETRY_MAX
            walk.to(Event.UNAVAILABLE, reason=type(error).__name__, message=str(error), patience=patience)

    def _walk(self, walk: Walk) -> None:
        name, target, policy = walk.name, walk.state.target, walk.state.policy
        slot = name.removesuffix(BESIDE)
        walk.to(Event.BEGUN)
        manifest = self._verifier.fetch_manifest(target)
        self._activation.fetch(manifest, policy, delta.earlier(self._board.records, slot, target.model))
        walk.to(Event.FETCHED)
        self._activation.verify(target, manifest, policy)
        walk.to(Event.VERIFIED)
        walk.to(Event.TESTING)
        opened = self._activation.open(target, manifest, policy, walk.check)
        if problem := self._problem(slot, opened):
            opened.runner.stop()
            raise Refused(MISMATCH, problem, table=opened.table)
        if self._shadows.wanted(walk):
            self._shadows.begin(walk, opened)
        else:
            self._activate(walk, opened)

    def look_after(self) -> None:
        """Let candidates that run without acting go on to act, or end."""
        for run, finding in self._shadows.look_after():
            with contextlib.suppress(Replaced):
                if finding.passed:
                    self.guarded(run.walk, partial(self._enter, run, finding))
                else:
                    self.guarded(run.walk, partial(self._end, run, finding))

    def stop(self) -> None:
        """End what runs without acting."""
        self._shadows.stop()

    def _enter(self, run: Run, finding: Finding) -> None:
        opened = self._activation.acting(run.opened, run.walk.state.policy)
        self._activate(run.walk, opened, finding)

    def _end(self, run: Run, finding: Finding) -> None:
        raise Refused(
            finding.reason,
            f"without acting: {finding.message}",
            measured=finding.measured,
            limit=finding.limit,
            lasting=finding.lasting,
            table=run.opened.table,
        )

    def _try(self, walk: Walk, work: Callable[[], None]) -> None:
        name = walk.name
        try:
            work()
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

    def _activate(self, walk: Walk, opened: Opened, finding: Finding | None = None) -> None:
        """Durable first, then visible; the old worker ends after its last call has returned.

        `finding` is what a run without acting has shown.
        """
        name, policy = walk.name, walk.state.policy
        before = self._board.records.get(name, SlotRecord())
        record = recorded(before, opened, policy)
        try:
            walk.check()
            self._state.set_slot(name, record)
            try:
                with self._board.lock:
                    shown = finding or Finding(
                        True, "SelfTestPassed", measured=opened.measured, limit=opened.limit
                    )
                    walk.take(
                        Event.PASSED,
                        reason=shown.reason,
                        message=shown.message,
                        measured=shown.measured,
                        limit=shown.limit,
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
