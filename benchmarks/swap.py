"""What a stream of 1,000 samples/s notices of a new model version."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from benchmarks.plant import SITE, Agent
from benchmarks.report import Row, median, spread
from edgeward.mqtt import Broker, Link
from edgeward.wire import API_VERSION

TOPIC, SCORES = "plant/bench/swap", "scores/bench"
FEATURES = [f"f{index}" for index in range(9)]
#: Samples in a message, and messages in a second.
BATCH, RATE = 10, 100
#: The event time of the first sample; each is a second after the one before, so that it says which it was.
BEGINS = 1_700_000_000
CALM = 5.0
SWAP = 0.25

STREAM: dict[str, object] = {
    "apiVersion": API_VERSION,
    "kind": "Stream",
    "metadata": {"name": f"{SITE}-swap"},
    "spec": {
        "source": {"mqtt": {"topic": TOPIC, "time": "t", "values": "values"}},
        "features": FEATURES,
        "window": {"count": BATCH, "timeout": 0.05},
        "actions": [{"name": "score", "when": "score > -1000000", "publish": SCORES}],
        "publish": {"results": "all"},
    },
}


@dataclass(frozen=True)
class Seen:
    """`calm`, `worst` and `swap` are the largest latencies (ms) before the rollout, from its beginning on, and
    within SWAP seconds of the new version's first answer; `usual` is the median before it. `lost` and
    `repeated` count samples of the whole time."""

    usual: float
    calm: float
    worst: float
    swap: float
    lost: int
    repeated: int


def _site(url: str, stop: Any, ready: Any) -> tuple[list[float], list[tuple[int, float, int]]]:
    """Sensor and panel in one process: when each message was sent; sample, time and version of each score."""
    sent: list[float] = []
    scores: list[tuple[int, float, int]] = []

    def arrived(message: Any) -> None:
        body = msgspec.json.decode(message.payload)
        scores.append((round(body["event_time"] - BEGINS), time.monotonic(), body["version"]))

    panel = Link(Broker(url), "swap-panel", subscriptions=(SCORES,), on_message=arrived)
    sensor = Link(Broker(url), "swap-sensor")
    values = dict.fromkeys(FEATURES, 0.5)
    try:
        for link in (panel, sensor):
            link.start()
        while not (panel.connected and sensor.connected):
            time.sleep(0.01)
        began = time.monotonic()
        ready.set()
        while not stop.is_set():
            first = len(sent) * BATCH
            pause = began + len(sent) / RATE - time.monotonic()
            if pause > 0:
                time.sleep(pause)
            samples = [{"t": BEGINS + first + index, "values": values} for index in range(BATCH)]
            sent.append(time.monotonic())
            sensor.publish(TOPIC, msgspec.json.encode(samples))
        # What is on its way still counts; a second without anything new is the end of it.
        known = -1
        while known != len(scores):
            known = len(scores)
            time.sleep(1.0)
    finally:
        sensor.stop()
        panel.stop()
    return sent, scores


def during(agent: Agent, roll_out: Callable[[], float], version: int) -> Seen:
    """Send while `roll_out` brings `version`. Raises RuntimeError when it never answers."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as shared, ProcessPoolExecutor(1, mp_context=context) as site:
        stop, ready = shared.Event(), shared.Event()
        work = site.submit(_site, agent.broker, stop, ready)
        try:
            if not ready.wait(60):
                raise RuntimeError("the sensor did not start")
            threading.Event().wait(CALM)
            began = time.monotonic()
            roll_out()
            threading.Event().wait(1.0)
        finally:
            stop.set()
        sent, scores = work.result()
    if not any(answered == version for _, _, answered in scores):
        raise RuntimeError(f"version {version} never answered")
    return judge(sent, scores, began, version)


def judge(
    sent: Sequence[float], scores: Sequence[tuple[int, float, int]], began: float, version: int
) -> Seen:
    """The first half second belongs to nobody: the stream begins."""
    latency = np.array([(at - sent[sample // BATCH]) * 1e3 for sample, at, _ in scores])
    when = np.array([sent[sample // BATCH] for sample, _, _ in scores])
    calm = latency[(when > sent[0] + 0.5) & (when < began)]
    first = min(at for _, at, answered in scores if answered == version)
    samples = {sample for sample, _, _ in scores}
    return Seen(
        float(np.median(calm)),
        float(calm.max()),
        float(latency[when >= began].max()),
        float(latency[np.abs(when - first) <= SWAP].max()),
        len(sent) * BATCH - len(samples),
        len(scores) - len(samples),
    )


def rows(seen: Sequence[Seen]) -> list[Row]:
    lost = max(item.lost for item in seen)

    def row(work: str, value: Callable[[Seen], float], target: str = "") -> Row:
        added = [value(item) - item.usual for item in seen]
        holds = median(added) <= 50 if target else None
        return Row(work, "ms", median(added), None, None, "", target, spread(added), holds)

    return [
        Row("new version at 1,000 samples/s, lost", "samples", lost, None, None, "", "0", None, lost == 0),
        row("largest added latency, at the swap", lambda item: item.swap, "<= 50"),
        row("largest added latency, rollout and self-test too", lambda item: item.worst),
        row(f"largest added latency, {CALM:.0f} s without a new version", lambda item: item.calm),
    ]
