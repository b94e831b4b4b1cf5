"""Packets lost, doubled and out of order, between the agent and the broker and between the broker and the store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from edgeward.broker import EmbeddedBroker
from edgeward.mqtt import Broker, Link
from simulators.fault_proxy import FaultProxy, Faults
from tests.contracts.test_brokers import Mosquitto, RealBroker, needs_mosquitto
from tests.faults.pipeline.conftest import Closing
from tests.faults.pipeline.ends import Agent, Keyring, Load, Store, compare, wait_for

ROWS = 20_000
BAD = Faults(lost=0.1, doubled=0.1, reordered=0.1)


class Proxies:
    """One for each end, on an event loop of their own."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.agent, self.store = (FaultProxy("127.0.0.1", port, BAD, seed=seed) for seed in (1, 2))
        for proxy in (self.agent, self.store):
            self._run(proxy.start())

    def _run(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(30)

    def close(self) -> None:
        for proxy in (self.agent, self.store):
            self._run(proxy.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose windows are full of what was lost is noticed soon."""
    for name in (
        "edgeward.mqtt.STALL_S",
        "trends.ingest.SILENCE_S",
        "agent.uplink.SILENCE_S",
        "agent.uplink.MAX_SILENCE_S",
    ):
        monkeypatch.setattr(name, 1.0)
    monkeypatch.setattr("agent.outbox.pacing.MIN_TIMEOUT", 0.2)


@pytest.fixture
def renewals(monkeypatch: pytest.MonkeyPatch) -> list[Link]:
    """The links that were given a new connection."""
    made: list[Link] = []
    renew = Link.renew

    def counted(link: Link) -> None:
        made.append(link)
        renew(link)

    monkeypatch.setattr(Link, "renew", counted)
    return made


@pytest.mark.usefixtures("quick_links", "impatient")
@pytest.mark.parametrize("kind", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded"])
def test_the_stores_set_is_the_devices_set(
    kind: str,
    tmp_path: Path,
    ring: Keyring,
    closing: Closing,
    request: pytest.FixtureRequest,
    renewals: list[Link],
) -> None:
    broker: RealBroker = Mosquitto(tmp_path) if kind == "mosquitto" else EmbeddedBroker(tmp_path / "broker")
    broker.start()
    request.addfinalizer(broker.stop)
    proxies = Proxies(int(broker.url.rpartition(":")[2]))
    closing(proxies)
    store = Store(tmp_path / "store", ring, f"mqtt://127.0.0.1:{proxies.store.port}")
    agent = Agent(tmp_path / "agent", ring, f"mqtt://127.0.0.1:{proxies.agent.port}")
    closing(store, agent)
    store.start()

    def counts() -> object:
        return agent.outbox.sequences(), agent.uplink.counts, store.ingest.counts, agent.uplink.pace

    with Load(agent) as load:
        wait_for(lambda: load.produced >= ROWS, counts)
    wait_for(agent.drained, counts)
    found = compare(store.journal, store.tables, load.produced)
    assert found.exactly_once and not found.in_gaps, found
    for proxy in (proxies.agent, proxies.store):
        assert all(proxy.counts[fault] >= 10 for fault in ("lost", "doubled", "reordered")), proxy.counts
    # What is lost takes its place in MQTT's windows for ever: Mosquitto's are full soon.
    assert renewals or kind == "embedded"
    assert not store.ingest.counts["refused"] and not agent.uplink.counts["refused acks"]


@pytest.mark.usefixtures("quick_links", "impatient")
def test_a_link_whose_broker_answers_nothing_connects_anew(
    tmp_path: Path, closing: Closing, request: pytest.FixtureRequest, renewals: list[Link]
) -> None:
    broker = EmbeddedBroker(tmp_path / "broker")
    broker.start()
    request.addfinalizer(broker.stop)
    proxies = Proxies(broker.port)
    closing(proxies)
    proxies.agent.faults = Faults(lost=1.0)
    link = Link(Broker(f"mqtt://127.0.0.1:{proxies.agent.port}"), "one")
    link.start()
    request.addfinalizer(link.stop)
    wait_for(lambda: link.connected, lambda: "the link to connect")
    link.publish("a", b"x")
    wait_for(lambda: link.publish("a", b"x") and renewals == [link], lambda: proxies.agent.counts)


@pytest.mark.usefixtures("quick_links", "impatient")
def test_an_ingester_that_hears_nothing_connects_anew(
    tmp_path: Path, ring: Keyring, closing: Closing, request: pytest.FixtureRequest, renewals: list[Link]
) -> None:
    broker = EmbeddedBroker(tmp_path / "broker")
    broker.start()
    request.addfinalizer(broker.stop)
    store = Store(tmp_path / "store", ring, broker.url)
    closing(store)
    store.start()
    wait_for(lambda: store.ingester._link in renewals, lambda: "a new connection")
    agent = Agent(tmp_path / "agent", ring, broker.url)
    closing(agent)
    agent.produce(0, 100)
    wait_for(lambda: agent.acknowledged == 100 and agent.drained(), agent.outbox.sequences)
