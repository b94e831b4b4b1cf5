"""Model slots: the shell around the lifecycle. What runs goes on running until its successor has passed."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from agent import selftest
from agent.lifecycle import Event, SlotState, step, wish
from agent.runtime.engine import Engine
from agent.runtime.port import Runner
from agent.state import SlotRecord, State
from agent.streams.sketches import LiveBaseline
from agent.verify import VerifiedPackage, Verifier, choose_variant
from edgeward.clock import Clock
from edgeward.errors import DigestMismatch, EdgewardError, PackageError, RuntimeFault, TrustError, Unavailable
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.package import Manifest, Variant
from edgeward.wire.reports import Phase, SlotReport
from edgeward.wire.slots import SlotPolicy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActiveModel:
    """A verified package, ready to infer; `live` collects what its drift figure is made of."""

    package: VerifiedPackage
    runner: Runner
    live: LiveBaseline
    policy: SlotPolicy = field(default_factory=SlotPolicy)

    @property
    def ref(self) -> ModelRef:
        return self.package.ref


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
    ) -> None:
        self._state = state
        self._verifier = verifier
        self._engine = engine
        self._runtimes = runtimes
        self._clock = clock
        self._changed = changed
        self._lock = threading.Condition()
        self._records = state.slots()
        self._candidates: dict[str, SlotState] = {}
        self._active: dict[str, ActiveModel] = {}
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="slots", daemon=True)

    def start(self) -> None:
        """Load again what ran before, from verified bytes on disk and without a network; then follow wishes."""
        for name, record in self._records.items():
            if record.running is not None:
                try:
                    self._active[name] = self._load_again(record.running)
                except EdgewardError as error:
                    log.error("slot %s: %s cannot run again: %s", name, record.running.model, error)
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stop = True
            self._lock.notify_all()
        self._thread.join(30)
        for model in self._active.values():
            model.runner.stop()

    def active(self, slot: str) -> ActiveModel | None:
        return self._active.get(slot)

    def wish(self, targets: dict[str, SlotTarget]) -> None:
        """Whole wanted state; a slot that is not in it keeps what it runs and gets no candidate."""
        quarantined = frozenset(self._state.quarantined())
        now = self._clock.now()
        with self._lock:
            for name, target in targets.items():
                running = self._active.get(name)
                candidate = self._candidates.get(name)
                if running is not None and running.ref == target.active:
                    self._candidates[name] = SlotState(target.active, Phase.ACTIVE, since=now)
                elif (
                    candidate is None or candidate.target != target.active or candidate.phase is Phase.ACTIVE
                ):
                    self._candidates[name] = wish(target.active, quarantined, now)
            for name in set(self._candidates) - set(targets):
                del self._candidates[name]
            self._lock.notify_all()
        self._changed()

    def report(self) -> dict[str, SlotReport]:
        with self._lock:
            names = set(self._candidates) | set(self._active)
            return {name: self._report_one(name) for name in sorted(names)}

    def _report_one(self, name: str) -> SlotReport:
        candidate, active = self._candidates.get(name), self._active.get(name)
        record = self._records.get(name, SlotRecord())
        return SlotReport(
            phase=candidate.phase if candidate else Phase.ACTIVE,
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
        )

    # the candidate's way

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._stop:
                    return
                due = self._next_due()
                if due is None:
                    self._lock.wait(0.5)
                    continue
            # A newer wish may come while the reason for stopping is being written down.
            with contextlib.suppress(_Replaced):
                self._advance(*due)

    def _next_due(self) -> tuple[str, SlotState] | None:
        now = self._clock.now()
        for name, candidate in self._candidates.items():
            if candidate.phase is Phase.PENDING and candidate.retry_at <= now:
                return name, candidate
        return None

    def _advance(self, name: str, candidate: SlotState) -> None:
        """Walk one candidate as far as it goes; every stop carries its reason."""
        target = candidate.target
        walk = _Walk(self, name, candidate)
        runner: Runner | None = None
        try:
            walk.to(Event.BEGUN)
            manifest = self._verifier.fetch_manifest(target)
            variant = choose_variant(manifest, self._runtimes)
            self._verifier.fetch_blobs(manifest, variant)
            walk.to(Event.FETCHED)
            package = self._verifier.open(target, manifest, variant)
            walk.to(Event.VERIFIED)
            walk.to(Event.TESTING)
            runner, verdict = self._test(package)
            if not verdict.passed:
                runner.stop()
                self._refuse(walk, "SelfTestFailed", verdict.message, verdict.measured, verdict.limit)
                return
            self._activate(name, package, runner)
            walk.to(Event.PASSED, reason="SelfTestPassed", measured=verdict.measured, limit=verdict.limit)
        except _Replaced:
            if runner is not None:
                runner.stop()
        except Unavailable as error:
            walk.to(Event.UNAVAILABLE, reason="Unavailable", message=str(error))
        except (DigestMismatch, TrustError, PackageError) as error:
            self._refuse(walk, type(error).__name__, str(error))
        except RuntimeFault as error:
            self._refuse(walk, "RuntimeFault", str(error))
        except (EdgewardError, OSError) as error:
            log.exception("slot %s: %s", name, error)
            walk.to(Event.UNAVAILABLE, reason=type(error).__name__, message=str(error))

    def _test(self, package: VerifiedPackage) -> tuple[Runner, selftest.Verdict]:
        """Load on a worker and compare with the golden vectors. Raises RuntimeFault, PackageError."""
        ref = package.ref
        inputs = selftest.golden_inputs(package.golden)
        runner = self._engine.open(
            package.variant.runtime,
            package.content,
            f"{ref.model}:{ref.version}",
            batchable=_may_join(package.variant),
        )
        try:
            got = runner.infer(inputs)
            tolerance = package.manifest.golden
            return runner, selftest.judge(package.golden, got, tolerance.atol, tolerance.rtol)
        except BaseException:
            runner.stop()
            raise

    def _activate(self, name: str, package: VerifiedPackage, runner: Runner) -> None:
        """Durable first, then visible; the old worker ends after its last call has returned."""
        old = self._active.get(name)
        record = self._records.get(name, SlotRecord())
        record = SlotRecord(package.ref, record.running if record.running != package.ref else record.previous)
        self._state.set_slot(name, record)
        with self._lock:
            self._records[name] = record
            self._active[name] = ActiveModel(package, runner, LiveBaseline(package.manifest.baseline))
        if old is not None:
            old.runner.stop()

    def _refuse(
        self,
        walk: _Walk,
        reason: str,
        message: str,
        measured: float | None = None,
        limit: float | None = None,
    ) -> None:
        target = walk.state.target
        log.error("slot %s: refused %s:%s: %s", walk.name, target.model, target.version, message)
        self._state.quarantine(target.digest, reason, self._clock.now())
        walk.to(Event.REFUSED, reason=reason, message=message, measured=measured, limit=limit)

    def _load_again(self, ref: ModelRef) -> ActiveModel:
        manifest: Manifest = self._verifier.reopen_manifest(ref)
        variant: Variant = choose_variant(manifest, self._runtimes)
        package = self._verifier.open(ref, manifest, variant)
        runner = self._engine.open(
            variant.runtime, package.content, f"{ref.model}:{ref.version}", batchable=_may_join(variant)
        )
        return ActiveModel(package, runner, LiveBaseline(manifest.baseline))


def _may_join(variant: Variant) -> bool:
    """Whether every tensor has a free first dimension."""
    return all(spec.shape and spec.shape[0] == -1 for spec in (*variant.inputs, *variant.outputs))


class _Replaced(Exception):
    """A newer wish has taken the candidate's place."""


class _Walk:
    """One candidate on its way; stops when a newer wish has come."""

    def __init__(self, slots: Slots, name: str, state: SlotState) -> None:
        self._slots = slots
        self.name = name
        self.state = state

    def to(
        self,
        event: Event,
        *,
        reason: str = "",
        message: str = "",
        measured: float | None = None,
        limit: float | None = None,
    ) -> None:
        slots = self._slots
        after = step(
            self.state,
            event,
            slots._clock.now(),
            reason=reason,
            message=message,
            measured=measured,
            limit=limit,
        )
        with slots._lock:
            if slots._candidates.get(self.name) != self.state:
                raise _Replaced
            slots._candidates[self.name] = self.state = replace(after)
        target = after.target
        log.info(
            "slot %s: %s:%s is %s %s", self.name, target.model, target.version, after.phase, after.message
        )
        slots._changed()
