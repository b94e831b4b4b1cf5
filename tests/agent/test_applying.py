"""A desired state that cannot be applied, or that takes the agent down, costs neither the agent nor the next one."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent import attempts
from agent.applying import AGAIN_SECONDS, Applying
from agent.attempts import HEALTHY_SECONDS, Attempts, Risk
from agent.state import State
from agent.trusted_clock import TrustedClock
from edgeward.clock import ManualClock
from edgeward.identifiers import DeviceName
from edgeward.trust import dsse
from edgeward.trust.keys import generate_key, public_pem
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState, encode

ME = DeviceName("north", "turbine-1")
KEY = generate_key()
CLOCK = ManualClock()


def signed(generation: int) -> bytes:
    now = CLOCK.now()
    state = DesiredState(ME.site, ME.device, generation, now - 60, now + 1e6, {}, [])
    return dsse.sign(encode(state), PAYLOAD_TYPE, KEY)


class Full(State):
    """A disk that may be full."""

    full = False

    def accept_desired(self, generation: int, raw: bytes) -> None:
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")
        super().accept_desired(generation, raw)


@dataclass
class Agent:
    """`boot` begins again without an end of the one before, as after SIGKILL. `deadly` generations end it."""

    path: Path
    clock: ManualClock = field(default_factory=ManualClock)
    errors: dict[int, Exception] = field(default_factory=dict)
    deadly: set[int] = field(default_factory=set)
    applied: list[int] = field(default_factory=list)
    opened: list[State] = field(default_factory=list)

    def boot(self) -> Applying:
        self.state = Full(self.path)
        self.opened.append(self.state)
        keys = [public_pem(KEY.public_key())]
        clock = TrustedClock(self.clock, self.state)
        self.attempts = Attempts(self.state)
        made = Applying(self.state, self.attempts, ME, lambda: keys, self._apply, clock)
        made.restore()
        return made

    def _apply(self, desired: DesiredState) -> None:
        self.applied.append(desired.generation)
        if desired.generation in self.deadly:
            raise Killed
        if error := self.errors.get(desired.generation):
            raise error


class Killed(BaseException):
    """The process ends here: nothing that would run behind it does."""


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path / "state.db")
    yield made
    for state in made.opened:
        state.close()


def reasons(applying: Applying) -> list[str]:
    return [condition.reason for condition in applying.conditions()]


@pytest.mark.parametrize("capped", [True, False])
def test_one_that_takes_the_agent_down_is_set_aside_and_the_next_one_taken(
    agent: Agent, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not capped:
        monkeypatch.setattr(attempts, "DEATHS", 10**9)
    agent.deadly = {2}
    first = agent.boot()
    first.offer(signed(1))
    with pytest.raises(Killed):
        first.offer(signed(2))
    for _ in range(attempts.DEATHS - 1 if capped else 5):
        with pytest.raises(Killed):
            agent.boot()
    if not capped:
        with pytest.raises(Killed):
            agent.boot()
        return
    up = agent.boot()
    assert agent.applied == [1, 2, 2, 2] and reasons(up) == ["SetAside"]
    assert (
        "generation 2 is set aside until a newer one comes: the agent went down 3 times"
        in up.conditions()[0].message
    )
    up.offer(signed(2))
    agent.clock.advance(1e4)
    up.look()
    assert agent.applied == [1, 2, 2, 2] and reasons(agent.boot()) == ["SetAside"]
    up = agent.boot()
    up.offer(signed(3))
    assert agent.applied[-1] == 3 and not up.conditions()


@pytest.mark.parametrize("healthy", [True, False])
def test_what_ends_the_agent_soon_afterwards_counts_and_what_does_later_does_not(
    agent: Agent, healthy: bool
) -> None:
    agent.boot().offer(signed(1))
    for _ in range(5):
        up = agent.boot()
        agent.clock.advance(HEALTHY_SECONDS if healthy else HEALTHY_SECONDS - 1)
        up.look()
    assert reasons(agent.boot()) == ([] if healthy else ["SetAside"])


def test_an_orderly_stop_counts_as_nothing(agent: Agent) -> None:
    agent.boot().offer(signed(1))
    for _ in range(5):
        agent.boot().stop()
    assert not agent.boot().conditions()


@pytest.mark.parametrize(
    ("error", "again"), [(ValueError("bug"), 3), (OSError(28, "No space left on device"), 11)]
)
def test_one_that_raises_is_tried_again_and_a_bug_three_times_only(
    agent: Agent, error: Exception, again: int
) -> None:
    agent.errors[1] = error
    up = agent.boot()
    up.offer(signed(1))
    assert reasons(up) == ["ApplyFailed"] and str(error) in up.conditions()[0].message
    up.look()
    assert agent.applied == [1]
    for _ in range(10):
        agent.clock.advance(AGAIN_SECONDS)
        up.look()
    assert len(agent.applied) == again
    if again == 3:
        assert reasons(up) == ["SetAside"] and "bug" in up.conditions()[0].message
        assert reasons(agent.boot()) == ["SetAside"]
    else:
        agent.errors.clear()
        agent.clock.advance(AGAIN_SECONDS)
        up.look()
        assert not up.conditions()
    up.offer(signed(2))
    assert agent.applied[-1] == 2 and not up.conditions()


def test_what_a_full_disk_cannot_accept_is_accepted_when_it_has_room(agent: Agent) -> None:
    up = agent.boot()
    agent.state.full = True
    up.offer(signed(1))
    assert not agent.applied and reasons(up) == ["NotAccepted"], "what is not durable is not applied"
    agent.state.full = False
    agent.clock.advance(AGAIN_SECONDS)
    up.look()
    assert agent.applied == [1] and agent.state.generation() == 1 and not up.conditions()


def test_a_model_under_test_takes_the_blame_from_the_desired_state(agent: Agent) -> None:
    agent.boot().offer(signed(1))
    for _ in range(5):
        agent.attempts.begin("test/a", "a", Risk.TESTING)
        assert not agent.boot().conditions()
    assert agent.attempts.spent("test/a", "a")


def test_a_full_disk_does_not_keep_a_desired_state_from_being_applied(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    agent.boot().offer(signed(1))
    monkeypatch.setattr(State, "set_attempts", full)
    assert not agent.boot().conditions() and agent.applied == [1, 1]


def test_what_is_lost_on_the_disk_is_asked_for_again(agent: Agent) -> None:
    """By HTTPS too, which answers with newer generations only than the one that is named."""
    applying = agent.boot()
    applying.offer(signed(3))
    assert (applying.held, agent.applied) == (3, [3])
    agent.state.accept_desired(3, signed(3)[:-40])
    applying = agent.boot()
    applying.offer(b"")
    assert applying.held == 2 and applying.conditions()[0].reason == "Damaged"
    applying.offer(signed(3))
    assert (applying.held, agent.applied, applying.conditions()) == (3, [3, 3], [])
