"""The trend store against a real broker, hostile senders, rubbish, and crashes between two writes."""

from __future__ import annotations

import datetime
import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeward.broker import EmbeddedBroker
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import InvalidDocument, UsageError
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link
from edgeward.trust import certificates, keys
from edgeward.trust.certificates import DeviceIdentity, Identity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import open_envelope, seal
from edgeward.wire.reports import Status
from edgeward.wire.rows import Ack, AlarmRow, Batch, Gap, Lost, ResultRow, TrendRow, encode_rows
from edgeward.wire.topics import Lane
from simulators.processes import wait_until
from trends.ingest import Ingest, Ingester
from trends.journal import Journal, Stored
from trends.query import Queries
from trends.quota import Quota
from trends.schemas import SCHEMAS
from trends.tables import Tables
from trends.verify import Produced, read_produced, verify

DEVICE = DeviceName("north", "turbine-1")
OTHER = DeviceName("north", "turbine-2")
TOPIC = topics.up(DEVICE, "result")


class Fleet:
    def __init__(self, now: float) -> None:
        self.now = now
        self.key = keys.generate_key()
        self.ca = certificates.make_ca(self.key, now)
        self.anchor = TrustAnchor(certificates.to_pem(self.ca))

    def member(self, identity: Identity) -> SigningIdentity:
        key = keys.generate_key()
        issued = certificates.issue(self.ca, self.key, key.public_key(), identity, self.now, lifetime=3600)
        return SigningIdentity(key, certificates.to_der(issued))


class Bench:
    """One store on a manual clock; messages are handed to it directly."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.fleet = Fleet(self.clock.now())
        self.folder = folder
        self.journal = Journal(folder / "journal.db")
        self.device = self.fleet.member(DeviceIdentity(DEVICE))
        self.ingest = Ingest(self.journal, self.fleet.anchor, frozenset({"north"}), self.clock)

    def deliver(self, topic: str, payload: bytes) -> Ack | None:
        with self.journal.transaction():
            reply = self.ingest.handle(topic, payload)
        return reply.ack if reply else None

    def born(self) -> None:
        topic = topics.status(DEVICE)
        birth = Status(1, 0, self.clock.now(), "online")
        assert self.deliver(topic, seal(birth, topic, self.device, with_certificate=True)) is None

    def row(self, seq: int, **changes: object) -> ResultRow:
        values = {
            "event_time": int(self.clock.now() * 1e6) + seq, "stream": "s", "revision": 1, "key": "k", "source_epoch": "se",
            "source_seq": seq, "digest": "d" * 64, "variant": "v", "provider": "CPU", "outputs": {"score": seq / 10},
            "alarm": False,
        }  # fmt: skip
        return ResultRow(**{**values, **changes})  # type: ignore[arg-type]

    def batch(self, first: int, count: int, floor: int = 0, epoch: str = "e") -> bytes:
        rows = encode_rows([self.row(seq) for seq in range(first, first + count)])
        return seal(Batch(epoch, first, count, floor, rows), TOPIC, self.device)

    def tables(self, between: Callable[[str], None] = lambda step: None) -> Tables:
        return Tables(self.folder / "tables", self.journal, between=between)

    def sequence(self, tables: Tables) -> list[int]:
        answer = Queries(tables, self.journal).sql("select seq from results order by seq")
        return answer.column("seq").to_pylist()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.born()
    yield made
    made.journal.close()


def test_batches_are_stored_once_and_acknowledged_cumulatively(bench: Bench) -> None:
    assert bench.deliver(TOPIC, bench.batch(0, 10)) == Ack("e", 9)
    assert bench.deliver(TOPIC, bench.batch(0, 10)) == Ack("e", 9)
    assert bench.deliver(TOPIC, bench.batch(20, 5)) == Ack("e", 9, [(20, 24)])
    assert bench.deliver(TOPIC, bench.batch(5, 15, floor=5)) == Ack("e", 24)
    assert bench.sequence(bench.tables()) == list(range(25))


def test_a_batch_before_the_birth_waits(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.deliver(TOPIC, bench.batch(0, 5)) is None
    bench.born()
    assert bench.deliver(TOPIC, bench.batch(0, 5)) == Ack("e", 4)


def test_gaps_are_kept_with_their_reason(bench: Bench) -> None:
    gap = Batch("e", 0, 7, 0, b"", Gap("budget", 1, 2))
    assert bench.deliver(TOPIC, seal(gap, TOPIC, bench.device)) == Ack("e", 6)
    assert bench.deliver(TOPIC, bench.batch(7, 3)) == Ack("e", 9)
    assert bench.deliver(TOPIC, bench.batch(15, 1, floor=15)) == Ack("e", 15)
    gaps = Queries(bench.tables(), bench.journal).sql(
        "select first_seq, last_seq, reason from gaps order by 1"
    )
    assert [tuple(row.values()) for row in gaps.to_pylist()] == [(0, 6, "budget"), (10, 14, "store-lost")]


def lost_batch(bench: Bench, first: int, count: int, lost: list[Lost], floor: int = 0) -> bytes:
    gone = {seq for item in lost for seq in range(item.first_seq, item.last_seq + 1)}
    rows = encode_rows([bench.row(seq) for seq in range(first, first + count) if seq not in gone])
    return seal(Batch("e", first, count, floor, rows, lost=lost), TOPIC, bench.device)


def gap_records(bench: Bench) -> list[tuple[object, ...]]:
    answer = Queries(bench.tables(), bench.journal).sql(
        'select first_seq, last_seq, reason, "count" from gaps order by 1, 3'
    )
    return [tuple(row.values()) for row in answer.to_pylist()]


def test_rows_and_losses_of_one_batch_add_up_whatever_was_stored_before(bench: Bench) -> None:
    lost = [Lost(2, 5, 10, 20, {"thinned": 3, "time-to-live": 1}), Lost(8, 8, 30, 30, {"merged": 1})]
    assert bench.deliver(TOPIC, bench.batch(4, 1)) == Ack("e", -1, [(4, 4)])
    assert bench.deliver(TOPIC, lost_batch(bench, 0, 10, lost)) == Ack("e", 9)
    assert bench.deliver(TOPIC, lost_batch(bench, 0, 10, lost)) == Ack("e", 9)
    assert bench.sequence(bench.tables()) == [0, 1, 4, 6, 7, 9], "what was stored before is not lost"
    records = gap_records(bench)
    assert sum(int(str(record[3])) for record in records) + 6 == 10
    assert {record[:3] for record in records} == {
        (2, 3, "thinned"), (5, 5, "thinned"), (8, 8, "merged"),
    }  # fmt: skip
    bench.tables().flush()
    assert gap_records(bench) == records


@pytest.mark.parametrize(
    "lost",
    [
        [Lost(0, 3, 0, 0, {"thinned": 3})],
        [Lost(0, 3, 0, 0, {"thinned": 5, "budget": -1})],
        [Lost(0, 0, 0, 0, {})],
        [Lost(0, 1, 0, 0, {"x": 2}), Lost(1, 2, 0, 0, {"x": 2})],
        [Lost(5, 3, 0, 0, {"x": -1})],
        [Lost(9, 10, 0, 0, {"x": 2})],
        [Lost(1, 1, 0, 0, {"x" * 300: 1})],
        [Lost(1 << 70 >> 8, 1 << 63, 0, 0, {"x": 1})],
    ],
)
def test_impossible_losses_are_refused(bench: Bench, lost: list[Lost]) -> None:
    body = Batch("e", 0, 10, 0, encode_rows([bench.row(0)]), lost=lost)
    assert bench.deliver(TOPIC, seal(body, TOPIC, bench.device)) is None
    huge = Batch("e", 0, 1 << 50, 0, encode_rows([bench.row(0)]), lost=[Lost(3, 3, 0, 0, {"x": 1})])
    assert bench.deliver(TOPIC, seal(huge, TOPIC, bench.device)) is None
    assert bench.journal.count() == 0 and gap_records(bench) == []


def test_a_journal_of_an_older_store_goes_on(tmp_path: Path) -> None:
    old = sqlite3.connect(tmp_path / "journal.db")
    old.executescript(
        "CREATE TABLE position (site TEXT, device TEXT, epoch TEXT, lane TEXT, expected INTEGER NOT NULL,"
        " PRIMARY KEY (site, device, epoch, lane)) WITHOUT ROWID;"
        "CREATE TABLE gap (id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT, device TEXT, epoch TEXT, lane TEXT,"
        " first_seq INTEGER, last_seq INTEGER, reason TEXT, first_event_time INTEGER, last_event_time INTEGER,"
        " received INTEGER);"
        "INSERT INTO position VALUES ('north', 'turbine-1', 'e', 'result', 7);"
        "INSERT INTO gap VALUES (1, 'north', 'turbine-1', 'e', 'result', 2, 4, 'budget', 0, 0, 0);"
    )
    old.commit()
    old.close()
    bench = Bench(tmp_path)
    bench.born()
    assert bench.deliver(TOPIC, bench.batch(5, 5)) == Ack("e", 9)
    assert bench.sequence(bench.tables()) == [7, 8, 9]
    assert gap_records(bench) == [(2, 4, "budget", 3)]


def test_gaps_of_a_table_without_counts_are_whole(bench: Bench) -> None:
    schema = SCHEMAS["gaps"].remove(SCHEMAS["gaps"].get_field_index("count"))
    at = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    values = ["north", "turbine-1", "e", "result", 2, 4, "budget", at, at, at]
    old = pa.table([[value] for value in values], schema=schema)
    write_deltalake(str(bench.folder / "tables" / "gaps"), old)
    assert gap_records(bench) == [(2, 4, "budget", 3)]
    bench.deliver(TOPIC, lost_batch(bench, 0, 2, [Lost(0, 1, 0, 0, {"x": 1, "y": 1})]))
    bench.tables().flush()
    assert gap_records(bench) == [(0, 1, "x", 1), (0, 1, "y", 1), (2, 4, "budget", 3)]


def test_hostile_senders_store_nothing(bench: Bench) -> None:
    good = bench.batch(0, 5)
    stranger = Fleet(bench.clock.now()).member(DeviceIdentity(DEVICE))
    sibling = bench.fleet.member(DeviceIdentity(OTHER))
    store = bench.fleet.member(StoreIdentity("rogue", frozenset({"north"})))
    elsewhere = DeviceName("harbour", "crane-1")
    crane = bench.fleet.member(DeviceIdentity(elsewhere))
    body = Batch("e", 0, 1, 0, encode_rows([bench.row(0)]))
    attempts = [
        (topics.up(OTHER, "result"), good),
        (topics.up(DEVICE, "alarm"), good),
        (TOPIC, seal(body, TOPIC, stranger, with_certificate=True)),
        (TOPIC, seal(body, TOPIC, sibling, with_certificate=True)),
        (TOPIC, seal(body, TOPIC, store, with_certificate=True)),
        (
            topics.up(elsewhere, "result"),
            seal(body, topics.up(elsewhere, "result"), crane, with_certificate=True),
        ),
        (TOPIC, good[:-1] + bytes([good[-1] ^ 1])),
        ("edgeward/v1/north/turbine-1/ack/result", good),
        ("nonsense", good),
    ]
    for topic, payload in attempts:
        assert bench.deliver(topic, payload) is None, topic
    assert bench.journal.count() == 0
    bench.clock.advance(7200)
    assert bench.deliver(TOPIC, good) is None, "the certificate has expired"
    assert bench.journal.count() == 0


def test_bad_rows_are_quarantined_and_do_not_block_their_lane(bench: Bench) -> None:
    far = int((bench.clock.now() + 10 * 86400) * 1e6)
    rows = [
        bench.row(0),
        bench.row(1, outputs={"score": math.nan}),
        bench.row(2, event_time=far),
        bench.row(3, key="x" * 1000),
        bench.row(4, event_time=0),
        bench.row(5),
    ]
    batch = Batch("e", 0, 6, 0, encode_rows(list(rows)))
    assert bench.deliver(TOPIC, seal(batch, TOPIC, bench.device)) == Ack("e", 5)
    wrong = Batch("e", 6, 2, 6, encode_rows([bench.row(6)]))
    assert bench.deliver(TOPIC, seal(wrong, TOPIC, bench.device)) == Ack("e", 7)
    assert bench.deliver(TOPIC, bench.batch(8, 1)) == Ack("e", 8)
    assert bench.sequence(bench.tables()) == [0, 5, 8]
    lost = Queries(bench.tables(), bench.journal).sql("select sum(last_seq - first_seq + 1)::int n from gaps")
    assert lost.to_pylist() == [{"n": 6}], "stored + gaps = produced"
    assert [seq for _, seq, _ in bench.journal.quarantined()] == [1, 2, 3, 4, 6]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary(max_size=400), st.sampled_from([TOPIC, topics.status(DEVICE), "x", "edgeward/v1/a/b/up/zzz"])
)
def test_random_bytes_never_raise_and_store_nothing(bench: Bench, payload: bytes, topic: str) -> None:
    before = bench.journal.count()
    bench.deliver(topic, payload)
    bench.deliver(TOPIC, seal(Batch("e", 0, 3, 0, payload), TOPIC, bench.device))
    assert bench.journal.count() == before


class Crash(Exception):
    pass


@pytest.mark.parametrize("where", ["committed", "synced", "forgotten"])
def test_a_crash_between_two_steps_loses_and_doubles_nothing(bench: Bench, where: str) -> None:
    def crash(step: str) -> None:
        if step == where:
            raise Crash

    bench.deliver(TOPIC, bench.batch(0, 10))
    with pytest.raises(Crash):
        bench.tables(crash).flush()
    assert bench.sequence(bench.tables()) == list(range(10)), "a query between crash and recovery"
    bench.deliver(TOPIC, bench.batch(10, 10))
    bench.tables().flush()
    assert bench.sequence(bench.tables()) == list(range(20))
    assert bench.journal.count() == 0
    bench.tables().flush()
    assert bench.sequence(bench.tables()) == list(range(20))


def test_a_lane_that_never_rests_does_not_hold_up_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the journal is asked for alarms there is another one: the results' turn comes all the same."""
    alarms, waiting, made = topics.up(DEVICE, "alarm"), bench.journal.waiting, [0]

    def another(lane: Lane, limit: int, after: int = 0) -> list[Stored]:
        if lane == "alarm":
            at = int(bench.clock.now() * 1e6)
            row = AlarmRow(at, "s", 1, "k", "se", made[0], "d", "v", "CPU", 0.9, 0.5)
            batch = Batch("e", made[0], 1, 0, encode_rows([row]))
            assert bench.deliver(alarms, seal(batch, alarms, bench.device))
            made[0] += 1
            if made[0] > 50:
                raise Crash
        return waiting(lane, limit, after)

    bench.deliver(TOPIC, bench.batch(0, 10))
    monkeypatch.setattr(bench.journal, "waiting", another)
    tables = bench.tables()
    tables.flush()
    opened, _ = tables.snapshot("results")
    assert opened is not None and opened.to_pyarrow_table().num_rows == 10
    tables.flush()
    assert tables.snapshot("alarms")[0] is not None


def test_gaps_that_never_rest_let_a_flush_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forget, forgotten = bench.journal.forget_gaps, [0]

    def another(last: int) -> None:
        forget(last)
        forgotten[0] += 1
        assert forgotten[0] < 50
        with bench.journal.transaction():
            bench.journal.append_gap(DEVICE, "e", "result", 1, (forgotten[0], forgotten[0]), "budget")

    with bench.journal.transaction():
        bench.journal.append_gap(DEVICE, "e", "result", 1, (0, 0), "budget")
    monkeypatch.setattr(bench.journal, "forget_gaps", another)
    assert bench.tables().flush() == 1


def test_rollup_merges_buckets_exactly(bench: Bench) -> None:
    start = 1_700_000_000 * 1_000_000 // 3_600_000_000 * 3_600_000_000
    values = [[1.0, 2.0, 3.0], [10.0], [4.0, 6.0]]
    rows = []
    for index, part in enumerate(values):
        mean = sum(part) / len(part)
        m2 = sum((value - mean) ** 2 for value in part)
        rows.append(
            TrendRow(start + index * 60_000_000, 60_000_000, "s", 1, "d" * 64, "v", "CPU", "output:score", len(part), 1,
                     mean, m2, min(part), max(part), [5.0], [2, 1])
        )  # fmt: skip
    topic = topics.up(DEVICE, "trend")
    bench.deliver(topic, seal(Batch("e", 0, 3, 0, encode_rows(list(rows))), topic, bench.device))
    bench.tables().flush()
    queries = Queries(bench.tables(), bench.journal)
    (row,) = queries.rollup(series="output:score", width="1h", group_by=["device"]).to_pylist()
    flat = [value for part in values for value in part]
    mean = sum(flat) / 6
    assert row["count"] == 6 and row["missing"] == 3 and row["device"] == "turbine-1"
    assert row["mean"] == pytest.approx(mean)
    assert row["stddev"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in flat) / 6))
    assert (row["minimum"], row["maximum"]) == (1.0, 10.0)


def test_queries_read_no_files_and_name_the_mistake(bench: Bench, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    queries = Queries(bench.tables(), bench.journal)
    for statement in (
        f"select * from '{secret}'",
        "select nothing from results",
        "selec",
        "SET enable_external_access=true",
    ):
        with pytest.raises(UsageError, match="the query failed"):
            queries.sql(statement)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"series": "score"}, "'score' is not a series.*output:NAME"),
        ({"since": "yesterday"}, "since: 'yesterday' is not a time"),
        ({"until": "2026-02-30"}, "until: '2026-02-30' is not a time"),
        ({"group_by": ["colour"]}, "cannot group by 'colour'"),
        ({"width": "0s"}, "'0s' is not a width of time"),
    ],
)
def test_a_bad_question_is_refused_by_an_empty_store_too(
    bench: Bench, wish: dict[str, Any], says: str
) -> None:
    queries = Queries(bench.tables(), bench.journal)
    good: dict[str, Any] = {
        "series": "output:score",
        "width": "1h",
        "group_by": ["device"],
        "since": "2026-03-01",
    }
    assert queries.rollup(**good, until="2026-03-01T06:00Z").num_rows == 0
    with pytest.raises(UsageError, match=says):
        queries.rollup(**{**good, **wish})


def test_verify_finds_a_loss_and_a_duplicate(bench: Bench, tmp_path: Path) -> None:
    bench.deliver(TOPIC, bench.batch(0, 10))
    queries = Queries(bench.tables(), bench.journal)
    produced = [Produced("turbine-1", "s", "se", 0, 9)]
    assert verify(queries, produced).lost == 0
    assert verify(queries, [Produced("turbine-1", "s", "se", 0, 11)]).lost == 2
    again = Batch("other-epoch", 0, 1, 0, encode_rows([bench.row(3)]))
    bench.deliver(TOPIC, seal(again, TOPIC, bench.device))
    assert verify(queries, produced).duplicated == 1
    bad = tmp_path / "produced.jsonl"
    bad.write_text(json.dumps({"device": "d"}) + "\n")
    with pytest.raises(InvalidDocument, match=r"produced\.jsonl:1"):
        read_produced(bad)


def test_ingest_over_a_broker_that_is_killed(tmp_path: Path) -> None:
    """The device end here is what an outbox does: repeat from the lowest unacknowledged row."""
    clock = SystemClock()
    fleet = Fleet(clock.now())
    device = fleet.member(DeviceIdentity(DEVICE))
    store = fleet.member(StoreIdentity("plant", frozenset({"north"})))
    journal = Journal(tmp_path / "journal.db")
    ingest = Ingest(journal, fleet.anchor, frozenset({"north"}), clock)
    acked = -1
    status = topics.status(DEVICE)
    total, size = 3000, 100

    def on_ack(message: object) -> None:
        nonlocal acked
        opened = open_envelope(message.payload, message.topic, fleet.anchor, clock.now())  # type: ignore[attr-defined]
        assert opened.identity == StoreIdentity("plant", frozenset({"north"}))
        acked = max(acked, opened.decode(Ack).seq)

    def birth() -> None:
        link.publish(
            status,
            seal(Status(1, 0, clock.now(), "online"), status, device, with_certificate=True),
            retain=True,
        )

    with EmbeddedBroker(tmp_path / "broker") as broker:
        ingester = Ingester(ingest, journal, Broker(broker.url), store, "plant")
        ingester.start()
        link = Link(
            Broker(broker.url), "device", subscriptions=(topics.ack(DEVICE, "result"),), on_message=on_ack,
            on_connect=birth, max_reconnect_delay=1,
        )  # fmt: skip
        link.start()
        deadline, killed, now = time.monotonic() + 60, False, int(clock.now() * 1e6)
        while acked < total - 1:
            assert time.monotonic() < deadline, f"acknowledged {acked} of {total}: {ingest.counts}"
            floor = acked + 1
            for first in range(floor, min(total, floor + 4 * size), size):
                count = min(size, total - first)
                rows = encode_rows(
                    [
                        ResultRow(now, "s", 1, "", "se", seq, "d", "v", "p", {}, False)
                        for seq in range(first, first + count)
                    ]
                )
                link.publish(TOPIC, seal(Batch("e", first, count, floor, rows), TOPIC, device))
            if floor > total // 2 and not killed:
                killed = True
                broker.kill()
                broker.start()
            until = time.monotonic() + 0.3
            while acked < floor and time.monotonic() < until:
                time.sleep(0.005)
        link.stop()
        ingester.stop()
    tables = Tables(tmp_path / "tables", journal)
    tables.flush()
    answer = Queries(tables, journal).sql("select count(*) n, count(distinct seq) d, max(seq) m from results")
    assert answer.to_pylist() == [{"n": total, "d": total, "m": total - 1}]
    assert killed
    journal.close()


def test_batches_over_the_quota_are_put_off_and_lose_nothing(bench: Bench) -> None:
    bench.ingest = Ingest(
        bench.journal, bench.fleet.anchor, frozenset({"north"}), bench.clock, Quota(rows=10, seconds=1)
    )
    assert bench.deliver(TOPIC, bench.batch(0, 10)) == Ack("e", 9)
    assert bench.deliver(TOPIC, bench.batch(10, 10)) is None
    assert bench.ingest.counts["over quota"] == 1 and not bench.journal.quarantined()
    bench.clock.advance(1)
    assert bench.deliver(TOPIC, bench.batch(10, 10)) == Ack("e", 19)


def test_messages_of_several_devices_are_acknowledged_in_the_order_of_their_coming(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The embedded broker ends a connection that acknowledges in another."""
    caplog.set_level("INFO", logger="edgeward.mqtt")
    clock = SystemClock()
    fleet = Fleet(clock.now())
    names = [DeviceName("north", name) for name in ("z", "m", "a")]
    devices = {name: fleet.member(DeviceIdentity(name)) for name in names}
    store = fleet.member(StoreIdentity("plant", frozenset({"north"})))
    journal = Journal(tmp_path / "journal.db")
    ingest = Ingest(journal, fleet.anchor, frozenset({"north"}), clock)
    now = int(clock.now() * 1e6)
    with EmbeddedBroker(tmp_path / "broker") as broker:
        ingester = Ingester(ingest, journal, Broker(broker.url), store, "plant")
        link = Link(Broker(broker.url), "devices", max_reconnect_delay=1)
        link.start()
        ingester.start()
        wait_until(lambda: link.connected and ingester.connected, what="the broker", timeout=60)
        with journal.transaction():  # holds the ingester up, so that one group gets them all
            for name, identity in devices.items():
                status = topics.status(name)
                birth = Status(1, 0, clock.now(), "online")
                link.publish(status, seal(birth, status, identity, with_certificate=True), retain=True)
            for seq in range(60):
                name = names[seq % 3]
                topic = topics.up(name, "result")
                rows = encode_rows([ResultRow(now, "s", 1, "", "se", seq, "d", "v", "p", {}, False)])
                link.publish(topic, seal(Batch("e", seq // 3, 1, 0, rows), topic, devices[name]))
        wait_until(lambda: journal.count() == 60, what="every row", timeout=60)
        assert not [record for record in caplog.records if "disconnected" in record.getMessage()]
        assert ingester.connected
        link.stop()
        ingester.stop()
    journal.close()
