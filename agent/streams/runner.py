"""source -> quality -> window -> model -> actions -> outbox: one thread per stream, one for its disk.

Actions run right after the inference and wait for nothing else. Then everything that the windows made,
and the sensor's position, is one transaction, and only then is the sensor told: a kill at any instant
leaves both or neither. An action may therefore run again after a kill, but is never left out.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from agent.outbox.outbox import Outbox
from agent.runtime.port import BadInput, Overloaded
from agent.runtime.worker import WorkerStopped
from agent.slots.active import ActiveModel
from agent.streams.decode.sequence import Joining, Position, continue_sequence
from agent.streams.disagreeing import Disagreeing
from agent.streams.examples import Examples, make_examples
from agent.streams.figures import Figures
from agent.streams.infer import infer_fitting
from agent.streams.positions import Positions
from agent.streams.publish import Selection
from agent.streams.quality import Quality
from agent.streams.reactions import Reactions
from agent.streams.results import (
    Lineage,
    Outputs,
    alarm_rows,
    read_outputs,
    result_rows,
    sample_rows,
    without_not_finite,
)
from agent.streams.samples import Samples
from agent.streams.signature import Signature, match
from agent.streams.sources.factory import build, numbers_samples
from agent.streams.sources.mqtt import MqttLink, MqttSampleSource, fill_in
from agent.streams.sources.push import PushSource
from agent.streams.trends import Trends
from agent.streams.window import Closed, Windows
from agent.streams.writer import Writer
from edgeward.clock import Clock
from edgeward.errors import EdgewardError, InvalidDocument, PackageError, RuntimeFault, Unavailable
from edgeward.identifiers import DeviceName
from edgeward.wire.desired import StreamTarget
from edgeward.wire.reports import StreamReport
from edgeward.wire.rows import AlarmRow, Row
from edgeward.wire.topics import Lane

log = logging.getLogger(__name__)

#: Messages and samples that may wait; a source is told to wait when there are more.
QUEUE_MESSAGES, QUEUE_SAMPLES = 2000, 50_000
#: Samples that one transaction may cover when many wait: the disk's flush costs as much as a hundred.
GROUP_SAMPLES = 2000
STOP_SECONDS = 30.0
_TRIES = 3


class StreamRunner:
    """`active` gives the slot's model, `publish` sends to the local broker, `committed` wakes the uplink."""

    def __init__(
        self,
        target: StreamTarget,
        name: DeviceName,
        outbox: Outbox,
        clock: Clock,
        active: Callable[[str], ActiveModel | None],
        link: MqttLink,
        committed: Callable[[], None],
        folder: Path,
    ) -> None:
        """`folder` is where `file` actions write. Raises InvalidDocument, MissingDependency."""
        spec = target.spec
        self.target = target
        self._spec = spec
        self._name = name
        self._clock = clock
        self._active = active
        self._committed = committed
        # Streams that share a topic are not equally far.
        self._source_key = f"{target.name}:{fill_in(getattr(spec.source.one(), 'topic', ''), name)}"
        self._numbered = numbers_samples(spec.source)
        self._joining = Joining()
        self._position = outbox.source(self._source_key) if self._numbered else None
        self._durable = self._position
        self.source = build(
            spec.source,
            spec.features,
            spec.quality,
            name=name,
            clock=clock,
            link=link,
            position=self._position,
        )
        self._quality = Quality(spec.features, spec.quality)
        self._windows = Windows(spec.window)
        self._positions = Positions()
        self._reactions = Reactions(target, name, link.publish, folder, clock)
        self._trends = Trends(
            int(spec.publish.trend_bucket * 1e6), spec.publish.trend_bucket + spec.window.timeout
        )
        self._trends.restore(outbox.open_trends(target.name), clock.monotonic())
        self._disagreeing = Disagreeing(target, clock)
        self._selection: Selection | None = None
        self._model: ActiveModel | None = None
        self._signature: Signature | None = None
        self._reason = ""
        self._queue: deque[tuple[Samples, float]] = deque()
        self._queued = 0
        self._arrived = threading.Condition()
        self._stop = threading.Event()
        self._figures = Figures()
        self._writer = Writer(
            outbox,
            self._source_key,
            self._stop,
            holds=self._numbered,
            stored=self._stored,
            refused=self._refused,
            failed=self._fail,
        )
        #: An internal error has ended the stream; only a new runner goes on, from the durable position.
        self.failed = False
        self._thread = threading.Thread(target=self._work, name=f"stream-{target.name}", daemon=True)

    def announce(self) -> None:
        """To be called for all streams of a device before the first starts: a sensor that several read must
        not be told that one has its samples before the others are known."""
        self._reading(self._active(self._spec.slot) is not None)

    def _reading(self, reading: bool) -> None:
        if isinstance(self.source, MqttSampleSource):
            self.source.reading(reading)

    def start(self) -> None:
        self._writer.start()
        self._thread.start()
        self.source.start(self)

    def stop(self) -> None:
        """Take no more, finish what was taken, and end."""
        self.source.stop()
        self._stop.set()
        with self._arrived:
            self._arrived.notify_all()
        self._thread.join(STOP_SECONDS)
        self._writer.end(STOP_SECONDS)
        self._reactions.stop()

    @property
    def push(self) -> PushSource | None:
        """The source, when it is fed over HTTP."""
        return self.source if isinstance(self.source, PushSource) else None

    # the source's side

    def take(self, samples: Samples) -> bool:
        """See Sink. Nothing is taken while no model fits: the samples wait at the sensor."""
        blocked = bool(self.blocked)
        self._reading(not blocked)
        if blocked:
            return False
        with self._arrived:
            if len(self._queue) >= QUEUE_MESSAGES or self._queued >= QUEUE_SAMPLES:
                return False
            self._queue.append((samples, self._clock.monotonic()))
            self._queued += len(samples)
            self._arrived.notify()
        return True

    @property
    def blocked(self) -> str:
        """See Sink."""
        slot = self._spec.slot
        return self._reason or ("" if self._active(slot) is not None else f"slot {slot} has no model")

    def count(self, what: str, number: int = 1) -> None:
        self._figures.count(what, number)

    # the stream's thread

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
            while self._queue:
                self._turn()
            self._process(self._windows.flush(), self._clock.monotonic(), everything=True)
        except Unavailable as error:
            log.warning("stream %s stops, the rest is left to the sensor: %s", self.target.name, error)
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not go unseen
            self._fail(error)
        finally:
            self._writer.close()

    def _turn(self) -> None:
        """Wait for samples or for a window's end, and work off what is there."""
        self._fit()
        now = self._clock.monotonic()
        due = self._windows.next_due()
        wait = 0.25 if due is None else min(0.25, max(0.0, due - now))
        with self._arrived:
            if not self._queue and not self._stop.is_set():
                self._arrived.wait(wait)
        closed: list[Closed] = []
        received: float | None = None
        covered = 0
        while self._queue and covered < GROUP_SAMPLES:
            with self._arrived:
                samples, arrived = self._queue.popleft()
                self._queued -= len(samples)
            received = arrived if received is None else received
            covered += len(samples)
            samples = self._accept(samples)
            if self._windows.breaks(samples):
                # Rows made together come from one life of a sensor and from values of one shape.
                self._process(closed + self._windows.flush(), received)
                closed = []
            self._positions.add(samples)
            closed += self._windows.add(samples, arrived)
        now = self._clock.monotonic()
        closed += self._windows.due(now)
        if closed or self._disagreeing.waiting or (self._trends.due or now + 1) <= now:
            self._process(closed, received if received is not None else self._clock.monotonic())

    def _accept(self, samples: Samples) -> Samples:
        """Those that are new, with what is wrong with them; none may be left."""
        if self._numbered and len(samples):
            position = self._joining.position(samples, self._position)
            samples, self._position = continue_sequence(samples, position)
            if not len(samples):
                self._acknowledge()  # repeats: the sensor has not heard of it
        return self._quality.apply(samples, self._clock.now())

    def _fit(self) -> None:
        """Look whether the slot has another model, and whether this stream fits it."""
        model = self._active(self._spec.slot)
        if model is self._model:
            return
        self._model = model
        self._signature = None
        if model is None:
            return
        manifest = model.package.manifest
        try:
            self._signature = match(
                self._spec, model.runner.inputs, model.runner.outputs, manifest.decision, manifest.features
            )
            self._selection = Selection(self._spec.publish, manifest.decision)
            self._reason = ""
        except (InvalidDocument, PackageError) as error:
            self._reason = str(error)
            log.error("stream %s does not fit %s: %s", self.target.name, model.ref.model, error)

    def _process(self, closed: list[Closed], received: float, *, everything: bool = False) -> None:
        """Infer, act, hand over to be stored. `received` is when the oldest of these samples came in."""
        examples = (
            make_examples(closed, self._spec.window.aggregate, self._spec.window.count) if closed else None
        )
        rows: list[tuple[Lane, Row]] = []
        if examples is not None:
            rows += self._rows_of(examples, received)
        if self._disagreeing.waiting:
            late, dropped = self._disagreeing.take()
            rows += late
            self.count("disagreeing_dropped", dropped)
        trends = self._trends.take(self.target, self._clock.monotonic(), everything=everything)
        rows += [("trend", row) for row in trends]
        whole = bool(trends) or self._writer.take_missed()
        change = self._trends.change(self.target, closed=whole)
        position = self._positions.at(self._windows.settled)
        position = position if self._numbered else None
        if rows or position or change is not None:
            self._writer.put(rows, position, change)

    # the writer's side

    def _stored(self, position: Position | None) -> None:
        self._committed()
        if position is not None:
            self._durable = position
            self._acknowledge()

    def _acknowledge(self) -> None:
        if self._durable is None:
            return
        try:
            self.source.committed(*self._durable)
        except (EdgewardError, OSError) as error:
            self.count("errors")
            log.warning("stream %s: the sensor could not be told: %s", self.target.name, error)

    def _refused(self, error: Exception) -> None:
        self.count("errors")
        log.error("stream %s: results cannot be stored: %s", self.target.name, error)

    def _fail(self, error: Exception) -> None:
        """To go on would tell the sensor that samples are stored which this error may have cost."""
        self._reason = f"internal error: {error!r}"
        self.count("errors")
        log.error("stream %s has ended", self.target.name, exc_info=error)
        self.failed = True

    # the model

    def _rows_of(self, examples: Examples, received: float) -> list[tuple[Lane, Row]]:
        model, outputs, began = self._ask(examples)
        lineage = Lineage(model.ref.digest, model.package.variant.name, model.runner.provider)
        decision = model.package.manifest.decision
        selection = self._selection
        keys = examples.stands.keys
        alarms = alarm_rows(self.target, lineage, examples, outputs, decision)
        self._reactions.act(model, examples, outputs, keys, received)
        chosen = (
            selection.choose(keys, outputs.scores, outputs.alarm)
            if selection is not None and len(examples)
            else np.ones(len(examples), np.bool_)
        )
        results = result_rows(self.target, lineage, examples, outputs, chosen)
        rows: list[tuple[Lane, Row]] = [("result", row) for row in results]
        rows += [("alarm", row) for row in alarms]
        if self._spec.publish.samples == "all":
            rows += [("sample", row) for row in sample_rows(self.target, examples, self._spec.features)]
        self._note(model, lineage, examples, outputs, alarms, began)
        return rows

    def _ask(self, examples: Examples) -> tuple[ActiveModel, Outputs, float]:
        """The model's outputs; of a model that was replaced meanwhile, its successor's."""
        tries = 0
        features = self._spec.features
        while True:
            self._fit()
            model, signature = self._model, self._signature
            if model is None or signature is None:
                if self._stop.wait(0.1):
                    raise Unavailable(self._reason or "the slot has no model")
                continue
            decision = model.package.manifest.decision
            if not len(examples):
                return model, read_outputs({}, 0, None), 0.0

            def ask(
                rows: Any, model: ActiveModel = model, signature: Signature = signature
            ) -> dict[str, Any]:
                try:
                    return model.runner.infer(signature.feed(rows, features))
                except RuntimeFault as fault:
                    # More are asked again in parts, until those that are refused stand alone.
                    if len(rows) == 1 and not isinstance(fault, BadInput | WorkerStopped):
                        model.health.failed += 1
                    raise

            misfits = signature.misfits(examples.inputs, features)
            began = self._clock.monotonic()
            try:
                got, answered, refusal = infer_fitting(ask, examples.inputs, misfits, single=signature.single)
            except WorkerStopped:
                self._stop.wait(0.01)
                continue
            except Overloaded as error:
                if self._stop.wait(min(error.retry_after, 0.5)):
                    raise
                continue
            except RuntimeFault as error:
                self.count("errors")
                tries += 1
                log.error("stream %s: %s", self.target.name, error)
                if tries < _TRIES:
                    self._stop.wait(0.2 * tries)
                    continue
                got, answered, refusal = {}, np.zeros(len(examples), np.bool_), str(error)
            for feature, text in misfits.values():
                self._quality.counts[f"misfit:{feature}"] += 1
                refusal = text
            outputs = read_outputs(got, len(examples), decision if got else None)
            if not answered.all():
                self.count("refused", int((~answered).sum()))
                log.warning("stream %s: the model refused samples: %s", self.target.name, refusal)
                outputs = Outputs(outputs.columns, outputs.scores, outputs.alarm & answered, answered)
            if got and model.policy.nan == "reject":
                checked = without_not_finite(outputs)
                if wrong := int((outputs.answered & ~checked.answered).sum()):
                    self.count("not_finite", wrong)
                    model.health.not_finite += wrong
                outputs = checked
            spent = self._clock.monotonic() - began
            model.health.note(round(spent * 1e9), int(answered.sum()))
            model.health.alarms += int(outputs.alarm.sum())
            if model.health.scores is not None and model.score in outputs.scores:
                model.health.note_scores(outputs.scores[model.score][outputs.answered])
            if (observer := model.tap.observer) is not None:
                lineage = Lineage(model.ref.digest, model.package.variant.name, model.runner.provider)
                self._disagreeing.offer(observer, signature, lineage, examples, got, outputs)
            return model, outputs, spent * 1e3

    # figures

    def _note(
        self,
        model: ActiveModel,
        lineage: Lineage,
        examples: Examples,
        outputs: Outputs,
        alarms: list[AlarmRow],
        latency: float,
    ) -> None:
        features = self._spec.features
        predicted = examples.inputs[outputs.answered] if len(examples) else examples.inputs
        if len(predicted):
            at = examples.stands.event_time[outputs.answered]
            series = {f"output:{name}": values[outputs.answered] for name, values in outputs.scores.items()}
            edges: dict[str, list[float]] = {}
            if predicted.ndim == 2:
                baseline = model.package.manifest.baseline
                model.live.add(features, predicted)
                series |= {f"feature:{name}": predicted[:, index] for index, name in enumerate(features)}
                edges = {f"feature:{name}": item.edges for name, item in baseline.items()}
            if self._spec.publish.trends:
                self._trends.add(at, lineage, series, edges, self._clock.monotonic())
        decision = model.package.manifest.decision
        judged = (
            outputs.scores[decision.output] if decision and decision.output in outputs.scores else np.zeros(0)
        )
        counts = {
            "rows": len(examples.samples),
            "predicted": int(outputs.answered.sum()),
            "late": examples.late,
            "alarms": len(alarms),
            "bad": len(examples.samples.problems),
        }
        self._figures.add(counts, float(np.nansum(judged)), int(np.count_nonzero(~np.isnan(judged))), latency)

    def report(self) -> StreamReport:
        """The figures since the last report."""
        model = self._active(self._spec.slot)
        taken = self._figures.take()
        counts = taken.counts
        problems, self._quality.counts = dict(self._quality.counts), Counter()
        return StreamReport(
            self.target.name,
            model.ref.digest if model else "",
            counts["rows"],
            counts["alarms"],
            counts["bad"] + counts["rejected"] + counts["dropped"],
            counts["errors"],
            taken.score_mean,
            taken.latency_ms,
            model.live.psi() if model else {},
            model.live.rows if model else 0,
            problems=problems,
            late=counts["late"],
            dropped=counts["dropped"],
            other=taken.other,
            actions=self._reactions.take(),
            reason=self.blocked,
        )
