"""Real workers: what a crash, a hang, a leak and a flood cost, and whom."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from agent.runtime.engine import Engine
from agent.runtime.port import LoadOptions, Overloaded, Timing
from agent.runtime.tensors import to_tensors
from agent.runtime.worker import DeadlineExceeded, Worker, WorkerStopped
from edgeward.errors import EdgewardError, RuntimeFault
from edgeward.wire.slots import SlotPolicy
from tests.agent.runtime.graphs import onnx_spinner, spin


def finish(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any] | None = None
) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants or [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def doubler(shape: list[Any] | None = None) -> bytes:
    """`y = x + x`"""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape or [None, None]) for name in "xy"]
    return finish([helper.make_node("Add", ["x", "x"], ["y"])], [info[0]], [info[1]])


def mean_of_rows() -> bytes:
    """One output row however many go in: not to be joined with others."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[0], keepdims=1)
    return finish(
        [node],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])],
    )


def reader() -> bytes:
    """`y = n * mean(x)`, by reading all of `x` n times and keeping none of it."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
            helper.make_node("Add", ["sum", "mean"], ["more"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.FLOAT, []),
        ],
    )
    return finish(
        [helper.make_node("Loop", ["n", "yes", "zero"], ["y"], body=body)],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 1]),
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [
            helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        ],
    )


FOREVER = 1 << 50


@pytest.fixture
def events() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def engine(events: list[tuple[Any, ...]]) -> Iterator[Engine]:
    made = Engine(
        on_crash_loop=lambda *what: events.append(what), on_recovered=lambda name: events.append((name,))
    )
    made.start()
    yield made
    made.stop()


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not reached"
        time.sleep(0.005)
    return found


def opened(engine: Engine, content: bytes, policy: SlotPolicy | None = None, **more: Any) -> Worker:
    runner = engine.open("onnx", content, "m:1", policy, **more)
    assert isinstance(runner, Worker)
    return runner


def on_loop(engine: Engine, work: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return work()

    return engine.call(run())


@pytest.mark.parametrize("isolation", ["process", "in-process"])
def test_small_and_large_tensors_cross_unchanged(engine: Engine, isolation: Any) -> None:
    runner = engine.open("onnx", doubler(), "m:1", SlotPolicy(isolation=isolation))
    for size in (0, 1, 1000, 300_000, 5, 2_000_000, 300_000):
        x = np.random.default_rng(size).normal(size=(1, size)).astype(np.float32)
        assert np.array_equal(runner.infer({"x": x})["y"], x + x)
    strided = np.arange(40, dtype=np.float32).reshape(5, 8)[::2, 1::3]
    assert np.array_equal(runner.infer({"x": strided})["y"], strided * 2)
    assert runner.provider == "CPUExecutionProvider"
    assert [spec.name for spec in runner.inputs + runner.outputs] == ["x", "y"]


def test_a_refused_request_leaves_the_worker_as_it_is(engine: Engine) -> None:
    worker = opened(engine, doubler([None, 3]))
    pid = worker.pid
    with pytest.raises(RuntimeFault, match="x"):
        worker.infer({"x": np.zeros((1, 4), np.float32)})
    with pytest.raises(RuntimeFault, match="x"):
        worker.infer({"x": np.zeros((1, 3), np.float64)})
    assert worker.infer({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[2, 2, 2]]
    assert (worker.pid, worker.restarts) == (pid, 0)


def test_what_is_no_model_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(RuntimeFault):
        engine.open("onnx", b"\x08\x08rubbish", "m:1")


class Load:
    """Callers of one model in threads; every answer is checked."""

    def __init__(self, worker: Worker, threads: int, infer: Callable[[Worker], None]) -> None:
        self.answered, self.failures = 0, [""] * 0
        self._stop = threading.Event()
        self._worker, self._infer = worker, infer
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._infer(self._worker)
                self.answered += 1
            except (EdgewardError, AssertionError) as error:
                self.failures.append(repr(error))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def double_something(worker: Worker) -> None:
    x = np.random.default_rng().normal(size=(2, 3)).astype(np.float32)
    assert np.array_equal(worker.infer({"x": x})["y"], x + x)


def test_a_segmentation_fault_under_load_costs_no_request_of_any_model(engine: Engine) -> None:
    victim = opened(engine, doubler(), batchable=True)
    others = [opened(engine, doubler(), batchable=joins) for joins in (True, False)]
    loads = [Load(worker, 3, double_something) for worker in (victim, *others)]
    for crash in range(4):
        pid = until(lambda: victim.pid)
        os.kill(pid, signal.SIGSEGV)
        until(lambda crash=crash, pid=pid: victim.restarts > crash and victim.pid not in (None, pid))
        before = [load.answered for load in loads]
        until(lambda old=before: all(load.answered > n + 20 for load, n in zip(loads, old, strict=True)))
    for load in loads:
        load.stop()
    assert [load.failures for load in loads] == [[], [], []]
    assert victim.restarts == 4 and [worker.restarts for worker in others] == [0, 0]


def test_a_request_that_always_crashes_fails_alone_after_two_workers(engine: Engine) -> None:
    worker = opened(engine, onnx_spinner(), SlotPolicy(deadline=60), batchable=True)
    innocent = Load(worker, 2, lambda it: it.infer(spin(3)) and None)
    stop = threading.Event()

    def killer() -> None:
        """The worker that spends CPU time is at the poisonous request: let it crash there."""
        while not stop.is_set():
            pid = worker.pid
            try:
                if pid and psutil.Process(pid).cpu_times().user > 2.0:
                    os.kill(pid, signal.SIGSEGV)
            except (psutil.NoSuchProcess, ProcessLookupError):
                pass
            stop.wait(0.01)

    thread = threading.Thread(target=killer)
    thread.start()
    with pytest.raises(RuntimeFault, match="two workers were lost over one request"):
        worker.infer(spin(FOREVER))
    stop.set()
    thread.join()
    innocent.stop()
    assert innocent.failures == []


@pytest.mark.parametrize("niceness", [0, 19])
def test_the_loop_waits_awake_for_nobody_who_gives_way(
    engine: Engine, niceness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    polled: list[int] = []
    monkeypatch.setattr(Worker, "_poll", lambda self: polled.append(1))
    worker = opened(engine, doubler(), options=LoadOptions(niceness=niceness))
    monkeypatch.setattr(worker, "_mean_ns", 0.0)
    for _ in range(5):
        double_something(worker)
    assert bool(polled) == (niceness == 0)
    assert os.getpriority(os.PRIO_PROCESS, worker.pid or 0) == os.nice(0) + niceness


def test_a_hang_costs_the_request_and_the_worker_only(engine: Engine) -> None:
    worker = opened(engine, onnx_spinner(), SlotPolicy(deadline=3.0))
    other = opened(engine, doubler())
    load = Load(other, 1, double_something)
    pid = worker.pid
    with pytest.raises(DeadlineExceeded, match="within 3 s"):
        worker.infer(spin(FOREVER))
    assert float(worker.infer(spin(3))["y"][0, 0]) == 3.0
    load.stop()
    assert worker.pid != pid and worker.restarts == 1 and load.failures == [] and other.restarts == 0


def test_a_worker_above_its_memory_ceiling_is_replaced_between_requests(engine: Engine) -> None:
    small = opened(engine, doubler())
    used = until(small.resident_bytes)
    # onnxruntime's arena keeps what one large request took: that is the leak.
    limit = used + (256 << 20)
    worker = opened(engine, doubler(), SlotPolicy(memory_bytes=limit))
    load = Load(worker, 1, double_something)
    pid = worker.pid
    large = np.ones((1, 25_000_000), np.float32)
    assert worker.infer({"x": large})["y"][0, -1] == 2.0
    until(lambda: worker.restarts >= 1 and worker.pid not in (None, pid))
    load.stop()
    assert load.failures == []
    until(lambda: 0 < worker.resident_bytes() < limit)


def test_a_worker_that_gives_back_what_a_request_took_goes_on(engine: Engine) -> None:
    """Above its ceiling during a request, below it after: what came meanwhile must not wait for ever."""
    worker = opened(engine, doubler(), SlotPolicy(memory_bytes=4 << 30))
    answers: list[Any] = []
    answered = threading.Event()

    def done(result: Any, timing: Timing) -> None:
        answers.append(result)
        answered.set()

    async def between_two_looks() -> None:
        worker._recycling = True
        worker.submit(to_tensors({"x": np.ones((1, 2), np.float32)}), done)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(worker._backlog) == 1
        worker._check_memory()

    engine.call(between_two_looks())
    assert answered.wait(60) and not isinstance(answers[0], EdgewardError)
    assert worker.restarts == 0


def test_a_request_that_would_outgrow_the_ceiling_is_refused_and_the_worker_stays(engine: Engine) -> None:
    used = until(opened(engine, doubler()).resident_bytes)
    limit = used + (64 << 20)
    worker = opened(engine, doubler(), SlotPolicy(memory_bytes=limit))
    pid = worker.pid
    with pytest.raises(RuntimeFault, match=rf"1\.5 times the worker's ceiling of {limit >> 20} MiB leaves: "):
        worker.infer({"x": np.ones((1, 75_000_000), np.float32)})
    double_something(worker)
    assert worker.pid == pid and worker.restarts == 0


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_request_that_outgrows_the_ceiling_is_ended_and_others_are_tried_again(
    engine: Engine, concurrency: int
) -> None:
    """Shared memory, which no limit of the process counts, as an accelerator's driver is not counted."""
    used = until(opened(engine, reader()).resident_bytes)
    policy = SlotPolicy(memory_bytes=used + (64 << 20), concurrency=concurrency, deadline=60.0)
    worker = opened(engine, reader(), policy)
    pid = worker.pid
    answers: dict[str, Any] = {}

    def submit() -> None:
        for name, rows, n in (("large", 50_000_000, FOREVER), ("small", 1, 300_000)):
            inputs = {"x": np.ones((rows, 1), np.float32), "n": np.array(n, np.int64)}
            worker.submit(
                to_tensors(inputs), lambda result, timing, name=name: answers.update({name: result})
            )

    on_loop(engine, submit)
    until(lambda: len(answers) == 2)
    assert isinstance(answers["large"], RuntimeFault)
    assert f"more than 1.5 times its memory ceiling of {policy.memory_bytes >> 20} MiB" in str(
        answers["large"]
    )
    assert np.frombuffer(answers["small"][0].data, np.float32).tolist() == [300_000.0]
    # Of two that ran together it shows only when each runs alone.
    assert worker.restarts == concurrency and until(lambda: worker.pid) != pid


def test_the_kernel_would_rather_take_the_worker_than_the_agent(engine: Engine) -> None:
    worker = opened(engine, doubler())
    scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (os.getpid(), worker.pid)]
    assert scores[1] == min(scores[0] + 500, 1000)


def test_a_crash_loop_is_told_once_and_requests_do_not_wait_for_ever(
    engine: Engine, events: list[tuple[Any, ...]]
) -> None:
    worker = opened(engine, doubler(), SlotPolicy(deadline=1.0))
    for crash in range(5):
        pid = until(lambda: worker.pid)
        os.kill(pid, signal.SIGSEGV)
        until(lambda crash=crash: worker.restarts > crash)
    assert events == [("m:1", 5, 60.0)]
    assert worker.pid is None, "it waits before the next start"
    with pytest.raises(Overloaded, match="started again"):
        worker.infer({"x": np.ones((1, 1), np.float32)})


def test_a_full_queue_refuses_and_says_when_to_come_back(engine: Engine) -> None:
    worker = opened(engine, onnx_spinner(), SlotPolicy(queue=2, deadline=60.0))
    answers: list[Any] = []

    def submit(n: int) -> None:
        worker.submit(to_tensors(spin(n)), lambda result, timing: answers.append(result))

    def flood() -> float:
        submit(300_000)  # runs
        submit(1)
        submit(1)
        with pytest.raises(Overloaded) as refusal:
            submit(1)
        return refusal.value.retry_after

    assert on_loop(engine, flood) > 0
    until(lambda: len(answers) == 3)
    assert not any(isinstance(answer, Exception) for answer in answers)


def test_requests_that_wait_together_run_as_one_batch(engine: Engine) -> None:
    worker = opened(engine, doubler(), SlotPolicy(max_batch=8), batchable=True)
    got: dict[int, tuple[Any, Timing]] = {}

    def submit() -> None:
        for number in range(20):
            inputs = to_tensors({"x": np.full((1, 2), number, np.float32)})
            worker.submit(
                inputs, lambda result, timing, number=number: got.update({number: (result, timing)})
            )

    on_loop(engine, submit)
    until(lambda: len(got) == 20)
    for number, (result, _) in got.items():
        assert np.frombuffer(result[0].data, np.float32).tolist() == [2 * number] * 2
    assert max(timing.batch for _, timing in got.values()) == 8


def test_a_model_that_mixes_rows_is_found_out_and_not_joined_again(engine: Engine) -> None:
    worker = opened(engine, mean_of_rows(), batchable=True)
    got: dict[int, Any] = {}

    def submit() -> None:
        for number in range(6):
            inputs = to_tensors({"x": np.full((1, 2), number, np.float32)})
            worker.submit(inputs, lambda result, timing, number=number: got.update({number: result}))

    on_loop(engine, submit)
    until(lambda: len(got) == 6)
    assert [np.frombuffer(got[n][0].data, np.float32)[0] for n in range(6)] == [0, 1, 2, 3, 4, 5]


def test_one_bad_request_in_a_batch_fails_alone(engine: Engine) -> None:
    table = helper.make_tensor("table", TensorProto.FLOAT, [4], [0.0, 10.0, 20.0, 30.0])
    content = finish(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [table],
    )
    worker = opened(engine, content, batchable=True)
    got: dict[int, Any] = {}

    def submit() -> None:
        for number in range(6):
            inputs = to_tensors({"x": np.array([number], np.int64)})
            worker.submit(inputs, lambda result, timing, number=number: got.update({number: result}))

    on_loop(engine, submit)
    until(lambda: len(got) == 6)
    assert [isinstance(got[n], RuntimeFault) for n in range(6)] == [False] * 4 + [True] * 2
    assert [np.frombuffer(got[n][0].data, np.float32)[0] for n in range(4)] == [0, 10, 20, 30]
    assert worker.restarts == 0


def test_stopping_at_once_waits_for_nothing(engine: Engine) -> None:
    worker = opened(engine, onnx_spinner(), SlotPolicy(deadline=600.0))
    answers: list[Any] = []
    on_loop(
        engine,
        lambda: worker.submit(to_tensors(spin(FOREVER)), lambda result, timing: answers.append(result)),
    )
    pid, began = worker.pid, time.monotonic()
    worker.stop(at_once=True)
    assert time.monotonic() - began < 10.0 and isinstance(answers[0], WorkerStopped)
    assert pid is not None and not psutil.pid_exists(pid)


def test_who_may_take_long_for_a_request_may_for_loading(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some accelerators compile then."""
    monkeypatch.setattr("agent.runtime.worker.START_DEADLINE", 0.01)
    with pytest.raises(RuntimeFault, match="not loaded within 0 s"):
        opened(engine, doubler(), SlotPolicy(deadline=0.01))
    worker = opened(engine, doubler(), SlotPolicy(deadline=60.0))
    double_something(worker)
    assert worker.restarts == 0


def test_stopping_answers_what_waits_and_refuses_what_comes(engine: Engine) -> None:
    worker = opened(engine, onnx_spinner(), SlotPolicy(deadline=60.0))
    answers: list[Any] = []

    def submit() -> None:
        for _ in range(5):
            worker.submit(to_tensors(spin(20_000)), lambda result, timing: answers.append(result))

    on_loop(engine, submit)
    pid = worker.pid
    worker.stop()
    assert len(answers) == 5 and not any(isinstance(answer, Exception) for answer in answers)
    assert pid is not None and not psutil.pid_exists(pid)
    with pytest.raises(WorkerStopped):
        worker.infer(spin(1))


@pytest.mark.parametrize("concurrency", [1, 3])
def test_several_requests_run_at_once_when_the_policy_says_so(engine: Engine, concurrency: int) -> None:
    worker = opened(engine, onnx_spinner(), SlotPolicy(concurrency=concurrency, deadline=2.0))
    answers: list[Any] = []

    def submit() -> None:
        worker.submit(to_tensors(spin(FOREVER)), lambda result, timing: None)
        worker.submit(to_tensors(spin(1)), lambda result, timing: answers.append(result))

    on_loop(engine, submit)
    if concurrency > 1:
        until(lambda: answers)
    else:
        on_loop(engine, lambda: None)
        assert answers == []


def test_workers_do_not_outlive_an_agent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_spinner())
    script = textwrap.dedent(
        """
        import sys, threading, numpy as np
        from agent.runtime.engine import Engine
        engine = Engine(); engine.start()
        worker = engine.open("onnx", open(sys.argv[1], "rb").read(), "m")
        threading.Thread(target=worker.infer, args=({"x": np.zeros((1, 1), np.float32), "n": np.array(1 << 50)},)).start()
        print(worker.pid, flush=True)
        """
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "model.onnx")], stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout is not None
    pid = int(agent.stdout.readline())
    child = psutil.Process(pid)
    until(lambda: child.cpu_times().user > 1.0)  # busy in native code
    agent.kill()
    agent.wait()
    agent.stdout.close()
    until(lambda: not psutil.pid_exists(pid) or child.status() == psutil.STATUS_ZOMBIE)
