"""A whole stream: real decoder, real worker, real outbox; the sensor and the broker are the test."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from agent.outbox.outbox import Outbox
from agent.runtime.engine import Engine
from agent.serving.messages import Request
from agent.slots.active import ActiveModel
from agent.streams import runner as module
from agent.streams import writer as writer_module
from agent.streams.local_link import LocalLink
from agent.streams.runner import StreamRunner
from agent.streams.running import Streams
from agent.streams.samples import Samples
from agent.streams.sketches import LiveBaseline
from edgeward.clock import SystemClock
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Message
from edgeward.wire.desired import ModelRef, StreamTarget
from edgeward.wire.package import Decision
from edgeward.wire.rows import ROW_TYPES
from edgeward.wire.slots import SlotPolicy
from edgeward.wire.streams import (
    Action,
    Check,
    FilesSource,
    HttpSource,
    MqttSource,
    Publish,
    Source,
    StreamSpec,
    Window,
)
from edgeward.wire.topics import Lane
from tests.agent.outboxes import rows_of

ME = DeviceName("north", "turbine-1")
T0 = 1_700_000_000.0


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not reached"
        time.sleep(0.005)
    return found


def model_bytes(scale: float = 1.0) -> bytes:
    """`score = scale * table[i] + b` for rows `[i, b]`; an index outside 0 to 99 is refused."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [100], [float(index) for index in range(100)])
    factor = helper.make_tensor("factor", TensorProto.FLOAT, [], [scale])
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    zero, one, two = (
        helper.make_tensor(name, TensorProto.INT64, [1], [n]) for n, name in enumerate(("zero", "one", "two"))
    )
    nodes = [
        helper.make_node("Slice", ["x", "zero", "one", "axis"], ["left"]),
        helper.make_node("Slice", ["x", "one", "two", "axis"], ["right"]),
        helper.make_node("Cast", ["left"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["value"]),
        helper.make_node("Mul", ["value", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "right"], ["score"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1])],
        [table, factor, axis, zero, one, two],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString())


class Wire:
    """The broker's side: what the stream subscribed to, and what it published."""

    def __init__(self) -> None:
        self.receive: Callable[[str, bytes], None] | None = None
        self.published: list[tuple[str, Any]] = []

    def subscribe(self, topic: str, receive: Callable[[str, bytes], None]) -> None:
        self.receive = receive

    def unsubscribe(self, topic: str) -> None:
        pass

    def expect_acks(self, topic: str, position: Any, *, expected: bool = True) -> None:
        pass

    def acknowledge(self, topic: str, epoch: str, seq: int) -> None:
        self.publish(f"{topic}/ack", json.dumps({"epoch": epoch, "seq": seq}).encode())

    def publish(self, topic: str, payload: bytes) -> bool:
        self.published.append((topic, json.loads(payload)))
        return True

    def on(self, topic: str) -> list[Any]:
        return [message for name, message in self.published if name == topic]

    def acked(self) -> tuple[str, int] | None:
        acks = self.on("t/ack")
        return (acks[-1]["epoch"], acks[-1]["seq"]) if acks else None


class Rig:
    """A device with one slot, and its durable state."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder, self.engine = folder, engine
        self.outbox = Outbox(folder / "outbox.db", SystemClock())
        self.wire = Wire()
        self.model: ActiveModel | None = None
        self.runner: StreamRunner | None = None

    def activate(self, version: int = 1, scale: float = 1.0, policy: SlotPolicy | None = None) -> ActiveModel:
        runner = self.engine.open("onnx", model_bytes(scale), f"m:{version}", policy, batchable=True)
        manifest = SimpleNamespace(baseline={}, features=[], decision=Decision("score", 50.0))
        package = SimpleNamespace(
            ref=ModelRef("m", version, f"{version}" * 64),
            manifest=manifest,
            variant=SimpleNamespace(name="v"),
        )
        old = self.model
        self.model = ActiveModel(package, runner, LiveBaseline({}), policy or SlotPolicy())  # type: ignore[arg-type]
        if old is not None:
            old.runner.stop()
        return self.model

    def start(self, **spec: Any) -> StreamRunner:
        spec.setdefault("source", Source(mqtt=MqttSource(topic="t", time="t", values="v", sequence=True)))
        spec.setdefault("features", ["i", "b"])
        spec.setdefault("window", Window(count=10, timeout=0.1))
        target = StreamTarget("s", 3, StreamSpec(**spec))
        self.runner = StreamRunner(
            target,
            ME,
            self.outbox,
            SystemClock(),
            lambda slot: self.model,
            self.wire,
            lambda: None,
            self.folder,
        )
        self.runner.start()
        return self.runner

    def send(self, rows: list[tuple[Any, Any]], first: int = 0, epoch: str = "e") -> None:
        assert self.wire.receive is not None
        message = [
            {"epoch": epoch, "seq": first + n, "t": T0 + first + n, "v": {"i": i, "b": b}}
            for n, (i, b) in enumerate(rows)
        ]
        self.wire.receive("t", json.dumps(message).encode())

    def rows(self, lane: Lane) -> list[Any]:
        decode = msgspec.msgpack.Decoder(ROW_TYPES[lane]).decode
        return [decode(row) for row in rows_of(self.outbox, lane)]

    def stop(self) -> None:
        if self.runner is not None:
            self.runner.stop()
            self.runner = None


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    engine = Engine()
    engine.start()
    made = Rig(tmp_path, engine)
    yield made
    made.stop()
    engine.stop()
    made.outbox.close()


def test_every_sample_is_stored_once_and_visibly_predicted_or_not(rig: Rig) -> None:
    rig.activate()
    rig.start(quality={"b": Check(minimum=0)}, publish=Publish(samples="all"))
    rig.send([(1, 0.5), (60, 0.25), (None, 1), (2, -1), (500, 0), (3, "x"), (4, 0.125)])
    until(lambda: rig.wire.acked() == ("e", 6))
    rig.send([(1, 0.5), (60, 0.25)])  # again: dropped
    rig.send([(5, 0)], first=7)
    until(lambda: rig.wire.acked() == ("e", 7))
    results = rig.rows("result")
    assert [row.source_seq for row in results] == list(range(8))
    assert [row.outputs.get("score") for row in results] == [1.5, 60.25, None, None, None, None, 4.125, 5.0]
    assert [row.provider for row in results].count("") == 4
    assert all(row.revision == 3 and row.digest == "1" * 64 and row.stream == "s" for row in results)
    assert results[1].event_time == (T0 + 1) * 1_000_000
    (alarm,) = rig.rows("alarm")
    assert (alarm.source_seq, alarm.value, alarm.threshold) == (1, 60.25, 50.0)
    assert len(rig.rows("sample")) == 8
    assert rig.runner is not None
    report = rig.runner.report()
    assert (report.rows, report.alarms) == (8, 1)
    assert report.problems == {"missing:i": 1, "range:b": 1, "missing:b": 1}
    assert report.other["refused"] == 1 and report.score_mean == pytest.approx((1.5 + 60.25 + 4.125 + 5) / 4)


def test_a_restart_goes_on_where_the_disk_says(rig: Rig) -> None:
    rig.activate()
    rig.start()
    rig.send([(1, 0)] * 25)
    until(lambda: rig.wire.acked() == ("e", 24))
    rig.stop()
    assert rig.outbox.source("s:t") == ("e", 24)
    rig.start()
    rig.send([(1, 0)] * 30)  # the sensor repeats from its beginning
    until(lambda: rig.wire.acked() == ("e", 29))
    rig.send([(2, 0)], first=0, epoch="f")  # another life of the sensor
    until(lambda: rig.wire.acked() == ("f", 0))
    assert [row.source_seq for row in rig.rows("result")] == [*range(30), 0]


def test_samples_wait_at_the_sensor_while_there_is_no_model(rig: Rig) -> None:
    runner = rig.start()
    assert not runner.take(
        Samples(np.zeros(1, np.int64), np.zeros((1, 2)), epoch="e", seq=np.zeros(1, np.int64))
    )
    rig.send([(1, 0)])
    assert rig.wire.acked() is None and rig.rows("result") == []
    rig.activate()
    until(lambda: rig.wire.acked() == ("e", 0))


def test_a_replaced_model_loses_no_sample_and_no_lineage(rig: Rig) -> None:
    rig.activate(1)
    rig.start(window=Window(count=1))
    stop = threading.Event()
    sent = 0

    def sensor() -> None:
        nonlocal sent
        while not stop.is_set():
            rig.send([(2, 0)], first=sent)
            sent += 1
            until(lambda mark=sent: (rig.wire.acked() or ("", -1))[1] >= mark - 20)

    thread = threading.Thread(target=sensor)
    thread.start()
    until(lambda: sent > 50)
    rig.activate(2, scale=10.0)
    until(lambda mark=sent: sent > mark + 50)
    stop.set()
    thread.join()
    until(lambda: rig.wire.acked() == ("e", sent - 1))
    rows = rig.rows("result")
    assert [row.source_seq for row in rows] == list(range(sent))
    assert {(row.digest[0], row.outputs["score"]) for row in rows} == {("1", 2.0), ("2", 20.0)}


def test_a_worker_that_crashes_costs_no_sample(rig: Rig) -> None:
    model = rig.activate()
    rig.start(window=Window(count=5, timeout=0.05))
    for number in range(60):
        if number in (10, 30):
            os.kill(until(lambda: model.runner.pid), signal.SIGSEGV)  # type: ignore[attr-defined]
        rig.send([(1, 0)] * 5, first=5 * number)
    until(lambda: rig.wire.acked() == ("e", 299))
    assert [row.outputs["score"] for row in rig.rows("result")] == [1.0] * 300


def test_a_stream_that_does_not_fit_the_model_takes_nothing_and_says_why(rig: Rig) -> None:
    rig.activate()
    runner = rig.start(features=["i", "b", "c"])
    until(lambda: "expects [-1, 2], the stream gives one tensor [n, 3]" in runner.report().reason)
    assert not runner.take(
        Samples(np.zeros(1, np.int64), np.zeros((1, 3)), epoch="e", seq=np.zeros(1, np.int64))
    )
    assert rig.rows("result") == []


def test_conditions_debounce_and_act_on_inputs_and_outputs(rig: Rig) -> None:
    rig.activate()
    hot = Action(name="hot", when="score > 10 && b >= 0.5", windows=2, publish="alarms/{device}")
    log = Action(name="log", when="alarm", file="alarms.jsonl", once=True)
    rig.start(window=Window(count=1), actions=[hot, log])
    rig.send([(20, 0.5), (20, 0.0), (20, 0.5), (60, 0.75), (70, 0.0)])
    until(lambda: rig.wire.acked() == ("e", 4))
    (message,) = rig.wire.on("alarms/turbine-1")
    assert (
        message["action"] == "hot" and message["outputs"] == {"score": 60.75} and message["source_seq"] == 3
    )
    assert message["event_time"] == T0 + 3 and message["device"] == "turbine-1"
    (line,) = (rig.folder / "alarms.jsonl").read_text().splitlines()
    assert json.loads(line)["value"] == 60.75
    assert rig.runner is not None
    report = rig.runner.report()
    assert report.actions["once"] == {"log": 1}
    assert report.actions["run"] == {"hot": 1, "log": 1} and report.actions["latency_ms"]["p99"] > 0


def test_windows_with_an_aggregate_infer_once_and_account_for_each_sample(rig: Rig) -> None:
    rig.activate()
    rig.start(window=Window(size=10, lateness=0, timeout=60, aggregate="mean"))
    rig.send([(2, 0.0)] * 20)  # event times T0 to T0 + 19
    rig.send([(9, 0.0)] * 11, first=20)  # and on to 1030, which closes [1020, 1030)
    until(lambda: rig.wire.acked() == ("e", 29))
    assert [row.outputs["score"] for row in rig.rows("result")] == [2.0] * 20 + [9.0] * 10


def test_what_goes_up_follows_the_policy_and_trends_follow_the_event_time(rig: Rig) -> None:
    rig.activate()
    rig.start(publish=Publish(results="changes", tolerance=0.5, trend_bucket=10))
    rig.send([(1, 0.0)] * 15 + [(4, 0.0)] * 5 + [(60, 0.0)])
    until(lambda: rig.wire.acked() == ("e", 20))
    assert [row.source_seq for row in rig.rows("result")] == [0, 15, 20]
    trends = {(row.bucket // 10**6, row.series): row for row in rig.rows("trend")}
    first = trends[(int(T0), "output:score")]
    assert (first.count, first.mean, first.maximum) == (10, 1.0, 1.0) and first.sketch
    assert trends[(int(T0) + 10, "feature:i")].mean == pytest.approx(2.5)


def test_one_time_that_lies_ahead_does_not_tear_the_trends_apart(rig: Rig) -> None:
    rig.activate()
    rig.start(publish=Publish(results="none", trend_bucket=100))
    rig.send([(1, 0.0)])
    ahead = {"epoch": "e", "seq": 1, "t": T0 + 5000, "v": {"i": 1, "b": 0.0}}
    rig.wire.receive("t", json.dumps(ahead).encode())
    for number in range(2, 22):
        rig.send([(1, 0.0)], first=number)
        until(lambda number=number: rig.wire.acked() == ("e", number))
    rows = [row for row in rig.rows("trend") if row.series == "output:score"]
    assert len(rows) <= 1, "the bucket is still open"


def test_a_sample_without_a_time_makes_no_other_late(rig: Rig) -> None:
    rig.activate()
    rig.start(
        source=Source(mqtt=MqttSource(topic="t", time="t", values="v")),
        window=Window(size=2, aggregate="mean", timeout=0.3),
    )
    times = [*range(6), None, 1e9, *range(6, 20)]
    for at in times:
        sample = {"v": {"i": 1, "b": 0.0}} | ({"t": T0 + at} if at is not None else {})
        rig.wire.receive("t", json.dumps(sample).encode())
    until(lambda: len(rig.rows("result")) == len(times))
    assert sum(1 for row in rig.rows("result") if not row.outputs) == 2
    report = rig.runner.report()
    assert report.late == 0 and report.problems == {"time": 1}


def test_no_action_follows_from_a_number_that_the_model_never_saw(rig: Rig) -> None:
    rig.activate()
    runner = rig.start(
        window=Window(count=1), actions=[Action(name="high", when="score > 1e30", publish="alarms")]
    )
    rig.send([(1, 0.0), (1, 1e39), (1, 2.0)])
    until(lambda: rig.wire.acked() == ("e", 2))
    assert [row.outputs.get("score") for row in rig.rows("result")] == [1.0, None, 3.0]
    assert rig.wire.on("alarms") == []
    report = runner.report()
    assert report.problems == {"misfit:b": 1} and report.other["refused"] == 1


@pytest.mark.parametrize("nan", ["reject", "allow"])
def test_an_infinite_output_acts_only_where_the_slot_allows_it(rig: Rig, nan: Any) -> None:
    rig.activate(scale=3e38, policy=SlotPolicy(nan=nan))
    runner = rig.start(
        window=Window(count=1), actions=[Action(name="high", when="score > 1e30", publish="alarms")]
    )
    rig.send([(0, 1.0), (2, 1.0), (0, 2.0)])
    until(lambda: rig.wire.acked() == ("e", 2))
    assert [row.outputs.get("score") for row in rig.rows("result")] == [1.0, None, 2.0]
    assert len(rig.wire.on("alarms")) == (nan == "allow")
    assert runner.report().other.get("not_finite", 0) == (nan == "reject")
    assert rig.model is not None
    health = rig.model.health
    assert (health.answered, health.failed, health.not_finite) == (3, 0, int(nan == "reject"))
    assert health.alarms == (nan == "allow")


def test_samples_over_http_are_taken_and_answered(rig: Rig) -> None:
    rig.activate()
    runner = rig.start(
        source=Source(http=HttpSource(time="t", values="v")), window=Window(count=2, timeout=0.05)
    )
    push = runner.push
    assert push is not None
    body = json.dumps([{"t": T0 + 1, "v": {"i": 7, "b": 0}}, {"t": T0 + 2, "v": {"i": 8, "b": 0}}]).encode()
    status, answer = push.handle({"content-type": "application/json"}, body)
    assert status == 200 and json.loads(answer)["taken"] == 2
    until(lambda: len(rig.rows("result")) == 2)
    assert push.handle({}, b"rubbish")[0] == 400


def test_samples_over_http_hear_why_a_stream_does_not_run(rig: Rig) -> None:
    runner = rig.start(source=Source(http=HttpSource(time="t", values="v")), features=["i", "b", "c"])
    push = runner.push
    assert push is not None
    body = b'{"t": 1, "v": {"i": 7, "b": 0, "c": 0}}'

    def said() -> tuple[int, str]:
        status, answer = push.handle({}, body)
        return status, json.loads(answer)["error"]

    assert said() == (503, "the stream does not run: slot default has no model")
    assert runner.report().reason == "slot default has no model"
    rig.activate()
    until(lambda: "expects [-1, 2]" in said()[1])
    assert said()[0] == 503


def test_who_posts_to_a_stream_that_cannot_run_here_is_told_when_to_come_back(rig: Rig) -> None:
    link = LocalLink(lambda topic: None, lambda topic: None, rig.wire.publish)
    streams = Streams(ME, rig.outbox, SystemClock(), lambda slot: None, link, lambda: None, rig.folder)
    http = Source(http=HttpSource())
    leads_out = Action(name="out", when="score > 1", file="../out")
    streams.apply(
        [
            StreamTarget("waits", 1, StreamSpec(source=http, features=["a"])),
            StreamTarget("refused", 1, StreamSpec(source=http, features=["a"], actions=[leads_out])),
        ]
    )

    async def post(stream: str) -> tuple[int, Any, dict[bytes, bytes]]:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        target = f"/v1/streams/{stream}/samples".encode()
        streams.handle(Request(b"POST", target, {}, b'{"a": 1}'), answered.set_result)
        got = await answered
        return got.status, json.loads(b"".join(got.body))["error"], dict(got.headers)

    try:
        refused = {report.stream: report.reason for report in streams.report()}["refused"]
        status, error, headers = asyncio.run(post("refused"))
        assert (status, error) == (503, f"the stream does not run: {refused}")
        assert headers[b"retry-after"] == b"1"
        status, error, headers = asyncio.run(post("waits"))
        assert (status, error) == (503, "the stream does not run: slot default has no model")
        assert headers[b"retry-after"] == b"1"
        assert asyncio.run(post("other"))[0] == 404
    finally:
        streams.stop()


def test_a_full_disk_holds_the_stream_up_and_loses_nothing(rig: Rig) -> None:
    rig.activate()
    runner = rig.start(window=Window(count=1))
    rig.outbox._db.execute("PRAGMA max_page_count = 12")
    for number in range(200):
        rig.send([(1, 0.0)] * 20, first=20 * number)
    until(lambda: runner.report().errors)
    before = rig.wire.acked()
    assert before is None or before[1] < 3999
    rig.outbox._db.execute("PRAGMA max_page_count = 1000000")
    until(lambda: rig.wire.acked() == ("e", 3999))
    assert [row.source_seq for row in rig.rows("result")] == list(range(4000))


def test_open_trends_survive_a_kill_to_the_last_row(rig: Rig, tmp_path: Path) -> None:
    rig.activate()
    rig.start(window=Window(count=5, timeout=0.05), publish=Publish(trend_bucket=1000))
    sent = 0
    for kill in range(3):
        for _ in range(40):
            rig.send([(index % 7, 0.5) for index in range(sent, sent + 5)], first=sent)
            sent += 5
        until(lambda mark=sent: rig.wire.acked() == ("e", mark - 1))
        assert rig.rows("trend") == []
        # The disk as a kill leaves it here: nothing of the running stream is closed or flushed.
        after = sqlite3.connect(tmp_path / f"after-{kill}.db")
        rig.outbox._db.backup(after)
        after.close()
        abandoned = rig.runner
        rig.outbox = Outbox(tmp_path / f"after-{kill}.db", SystemClock())
        rig.runner, rig.wire = None, Wire()
        rig.start(window=Window(count=5, timeout=0.05), publish=Publish(trend_bucket=1000))
        assert abandoned is not None
        abandoned.stop()
    rig.stop()
    trends = {row.series: row for row in rig.rows("trend")}
    values = np.arange(sent) % 7
    score = trends["output:score"]
    assert (score.count, score.minimum, score.maximum) == (sent, 0.5, 6.5)
    assert score.mean == pytest.approx(values.mean() + 0.5) and score.m2 == pytest.approx(values.var() * sent)
    assert trends["feature:i"].count == sent and len(rig.rows("trend")) == 3
    assert len(rig.rows("result")) == sent


def test_the_last_bucket_of_a_sensor_that_stopped_goes_up(rig: Rig) -> None:
    rig.activate()
    rig.start(window=Window(count=1, timeout=0.05), publish=Publish(trend_bucket=0.2))
    rig.send([(1, 0.0)])
    until(lambda: rig.rows("trend"))
    assert {row.series: row.count for row in rig.rows("trend")} == {
        "output:score": 1,
        "feature:i": 1,
        "feature:b": 1,
    }


def test_what_the_disk_refused_before_a_stop_is_left_to_the_sensor(rig: Rig) -> None:
    rig.activate()
    runner = rig.start(window=Window(count=1))
    store = rig.outbox.commit_rows

    def refuse_until_the_stop(*arguments: Any) -> None:
        if not runner._stop.is_set():
            raise OSError("no space left")
        store(*arguments)

    rig.outbox.commit_rows = refuse_until_the_stop  # type: ignore[method-assign]
    rig.send([(1, 0.0)] * 10)
    until(lambda: runner.report().errors)
    rig.send([(1, 0.0)] * 10, first=10)
    until(lambda: runner._writer.waiting >= 20)
    rig.stop()
    # The second message must not be stored over a hole, and the first not be told to be durable.
    assert rig.wire.acked() is None and rig.rows("result") == []
    rig.start(window=Window(count=1))
    rig.send([(1, 0.0)] * 20)
    until(lambda: rig.wire.acked() == ("e", 19))
    assert [row.source_seq for row in rig.rows("result")] == list(range(20))


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module.result_rows

    def broken(*_: Any) -> Any:
        monkeypatch.setattr(module, "result_rows", made)
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(module, "result_rows", broken)


def test_an_internal_error_is_seen_and_nothing_is_acknowledged_past_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.activate()
    runner = rig.start(window=Window(count=1))
    rig.send([(1, 0.0)])
    until(lambda: rig.wire.acked() == ("e", 0))
    fail_once(monkeypatch)
    rig.send([(1, 0.0)] * 2, first=1)
    until(lambda: runner.failed)
    assert "a mistake of ours" in runner.report().reason
    assert not runner.take(
        Samples(np.zeros(1, np.int64), np.zeros((1, 2)), epoch="e", seq=np.full(1, 3, np.int64))
    )
    assert rig.wire.acked() == ("e", 0)


def test_a_stream_that_an_internal_error_ended_is_started_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.activate()
    link = LocalLink(lambda topic: None, lambda topic: None, rig.wire.publish)
    streams = Streams(ME, rig.outbox, SystemClock(), lambda slot: rig.model, link, lambda: None, rig.folder)
    rig.wire.receive = lambda topic, payload: link.dispatch(Message(topic, payload, False, lambda: None))
    source = Source(mqtt=MqttSource(topic="t", time="t", values="v", sequence=True))
    streams.apply([StreamTarget("s", 3, StreamSpec(source, ["i", "b"], window=Window(count=1)))])
    try:
        fail_once(monkeypatch)
        rig.send([(1, 0.0)])
        until(lambda: "a mistake of ours" in streams.report()[0].reason)
        assert streams.report()[0].reason == ""
        rig.send([(1, 0.0)] * 2)
        until(lambda: rig.wire.acked() == ("e", 1))
        assert [row.source_seq for row in rig.rows("result")] == [0, 1]
    finally:
        streams.stop()


def test_a_thread_that_outlives_the_stop_stores_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor has begun at the durable position: both would store the same samples."""
    monkeypatch.setattr(module, "STOP_SECONDS", 0.05)
    model = rig.activate()
    asked, answer = threading.Event(), threading.Event()
    infer = model.runner.infer

    def slowly(inputs: Any) -> Any:
        asked.set()
        answer.wait(30)
        return infer(inputs)

    monkeypatch.setattr(model.runner, "infer", slowly)
    runner = rig.start(window=Window(count=1))
    rig.send([(1, 0.0)] * 5)
    assert asked.wait(30)
    rig.stop()
    answer.set()
    runner._thread.join(30)
    assert not runner._thread.is_alive()
    assert rig.rows("result") == [] and rig.outbox.source("s:t") is None


def test_images_of_several_sizes_are_inferred_each_by_its_own(rig: Rig, tmp_path: Path) -> None:
    mean = helper.make_node("ReduceMean", ["x"], ["score"], axes=[1, 2, 3], keepdims=0)
    graph = helper.make_graph(
        [mean], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, None, 3])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None])],
    )  # fmt: skip
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    package = rig.activate().package
    opened = rig.engine.open("onnx", content.SerializeToString(), "images:1", batchable=True)
    assert rig.model is not None
    rig.model.runner.stop()
    rig.model = ActiveModel(package, opened, LiveBaseline({}))
    runner = rig.start(
        source=Source(files=FilesSource(path=str(tmp_path), format="image", follow=True)),
        features=[],
        window=Window(count=3, timeout=0.05),
    )
    first = 0
    for count, size in ((2, 4), (2, 6), (1, 4)):
        images = np.full((count, size, size, 3), {4: 204, 6: 51}[size], np.uint8)
        numbers = np.arange(first, first + count)
        until(
            lambda images=images, numbers=numbers: runner.take(
                Samples(numbers + round(T0 * 1e6), images, epoch="f", seq=numbers)
            )
        )
        first += count
    until(lambda: len(rig.rows("result")) == 5)
    assert [round(row.outputs["score"], 2) for row in rig.rows("result")] == [0.8, 0.8, 0.2, 0.2, 0.8]
    assert runner.report().reason == ""


def test_no_action_waits_for_the_disk_and_what_waits_is_bounded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "MAX_ROWS", 200)
    monkeypatch.setattr(module, "GROUP_SAMPLES", 100)
    rig.activate()
    runner = rig.start(window=Window(count=1), actions=[Action(name="a", publish="alarms")])
    disk, store, commits = threading.Event(), rig.outbox.commit_rows, []

    def slowly(*arguments: Any) -> None:
        disk.wait(30)
        commits.append(arguments)
        store(*arguments)

    rig.outbox.commit_rows = slowly  # type: ignore[method-assign]
    for number in range(3):
        rig.send([(60, 0.0)], first=number)
        until(lambda mark=number: len(rig.wire.on("alarms")) == mark + 1)
    assert rig.wire.acked() is None and rig.rows("result") == [], "nothing is durable yet"
    for number in range(3, 23):
        rig.send([(1, 0.0)] * 100, first=3 + 100 * (number - 3))
    until(lambda: runner._writer._changed._waiters)  # type: ignore[attr-defined]  # the stream waits for room
    assert 200 <= runner._writer.waiting < 400
    disk.set()
    until(lambda: rig.wire.acked() == ("e", 2002))
    assert [row.source_seq for row in rig.rows("result")] == list(range(2003))
    assert len(commits) < 23, "what waited together was stored together"


def test_an_internal_error_of_the_writer_ends_the_stream_visibly(rig: Rig) -> None:
    rig.activate()
    runner = rig.start(window=Window(count=1))
    store = rig.outbox.commit_rows

    def broken(*_: Any) -> None:
        rig.outbox.commit_rows = store  # type: ignore[method-assign]
        raise ValueError("a mistake of ours")

    rig.outbox.commit_rows = broken  # type: ignore[method-assign]
    rig.send([(1, 0.0)])
    until(lambda: runner.failed)
    assert "a mistake of ours" in runner.report().reason
    rig.send([(1, 0.0)], first=1)
    rig.stop()
    assert rig.wire.acked() is None and rig.rows("result") == []
