"""How fast does a stream turn sensor messages into predictions and actions?

python -m benchmarks.stream [--quick] [--json FILE]

Throughput: messages of 100 rows through the agent's own decoder, windows, a gradient boosting in a worker
process, conditions and the durable outbox; rows per second of CPU time of the agent and its worker
together. Latency: single messages through the embedded broker, from before the sensor's publish to the
arrival of the action's message.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import psutil

from agent.outbox.outbox import Outbox
from agent.runtime.engine import Engine
from agent.slots.active import ActiveModel
from agent.streams.local_link import LocalLink, StreamLink
from agent.streams.runner import StreamRunner
from agent.streams.sketches import LiveBaseline
from benchmarks import models
from benchmarks.report import Row, arguments, finish, median, spread
from edgeward.broker import EmbeddedBroker
from edgeward.clock import SystemClock
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link
from edgeward.wire.desired import ModelRef, StreamTarget
from edgeward.wire.package import Decision
from edgeward.wire.streams import Action, MqttSource, Publish, Source, StreamSpec, Window
from models.datasets import load_named

ME = DeviceName("bench", "bench-1")
TOPIC, ALARMS = "plant/bench/sensors", "alarms/bench"
ROWS = 100


class _Wire:
    """A sensor's side of a topic without a broker: what the stream subscribes to and publishes."""

    def __init__(self) -> None:
        self.receive: Callable[[str, bytes], None] = lambda topic, payload: None
        self.acked = -1
        self.actions = 0
        self.moved = threading.Condition()

    def subscribe(self, topic: str, receive: Callable[[str, bytes], None]) -> None:
        self.receive = receive

    def unsubscribe(self, topic: str) -> None:
        pass

    def expect_acks(self, topic: str, position: Any, *, expected: bool = True) -> None:
        pass

    def acknowledge(self, topic: str, epoch: str, seq: int) -> None:
        with self.moved:
            self.acked = seq
            self.moved.notify()

    def publish(self, topic: str, payload: bytes) -> bool:
        self.actions += 1
        return True


def _spec(features: list[str], publish: Publish, *, count: int, sequence: bool) -> StreamSpec:
    return StreamSpec(
        source=Source(mqtt=MqttSource(topic=TOPIC, time="t", values="values", sequence=sequence)),
        features=features,
        window=Window(count=count, timeout=0.05),
        actions=[Action(name="alarm", publish=ALARMS)],
        publish=publish,
    )


def _model(engine: Engine, threshold: float) -> ActiveModel:
    """The boosting in a worker, as a slot holds it; its package is never on the disk here."""
    manifest = SimpleNamespace(baseline={}, features=[], decision=Decision("variable", threshold))
    package = SimpleNamespace(
        ref=ModelRef("boosting", 1, "0" * 64), manifest=manifest, variant=SimpleNamespace(name="onnx-cpu")
    )
    runner = engine.open("onnx", models.tabular(), "boosting:1", batchable=True)
    return ActiveModel(package, runner, LiveBaseline({}))  # type: ignore[arg-type]  # only these fields are read


def _messages(features: list[str], count: int) -> list[bytes]:
    values = load_named("shuttle").values
    messages = []
    for number in range(count):
        first = number * ROWS
        rows = values[np.arange(first, first + ROWS) % len(values)].tolist()
        samples = [
            {
                "epoch": "bench",
                "seq": first + index,
                "t": 1.7e9 + first + index,
                "values": dict(zip(features, row, strict=True)),
            }
            for index, row in enumerate(rows)
        ]
        messages.append(msgspec.json.encode(samples))
    return messages


def _cpu(engine_pids: list[int]) -> float:
    mine = sum(os.times()[:2])
    return mine + sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in engine_pids)


def throughput(
    folder: Path, publish: Publish, messages: list[bytes], features: list[str]
) -> tuple[float, float]:
    """Rows per second of CPU time and of wall-clock time, everything durable."""
    engine = Engine()
    engine.start()
    state = Outbox(folder / "outbox.db", SystemClock())
    wire = _Wire()
    model = _model(engine, 0.5)
    spec = _spec(features, publish, count=ROWS, sequence=True)
    runner = StreamRunner(
        StreamTarget("bench", 1, spec),
        ME,
        state,
        SystemClock(),
        lambda slot: model,
        wire,
        lambda: None,
        folder,
    )
    runner.start()
    pids = [child.pid for child in psutil.Process().children()]
    warm = len(messages) // 10
    try:
        _feed(wire, messages[:warm], warm * ROWS - 1, 0)
        began, cpu = time.perf_counter(), _cpu(pids)
        _feed(wire, messages[warm:], len(messages) * ROWS - 1, warm * ROWS)
        wall, spent = time.perf_counter() - began, _cpu(pids) - cpu
    finally:
        runner.stop()
        engine.stop()
        state.close()
    rows = (len(messages) - warm) * ROWS
    return rows / spent, rows / wall


def _feed(wire: _Wire, messages: list[bytes], last: int, first: int) -> None:
    """Send as a sensor does: some messages ahead of what is durable, until all is."""
    for number, message in enumerate(messages):
        ahead = first + number * ROWS - 40 * ROWS
        with wire.moved:
            wire.moved.wait_for(partial(_reached, wire, ahead), timeout=30)
        wire.receive(TOPIC, message)
    with wire.moved:
        if not wire.moved.wait_for(partial(_reached, wire, last), timeout=60):
            raise RuntimeError(f"only {wire.acked + 1} of {last + 1} rows became durable")


def _reached(wire: _Wire, seq: int) -> bool:
    return wire.acked >= seq


def latencies(folder: Path, features: list[str], count: int, pause: float) -> list[float]:
    """Milliseconds from a sensor's publish to the action's message, each way through the broker.

    Sensor and panel have a process of their own, as at a site: in the agent's they would take turns with it
    for the interpreter.
    """
    engine = Engine()
    engine.start()
    state = Outbox(folder / "outbox.db", SystemClock())
    model = _model(engine, -1e9)  # every sample is an alarm
    with (
        EmbeddedBroker(folder / "broker") as broker,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as site,
    ):
        local: Any = None
        agent = Link(Broker(broker.url), "agent", on_message=lambda message: local.dispatch(message))
        local = LocalLink(agent.subscribe, agent.unsubscribe, agent.publish)
        runner = StreamRunner(
            StreamTarget("bench", 1, _spec(features, Publish(), count=1, sequence=False)),
            ME, state, SystemClock(), lambda slot: model, StreamLink(local), lambda: None, folder,
        )  # fmt: skip
        try:
            agent.start()
            _wait(lambda: agent.connected)
            runner.start()
            values = dict(zip(features, load_named("shuttle").values[0].tolist(), strict=True))
            payload = msgspec.json.encode({"t": 1.7e9, "values": values})
            return site.submit(_site, broker.url, payload, count, pause).result()
        finally:
            runner.stop()
            agent.stop()
            engine.stop()
            state.close()


def _site(url: str, payload: bytes, count: int, pause: float) -> list[float]:
    """The sensor and the panel: one message at a time, and how long its action took."""
    arrived = threading.Semaphore(0)
    panel = Link(Broker(url), "panel", subscriptions=(ALARMS,), on_message=lambda message: arrived.release())
    sensor = Link(Broker(url), "sensor")
    spent = []
    try:
        for link in (panel, sensor):
            link.start()
        _wait(lambda: panel.connected and sensor.connected)
        while not arrived.acquire(timeout=0.2):
            sensor.publish(TOPIC, payload)
        while arrived.acquire(timeout=0.5):
            continue
        for _ in range(count):
            began = time.perf_counter()
            sensor.publish(TOPIC, payload)
            if not arrived.acquire(timeout=10):
                raise RuntimeError("no action within 10 s")
            spent.append((time.perf_counter() - began) * 1e3)
            time.sleep(pause)
    finally:
        sensor.stop()
        panel.stop()
    return spent


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError("the broker did not connect")
        time.sleep(0.01)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    rounds, messages, singles = (1, 500, 200) if options.quick else (3, 2000, 1000)
    features = load_named("shuttle").features
    wires = _messages(features, messages)
    policies = {
        "every result": Publish(),
        "changes by 0.05": Publish(results="changes", tolerance=0.05),
        "trends only": Publish(results="none"),
    }
    per_core: dict[str, list[float]] = {name: [] for name in policies}
    wall: dict[str, list[float]] = {name: [] for name in policies}
    tails: list[float] = []
    middles: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            for policy, publish in policies.items():
                folder = Path(name) / f"{number}-{policy.replace(' ', '-')}"
                folder.mkdir()
                cpu, clock = throughput(folder, publish, wires, features)
                per_core[policy].append(cpu)
                wall[policy].append(clock)
            folder = Path(name) / f"{number}-latency"
            folder.mkdir()
            spent = latencies(folder, features, singles, 0.005)
            middles.append(float(np.percentile(spent, 50)))
            tails.append(float(np.percentile(spent, 99)))
    rows = [
        Row(
            f"batches of {ROWS} rows, {policy} stored", "rows/s per core", median(values), None, None, "",
            ">= 50,000" if policy == "every result" else "", spread(values),
            median(values) >= 50_000 if policy == "every result" else None,
        )
        for policy, values in per_core.items()
    ]  # fmt: skip
    rows += [
        Row(
            "the same, wall clock, every result", "rows/s", median(wall["every result"]),
            spread=spread(wall["every result"]),
        ),
        Row("single message to action, p50", "ms", median(middles), spread=spread(middles)),
        Row(
            "single message to action, p99", "ms", median(tails), None, None, "", "<= 5", spread(tails),
            median(tails) <= 5,
        ),
    ]  # fmt: skip
    finish("Streams: sensor message -> prediction -> action", rows, options.json)


if __name__ == "__main__":
    main()
