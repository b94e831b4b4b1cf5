"""The way of one candidate: fetched, verified, tested, and then active or refused."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from agent import delta
from agent.attempts import Attempts, Risk
from agent.fetch import NoRoom
from agent.lifecycle import DISK_RETRY_MAX, RETRY_MAX, TABLE, Event, SlotState, Verdict, due, waits
from agent.pace import Paused
from agent.slots.activation import Activation
from agent.slots.active import make_active
from agent.slots.board import BESIDE, Board
from agent.slots.boot import candidate_key
from agent.slots.disk import Disk
from agent.slots.gate import Gate, MustStay, Stay
from agent.slots.heat import hottest
from agent.slots.opened import Opened, Refused
from agent.slots.records import recorded
from agent.slots.shadow import Finding
from agent.slots.shadows import Run, Shadows
from agent.slots.walk import Replaced, Walk
from agent.state import SlotRecord, State
from agent.verify import Verifier
from edgeward.errors import DigestMismatch, EdgewardError, PackageError, RuntimeFault, TrustError, Unavailable
from edgeward.wire.desired import ModelRef
from edgeward.wire.package import Manifest
from edgeward.wire.reports import Phase

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
        gate: Gate,
        problem: Callable[[str, Opened], str],
        attempts: Attempts,
        temperature: Callable[[], float | None] = hottest,
    ) -> None:
        """`problem` says why a tested model must not enter a slot after all, `temperature` how hot the device is."""
        self._board = board
        self._state = state
        self._verifier = verifier
        self._activation = activation
        self._disk = disk
        self._gate = gate
        self._problem = problem
        self._holds = gate.holds()
        self._shadows = Shadows(board, activation, temperature)
        self._attempts = attempts
        #: Under way; the last one is what transfers, others wait for it.
        self._walks: list[Walk] = []

    def next_due(self) -> tuple[str, SlotState] | None:
        """A candidate that may try now; with the board's lock held."""
        now = self._board.clock.now()
        for name, candidate in self._board.candidates.items():
            if self._stay(name, candidate) is None if waits(candidate) else due(candidate, now):
                return name, candidate
        return None

    def look(self) -> None:
        """Say anew what waits for hours and holds, when these or the clock have been changed."""
        for name, candidate in list(self._board.candidates.items()):
            stay = self._stay(name, candidate) if waits(candidate) else None
            if stay is not None and (candidate.reason, candidate.message, candidate.until) != (
                stay.reason,
                stay.message,
                stay.until or 0.0,
            ):
                with contextlib.suppress(Replaced):
                    _stop_at(Walk(self._board, name, candidate), stay)
        self.tell_holds()

    def tell_holds(self) -> None:
        """Have it reported when somebody has set or lifted a hold, or one has ended."""
        if (holds := self._gate.holds()) != self._holds:
            self._holds = holds
            self._board.changed()

    def _stay(self, name: str, candidate: SlotState) -> Stay | None:
        pending = candidate.phase is Phase.PENDING
        return self._gate.download() if pending else self._stay_before(name, candidate)

    def advance(self, name: str, candidate: SlotState) -> None:
        """Walk one candidate as far as it goes; every stop carries its reason."""
        walk = Walk(self._board, name, candidate)
        self._walks.append(walk)
        try:
            self.guarded(walk, lambda: self._walk(walk))
        finally:
            self._walks.pop()

    def meanwhile(self) -> None:
        """What must not wait for the end of a transfer, which may take hours under a cap: whose hour has come in
        other slots, what runs without acting, and a newer wish. Raises Replaced when that ends the transfer."""
        self.look()
        self.look_after()
        busy = {walk.name for walk in self._walks}
        with self._board.lock:
            others = [(name, state) for name, state in self._board.candidates.items() if name not in busy]
        for name, candidate in others:
            # These have been fetched: they need the link as little as the transfer needs the processor.
            if candidate.phase in (Phase.STAGED, Phase.HELD) and self._stay(name, candidate) is None:
                with contextlib.suppress(Replaced):
                    self.advance(name, candidate)
        for walk in self._walks[-1:]:
            walk.check()

    def guarded(self, walk: Walk, work: Callable[[], None]) -> None:
        """Do a part of the walk; whatever goes wrong becomes its step. Raises Replaced."""
        name = walk.name
        try:
            self._try(walk, work)
        except Replaced:
            raise
        except Exception as error:
            # A full disk, for example, wherever it was noticed: what runs goes on, and this is tried again.
            log.exception("slot %s: %s", name, error)
            if (walk.state.phase, Event.UNAVAILABLE) not in TABLE:
                return  # it has come to its end, only something behind it failed
            patience = DISK_RETRY_MAX if isinstance(error, OSError | sqlite3.Error) else RETRY_MAX
            walk.to(Event.UNAVAILABLE, reason=type(error).__name__, message=str(error), patience=patience)

    def _walk(self, walk: Walk) -> None:
        name, target, policy = walk.name, walk.state.target, walk.state.policy
        slot, manifest = name.removesuffix(BESIDE), None
        if walk.state.phase is Phase.PENDING:
            manifest = self._fetch(walk)
            stay = self._stay_before(name, walk.state)
            if stay is not None:
                # Known after a reboot without a network, too.
                self._state.set_staged(name, target)
            walk.to(Event.VERIFIED)
            if stay is not None:
                _stop_at(walk, stay)
                return
        elif walk.state.phase is Phase.HELD:
            walk.to(Event.RELEASED)
        walk.to(Event.TESTING)
        if manifest is None:
            manifest = self._verifier.reopen_manifest(target)
        with self._attempt(target.digest):
            opened = self._activation.open(target, manifest, policy, walk.check)
            if problem := self._problem(slot, opened):
                opened.runner.stop()
                raise Refused(MISMATCH, problem, table=opened.table)
            if self._shadows.wanted(name, walk.state):
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
        self._shadows.passed(run.walk)
        with self._attempt(run.walk.state.target.digest):
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
        except MustStay as error:
            self._state.set_staged(name, walk.state.target)
            _stop_at(walk, error.stay)
        except Paused as error:
            if walk.state.phase is Phase.DOWNLOADING:
                _stop_at(walk, Stay(error.reason, error.message, error.until))
            else:
                walk.to(Event.UNAVAILABLE, reason=error.reason, message=error.message)
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

    def _stay_before(self, name: str, candidate: SlotState) -> Stay | None:
        """What keeps it from going on to its self-test; hours do not where it would not act yet."""
        if name.endswith(BESIDE):
            return None
        stay = self._gate.activation(name)
        return stay if stay is None or stay.held or not self._shadows.wanted(name, candidate) else None

    def _fetch(self, walk: Walk) -> Manifest:
        """Everything that the walk needs, verified and on the disk."""
        name, target, policy = walk.name, walk.state.target, walk.state.policy
        walk.to(Event.BEGUN)
        manifest = self._staged(name, target) or self._verifier.fetch_manifest(target)
        self._activation.fetch(
            manifest, policy, delta.earlier(self._board.records, name.removesuffix(BESIDE), target.model)
        )
        walk.to(Event.FETCHED)
        self._activation.verify(target, manifest, policy)
        return manifest

    def _staged(self, name: str, target: ModelRef) -> Manifest | None:
        """The manifest of what was verified before it had to wait, as the durable state vouches for."""
        if self._state.staged(name) != target:
            return None
        try:
            return self._verifier.reopen_manifest(target)
        except (EdgewardError, OSError) as error:
            log.info("slot %s: what was staged is fetched again: %s", name, error)
            return None

    def _activate(self, walk: Walk, opened: Opened, finding: Finding | None = None) -> None:
        """Durable first, then visible; the old worker ends after its last call has returned.

        `finding` is what a run without acting has shown.
        """
        name, policy = walk.name, walk.state.policy
        before = self._board.records.get(name, SlotRecord())
        record = recorded(before, opened, policy)
        try:
            with self._gate.switching(name):
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


def _stop_at(walk: Walk, stay: Stay) -> None:
    """The step to where the walk waits."""
    if walk.state.phase is Phase.HELD and not stay.held:
        walk.take(Event.RELEASED)
    walk.to(
        Event.HELD if stay.held else Event.CLOSED,
        reason=stay.reason,
        message=stay.message,
        until=stay.until or 0.0,
    )
