"""A model in a process of its own: a crash, a hang or a leak costs the worker, never the agent.

Everything here runs on the engine's loop, but for `infer` and `stop`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from agent.runtime import ceiling, recovery
from agent.runtime.backlog import Backlog, InFlight, Pending
from agent.runtime.channel import Channel, Frame, Kind
from agent.runtime.child import Load, Loaded
from agent.runtime.port import Arrays, BadInput, Done, LoadOptions, Overloaded, Tensor, Timing
from agent.runtime.process import ChildProcess
from agent.runtime.tensors import join, split, to_arrays, to_tensors
from edgeward.clock import Clock
from edgeward.errors import EdgewardError, RuntimeFault
from edgeward.wire.package import Runtime, TensorSpec
from edgeward.wire.slots import SlotPolicy

log = logging.getLogger(__name__)

START_DEADLINE = 120.0
_TICK = 0.5
#: From this mean time of a batch on, the next one is sent ahead so that the worker never waits for it.
#: Below, waiting lets requests join into a larger batch, which is worth more.
_SEND_AHEAD_NS = 1_000_000
#: Below this mean time of a batch the loop waits for a lone request's answer by polling: to be woken up
#: by the kernel costs as much again. Never longer than this, and not while requests come in company.
_POLL_NS = 250_000
_ALONE = 1.2  # mean requests per batch


class WorkerStopped(RuntimeFault):
    """The model was taken out of its slot; its successor is there."""


class DeadlineExceeded(RuntimeFault):
    """The model did not answer in time."""


@dataclass(frozen=True)
class Events:
    """See Engine."""

    on_crash_loop: Callable[[str, int, float], None]
    on_recovered: Callable[[str], None]


def _give(
    request: Pending, result: list[Tensor] | EdgewardError, sent: int, infer_ns: int, rows: int
) -> None:
    """A bug in one request's handler must not cost the others their answer."""
    try:
        request.done(result, Timing(sent - request.arrived, infer_ns, rows))
    except Exception:
        log.exception("handling an inference result failed")


class Worker:
    """A Runner over one process at a time. Made by `Engine.open`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        runtime: Runtime,
        content: bytes,
        name: str,
        policy: SlotPolicy,
        options: LoadOptions,
        batchable: bool,
        events: Events,
        clock: Clock,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._load = Load(runtime, len(content), options, policy.concurrency, policy.memory_bytes)
        self._content = content
        self._name = name
        self._policy = policy
        # Some accelerators compile while a model is loaded; who may take so long for a request may for that.
        self._start_deadline = max(START_DEADLINE, policy.deadline)
        self._events = events
        self._backlog = Backlog(policy.queue, policy.max_batch if batchable else 1)
        self._process: ChildProcess | None = None
        self._ready = False
        self._in_flight = InFlight(policy.concurrency)
        self._losses = recovery.Losses()
        self._mean_ns = 0.0
        self._company = 1.0
        self._stopped = False
        self._recycling = False
        self._pump_due = False
        self._loading: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._delay: asyncio.TimerHandle | None = None
        self._memory_timer: asyncio.TimerHandle | None = None
        self._began = 0.0
        self.provider = ""
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self.restarts = 0
        self.loss = ""

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    # for everyone

    def infer(self, inputs: Arrays) -> Arrays:
        """Run and wait. Raises BadInput when the inputs are at fault, RuntimeFault when the model fails or
        two workers are lost over them, WorkerStopped, DeadlineExceeded, Overloaded."""
        tensors = to_tensors(inputs)
        answer: list[list[Tensor] | EdgewardError] = []
        ready = threading.Event()

        def done(result: list[Tensor] | EdgewardError, timing: Timing) -> None:
            answer.append(result)
            ready.set()

        def begin() -> None:
            try:
                self.submit(tensors, done)
            except EdgewardError as error:
                done(error, Timing(0, 0, 0))

        self._loop.call_soon_threadsafe(begin)
        ready.wait()
        result = answer[0]
        if isinstance(result, EdgewardError):
            raise result
        return to_arrays(result)

    def submit(self, inputs: list[Tensor], done: Done) -> None:
        """See Runner. Raises Overloaded when the queue is full, WorkerStopped."""
        if self._stopped:
            raise WorkerStopped(f"model {self._name} has been replaced")
        if self._backlog.full:
            self._pump()
        if self._backlog.full:
            seconds = len(self._backlog) * max(self._mean_ns, 1e6) / 1e9 / self._policy.concurrency
            raise Overloaded(f"model {self._name}: {len(self._backlog)} requests wait already", seconds)
        self._backlog.add(inputs, done, self._clock.monotonic_ns())
        if not self._pump_due:
            # Not yet: the loop may be about to read more requests, which can join this one.
            self._pump_due = True
            self._loop.call_soon(self._pump_now)

    def stop(self, *, at_once: bool = False) -> None:
        """Answer what has been submitted, unless `at_once`; refuse what comes later, and end the process."""
        asyncio.run_coroutine_threadsafe(self._drain(at_once), self._loop).result()

    # starting and ending

    async def start(self) -> None:
        """Start the process and wait until the model is loaded. Raises RuntimeFault."""
        self._loading = self._loop.create_future()
        self._launch()
        try:
            await asyncio.wait_for(asyncio.shield(self._loading), self._start_deadline)
        except TimeoutError:
            self._end()
            raise RuntimeFault(
                f"model {self._name}: not loaded within {self._start_deadline:.0f} s"
            ) from None
        except RuntimeFault:
            self._end()
            raise
        self._tick()

    def _launch(self) -> None:
        self._began = self._clock.monotonic()
        self._process = ChildProcess(self._content, self._load, self._policy.threads)
        self._loop.add_reader(self._process.fileno(), self._readable)

    def _end(self) -> None:
        """Kill the process, if there is one, and forget its channel."""
        self._ready = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        process, self._process = self._process, None
        if process is not None:
            self._loop.remove_reader(process.fileno())
            self._loop.remove_writer(process.fileno())
            process.end()

    async def _drain(self, at_once: bool) -> None:
        self._stopped = True
        until = self._clock.monotonic() + (0.0 if at_once else self._policy.deadline)
        while (self._in_flight or len(self._backlog)) and self._clock.monotonic() < until:
            await asyncio.sleep(0.005)
        self._end()
        gone = WorkerStopped(f"model {self._name} has been replaced")
        lost = [request for batch in self._in_flight.take_all() for request in batch.requests]
        self._fail([*lost, *self._backlog.drop(lambda request: True)], gone)

    # the worker's answers

    def _readable(self) -> None:
        if self._process is None:
            return
        channel = self._process.channel
        try:
            for frame in channel.receive():
                self._answered(channel, frame)
        except (EOFError, KeyError, ValueError):
            # Nonsense from a worker is as good as its end.
            self._lost("crashed")
            return
        self._pump()

    def _answered(self, channel: Channel, frame: Frame) -> None:
        if not self._ready:
            self._answered_load(frame)
            return
        now = self._clock.monotonic_ns()
        batch = self._in_flight.answered(frame.slot, now)
        spent = now - (batch.started or batch.sent)
        self._mean_ns += (spent - self._mean_ns) * 0.1
        self._losses = recovery.answered(self._losses)
        if frame.kind in (Kind.FAULT, Kind.BAD_INPUT):
            why = bytes(frame.payload).decode(errors="replace")
            kind = BadInput if frame.kind is Kind.BAD_INPUT else RuntimeFault
            if len(batch.requests) > 1:
                # One bad request must not spoil the others it was joined with.
                self._backlog.put_back([batch])
                return
            self._fail(batch.requests, kind(f"model {self._name}: {why}"))
            return
        outputs = channel.tensors(frame, copy=True)
        if len(batch.requests) == 1:
            _give(batch.requests[0], outputs, batch.sent, spent, batch.rows)
            return
        parts = split(outputs, [request.rows for request in batch.requests])
        if parts is None:
            log.warning("model %s does not keep to rows: its requests are not joined any more", self._name)
            self._backlog.split_up(batch)
            return
        for request, part in zip(batch.requests, parts, strict=True):
            _give(request, part, batch.sent, spent, batch.rows)

    def _answered_load(self, frame: Frame) -> None:
        loading, self._loading = self._loading, None
        if frame.kind is Kind.FAULT:
            fault = RuntimeFault(f"model {self._name}: {bytes(frame.payload).decode(errors='replace')}")
            if loading is not None:
                loading.set_exception(fault)
            else:
                log.error("%s", fault)
                self._lost("could not load its model again")
            return
        loaded = msgspec.msgpack.decode(frame.payload, type=Loaded)
        self.provider, self.inputs, self.outputs = loaded.provider, loaded.inputs, loaded.outputs
        self._ready = True
        log.info(
            "model %s: loaded in %.2f s on %s",
            self._name,
            self._clock.monotonic() - self._began,
            self.provider,
        )
        if loading is not None:
            loading.set_result(None)

    # sending

    def _pump_now(self) -> None:
        self._pump_due = False
        self._pump()

    def _pump(self) -> None:
        process = self._process
        if process is None or not self._ready or self._recycling:
            return
        channel = process.channel
        ahead = 1 if self._mean_ns > _SEND_AHEAD_NS else 0
        depth = self._policy.concurrency + ahead
        backlog = self._backlog
        while len(backlog) and len(self._in_flight) < depth:
            if self._in_flight and (backlog.suspect or self._in_flight.suspects):
                return
            if self._waits_for_company():
                return
            now = self._clock.monotonic_ns()
            batch = backlog.take(now)
            slot = self._in_flight.send(batch, now)
            self._watch()
            try:
                channel.send_tensors(Kind.REQUEST, slot, join([request.inputs for request in batch.requests]))
            except OSError:
                self._lost("crashed")
                return
            if channel.pending:
                self._loop.add_writer(process.fileno(), self._writable)
            self._company += (len(batch.requests) - self._company) * 0.1
            # What gives way to others must not hold up the loop that answers them.
            awake = not self._load.options.niceness
            if awake and self._company < _ALONE and self._mean_ns < _POLL_NS:
                self._loop.call_soon(self._poll)

    def _poll(self) -> None:
        until = self._clock.monotonic_ns() + _POLL_NS
        while len(self._in_flight) == 1 and self._clock.monotonic_ns() < until:
            self._readable()

    def _waits_for_company(self) -> bool:
        """Whether the next batch should wait for more requests; it is then sent by a timer at the latest."""
        delay = self._policy.queue_delay_us * 1000
        oldest = self._backlog.oldest
        if not delay or oldest is None or self._backlog.max_batch == 1 or self._backlog.suspect:
            return False
        left = oldest + delay - self._clock.monotonic_ns()
        if left <= 0 or self._backlog.rows() >= self._backlog.max_batch:
            return False
        if self._delay is None:
            self._delay = self._loop.call_later(left / 1e9, self._delay_over)
        return True

    def _delay_over(self) -> None:
        self._delay = None
        self._pump()

    def _writable(self) -> None:
        process = self._process
        if process is None:
            return
        try:
            process.channel.flush()
        except OSError:
            self._lost("crashed")
            return
        if not process.channel.pending:
            self._loop.remove_writer(process.fileno())

    # deadlines, losses

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._policy.deadline, self._check_deadline)
        if self._memory_timer is None and self._policy.memory_bytes is not None:
            self._memory_timer = self._loop.call_later(ceiling.POLL, self._check_excess)

    def _check_excess(self) -> None:
        """While requests run: one of them may take far more than the ceiling before it ends."""
        self._memory_timer = None
        limit = self._policy.memory_bytes
        if limit is None or self._process is None or self._in_flight.oldest_start() is None:
            return
        why = ceiling.excess(limit, self.resident_bytes())
        if why:
            self._lost(why, fault=RuntimeFault(f"model {self._name}: its worker {why}"))
        else:
            self._memory_timer = self._loop.call_later(ceiling.POLL, self._check_excess)

    def _check_deadline(self) -> None:
        self._timer = None
        oldest = self._in_flight.oldest_start()
        if oldest is None:
            return
        left = self._policy.deadline - (self._clock.monotonic_ns() - oldest) / 1e9
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_deadline)
            return
        why = f"did not answer within {self._policy.deadline:g} s"
        self._lost(why, fault=DeadlineExceeded(f"model {self._name} {why}"))

    def _lost(self, why: str, *, fault: RuntimeFault | None = None) -> None:
        """Go on without the process. `fault` is for the requests that are to blame, where that is known."""
        death = self._process.death() if self._process is not None and fault is None else ""
        self._end()
        why = f"{why} ({death})" if death else why
        loading, self._loading = self._loading, None
        if loading is not None:
            loading.set_exception(RuntimeFault(f"model {self._name}: its worker {why} while loading it"))
            return
        if self._stopped and not self._in_flight and not len(self._backlog):
            return
        lost = self._in_flight.take_all()
        if fault is not None:
            started = [batch for batch in lost if batch.started is not None]
            # Each request has its own time, but of several that ran only one may have taken the memory.
            known = isinstance(fault, DeadlineExceeded) or len(started) == 1
            guilty = [batch for batch in started if known and len(batch.requests) == 1]
            self._fail([batch.requests[0] for batch in guilty], fault)
            lost = [batch for batch in lost if batch not in guilty]
        failed = self._backlog.put_back(lost)
        self._losses, delay, looping = recovery.lost(self._losses, self._clock.monotonic())
        log.warning("model %s: its worker %s, starting again in %.1f s", self._name, why, delay)
        self._fail(
            failed, RuntimeFault(f"model {self._name}: two workers were lost over one request ({why})")
        )
        self.loss = why
        self.restarts += 1
        self._loop.call_later(delay, self._start_again)
        if looping:
            self._events.on_crash_loop(self._name, len(self._losses.times), recovery.LOOP_SECONDS)

    def _start_again(self) -> None:
        if self._process is None and not (self._stopped and not len(self._backlog)):
            self._launch()

    def _fail(self, requests: list[Pending], error: EdgewardError) -> None:
        now = self._clock.monotonic_ns()
        for request in requests:
            _give(request, error, now, 0, 0)

    # memory, and requests that wait too long

    def _tick(self) -> None:
        if self._stopped:
            return
        self._losses, recovered = recovery.quiet(self._losses, self._clock.monotonic())
        if recovered:
            self._events.on_recovered(self._name)
        if (
            not self._ready
            and self._clock.monotonic() - self._began > self._start_deadline
            and self._process is not None
        ):
            self._lost(f"was not ready within {self._start_deadline:.0f} s")
        limit = self._clock.monotonic_ns() - int(self._policy.deadline * 1e9)
        if not self._ready:
            late = self._backlog.drop(lambda request: request.arrived < limit)
            self._fail(late, Overloaded(f"model {self._name} is being started again", 1.0))
        self._check_memory()
        self._loop.call_later(_TICK, self._tick)

    def _check_memory(self) -> None:
        ceiling, used = self._policy.memory_bytes, self.resident_bytes()
        if ceiling is None or used <= ceiling:
            if self._recycling:
                # It has given back what a request took; what came meanwhile waits for nothing else.
                self._recycling = False
                self._pump()
            return
        if self._in_flight:
            self._recycling = True  # what runs may end; nothing new begins
            return
        self._recycling = False
        log.warning(
            "model %s: its worker holds %d MiB, above its ceiling of %d MiB: starting again",
            self._name, used >> 20, ceiling >> 20,
        )  # fmt: skip
        self._lost("outgrew its memory ceiling")

    def resident_bytes(self) -> int:
        """The worker's resident memory; 0 while there is none."""
        return self._process.resident_bytes() if self._process is not None else 0
