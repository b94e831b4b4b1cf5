"""Two real stores and a real broker between them: what may leave arrives once, the rest is counted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeward.broker import EmbeddedBroker
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link
from edgeward.trust.certificates import DeviceIdentity, StoreIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import seal
from edgeward.wire.residency import ResidencyPolicy
from edgeward.wire.resources import Residency
from edgeward.wire.rows import Ack, Batch, Lost, encode_rows
from tests.trends.forwarding_bench import CLOCK, DEVICE, FAST, Central, Fleet, Site, policy, row, wait_until
from trends.forwarder import Pace
from trends.ingest import Ingest
from trends.ledger import check_chain
from trends.quota import Quota

OTHER = DeviceName("north", "turbine-2")
ALL = Residency(forward=["alarm", "result", "trend", "sample"], inputs="full", redact=[])


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def pair(tmp_path: Path, broker: EmbeddedBroker) -> Iterator[tuple[Site, Central]]:
    fleet = Fleet()
    site = Site(tmp_path / "site", fleet)
    central = Central(tmp_path / "central", fleet, broker.url)
    yield site, central
    site.close()
    central.close()


def settled(site: Site) -> None:
    wait_until(lambda: site.behind == 0)


def test_by_default_trends_go_without_single_inputs_and_the_rest_is_counted(
    pair: tuple[Site, Central],
) -> None:
    site, central = pair
    central.start()
    site.produce("trend", 0, 20)
    site.produce("result", 0, 30, lost=(Lost(4, 6, 1, 2, {"thinned": 2, "budget": 1}),))
    site.produce("sample", 0, 40, OTHER)
    site.forward(central.url)
    settled(site)
    assert central.lanes() == {
        ("turbine-1", "trend"): (20, 0, 0, 0),
        ("turbine-1", "result"): (0, 30, 0, 0),
        ("turbine-2", "sample"): (0, 40, 0, 0),
    }
    reasons = central.ask('select lane, reason, sum("count")::int as n from gaps group by all order by all')
    assert [tuple(each.values()) for each in reasons] == [
        ("result", "budget", 1), ("result", "residency", 27), ("result", "thinned", 2), ("sample", "residency", 40),
    ]  # fmt: skip
    features = central.ask("select * from trends where series = 'feature:x'")
    assert {(each["minimum"], each["maximum"], each["sketch"], each["mean"]) for each in features} == {
        (5.0 - 396**0.5, 5.0 + 396**0.5, b"", 5.0)
    }
    (outputs,) = central.ask(
        "select distinct minimum, maximum, sketch from trends where series = 'output:score'"
    )
    assert tuple(outputs.values()) == (0.25, 9.75, b"sketch")
    times = central.ask("select distinct epoch_us(first_event_time) a, epoch_us(last_event_time) b from gaps")
    assert times == [{"a": 0, "b": 0}]


def test_rows_come_from_the_tables_when_the_journal_let_go_of_them(pair: tuple[Site, Central]) -> None:
    site, central = pair
    site.produce("result", 0, 300)
    site.produce("result", 300, 100, lost=(Lost(310, 319, 5, 6, {"thinned": 10}),))
    site.produce("trend", 0, 50)
    assert site.tables.flush() > 0 and site.journal.count() == 0
    site.produce("result", 400, 100)
    site.forward(central.url, ALL)
    central.start()
    settled(site)
    assert central.lanes() == {
        ("turbine-1", "result"): (490, 10, 0, 0),
        ("turbine-1", "trend"): (50, 0, 0, 0),
    }
    gaps = (
        "select first_seq, last_seq, reason, first_event_time, last_event_time, count from gaps order by all"
    )
    assert central.ask(gaps) == site.ask(gaps)
    columns = "seq, stream, key, source_seq, digest, outputs, event_time, alarm"
    ask = f"select {columns} from results order by seq"
    assert central.ask(ask) == site.ask(ask)
    ask = "select * exclude (received) from trends order by seq"
    assert central.ask(ask) == site.ask(ask)


def test_a_central_store_that_was_restored_from_a_backup_gets_again_what_it_lost(
    pair: tuple[Site, Central], tmp_path: Path
) -> None:
    site, central = pair
    central.start()
    site.produce("result", 0, 50)
    site.forward(central.url, ALL)
    settled(site)
    central.stop()
    central.journal.close()
    shutil.copytree(central.folder, tmp_path / "backup")
    central.open()
    central.start()
    site.produce("result", 50, 50)
    settled(site)
    central.stop()
    central.journal.close()
    shutil.rmtree(central.folder)
    shutil.copytree(tmp_path / "backup", central.folder)
    central.open()
    assert central.lanes() == {("turbine-1", "result"): (50, 0, 0, 0)}
    central.start()
    # One more row tells the site what the central store does not have.
    site.produce("result", 100, 1)
    wait_until(lambda: central.lanes() == {("turbine-1", "result"): (101, 0, 0, 0)})
    settled(site)


def test_a_lost_central_store_is_noticed_after_a_restart_though_nothing_new_comes(
    pair: tuple[Site, Central],
) -> None:
    site, central = pair
    central.start()
    site.produce("result", 0, 50)
    site.forward(central.url, ALL)
    settled(site)
    site.stop()
    central.stop()
    central.journal.close()
    shutil.rmtree(central.folder)
    central.folder.mkdir()
    central.open()
    central.start()
    site.forward(central.url, ALL)
    wait_until(lambda: central.lanes() == {("turbine-1", "result"): (50, 0, 0, 0)})


def test_a_site_that_lost_its_cursor_doubles_nothing(pair: tuple[Site, Central]) -> None:
    site, central = pair
    central.start()
    site.produce("result", 0, 50)
    site.forward(central.url, ALL)
    settled(site)
    site.stop()
    (site.folder / "forward.db").unlink()
    site.produce("result", 50, 10)
    site.forward(central.url, ALL)
    settled(site)
    assert central.lanes() == {("turbine-1", "result"): (60, 0, 0, 0)}


def test_what_the_site_lost_itself_is_a_gap_and_a_long_one_is_one(pair: tuple[Site, Central]) -> None:
    site, central = pair
    central.start()
    site.produce("result", 3_000_000, 10, floor=3_000_000)
    site.forward(central.url, ALL)
    settled(site)
    assert central.lanes() == {("turbine-1", "result"): (10, 3_000_000, 0, 0)}
    assert len(central.ask("select * from gaps")) <= 2


def test_a_policy_holds_from_then_on_and_each_is_in_a_record(pair: tuple[Site, Central]) -> None:
    site, central = pair
    central.start()
    site.produce("result", 0, 10)
    forwarder = site.forward(central.url, Residency(forward=["result"]))
    settled(site)
    forwarder.policy = policy(north=Residency(forward=[]))
    site.produce("result", 10, 5)
    settled(site)
    wait_until(lambda: site.ledger.decisions())
    site.forwarder.stop()
    site.ledger.record(time.time())
    first, second = site.ledger.decisions()
    assert (first.forwarded, first.withheld, second.forwarded, second.withheld) == (10, 0, 0, 5)
    assert first.policy != second.policy and first.bytes > 0 and second.bytes == 0
    assert [(span.first_seq, span.last_seq) for each in (first, second) for span in each.spans] == [
        (0, 9),
        (10, 14),
    ]
    check_chain([first, second])
    keys = {each["key"] for each in central.ask("select key from results")}
    assert keys == {""}, "part numbers stay unless the site lets them go"
    assert central.lanes() == {("turbine-1", "result"): (10, 5, 0, 0)}


@pytest.mark.parametrize("kind", ["expired", "other site"])
def test_nothing_leaves_by_a_policy_that_does_not_hold(pair: tuple[Site, Central], kind: str) -> None:
    site, central = pair
    central.start()
    site.produce("trend", 0, 10)
    forwarder = site.forward(central.url, pace=Pace(rows_every=1e9))
    settled(site)
    now = time.time()
    forwarder.policy = {
        "expired": ResidencyPolicy(now - 10, now - 5, {"north": ALL}),
        "other site": policy(south=ALL),
    }[kind]
    batches = forwarder.counts["batches"]
    site.produce("result", 0, 10)
    rounds = forwarder.counts["held"]
    wait_until(lambda: forwarder.counts["held"] > rounds + 2)
    assert forwarder.counts["batches"] == batches and site.behind == 10
    # The control: with one that holds it goes.
    forwarder.policy = policy(north=Residency(forward=["result"]))
    settled(site)


class Stranger:
    """Somebody with a connection to the central broker and a certificate of this fleet."""

    def __init__(self, url: str) -> None:
        self.answers: list[bytes] = []
        self.link = Link(
            Broker(url), "stranger", subscriptions=(topics.all_forwarded("north"),),
            on_message=lambda message: self.answers.append(message.payload),
        )  # fmt: skip
        self.link.start()
        wait_until(lambda: self.link.connected)


def test_only_a_store_of_the_site_may_forward_for_its_devices(pair: tuple[Site, Central]) -> None:
    site, central = pair
    central.start()
    stranger = Stranger(central.url)
    topic = topics.forward(DEVICE, "result")
    body = Batch("e", 0, 1, 0, encode_rows([row("result", 0)]))
    denied = central.fleet.member(StoreIdentity("old", frozenset({"north"})))
    central.ingest.denied = frozenset({denied.keyid})
    south = topics.forward(DeviceName("south", "a"), "result")
    attempts = [
        (topic, central.fleet.member(DeviceIdentity(DEVICE))),
        (topic, central.fleet.member(StoreIdentity("south", frozenset({"south"})))),
        (topic, Fleet().member(StoreIdentity("plant", frozenset({"north"})))),
        (topic, denied),
        (south, central.fleet.member(StoreIdentity("south", frozenset({"south"})))),
        (topics.up(DEVICE, "result"), site.signer),
    ]
    for number, (where, who) in enumerate(attempts, 1):
        stranger.link.publish(where, seal(body, where, who, with_certificate=True))
        wait_until(lambda number=number: central.ingest.counts["refused"] == number)
    assert central.lanes() == {} and stranger.answers == []
    stranger.link.publish(topic, seal(body, topic, site.signer, with_certificate=True))
    wait_until(lambda: stranger.answers)
    assert central.lanes() == {("turbine-1", "result"): (1, 0, 0, 0)}
    stranger.link.stop()


def test_a_store_that_is_no_central_one_takes_nothing_forwarded(pair: tuple[Site, Central]) -> None:
    site, central = pair
    central.start(central=False)
    topic = topics.forward(DEVICE, "result")
    body = seal(
        Batch("e", 0, 1, 0, encode_rows([row("result", 0)])), topic, site.signer, with_certificate=True
    )
    with central.journal.transaction():
        assert central.ingest.handle(topic, body) is None
    assert central.lanes() == {}


def test_acks_of_others_count_for_nothing(pair: tuple[Site, Central]) -> None:
    site, central = pair
    stranger = Stranger(central.url)
    site.produce("result", 0, 10)
    forwarder = site.forward(central.url, ALL)
    denied = site.fleet.member(StoreIdentity("old", frozenset({"north"})))
    forwarder.denied = frozenset({denied.keyid})
    wait_until(lambda: forwarder.counts["batches"])
    topic = topics.forwarded(DEVICE, "result")
    for number, who in enumerate(
        [
            site.fleet.member(DeviceIdentity(DEVICE)),
            site.fleet.member(StoreIdentity("cloud", frozenset({"south"}))),
            Fleet().member(StoreIdentity("cloud", frozenset({"north"}))),
            denied,
            site.signer,
        ],
        1,
    ):
        stranger.link.publish(topic, seal(Ack("e", 9), topic, who, with_certificate=True))
        wait_until(lambda number=number: forwarder.counts["refused acks"] == number)
    assert site.behind == 10
    central.start()
    settled(site)
    stranger.link.stop()


def test_a_quota_counts_rows_not_what_is_lost(pair: tuple[Site, Central]) -> None:
    site, central = pair
    quota = Quota(rows=1.0, seconds=20.0)
    central.ingest = Ingest(
        central.journal, site.fleet.anchor, frozenset({"north"}), CLOCK, quota, central=True
    )
    topic = topics.forward(DEVICE, "result")
    rows = encode_rows([row("result", seq) for seq in range(10)])
    for first, taken in ((0, True), (1_000_000, True), (2_000_000, False)):
        body = Batch(
            "e",
            first,
            1_000_000,
            0,
            rows,
            lost=[Lost(first + 10, first + 999_999, 0, 0, {"residency": 999_990})],
        )
        with central.journal.transaction():
            reply = central.ingest.handle(topic, seal(body, topic, site.signer, with_certificate=True))
        assert (reply is not None) == taken


def test_a_full_journal_of_withheld_rows_is_one_message(pair: tuple[Site, Central]) -> None:
    site, central = pair
    central.start()
    for first in range(0, 50_000, 5_000):
        site.produce("result", first, 5_000)
    forwarder = site.forward(central.url, pace=FAST)
    settled(site)
    assert central.lanes() == {("turbine-1", "result"): (0, 50_000, 0, 0)}
    assert forwarder.counts["batches"] <= 2, "with the one that asks whether the central store still has it"
