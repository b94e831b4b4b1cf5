"""A broker is killed under load, again and again: every row is in the store once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgeward.broker import EmbeddedBroker
from tests.contracts.test_brokers import Mosquitto, RealBroker, needs_mosquitto
from tests.faults.pipeline.conftest import Closing
from tests.faults.pipeline.ends import Agent, Keyring, Load, Outcome, Store, compare, wait_for
from trends.sequence import Decision, Settled, decide

KILLS = 100


class Run:
    """Both ends at a broker that is killed while rows are on their way."""

    def __init__(
        self,
        broker: RealBroker,
        folder: Path,
        ring: Keyring,
        closing: Closing,
        *,
        trusts_broker: bool = False,
    ) -> None:
        self.broker = broker
        broker.start()
        self.store = Store(folder / "store", ring, broker.url)
        self.agent = Agent(folder / "agent", ring, broker.url, trusts_broker=trusts_broker)
        closing(self.store, self.agent)
        self.store.start()
        self.produced = 0

    def kill(self, times: int) -> None:
        """Each time once more rows have arrived, while a stream makes others."""
        with Load(self.agent, self.produced) as load:
            for _ in range(times):
                before = self.agent.acknowledged
                wait_for(lambda before=before: self.agent.acknowledged > before, self.counts)
                self.broker.kill()
                self.broker.start()
        self.produced = load.produced
        wait_for(self.agent.drained, self.counts)

    def counts(self) -> object:
        return self.agent.outbox.sequences(), self.agent.uplink.counts, self.store.ingest.counts

    def outcome(self) -> Outcome:
        return compare(self.store.journal, self.store.tables, self.produced)


@pytest.fixture(params=[pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def start(
    request: pytest.FixtureRequest, tmp_path: Path, ring: Keyring, closing: Closing, quick_links: None
) -> Callable[..., Run]:
    def begin(*, trusts_broker: bool = False) -> Run:
        if request.param == "mosquitto":
            broker: RealBroker = Mosquitto(tmp_path)
        else:
            broker = EmbeddedBroker(tmp_path / "broker")
        request.addfinalizer(broker.stop)
        return Run(broker, tmp_path, ring, closing, trusts_broker=trusts_broker)

    return begin


def test_a_broker_that_is_killed_loses_and_doubles_nothing(start: Callable[..., Run]) -> None:
    run = start()
    run.kill(KILLS)
    found = run.outcome()
    assert found.exactly_once and not found.in_gaps, found
    assert run.agent.outbox.lane("result").next_seq == run.produced
    assert run.store.ingest.counts["refused"] == 0 and not run.store.refused
    assert run.store.ingest.counts["duplicate"], "acks died with the broker"


def test_rows_are_lost_when_a_brokers_word_is_taken_for_the_stores(start: Callable[..., Run]) -> None:
    """The control: what a broker has acknowledged dies with it."""
    run = start(trusts_broker=True)
    run.kill(10)
    assert run.outcome().lost["results"]


def test_rows_are_doubled_when_the_store_forgets_what_it_has(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what was stored, and whose ack died with the broker, comes again."""

    def forgetful(settled: Settled | None, first: int, count: int, floor: int) -> Decision:
        decision = decide(settled, first, count, floor)
        return replace(decision, take=[(first, first + count - 1)])

    monkeypatch.setattr("trends.ingest.decide", forgetful)
    run = start()
    rounds = 0
    while not run.outcome().duplicated["results"]:
        rounds += 1
        assert rounds < KILLS, run.counts()
        run.kill(1)
    assert run.outcome().twice
