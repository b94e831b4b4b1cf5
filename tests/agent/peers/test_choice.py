"""Who goes to the controller, and who is left alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from agent.peers import choice
from agent.peers.choice import Answer, Go, Take, Wait
from edgeward.storage import sha256_hex

NAMES = st.lists(st.from_regex("[a-z]{1,8}", fullmatch=True), min_size=1, max_size=12, unique=True)
DIGESTS = st.binary(max_size=8).map(sha256_hex)
MISSING, WANTS = Answer("missing"), Answer("wants")


@given(DIGESTS, NAMES, st.randoms())
def test_all_come_to_the_same_order_whatever_they_heard_first(
    digest: str, names: list[str], chance: object
) -> None:
    shuffled = list(names)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choice.order(digest, names) == choice.order(digest, shuffled + names)
    assert sorted(choice.order(digest, names)) == sorted(names)


@given(DIGESTS, NAMES, st.data())
def test_who_leaves_moves_nobody_else(digest: str, names: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(names))
    left = [name for name in choice.order(digest, names) if name != gone]
    assert choice.order(digest, [name for name in names if name != gone]) == left


def test_digests_are_spread_over_the_names() -> None:
    names = [f"line-{number}" for number in range(5)]
    turns = Counter(choice.order(sha256_hex(b"%d" % number), names)[0] for number in range(5000))
    assert all(850 < turns[name] < 1150 for name in names), turns


@given(DIGESTS, NAMES)
def test_exactly_one_goes_at_once_when_nobody_has_it(digest: str, names: list[str]) -> None:
    steps = {
        me: choice.next_step(digest, me, {name: WANTS for name in names if name != me}, 0.0, 0.25)
        for me in names
    }
    assert [me for me, step in steps.items() if isinstance(step, Go)] == choice.order(digest, names)[:1]
    assert all(isinstance(step, Wait) and 0 < step.seconds <= 0.25 for step in steps.values() if step != Go())


@given(DIGESTS, NAMES)
def test_turns_come_one_after_another_and_everyones_comes(digest: str, names: list[str]) -> None:
    turns = [choice.grace(rank) for rank in range(65)]
    assert turns[0] == 0 and all(a < b for a, b in pairwise(turns)) and turns[-1] < 20
    for rank, me in enumerate(choice.order(digest, names)):
        answers = {name: WANTS for name in names if name != me}
        assert choice.next_step(digest, me, answers, choice.grace(rank), 9.0) == Go()
        if rank:
            assert choice.next_step(digest, me, answers, choice.grace(rank) - 0.1, 9.0) != Go()


@given(DIGESTS, NAMES, st.data())
def test_those_that_do_not_want_it_hold_nobody_up(digest: str, names: list[str], data: st.DataObject) -> None:
    """The first devices of a rollout have peers whose turn comes later."""
    wanting = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    ranked = [name for name in choice.order(digest, names) if name in wanting]
    for rank, me in enumerate(ranked):
        answers = {name: WANTS if name in wanting else MISSING for name in names if name != me}
        goes = [choice.next_step(digest, me, answers, waited, 9.0) == Go() for waited in (0.0, choice.SETTLE)]
        assert goes == [me == choice.order(digest, names)[0], rank == 0]


@given(DIGESTS, st.lists(st.sampled_from(["has", "coming", "full", "wants", "missing"]), max_size=8))
def test_a_peer_that_has_it_comes_before_waiting_and_waiting_before_going(
    digest: str, kinds: list[str]
) -> None:
    answers = {f"p{index}": Answer(kind) for index, kind in enumerate(kinds)}  # type: ignore[arg-type]
    step = choice.next_step(digest, "me", answers, 1e6, 0.25)
    if "has" in kinds:
        assert isinstance(step, Take) and answers[step.peer].kind == "has"
    elif {"coming", "full"} & set(kinds):
        assert step == Wait(0.25)
    else:
        assert step == Go()
    again = choice.ask_again(digest, "me", answers)
    assert len(again) <= choice.ASKED_AGAIN and "me" not in again
    assert {name for name, answer in answers.items() if answer.kind in ("has", "coming", "full")} <= set(
        again
    )


def test_takers_are_spread_over_those_who_have_it() -> None:
    answers = {f"p{number}": Answer("has") for number in range(4)}
    steps = [choice.next_step("0" * 64, f"me{number}", answers, 0.0, 1.0) for number in range(200)]
    taken = Counter(step.peer for step in steps if isinstance(step, Take))
    assert len(taken) == 4 and min(taken.values()) > 25, taken


@given(
    st.lists(st.tuples(st.floats(0.01, 30.0), st.sampled_from(["coming", "full"]), st.integers(0, 1 << 40)))
)
def test_nobody_is_waited_for_longer_than_the_total(answers: list[tuple[float, str, int]]) -> None:
    now, awaited, begun = 100.0, None, 100.0
    for seconds, kind, received in answers:
        answer = Answer(kind, received)  # type: ignore[arg-type]
        awaited = choice.watch(answer, awaited, now)
        vain = choice.in_vain(answer, awaited, now)
        assert vain or now - begun < choice.TOTAL
        assert vain or kind == "coming" or now - begun < choice.FULL
        assert not vain or now - begun >= min(choice.STALL, choice.FULL, choice.TOTAL)
        now += seconds


def test_progress_is_waited_for_and_a_stall_is_not() -> None:
    awaited = choice.watch(Answer("coming", 1), None, 0.0)
    awaited = choice.watch(Answer("coming", 2), awaited, 50.0)
    assert not choice.in_vain(Answer("coming", 2), awaited, 50.0 + choice.STALL - 1)
    assert choice.in_vain(Answer("coming", 2), awaited, 50.0 + choice.STALL)


@given(st.integers(1, 80), st.integers(1, 600))
def test_each_failure_doubles_the_time_alone_up_to_the_most(count: int, base: int) -> None:
    standing, now, before = choice.Standing(), 0.0, 0.0
    for _ in range(count):
        standing = choice.failed(standing, now, base)
        alone = standing.until - now
        assert min(3600.0, max(base, before * 2)) == alone
        now, before = standing.until, alone
