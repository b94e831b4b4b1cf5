"""source -> window -> features -> model -> actions -> outbox: one thread per stream.

Everything a window makes, and the sensor's position, is one transaction. Actions run right after it
and do not wait for any uplink.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable

import msgspec
import numpy as np

from agent.runtime.worker import WorkerStopped
from agent.samples import Sample, continue_sequence, parse
from agent.sketch import Statistics
from agent.slots import ActiveModel
from agent.state import State
from edgeward.clock import Clock
from edgeward.errors import InvalidDocument, RuntimeFault
from edgeward.identifiers import DeviceName
from edgeward.wire.desired import StreamTarget
from edgeward.wire.reports import StreamReport
from edgeward.wire.rows import AlarmRow, ResultRow, Row, SampleRow, TrendRow
from edgeward.wire.streams import MqttSource
from edgeward.wire.topics import Lane

log = logging.getLogger(__name__)

QUEUE_MESSAGES = 2000


class SensorAck(msgspec.Struct):
    epoch: str
    seq: int


def fill_in(topic: str, name: DeviceName) -> str:
    return topic.replace("{site}", name.site).replace("{device}", name.device)


class Trends:
    """Open buckets of event time per series; a bucket closes when a later one has begun."""

    def __init__(self, width_us: int) -> None:
        self._width = width_us
        self._open: dict[tuple[str, int, str, str, str], Statistics] = {}
        self._newest = 0

    def add(
        self, at_us: int, model: ActiveModel, series: str, values: np.ndarray, edges: list[float]
    ) -> None:
        bucket = at_us // self._width * self._width
        self._newest = max(self._newest, bucket)
        key = (series, bucket, model.ref.digest, model.package.variant.name, model.runner.provider)
        self._open.setdefault(key, Statistics(edges)).add(values)

    def take(self, target: StreamTarget, *, everything: bool = False) -> list[Row]:
        """The rows of all closed buckets (or of all), which are forgotten here."""
        rows: list[Row] = []
        for key in [key for key in self._open if everything or key[1] < self._newest]:
            series, bucket, digest, variant, provider = key
            item = self._open.pop(key)
            empty = item.count == 0
            rows.append(
                TrendRow(
                    bucket, self._width, target.name, target.revision, digest, variant, provider, series,
                    item.count, item.missing, item.mean, item.m2, 0.0 if empty else item.minimum,
                    0.0 if empty else item.maximum, item.edges, item.histogram,
                )
            )  # fmt: skip
        return rows


class StreamRunner:
    """`active` gives the slot's model, `publish` sends to the local broker, `committed` wakes the uplink."""

    def __init__(
        self,
        target: StreamTarget,
        name: DeviceName,
        state: State,
        clock: Clock,
        active: Callable[[str], ActiveModel | None],
        publish: Callable[[str, bytes], bool],
        committed: Callable[[], None],
    ) -> None:
        self.target = target
        self._spec = target.spec
        source = target.spec.source.one()
        assert isinstance(source, MqttSource)
        self._source: MqttSource = source
        self.topic = fill_in(self._source.topic, name)
        self._name = name
        self._state = state
        self._clock = clock
        self._active = active
        self._publish = publish
        self._committed = committed
        self._queue: queue.Queue[bytes] = queue.Queue(QUEUE_MESSAGES)
        self._stop = threading.Event()
        self._trends = Trends(int(target.spec.publish.trend_bucket * 1e6))
        self._window: list[Sample] = []
        self._opened = 0.0
        self._position = state.source(self.topic)
        self._counts: Counter[str] = Counter()
        self._scores = 0.0
        self._latencies: list[float] = []
        self._figures = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"stream-{target.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def receive(self, payload: bytes) -> None:
        """A message of the source. A full queue drops it: a numbering sensor sends it again."""
        try:
            self._queue.put_nowait(payload)
        except queue.Full:
            with self._figures:
                self._counts["dropped"] += 1

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except (RuntimeFault, OSError) as error:
                with self._figures:
                    self._counts["errors"] += 1
                log.error("stream %s: %s", self.target.name, error)
                self._stop.wait(0.5)
        self._close_window(everything=True)

    def _turn(self) -> None:
        wait = (
            0.1
            if not self._window
            else max(0.0, self._opened + self._spec.window.timeout - self._clock.monotonic())
        )
        try:
            payload = self._queue.get(timeout=min(wait, 0.1))
        except queue.Empty:
            payload = None
        if payload is not None:
            self._take_in(payload)
        due = bool(self._window) and self._clock.monotonic() - self._opened >= self._spec.window.timeout
        while len(self._window) >= self._spec.window.count or (due and self._window):
            if not self._close_window():
                break

    def _take_in(self, payload: bytes) -> None:
        try:
            samples = parse(payload, self._source, self._spec.features, self._clock.now())
        except InvalidDocument as error:
            with self._figures:
                self._counts["rejected"] += 1
            log.warning("stream %s: ignored a message: %s", self.target.name, error)
            return
        if self._source.sequence:
            last = self._window[-1] if self._window else None
            position = (last.epoch, last.seq) if last is not None else self._position
            samples, _ = continue_sequence(samples, position)
            if not samples:
                self._acknowledge()
            if self._active(self._spec.slot) is None:
                return
        if samples and not self._window:
            self._opened = self._clock.monotonic()
        self._window += samples

    def _close_window(self, *, everything: bool = False) -> bool:
        """Infer, commit, act, acknowledge. False when there is no model: the samples wait at the sensor."""
        model = self._active(self._spec.slot)
        if model is None:
            with self._figures:
                self._counts["rejected"] += len(self._window)
            self._window = []
            return False
        window = self._window[: self._spec.window.count]
        rows: list[tuple[Lane, Row]] = []
        alarms: list[AlarmRow] = []
        if window:
            try:
                results, alarms = self._infer(model, window)
            except WorkerStopped:
                return True
            if self._spec.publish.results == "all":
                rows += [("result", row) for row in results]
            rows += [("alarm", row) for row in alarms]
            if self._spec.publish.samples == "all":
                rows += [("sample", self._raw(sample)) for sample in window]
        rows += [("trend", row) for row in self._trends.take(self.target, everything=everything)]
        position = (window[-1].epoch, window[-1].seq) if window and self._source.sequence else None
        self._state.commit_rows(rows, {self.topic: position} if position else None)
        self._window = self._window[len(window) :]
        self._opened = self._clock.monotonic()
        if position:
            self._position = position
            self._acknowledge()
        for alarm in alarms:
            self._act(model, alarm)
        self._committed()
        return True

    def _infer(self, model: ActiveModel, window: list[Sample]) -> tuple[list[ResultRow], list[AlarmRow]]:
        good = [sample for sample in window if not sample.problem]
        features = self._spec.features
        variant = model.package.variant
        outputs: dict[str, np.ndarray] = {}
        started = self._clock.monotonic()
        if good:
            matrix = np.array([[sample.values[name] for name in features] for sample in good])
            if self._spec.window.aggregate == "mean":
                matrix = np.broadcast_to(matrix.mean(axis=0), matrix.shape)
            tensor = variant.inputs[0]
            got = model.runner.infer({tensor.name: np.ascontiguousarray(matrix, dtype=tensor.dtype)})
            outputs = {
                name: values.reshape(len(good), -1)[:, -1].astype(float) for name, values in got.items()
            }
            model.live.add(features, matrix)
            self._sketch(model, good[-1].event_time, matrix, outputs)
        latency = (self._clock.monotonic() - started) * 1e3
        decision = model.package.manifest.decision
        results: list[ResultRow] = []
        alarms: list[AlarmRow] = []
        index = 0
        common = (model.ref.digest, variant.name, model.runner.provider)
        for sample in window:
            where = (
                sample.event_time,
                self.target.name,
                self.target.revision,
                sample.key,
                sample.epoch,
                sample.seq,
            )
            if sample.problem:
                # Stored once and visibly not predicted, so that nothing is missing from the count.
                results.append(ResultRow(*where, model.ref.digest, variant.name, "", {}, False))
                continue
            values = {name: float(column[index]) for name, column in outputs.items()}
            finite = {name: value for name, value in values.items() if np.isfinite(value)}
            index += 1
            alarm = False
            if decision is not None and decision.output in finite:
                value = finite[decision.output]
                alarm = (
                    value > decision.threshold
                    if decision.direction == "above"
                    else value < decision.threshold
                )
                if alarm:
                    alarms.append(AlarmRow(*where, *common, value, decision.threshold))
            results.append(ResultRow(*where, *common, finite, alarm))
        self._count(
            len(window),
            len(window) - len(good),
            results,
            alarms,
            latency,
            decision.output if decision else "",
        )
        return results, alarms

    def _sketch(
        self, model: ActiveModel, at: int, matrix: np.ndarray, outputs: dict[str, np.ndarray]
    ) -> None:
        baseline = model.package.manifest.baseline
        for index, name in enumerate(self._spec.features):
            edges = baseline[name].edges if name in baseline else []
            self._trends.add(at, model, f"feature:{name}", matrix[:, index], edges)
        for name, column in outputs.items():
            self._trends.add(at, model, f"output:{name}", column, [])

    def _count(
        self,
        rows: int,
        rejected: int,
        results: list[ResultRow],
        alarms: list[AlarmRow],
        latency: float,
        score: str,
    ) -> None:
        with self._figures:
            self._counts["rows"] += rows
            self._counts["rejected"] += rejected
            self._counts["alarms"] += len(alarms)
            self._scores += sum(row.outputs.get(score, 0.0) for row in results)
            self._latencies.append(latency)

    def _raw(self, sample: Sample) -> SampleRow:
        return SampleRow(
            sample.event_time, self.target.name, self.target.revision, sample.key, sample.epoch, sample.seq,
            sample.values,
        )  # fmt: skip

    def _act(self, model: ActiveModel, alarm: AlarmRow) -> None:
        message = {
            "device": self._name.device, "stream": self.target.name, "event_time": alarm.event_time / 1e6,
            "value": alarm.value, "threshold": alarm.threshold, "model": model.ref.model,
            "version": model.ref.version, "digest": alarm.digest, "source_seq": alarm.source_seq,
        }  # fmt: skip
        for action in self._spec.actions:
            self._publish(fill_in(action.publish or "", self._name), msgspec.json.encode(message))

    def _acknowledge(self) -> None:
        """Tell the sensor up to where its samples are durable; also again, when it repeats old ones."""
        if self._position is not None:
            self._publish(f"{self.topic}/ack", msgspec.json.encode(SensorAck(*self._position)))

    def report(self) -> StreamReport:
        """The figures since the last report."""
        model = self._active(self._spec.slot)
        with self._figures:
            counts, self._counts = self._counts, Counter()
            scores, self._scores = self._scores, 0.0
            latencies, self._latencies = self._latencies, []
        latency = {}
        if latencies:
            p50, p95 = np.percentile(latencies, [50, 95])
            latency = {"p50": float(p50), "p95": float(p95)}
        rows = counts["rows"] - counts["rejected"]
        return StreamReport(
            self.target.name, model.ref.digest if model else "", counts["rows"], counts["alarms"],
            counts["rejected"] + counts["dropped"], counts["errors"], scores / rows if rows > 0 else None, latency,
            model.live.psi() if model else {}, model.live.rows if model else 0,
        )  # fmt: skip
