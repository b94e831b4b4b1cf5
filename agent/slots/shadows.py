"""The candidates that run without acting, each beside what its slot runs; for the slots' thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from agent.lifecycle import Event, SlotState
from agent.slots.activation import Activation
from agent.slots.active import ActiveModel
from agent.slots.board import BESIDE, Board
from agent.slots.opened import Opened, Refused
from agent.slots.shadow import Comparison, Finding, Side, broken, judge
from agent.slots.shadowing import Shadowing, fed, shadowed
from agent.slots.walk import Replaced, Walk
from edgeward.errors import EdgewardError, PackageError, Unavailable
from edgeward.wire.desired import ModelRef
from edgeward.wire.slots import ShadowPolicy, SlotPolicy

log = logging.getLogger(__name__)

#: How often a run that goes on is reported, in seconds.
REPORT_SECONDS = 10.0
REPLACED = "a newer wish has taken its place"


@dataclass
class Run:
    """One candidate beside `incumbent`. `endless`: it shall never act."""

    walk: Walk
    opened: Opened
    shadow: ShadowPolicy
    shadowing: Shadowing
    incumbent: ActiveModel
    endless: bool
    told_at: float


class Shadows:
    def __init__(self, board: Board, activation: Activation, temperature: Callable[[], float | None]) -> None:
        self._board = board
        self._activation = activation
        self._temperature = temperature
        self._runs: dict[str, Run] = {}
        #: What has passed, and may have to wait for its hour before it acts.
        self._passed: dict[str, tuple[ModelRef, SlotPolicy]] = {}

    def wanted(self, name: str, candidate: SlotState) -> bool:
        """Whether a tested candidate has to run without acting first: there must be something to compare with."""
        if name.endswith(BESIDE):
            return True
        running = self._board.active.get(name)
        if self._passed.get(name) == (candidate.target, candidate.policy):
            return False
        return (
            candidate.policy.shadow is not None
            and running is not None
            and running.ref.digest != candidate.target.digest
        )

    def passed(self, walk: Walk) -> None:
        """It need not run without acting again, while the agent runs."""
        self._passed[walk.name] = (walk.state.target, walk.state.policy)

    def begin(self, walk: Walk, opened: Opened) -> None:
        """Run it beside what acts, in a worker of its own. Raises Refused, RuntimeFault, Replaced."""
        opened.runner.stop()
        # The wish that it has been replaced by may have come after the last look.
        if (before := self._runs.get(walk.name)) is not None:
            self._finish(walk.name, before, "ended", REPLACED)
        policy = walk.state.policy
        shadow = policy.shadow or ShadowPolicy()
        incumbent = self._board.active.get(walk.name.removesuffix(BESIDE))
        if incumbent is None:
            raise Unavailable("the slot runs nothing yet that it could be compared with")
        try:
            comparison = _comparison(incumbent, opened, shadow)
        except PackageError as error:
            raise Refused("ShadowNotComparable", str(error), table=opened.table) from None
        runner = self._activation.shadow(opened, shadowed(policy, shadow))
        shadowing = Shadowing(
            opened.package.ref.digest,
            runner,
            comparison,
            policy,
            shadow,
            self._board.clock,
            self._temperature,
        )
        with self._board.lock:
            now = self._board.clock.monotonic()
            self._board.shadows[walk.name] = shadowing.report(shadowing.look(now)[0])
        try:
            walk.to(Event.SHADOWING, reason="Shadowing", message="it runs without acting")
        except BaseException:
            shadowing.stop()
            raise
        endless = walk.name.endswith(BESIDE)
        self._runs[walk.name] = run = Run(walk, opened, shadow, shadowing, incumbent, endless, now)
        _attach(run)

    def look_after(self) -> Iterator[tuple[Run, Finding]]:
        """Those that have come to an end, each with what was found; they have been stopped."""
        now = self._board.clock.monotonic()
        for name, run in list(self._runs.items()):
            try:
                run.walk.check()
                self._follow(name, run)
            except Replaced:
                self._finish(name, run, "ended", REPLACED)
                continue
            except PackageError as error:
                finding = Finding(False, "ShadowNotComparable", str(error))
                self._finish(name, run, "refused", f"{finding.reason}: {finding.message}")
                yield run, finding
                continue
            tally, budget, elapsed = run.shadowing.look(now)
            strict = run.walk.state.policy.nan == "reject"
            finding = (
                broken(run.shadow, budget) or Finding(None)
                if run.endless
                else judge(run.shadow, tally, budget, elapsed, finite=strict)
            )
            if finding.passed is None:
                if now - run.told_at >= REPORT_SECONDS:
                    run.told_at = now
                    report = run.shadowing.report(tally)
                    if run.incumbent.tap.observer is not run.shadowing:
                        waits = "another candidate is on its way to act"
                        report = msgspec.structs.replace(report, state="paused", reason=waits)
                    with self._board.lock:
                        self._board.shadows[name] = report
                    self._board.changed()
                continue
            state = "passed" if finding.passed else "refused"
            log.warning(
                "slot %s: the run without acting has ended: %s %s", name, finding.reason, finding.message
            )
            self._finish(name, run, state, f"{finding.reason}: {finding.message}")
            yield run, finding

    def stop(self) -> None:
        for name, run in list(self._runs.items()):
            self._finish(name, run, "ended", "the agent stops")

    def _follow(self, name: str, run: Run) -> None:
        """Stay beside what acts. Raises PackageError when that has become another model that cannot be compared."""
        acting = self._board.active.get(name.removesuffix(BESIDE))
        if acting is not None and acting is not run.incumbent:
            if run.incumbent.tap.observer is run.shadowing:
                run.incumbent.tap.observer = None
            run.incumbent = acting
            run.shadowing.again(_comparison(acting, run.opened, run.shadow))
        _attach(run)

    def _finish(self, name: str, run: Run, state: str, reason: str) -> None:
        if run.incumbent.tap.observer is run.shadowing:
            run.incumbent.tap.observer = None
        del self._runs[name]
        tally, _, _ = run.shadowing.look(self._board.clock.monotonic())
        report = msgspec.structs.replace(run.shadowing.report(tally), state=state, reason=reason)
        with self._board.lock:
            self._board.shadows[name] = report
        try:
            run.shadowing.stop()
        except EdgewardError as error:
            log.warning("slot %s: stopping its shadow: %s", name, error)


def _attach(run: Run) -> None:
    """One is fed at a time: a candidate on its way to act comes before one that never shall."""
    tap = run.incumbent.tap
    if tap.observer is None or not run.endless:
        tap.observer = run.shadowing


def _comparison(incumbent: ActiveModel, opened: Opened, shadow: ShadowPolicy) -> Comparison:
    """Raises PackageError."""
    package, runner = opened.package, opened.runner
    if problem := fed(incumbent.runner.inputs, runner.inputs):
        raise PackageError(problem, hint="activate this version without a shadow run")
    sides = []
    for manifest, outputs in (
        (incumbent.package.manifest, incumbent.runner.outputs),
        (package.manifest, runner.outputs),
    ):
        decision = manifest.decision
        known = decision is not None and decision.output in {spec.name for spec in outputs}
        sides.append(Side(outputs, decision if known else None))
    return Comparison.of(sides[0], sides[1], shadow.tolerance)
