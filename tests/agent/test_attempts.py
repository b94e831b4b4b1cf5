"""What counts as a death of the agent, and over what: against every order of beginnings and ends."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.attempts import DEATHS, REBOOTS, Attempt, Attempts, Risk, after_death, kernel_boot
from agent.state import State


class Memory:
    """A store that a test can take away."""

    def __init__(self) -> None:
        self.kept: dict[str, Attempt] = {}
        self.full = False

    def attempts(self) -> dict[str, Attempt]:
        return dict(self.kept)

    def set_attempts(self, changes: Mapping[str, Attempt | None]) -> None:
        if self.full:
            raise sqlite3.OperationalError("database or disk is full")
        for key, attempt in changes.items():
            self.kept.pop(key, None)
            if attempt is not None:
                self.kept[key] = attempt


def test_three_deaths_in_a_row_are_enough_and_an_end_forgets_them() -> None:
    store = Memory()
    for round_ in range(2):
        for death in range(DEATHS):
            attempts = Attempts(store, "boot")
            assert attempts.spent("a", "x") is None, (round_, death)
            attempts.begin("a", "x", Risk.TESTING)
        attempts = Attempts(store, "boot")
        spent = attempts.spent("a", "x")
        assert spent is not None and spent.figures() == (3.0, 3.0)
        assert spent.why("there") == "the agent went down 3 times in a row there"
        assert attempts.spent("a", "y") is None, "another subject begins anew"
        attempts.end("a")
    assert not store.kept


def test_a_machine_that_loses_power_is_believed_longer() -> None:
    store = Memory()
    for boot in range(REBOOTS):
        attempts = Attempts(store, f"boot {boot}")
        assert attempts.spent("a", "x") is None
        attempts.begin("a", "x", Risk.OPENING)
    spent = Attempts(store, "last").spent("a", "x")
    assert spent is not None and spent.figures() == (10.0, 10.0) and spent.deaths == 0
    assert spent.why("there").startswith("the machine went down 10 times")


def test_an_orderly_stop_is_no_death_but_forgives_none() -> None:
    store = Memory()
    for _ in range(DEATHS - 1):
        Attempts(store, "boot").begin("a", "x", Risk.TESTING)
    attempts = Attempts(store, "boot")
    attempts.begin("a", "x", Risk.TESTING)
    attempts.leave("a")
    attempts = Attempts(store, "boot")
    assert attempts.spent("a", "x") is None and attempts.all()["a"].deaths == DEATHS - 1
    attempts.begin("a", "x", Risk.TESTING)
    assert Attempts(store, "boot").spent("a", "x")


@given(st.dictionaries(st.text("abc", max_size=2), st.tuples(st.sampled_from(Risk), st.booleans())))
def test_only_the_narrowest_takes_the_blame(found: dict[str, tuple[Risk, bool]]) -> None:
    before = {key: Attempt("x", risk, "boot", open) for key, (risk, open) in found.items()}
    after = {**before, **after_death(before, "boot")}
    left = [risk for risk, open in found.values() if open]
    for key, (risk, open) in found.items():
        assert after[key].deaths == (open and risk == min(left)) and not after[key].open
    assert not after_death(after, "boot"), "a death is counted once"


def test_a_full_disk_keeps_only_what_is_new_from_beginning() -> None:
    store = Memory()
    attempts = Attempts(store, "boot")
    attempts.begin("a", "x", Risk.SERVING)
    store.full = True
    with pytest.raises(sqlite3.Error):
        attempts.begin("b", "y", Risk.TESTING)
    attempts.end("a")
    assert not attempts.all()
    again = Attempts(store, "boot")
    assert again.all()["a"].deaths == 1 and "b" not in again.all()


def test_attempts_outlive_the_process(tmp_path: Path) -> None:
    state = State(tmp_path / "state.db")
    first = Attempts(state)
    first.begin("a", "x", Risk.TESTING)
    first.begin("b", "y", Risk.SERVING)
    first.end("b")
    state.close()
    state = State(tmp_path / "state.db")
    assert Attempts(state).all() == {"a": Attempt("x", Risk.TESTING, kernel_boot(), False, 1, 0)}
    state._db.execute("INSERT INTO attempt VALUES ('c', x'c0')")
    assert set(state.attempts()) == {"a"}, "what another version of the agent wrote counts as nothing"
    state.close()
