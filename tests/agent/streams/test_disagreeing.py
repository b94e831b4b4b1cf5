"""What a stream offers to a shadow, and what goes up where both models disagree: a real stream, a real worker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper

from agent.runtime.engine import Engine
from agent.runtime.port import Arrays
from agent.slots.active import ActiveModel
from agent.slots.drift import ScoreBins
from agent.slots.tap import Disagreed
from agent.streams.disagreeing import Bucket
from agent.streams.runner import StreamRunner
from agent.streams.sketches import LiveBaseline
from edgeward.clock import SystemClock
from edgeward.identifiers import DeviceName
from edgeward.wire.desired import ModelRef, StreamTarget
from edgeward.wire.package import Decision
from edgeward.wire.rows import ROW_TYPES
from edgeward.wire.slots import SlotPolicy
from edgeward.wire.streams import Check, MqttSource, Publish, Source, StreamSpec, Window
from edgeward.wire.topics import Lane
from tests.agent.outboxes import open_outbox, rows_of

T0 = 1_700_000_000.0


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not reached"
        time.sleep(0.005)
    return found


def sum_model() -> bytes:
    """`score = i + b` for rows `[i, b]`."""
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x", "axes"], ["score"], keepdims=1)], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [None, 1])], [axes],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


class Contradicts:
    """An observer to whom every inference is offered and which calls those above a score wrong."""

    def __init__(self, above: float) -> None:
        self.above = above
        self.offered: list[tuple[Arrays, Arrays]] = []

    def chosen(self, number: int) -> list[int]:
        return list(range(number))

    def offer(self, inputs: Arrays, outputs: Arrays, disagreed: Disagreed | None = None) -> None:
        self.offered.append((inputs, outputs))
        if outputs["score"].max() > self.above and disagreed is not None:
            disagreed()


class Broker:
    receive: Callable[[str, bytes], None]

    def __init__(self) -> None:
        self.acked = -1

    def subscribe(self, topic: str, receive: Callable[[str, bytes], None]) -> None:
        self.receive = receive

    def unsubscribe(self, topic: str) -> None: ...

    def expect_acks(self, topic: str, position: Any, *, expected: bool = True) -> None: ...

    def acknowledge(self, topic: str, epoch: str, seq: int) -> None:
        self.acked = seq

    def publish(self, topic: str, payload: bytes) -> bool:
        return True


class Rig:
    def __init__(self, folder: Path) -> None:
        self.engine = Engine()
        self.engine.start()
        self.outbox = open_outbox(folder, SystemClock())
        self.folder, self.broker = folder, Broker()
        runner = self.engine.open("onnx", sum_model(), "m:1", batchable=True)
        manifest = SimpleNamespace(baseline={}, features=[], decision=Decision("score", 50.0))
        variant = SimpleNamespace(name="v")
        package = SimpleNamespace(ref=ModelRef("m", 1, "1" * 64), manifest=manifest, variant=variant)
        self.model = ActiveModel(package, runner, LiveBaseline({}), SlotPolicy())  # type: ignore[arg-type]

    def start(self, **spec: Any) -> StreamRunner:
        source = Source(mqtt=MqttSource(topic="t", time="t", values="v", sequence=True))
        spec = {"window": Window(count=10, timeout=0.1), **spec}
        target = StreamTarget("s", 3, StreamSpec(source=source, features=["i", "b"], **spec))
        self.runner = StreamRunner(
            target, DeviceName("north", "d"), self.outbox, SystemClock(), lambda slot: self.model,
            self.broker, lambda: None, self.folder,  # type: ignore[arg-type]
        )  # fmt: skip
        self.runner.start()
        return self.runner

    def send(self, rows: list[tuple[Any, Any]], first: int = 0) -> None:
        message = [
            {"epoch": "e", "seq": first + n, "t": T0 + first + n, "v": {"i": i, "b": b}}
            for n, (i, b) in enumerate(rows)
        ]
        self.broker.receive("t", json.dumps(message).encode())
        until(lambda: self.broker.acked == first + len(rows) - 1)

    def rows(self, lane: Lane) -> list[Any]:
        decode = msgspec.msgpack.Decoder(ROW_TYPES[lane]).decode
        return [decode(row) for row in rows_of(self.outbox, lane)]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.runner.stop()
    made.outbox.close()
    made.engine.stop()


def test_only_what_a_shadow_answers_otherwise_goes_up(rig: Rig) -> None:
    observer = rig.model.tap.observer = Contradicts(above=10.0)
    rig.start(quality={"b": Check(minimum=0)}, publish=Publish(results="disagreeing", samples="disagreeing"))
    rig.send([(1, 0.5), (20, 0.25), (3, -1), (4, 0.5), (60, 0.0), (70, 1e39)])
    results = until(lambda: len(rows := rig.rows("result")) == 4 and rows)
    late = [(row.source_seq, row.outputs, row.alarm) for row in results if row.provider]
    assert late == [(1, {"score": 20.25}, False), (4, {"score": 60.0}, True)]
    assert [row.source_seq for row in results if not row.provider] == [2, 5], (
        "what was not predicted goes up too"
    )
    samples = rig.rows("sample")
    assert [(row.source_seq, row.values) for row in samples] == [
        (1, {"i": 20.0, "b": 0.25}), (4, {"i": 60.0, "b": 0.0}),
    ]  # fmt: skip
    assert len(rig.rows("alarm")) == 1, "the shadow raises none"
    assert [inputs["x"].tolist() for inputs, _ in observer.offered] == [
        [[1.0, 0.5]], [[20.0, 0.25]], [[4.0, 0.5]], [[60.0, 0.0]],
    ]  # fmt: skip
    assert [outputs["score"].tolist() for _, outputs in observer.offered][1] == [[20.25]]


def test_an_answer_that_comes_later_goes_up_by_itself(rig: Rig) -> None:
    class Later(Contradicts):
        def offer(self, inputs: Arrays, outputs: Arrays, disagreed: Disagreed | None = None) -> None:
            assert disagreed is not None
            waiting.append(disagreed)

    waiting: list[Disagreed] = []
    rig.model.tap.observer = Later(above=0.0)
    rig.start(publish=Publish(results="disagreeing", trends=False))
    rig.send([(1, 0.5), (20, 0.25)])
    assert rig.rows("result") == []
    for disagreed in waiting:
        disagreed()
    until(lambda: [row.source_seq for row in rig.rows("result")] == [0, 1])


def test_a_window_goes_up_with_all_of_its_samples_and_at_its_rate(rig: Rig) -> None:
    rig.model.tap.observer = Contradicts(above=0.0)
    window = Window(count=2, timeout=60, aggregate="mean")
    runner = rig.start(
        window=window, publish=Publish(results="none", samples="disagreeing", disagreeing_rate=1.0)
    )
    rig.send([(2, 0.0), (4, 0.0), (6, 0.0), (8, 0.0)])
    until(lambda: len(rig.rows("sample")) == 2)
    rig.runner.stop()
    assert [row.source_seq for row in rig.rows("sample")] == [0, 1] and rig.rows("result") == []
    assert runner.report().other["disagreeing_dropped"] == 1


@pytest.mark.parametrize(
    "publish", [Publish(results="disagreeing", samples="disagreeing"), Publish(results="none")]
)
def test_without_a_shadow_or_without_the_wish_nothing_of_it_goes_up(rig: Rig, publish: Publish) -> None:
    if publish.results == "none":
        rig.model.tap.observer = Contradicts(above=0.0)
    rig.start(publish=publish)
    rig.send([(1, 0.5), (20, 0.25)])
    rig.runner.stop()
    assert rig.rows("result") == [] and rig.rows("sample") == []


def test_scores_are_counted_where_the_guard_wants_them(rig: Rig) -> None:
    rig.model.health.scores = ScoreBins()
    rig.start()
    rig.send([(1, 0.5), (None, 1), (20, 0.25)])
    assert rig.model.health.scores._first == [1.5, 20.25]


def test_the_bucket_is_full_at_first_and_fills_evenly() -> None:
    bucket = Bucket(60.0)
    assert [bucket.take(0.0) for _ in range(61)] == [True] * 60 + [False]
    assert bucket.take(1.0) and not bucket.take(1.5) and bucket.take(2.0)
    assert np.sum([bucket.take(1000.0) for _ in range(100)]) == 60
