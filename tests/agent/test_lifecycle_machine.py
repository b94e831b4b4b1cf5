"""Slots against a small pure model of what must hold, whatever happens in whatever order.

The state, the blob store's rules, the lifecycle and its guard are real; only the models' workers are not: they
answer at once and fail where their version says so. Every turn of the slots is taken here, on a clock that moves
only when told to.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agent import attempts, lifecycle
from agent.attempts import Risk
from agent.fetch import NoRoom
from agent.lifecycle import TABLE, SlotState
from agent.slots import candidate
from agent.slots.boot import candidate_key
from agent.slots.opened import Setup
from agent.slots.slots import Slots
from agent.state import SlotRecord, State
from edgeward.clock import ManualClock
from edgeward.errors import RuntimeFault, TrustError
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.package import Manifest, TensorSpec, Variant
from edgeward.wire.reports import Phase
from edgeward.wire.slots import GuardPolicy, SlotPolicy
from tests.agent.conftest import ROWS, Releaser

#: Good ones, one whose golden vectors do not hold, one that does not load.
GOOD, BAD_GOLDEN, BROKEN = (1, 2, 3, 4), 5, 6
POLICIES = (SlotPolicy(guard=GuardPolicy(minimum=5)), SlotPolicy(guard=GuardPolicy(minimum=5), queue=7))
LINKS = ("fine", "offline", "no room", "disk full", "forged")


class Runner:
    """Doubles, at once."""

    provider = "CPUExecutionProvider"
    restarts = 0

    def __init__(self) -> None:
        self.inputs = [TensorSpec("x", "float32", [-1, 4])]
        self.outputs = [TensorSpec("y", "float32", [-1, 4])]
        self.stopped = False

    def infer(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"y": inputs["x"] * 2}

    def stop(self, *, at_once: bool = False) -> None:
        self.stopped = True


class Engine:
    """Opens what is not broken."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def open(self, runtime: str, content: bytes, name: str, *_: Any, **__: Any) -> Runner:
        self.opened.append(name)
        if b"broken" in content:
            raise RuntimeFault("it does not load")
        return Runner()


class Link(Releaser):
    """The releaser over a link and onto a disk that fail as told; whatever is dropped is really gone."""

    how = "fine"

    def __init__(self) -> None:
        super().__init__()
        self.on_disk: set[str] = set()

    def _check(self) -> None:
        if self.how == "no room":
            raise NoRoom("0" * 64, 10, 20)
        if self.how == "disk full":
            raise OSError(28, "No space left on device")
        if self.how == "forged":
            raise TrustError("not what was signed")

    def fetch_manifest(self, ref: ModelRef) -> Manifest:
        self.offline = self.how == "offline"
        manifest = super().fetch_manifest(ref)
        self._check()
        return manifest

    def fetch_blobs(self, manifest: Manifest, variant: Variant, *more: Any) -> None:
        self._check()
        super().fetch_blobs(manifest, variant, *more)
        self.on_disk.add(variant.blob.digest)

    def collect(self, kept: Any) -> int:
        super().collect(kept)
        self.on_disk -= self.dropped
        return 0

    def open(self, ref: ModelRef, manifest: Manifest, variant: Variant) -> Any:
        assert variant.blob.digest in self.on_disk, f"{ref} is opened, but not on the disk"
        return super().open(ref, manifest, variant)

    def blob(self, ref: ModelRef) -> str:
        return self.manifests[ref.digest].variants[0].blob.digest


class Disk(State):
    """May refuse to be written. What a power cut does to it is tested elsewhere: here it need not wait for a disk."""

    full = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._db.execute("PRAGMA synchronous=OFF")

    @contextmanager
    def transaction(self) -> Any:
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")
        with super().transaction():
            yield


class Watching(dict[str, SlotState]):
    """The candidates; every step between two phases is held against the table."""

    steps = frozenset((before, after) for (before, _), after in TABLE.items())

    def __setitem__(self, name: str, after: SlotState) -> None:
        before = self.get(name)
        if before is not None and before.target == after.target and before.policy == after.policy:
            same = before.phase is after.phase
            # A wish may begin anew anywhere, and ends at once where that is what runs or is refused.
            wished = after.phase in (Phase.PENDING, Phase.ACTIVE, Phase.DEGRADED, Phase.QUARANTINED) and (
                after.failures == 0 and not after.retry_at
            )
            assert same or wished or (before.phase, after.phase) in self.steps, (before, after)
        super().__setitem__(name, after)


class Machine(RuleBasedStateMachine):
    """`running` and `previous` are what the model of this machine says of them; None: nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        self.clock = ManualClock()
        self.link = Link()
        self.refs = {
            version: self.link.release(
                version, ("only", b"broken" if version == BROKEN else b"%d" % version),
                outputs=ROWS * (3 if version == BAD_GOLDEN else 2),
            )
            for version in (*GOOD, BAD_GOLDEN, BROKEN)
        }  # fmt: skip
        self.running: ModelRef | None = None
        self.previous: ModelRef | None = None
        self.condemned: set[str] = set()
        self.target: tuple[ModelRef, SlotPolicy] | None = None
        self.policy: SlotPolicy | None = None
        self.state: Disk
        self._open()

    def _open(self) -> None:
        self.state = Disk(self.path / "state.db")
        self.engine = Engine()
        self.slots = Slots(
            self.state, self.link, self.engine, {"onnx": "onnxruntime 1"}, self.clock, lambda: None,  # type: ignore[arg-type]
            Setup(machine="here", seconds=0.0),
        )  # fmt: skip
        self.slots._board.candidates = Watching()
        self.slots.open()
        self.looping = False

    def teardown(self) -> None:
        self.slots.stop()
        self.state.close()
        self._folder.cleanup()

    def _turns(self, limit: int = 50) -> None:
        before = len(self.engine.opened)
        for _ in range(limit):
            if not self.slots.turn():
                break
        else:
            raise AssertionError("a loop without an end")
        opened = {name.split(" ")[0] for name in self.engine.opened[before:]}
        for version, ref in self.refs.items():
            assert f"m:{version}" not in opened or ref.digest not in self.condemned, "tried again"
        self._follow()

    def _follow(self) -> None:
        """What the pure model expects of a wish once every turn is taken."""
        if self.target is None or self.state.full:
            return
        (ref, policy), link = self.target, self.link.how
        candidate = self.slots._board.candidates["default"]
        if (ref, policy) == (self.running, self.policy):
            return
        if ref.digest in self.condemned or candidate.phase is Phase.PENDING:
            return
        assert link == "fine" or candidate.phase is Phase.QUARANTINED
        if ref.version in GOOD:
            assert candidate.phase in (Phase.ACTIVE, Phase.DEGRADED), candidate
            if ref != self.running:
                self.previous, self.running = self.running, ref
            self.policy = policy
            self.looping = False
        else:
            assert candidate.phase is Phase.QUARANTINED
            self.condemned.add(ref.digest)

    # what happens

    @rule(
        version=st.sampled_from((*GOOD, BAD_GOLDEN, BROKEN)),
        policy=st.sampled_from(POLICIES),
        turns=st.booleans(),
    )
    def wish(self, version: int, policy: SlotPolicy, turns: bool) -> None:
        self.target = (self.refs[version], policy)
        self.slots.wish({"default": SlotTarget(self.refs[version], policy=policy)})
        if turns:
            self._turns()

    @rule()
    def unwish(self) -> None:
        self.target = None
        self.slots.wish({})
        self._turns()

    @rule(how=st.sampled_from(LINKS))
    def link_becomes(self, how: str) -> None:
        self.link.how = how

    @rule(full=st.booleans())
    def disk_becomes(self, full: bool) -> None:
        self.state.full = full

    @rule(seconds=st.sampled_from((0.5, 30.0, 400.0)))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self._turns()

    @rule()
    def retry(self) -> None:
        self.slots.retry()
        self._turns()

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        if not killed:
            self.slots.stop()
        full = self.state.full
        self.state.full = False
        self.state.close()
        self._open()
        self.state.full = full
        if self.target is not None:
            ref, policy = self.target
            self.slots.wish({"default": SlotTarget(ref, policy=policy)})

    @precondition(lambda self: self.running is not None and not self.state.full)
    @rule()
    def breach(self) -> None:
        """Every request fails: the predecessor takes over, or nothing can."""
        model = self.slots.active("default")
        assert model is not None
        model.health.failed += 10 * (model.health.answered + model.health.failed + 10)
        self.clock.advance(40.0)
        self._fall()

    @precondition(lambda self: self.running is not None and not self.state.full)
    @rule()
    def crash_loop(self) -> None:
        model = self.slots.active("default")
        assert model is not None and self.running is not None
        model.runner.restarts = 5
        self.slots.crash_looped(f"m:{self.running.version}", 5, 60.0)
        self.looping = True
        self._fall()

    def _fall(self) -> None:
        if self.previous is not None and self.previous.digest not in self.condemned:
            assert self.running is not None
            self.condemned.add(self.running.digest)
            self.running, self.previous = self.previous, None
            self.looping = False
        self.slots._care.look_after()
        if self.slots._board.records.get("default", SlotRecord()).running == self.running:
            self.policy = self.slots._board.records["default"].policy
        self._turns()

    @precondition(lambda self: self.running is not None)
    @rule()
    def recovers(self) -> None:
        if self.looping and self.running is not None:
            self.slots.recovered(f"m:{self.running.version}")
            self.looping = False

    @precondition(lambda self: not self.state.full)
    @rule(version=st.sampled_from(GOOD))
    def the_agent_dies_three_times_over(self, version: int) -> None:
        """A candidate takes it down while it is tested."""
        ref = self.refs[version]
        if ref in (self.running, self.previous) or ref.digest in self.condemned:
            return
        for _ in range(attempts.DEATHS):
            attempts.Attempts(self.state).begin(candidate_key(ref.digest), ref.digest, Risk.TESTING)
        self.condemned.add(ref.digest)
        self.restart(killed=True)

    # what must hold

    @invariant()
    def one_verified_model_runs_and_is_what_is_written_down(self) -> None:
        model = self.slots.active("default")
        assert (model.ref if model else None) == self.running
        if model is not None:
            assert model.ref.version in GOOD and not model.runner.stopped  # type: ignore[attr-defined]
            assert np.array_equal(model.runner.infer({"x": ROWS})["y"], ROWS * 2)
        record = self.state.slots().get("default", SlotRecord())
        assert (record.running, record.previous) == (self.running, self.previous)
        assert record == self.slots._board.records.get("default", SlotRecord())

    @invariant()
    def what_it_may_need_is_on_the_disk(self) -> None:
        for ref in (self.running, self.previous):
            assert ref is None or self.link.blob(ref) in self.link.on_disk

    @invariant()
    def what_was_refused_for_good_is_known_and_nothing_else(self) -> None:
        assert set(self.state.quarantined()) == self.condemned
        assert self.running is None or self.running.digest not in self.condemned

    @invariant()
    def the_report_is_true(self) -> None:
        report = self.slots.report().get("default")
        if report is None:
            assert self.running is None
            return
        assert report.running == self.running and report.previous == self.previous
        if self.target is not None:
            ref, policy = self.target
            assert report.target == ref
            if report.phase is Phase.ACTIVE:
                assert (ref, policy) == (self.running, self.policy)
            if ref.digest in self.condemned:
                assert report.phase is Phase.QUARANTINED

    @precondition(lambda self: self.target is not None)
    @rule()
    def everything_comes_to_its_end_when_the_world_is_well(self) -> None:
        self.link.how, self.state.full = "fine", False
        for _ in range(3):
            self.clock.advance(4000.0)
            self._turns()
        ended = self.slots.report()["default"].phase
        assert (
            ended in (Phase.ACTIVE, Phase.DEGRADED, Phase.QUARANTINED) and self.slots.settled()
        ) or self.looping


def test_whatever_happens_one_verified_model_runs() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=200, stateful_step_count=30))


@pytest.mark.parametrize("bug", ["tries again", "forgets the predecessor", "writes half a roll-back"])
def test_it_finds_what_was_broken_on_purpose(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "tries again":
        wish = lifecycle.wish
        monkeypatch.setattr(lifecycle, "wish", lambda target, _, *more: wish(target, {}, *more))
    elif bug == "forgets the predecessor":
        made = candidate.recorded
        monkeypatch.setattr(
            candidate,
            "recorded",
            lambda before, *more: msgspec.structs.replace(made(before, *more), previous=before.running),
        )
    else:
        monkeypatch.setattr(
            State, "roll_back", lambda self, name, record, digest, verdict: self.quarantine(digest, verdict)
        )
    first_found = settings(
        max_examples=200,
        stateful_step_count=30,
        phases=[HypothesisPhase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=first_found)
