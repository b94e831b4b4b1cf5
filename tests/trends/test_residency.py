"""What may leave, as properties: no single input by default, every number in one place, columns back to rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.errors import EdgewardError
from edgeward.identifiers import DeviceName
from edgeward.intervals import size
from edgeward.wire.residency import ResidencyPolicy, digest
from edgeward.wire.resources import Residency
from edgeward.wire.rows import MAX_ACK_RANGES, Ack, Batch, Lost, Row, TrendRow, decode_rows, encode_rows
from edgeward.wire.topics import Lane
from tests.trends.test_columns import NOW, ROWS
from tests.trends.test_shared_journal import plain
from trends.columns import from_arrow, to_arrow
from trends.databases import Postgres
from trends.forwarding import MOST_PATIENCE, Flight, after_ack, cut, pending, settled_spans
from trends.journal import Stored
from trends.ledger import Ledger, check_chain
from trends.losses import losses
from trends.outgoing import Gap, Holding, batches, shares
from trends.read_back import Lot
from trends.residency import DEFAULT, bounds, outgoing, outgoing_reason, terms_for
from trends.sequence import SequenceId, Settled, decide

LANES: list[Lane] = ["alarm", "result", "trend", "sample"]
lanes = st.sampled_from(LANES)
policies = st.builds(
    Residency,
    forward=st.lists(lanes, unique=True),
    series=st.sampled_from([["*"], ["output:*"], ["feature:a*"], []]),
    inputs=st.sampled_from(["moments", "full"]),
    least_samples=st.integers(1, 20),
    redact=st.lists(st.sampled_from(["key", "source"]), unique=True),
)
inputs = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


def trend(values: list[float], series: str = "feature:x", **changes: Any) -> TrendRow:
    array = np.array(values)
    row = TrendRow(
        NOW, 60, "s", 1, "d", "v", "CPU", series, len(values), 0, float(array.mean()),
        float(((array - array.mean()) ** 2).sum()), min(values), max(values), [0.0], [1, 2],
        array.astype(np.float32).tobytes(),
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


@given(lanes, st.data())
def test_by_default_only_trends_leave(lane: Lane, data: st.DataObject) -> None:
    row = data.draw(ROWS[lane])
    if lane != "trend":
        assert outgoing(DEFAULT, lane, row) is None


@given(inputs, st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.binary(max_size=9))
def test_by_default_what_leaves_of_inputs_depends_on_their_moments_alone(
    values: list[float], low: float, high: float, sketch: bytes
) -> None:
    row = trend(values)
    sent = outgoing(DEFAULT, "trend", row)
    other = msgspec.structs.replace(row, minimum=low, maximum=high, sketch=sketch)
    assert sent == outgoing(DEFAULT, "trend", other)
    if len(values) < DEFAULT.least_samples:
        assert sent is None
        return
    assert isinstance(sent, TrendRow) and not sent.sketch
    slack = 1e-6 * max(1.0, *map(abs, values))
    assert sent.minimum <= min(values) + slack and sent.maximum >= max(values) - slack
    assert (sent.count, sent.mean, sent.m2, sent.histogram) == (row.count, row.mean, row.m2, row.histogram)


@given(st.sampled_from(["feature:x", "features:x", "", "Output:y", "raw"]))
def test_a_series_that_is_not_named_an_output_is_taken_for_an_input(series: str) -> None:
    assert outgoing(DEFAULT, "trend", trend([1.0], series)) is None
    sent = outgoing(DEFAULT, "trend", trend([1.0] * 10, series))
    assert isinstance(sent, TrendRow) and not sent.sketch


def test_outputs_leave_whole_and_an_empty_bucket_says_nothing_but_that() -> None:
    row = trend([1.0], "output:score")
    assert outgoing(DEFAULT, "trend", row) == row
    empty = trend([1.0], count=0, missing=7)
    sent = outgoing(DEFAULT, "trend", empty)
    assert isinstance(sent, TrendRow) and (sent.count, sent.missing) == (0, 7)
    assert (sent.mean, sent.m2, sent.minimum, sent.maximum, sent.sketch) == (0.0, 0.0, 0.0, 0.0, b"")


@given(st.integers(1, 1 << 40), st.floats(allow_nan=False, allow_infinity=False), st.floats(-1, 1.7e308))
def test_bounds_are_always_numbers_that_a_store_takes(count: int, mean: float, m2: float) -> None:
    low, high = bounds(count, mean, m2)
    assert math.isfinite(low) and math.isfinite(high) and low <= mean <= high


@given(lanes, policies, st.data())
def test_redacted_columns_are_empty_and_the_others_as_they_were(
    lane: Lane, residency: Residency, data: st.DataObject
) -> None:
    row = data.draw(ROWS[lane])
    sent = outgoing(residency, lane, row)
    assert (sent is not None) <= (lane in residency.forward)
    if sent is None or lane == "trend":
        return
    expected = msgspec.structs.asdict(row)
    if "key" in residency.redact:
        expected["key"] = ""
    if "source" in residency.redact:
        expected |= {"source_epoch": "", "source_seq": -1}
    assert msgspec.structs.asdict(sent) == expected


def test_what_holds_for_a_site() -> None:
    policy = ResidencyPolicy(10.0, 20.0, {"north": Residency(forward=[])})
    assert terms_for("north", None, 15.0).residency == DEFAULT
    assert terms_for("north", policy, 19.9).residency == Residency(forward=[])
    assert (
        terms_for("north", policy, 20.0).residency is None
        and "expired" in terms_for("north", policy, 20.0).held
    )
    assert terms_for("south", policy, 15.0).residency is None
    assert terms_for("north", policy, 15.0).policy != terms_for("north", None, 15.0).policy == digest(DEFAULT)


@pytest.mark.parametrize(
    ("reason", "leaves"),
    [
        ("thinned", "thinned"), ("refused: outputs of part 4711: not finite", "refused"), ("budget", "budget"),
        ("Anna's secret", "other"), ("", "other"), ("residency", "other"),
    ],
)  # fmt: skip
def test_a_reason_that_leaves_is_a_word_of_the_contract(reason: str, leaves: str) -> None:
    assert outgoing_reason(reason) == leaves


# batches


@st.composite
def holdings(draw: st.DrawFn, lane: Lane) -> Holding:
    """Rows, gaps (with one or two reasons) and numbers of which nothing is known, in any order."""
    first = at = draw(st.integers(0, 5))
    rows: dict[int, Row] = {}
    gaps: list[Gap] = []
    for kind in draw(st.lists(st.sampled_from(["row", "gap", "nothing"]), min_size=1, max_size=12)):
        length = draw(st.integers(1, 5))
        if kind == "row":
            rows |= {seq: draw(ROWS[lane]) for seq in range(at, at + length)}
        elif kind == "gap":
            some = draw(st.integers(1, length))
            reasons = {"thinned": some} | ({"odd\nreason": length - some} if length > some else {})
            gaps.append(Gap(at, at + length - 1, reasons, (1, 2)))
        at += length
    begin = draw(st.integers(first, at - 1))
    return Holding(begin, draw(st.integers(begin, at - 1)), rows, gaps)


@given(lanes, policies, st.data(), st.integers(1, 4), st.integers(1, 4))
def test_every_number_is_in_one_batch_which_a_store_takes(
    lane: Lane, residency: Residency, data: st.DataObject, most_rows: int, most_lost: int
) -> None:
    holding = data.draw(holdings(lane))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trends.outgoing.MAX_ROWS", most_rows)
        patch.setattr("trends.outgoing.MAX_LOST", most_lost)
        made = list(batches("e", lane, holding, residency))
    at, rows = holding.first, 0
    known = Settled(holding.first)
    for batch in made:
        assert batch.first_seq == at
        lost = losses(batch)
        count = batch.count - sum(each.last_seq - each.first_seq + 1 for each in lost)
        sent = decode_rows(lane, batch.rows) if batch.rows else []
        assert len(sent) == count <= most_rows and len(lost) <= most_lost + 1
        decision = decide(known, batch.first_seq, batch.count, batch.floor)
        assert decision.take == [(batch.first_seq, batch.first_seq + batch.count - 1)] and not decision.lost
        known, at, rows = decision.after, at + batch.count, rows + count
    assert at == holding.last + 1
    kept = [
        outgoing(residency, lane, holding.rows[seq])
        for seq in sorted(holding.rows)
        if holding.first <= seq <= holding.last
    ]
    assert rows == sum(1 for row in kept if row is not None)
    total = [sum(each) for each in zip(*(shares(b, [(0, 1000)]) for b in made), strict=True)]
    assert sum(total) == holding.last - holding.first + 1 and total[0] == rows
    if lane in residency.forward:
        assert total[1] == len(kept) - rows


@given(lanes, st.data())
def test_columns_become_the_rows_again(lane: Lane, data: st.DataObject) -> None:
    rows = data.draw(st.lists(ROWS[lane], min_size=1, max_size=5))
    table = to_arrow(lane, [Stored(1, "north", "d", "e", 7, len(rows), NOW, encode_rows(rows))])
    assert from_arrow(lane, table) == rows
    if lane == "trend":
        old = from_arrow(lane, table.drop_columns(["sketch"]))
        assert old == [msgspec.structs.replace(row, sketch=b"") for row in rows]


# what is offered

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=6)


def made_of(expected: int, parts: list[tuple[int, int]]) -> Settled:
    known = Settled(expected)
    for first, length in parts:
        known = known.add(first, first + length)
    return known


def numbers(parts: list[tuple[int, int]]) -> set[int]:
    return {seq for first, last in parts for seq in range(first, last + 1)}


@given(st.integers(0, 20), spans, st.none() | st.tuples(st.integers(0, 20), spans), spans)
def test_what_is_offered_is_what_the_other_lacks(
    expected: int, parts: list[tuple[int, int]], other: tuple[int, list[tuple[int, int]]] | None,
    flying: list[tuple[int, int]],
) -> None:  # fmt: skip
    here, there = made_of(expected, parts), made_of(*other) if other else None
    flights = [(first, first + length) for first, length in flying]
    found = pending(here, there, flights)
    known = numbers(settled_spans(there)) if there else set()
    assert numbers(found) == numbers(settled_spans(here)) - known - numbers(flights)
    assert size(found) == len(numbers(found)) and found == sorted(found)


def test_a_doubted_sequence_offers_its_newest_number_once() -> None:
    here = Settled(5, [(7, 9)])
    assert pending(here, here, [], doubted=True) == [(9, 9)]
    assert pending(here, here, [(9, 9)], doubted=True) == []
    assert pending(here, here, []) == []
    assert pending(Settled(0), None, [], doubted=True) == []


def test_acks_are_believed_in_both_directions() -> None:
    assert after_ack(None, Ack("e", 4, [(7, 8)])) == Settled(5, [(7, 8)])
    assert after_ack(Settled(5), Ack("e", 9)) == Settled(10)
    assert after_ack(Settled(10), Ack("e", 4, [(7, 8)])) == Settled(5, [(7, 8)])
    assert after_ack(Settled(0, [(3, 4)]), Ack("e", -1)) == Settled(0), "it is no longer there"
    newest = [(1000 + 2 * i, 1000 + 2 * i) for i in range(MAX_ACK_RANGES)]
    assert after_ack(Settled(0, [(3, 4)]), Ack("e", -1, newest)).above[0] == (3, 4), (
        "there are more than it names"
    )


def test_what_an_ack_overtakes_goes_again_at_once_and_the_rest_when_it_is_overdue() -> None:
    flight = Flight(first=5.0)
    for number in range(4):
        flight = flight.sent((10 * number, 10 * number + 9), 100.0 + number)
    assert flight.numbers() == [(0, 9), (10, 19), (20, 29), (30, 39)]
    assert flight.acknowledged(Settled(0, [(20, 29)])).numbers() == [(30, 39)]
    assert flight.acknowledged(Settled(10)).numbers() == [(10, 19), (20, 29), (30, 39)]
    assert flight.acknowledged(Settled(5)).numbers() == flight.numbers(), "half a batch is none"
    late = flight.at(105.0)
    assert late.numbers() == [(10, 19), (20, 29), (30, 39)] and late.patience == 10.0
    assert late.at(106.0).at(107.0).at(1e9).patience == 80.0
    assert late.acknowledged(Settled(20)).patience == 5.0
    for _ in range(20):
        late = late.sent((0, 9), 0.0).at(1e9)
    assert late.patience == MOST_PATIENCE


@given(st.integers(0, 30), st.integers(0, 60), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=5),
       st.integers(1, 10))  # fmt: skip
def test_a_lot_is_cut_by_its_rows_not_by_its_gaps(
    first: int, length: int, gaps: list[tuple[int, int]], limit: int
) -> None:
    lot = Lot(SequenceId(DeviceName("north", "a"), "e", "result"), first, first + length)
    spans = sorted((begin, begin + more) for begin, more in gaps)
    part = cut(lot, spans, limit)
    assert part.first == first <= part.last <= lot.last
    inside = numbers([part.span]) - numbers(spans)
    assert len(inside) <= limit
    assert part.last == lot.last or len(inside) == limit


# the log of decisions


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_the_log_is_a_chain_and_a_change_in_it_shows(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    def opened(now: float) -> Ledger:
        if kind == "sqlite":
            return Ledger(tmp_path / "forward.db", now)
        return Ledger(Postgres(plain(request.getfixturevalue("postgres_url"))), now)

    ledger = opened(100.0)
    sequence = SequenceId(DeviceName("north", "a"), "e", "result")
    batch = Batch("e", 0, 10, 0, encode_rows([]), lost=[Lost(2, 9, 0, 0, {"residency": 8})])
    for number in range(3):
        ledger.decide([(sequence, f"policy-{number}", batch)], 100.0 + number)
        ledger.decide([(sequence, f"policy-{number}", batch)], 100.0 + number)
    assert [(each.forwarded, each.withheld) for each in ledger.tallies()] == [(2, 8)] * 3, (
        "sent twice, decided once"
    )
    going_on = {("north", "policy-2")}
    assert ledger.record(110.0, older_than=60.0, going_on=going_on) == 2
    assert ledger.record(161.9, older_than=60.0, going_on=going_on) == 0
    assert ledger.record(162.0, older_than=60.0, going_on=going_on) == 1
    ledger.close()
    ledger = opened(999.0)
    log = ledger.decisions()
    assert [(each.number, each.since, each.until) for each in log] == [
        (1, 100.0, 110.0), (2, 101.0, 110.0), (3, 102.0, 162.0),
    ]  # fmt: skip
    check_chain(log)
    changed = [log[0], msgspec.structs.replace(log[1], withheld=0), log[2]]
    for forged in (changed, [log[0], log[2]], log[1:]):
        with pytest.raises(EdgewardError, match="does not follow"):
            check_chain(forged)
    ledger.set_reported(2)
    assert [each.number for each in ledger.decisions(ledger.reported)] == [3]
    said = {sequence: Settled(3, [(5, 6)]), sequence._replace(epoch="f"): Settled(0, [(0, 1)])}
    ledger.acknowledged(said)
    assert ledger.cursors() == said
    ledger.acknowledged({sequence: Settled(1)})
    assert ledger.cursors()[sequence] == Settled(1), "a central store may have lost rows"
    ledger.close()
