"""Rows that cannot be true, and messages that are none: nothing of them is stored, and their neighbours are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward.clock import ManualClock, SystemClock
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import Envelope, seal
from edgeward.wire.reports import Status
from edgeward.wire.rows import AHEAD_US, EARLIEST_US, Ack, Batch, join_rows
from tests.contracts.test_brokers import Mosquitto, needs_mosquitto
from tests.faults.pipeline.conftest import Closing
from tests.faults.pipeline.ends import SITES, Agent, Keyring, Store, compare, keyring, wait_for
from trends.ingest import Ingest
from trends.journal import Journal

NOW = SystemClock().now()
NOW_US = int(NOW * 1e6)
OTHER = DeviceName("north", "turbine-2")


def values(**changes: object) -> list[object]:
    """A result as it stands in MessagePack: an array."""
    good = {
        "event_time": NOW_US, "stream": "s", "revision": 1, "key": "", "source_epoch": "e", "source_seq": 7,
        "digest": "d", "variant": "v", "provider": "CPU", "outputs": {"score": 0.5}, "alarm": False,
    }  # fmt: skip
    return list({**good, **changes}.values())


_far = st.one_of(st.integers(NOW_US + 30 * AHEAD_US, (1 << 64) - 1), st.integers(-(1 << 63), EARLIEST_US - 1))
_long = st.integers(257, 5000).map(lambda length: "x" * length)
_not_finite = st.sampled_from([math.nan, math.inf, -math.inf])
_names = st.text(max_size=5)

#: Rows of every kind of which none may be stored, each encoded.
POISON = st.one_of(
    st.builds(lambda at: values(event_time=at), _far),
    st.builds(lambda name, text: values(**{name: text}), st.sampled_from(["stream", "key", "digest", "variant"]), _long),
    st.builds(lambda name, value: values(outputs={"ok": 1.0, name: value}), _names, _not_finite),
    st.builds(lambda name: values(outputs={name: 1.0}), _long),
    st.builds(lambda name, value: values(**{name: value}), st.sampled_from(["event_time", "revision", "outputs", "alarm"]),
              st.one_of(st.text(), st.binary(max_size=20), st.none())),
    st.integers((1 << 62) + 1, (1 << 64) - 1).map(lambda number: values(source_seq=number)),
    st.integers(0, 10).map(lambda length: values()[:length]),
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=9), st.lists(st.integers(0, 9), max_size=9)),
).map(msgspec.msgpack.encode)  # fmt: skip


class Bench:
    """A store that is handed messages, by a device whose birth it has."""

    def __init__(self, folder: Path, ring: Keyring) -> None:
        self.journal = Journal(folder / "journal.db")
        self.ingest = Ingest(self.journal, ring.anchor(), SITES, ManualClock(NOW))
        self.signer = ring.device_signer()
        self.topic = topics.up(ring.name, "result")
        self.epoch = self.quarantined = 0
        birth = topics.status(ring.name)
        self.deliver(birth, seal(Status(1, 0, NOW, "online"), birth, self.signer, with_certificate=True))

    def deliver(self, topic: str, payload: bytes) -> Ack | None:
        with self.journal.transaction():
            reply = self.ingest.handle(topic, payload)
        return reply.ack if reply else None

    def begin(self) -> None:
        """An epoch of its own, and nothing waits."""
        self.epoch += 1
        self.quarantined = len(self.journal.quarantined())
        for entry in self.journal.waiting("result", 10**6):
            self.journal.forget_rows("result", entry.id)
        for gap in self.journal.waiting_gaps(10**6):
            self.journal.forget_gaps(gap.id)

    def batch(self, rows: list[bytes], first: int = 0) -> bytes:
        body = Batch(f"epoch-{self.epoch}", first, len(rows), first, join_rows(rows))
        return seal(body, self.topic, self.signer)

    def stored(self) -> list[int]:
        entries = self.journal.waiting("result", 10**6)
        return [entry.first_seq + index for entry in entries for index in range(entry.count)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    # This file may have been read long before its tests begin: the bench's clock stands at that time.
    made = Bench(tmp_path_factory.mktemp("bench"), keyring(now=NOW))
    yield made
    made.journal.close()


@settings(max_examples=200)
@given(rows=st.lists(st.one_of(st.none(), POISON), min_size=1, max_size=12))
def test_of_each_batch_the_good_rows_are_stored_and_the_others_counted(
    bench: Bench, rows: list[bytes | None]
) -> None:
    good = msgspec.msgpack.encode(values())
    bench.begin()
    ack = bench.deliver(bench.topic, bench.batch([good if row is None else row for row in rows]))
    assert ack is not None and ack.seq == len(rows) - 1, "what cannot be stored blocks nothing"
    assert bench.stored() == [seq for seq, row in enumerate(rows) if row is None]
    bad = [seq for seq, row in enumerate(rows) if row is not None]
    assert [(gap.first_seq, gap.count) for gap in bench.journal.waiting_gaps(1000)] == [
        (seq, 1) for seq in bad
    ]
    assert [seq for _, seq, _ in bench.journal.quarantined()][bench.quarantined :] == bad
    ack = bench.deliver(bench.topic, bench.batch([good], len(rows)))
    assert ack is not None and ack.seq == len(rows), "the lane goes on"


@settings(max_examples=300)
@given(
    part=st.sampled_from(["version", "keyid", "body", "signature", "certificate", "raw"]),
    junk=st.binary(max_size=300),
    at=st.integers(0, 400),
)
def test_no_envelope_that_was_touched_is_believed(bench: Bench, part: str, junk: bytes, at: int) -> None:
    bench.begin()
    whole = bench.batch([msgspec.msgpack.encode(values())])
    opened = msgspec.msgpack.decode(whole, type=Envelope)
    if part == "raw":
        touched = whole[: at % len(whole)] + junk + whole[at % len(whole) + len(junk) :]
    else:
        fields: dict[str, object] = {name: getattr(opened, name) for name in Envelope.__struct_fields__}
        fields[part] = {"version": at + 2, "keyid": junk.hex()}.get(part, junk)
        touched = msgspec.msgpack.encode(list(fields.values()))
    # DER certificates and signatures may be written in one way only; an empty certificate is what was sent.
    if touched == whole:
        return
    assert bench.deliver(bench.topic, touched) is None
    assert bench.stored() == []


@settings(max_examples=100)
@given(name=st.sampled_from([OTHER, DeviceName("south", "turbine-1")]), lane=st.sampled_from(topics.LANES))
def test_a_device_writes_as_nobody_else(bench: Bench, name: DeviceName, lane: topics.Lane) -> None:
    bench.begin()
    topic = topics.up(name, lane)
    body = Batch("epoch", 0, 1, 0, join_rows([msgspec.msgpack.encode(values())]))
    assert bench.deliver(topic, seal(body, topic, bench.signer, with_certificate=True)) is None
    assert bench.stored() == []


@pytest.mark.usefixtures("quick_links")
@needs_mosquitto[0]
@needs_mosquitto[1]
def test_an_ingester_lives_through_all_of_it(
    mosquitto: Mosquitto, tmp_path: Path, ring: Keyring, closing: Closing
) -> None:
    """Over a real broker, between a good device's batches."""
    store = Store(tmp_path / "store", ring, mosquitto.url)
    agent = Agent(tmp_path / "agent", ring, mosquitto.url)
    closing(store, agent)
    store.start()
    stranger = keyring().device_signer()
    attacker = Link(Broker(mosquitto.url), "attacker", max_reconnect_delay=1.0)
    attacker.start()
    wait_for(lambda: attacker.connected, lambda: "the attacker to connect")
    topic = topics.up(ring.name, "result")
    for number in range(50):
        agent.produce(number * 100, 100)
        for payload in poisoned(topic, stranger, number):
            attacker.publish(topic, payload)
        attacker.publish(topics.status(ring.name), bytes([number]) * number)
    wait_for(agent.drained, agent.outbox.sequences)
    wait_for(lambda: store.ingest.counts["refused"] + store.ingest.counts["unknown signer"] >= 200,
             lambda: store.ingest.counts)  # fmt: skip
    attacker.stop()
    found = compare(store.journal, store.tables, 5000)
    assert found.exactly_once and not found.in_gaps, found


def poisoned(topic: str, stranger: SigningIdentity, number: int) -> list[bytes]:
    body = Batch("epoch", number, 1, 0, join_rows([msgspec.msgpack.encode(values())]))
    return [
        seal(body, topic, stranger, with_certificate=True),
        seal(body, topic, stranger),
        bytes([number]) * 1000,
        b"",
    ]
