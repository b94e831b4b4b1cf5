"""A model in the agent's process: what it may hold up, and what its callers are told meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from agent.runtime.engine import Engine
from agent.runtime.inprocess import InProcess
from agent.runtime.port import Overloaded
from agent.runtime.tensors import to_tensors
from agent.runtime.worker import DeadlineExceeded, WorkerStopped
from edgeward.wire.slots import SlotPolicy
from tests.agent.runtime import graphs

LONG = 2.0


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    made.start()
    yield made
    made.stop()


def opened(engine: Engine, content: bytes, **policy: Any) -> InProcess:
    runner = engine.open("onnx", content, "m:1", SlotPolicy(isolation="in-process", **policy))
    assert isinstance(runner, InProcess)
    return runner


def on_loop(engine: Engine, work: Any) -> Any:
    async def run() -> Any:
        return work()

    return engine.call(run())


@pytest.fixture(scope="module")
def long_call() -> int:
    """So many additions take about LONG seconds."""
    engine = Engine()
    engine.start()
    runner = opened(engine, graphs.onnx_spinner())
    tries = 1000
    while True:
        began = time.monotonic()
        runner.infer(graphs.spin(tries))
        spent = time.monotonic() - began
        if spent > 0.1:
            engine.stop()
            return int(tries * LONG / spent)
        tries *= 4


def test_a_slow_call_holds_up_no_other_model(engine: Engine, long_call: int) -> None:
    slow = opened(engine, graphs.onnx_spinner(), deadline=60.0)
    same = graphs.onnx_same(TensorProto.FLOAT)
    others = [opened(engine, same), engine.open("onnx", same, "m:2")]
    answers: list[Any] = []
    on_loop(engine, lambda: slow.submit(to_tensors(graphs.spin(long_call)), lambda *got: answers.append(got)))
    x = np.ones((1, 2), np.float32)
    for other in others:
        assert other.infer({"x": x})["y"].tolist() == x.tolist()
        answered = threading.Event()
        on_loop(
            engine,
            lambda other=other, done=answered: other.submit(to_tensors({"x": x}), lambda *_: done.set()),
        )
        answered.wait()
    assert answers == []
    slow.stop()
    on_loop(engine, lambda: None)
    ((result, timing),) = answers
    assert np.frombuffer(result[0].data, np.float32)[0] == long_call and timing.infer_ns > 1e8
    with pytest.raises(WorkerStopped):
        slow.infer(graphs.spin(1))


@pytest.mark.parametrize("way", ["infer", "submit"])
def test_a_call_beyond_its_deadline_is_given_up_and_others_refused_until_it_returns(
    engine: Engine, long_call: int, way: str
) -> None:
    runner = opened(engine, graphs.onnx_spinner(), deadline=0.2)
    answers: list[Any] = []
    answered = threading.Semaphore(0)

    def done(result: Any, timing: Any) -> None:
        answers.append(result)
        answered.release()

    if way == "infer":
        with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
            runner.infer(graphs.spin(long_call))
    else:
        on_loop(engine, lambda: [runner.submit(to_tensors(graphs.spin(n)), done) for n in (long_call, 1)])
        answered.acquire()
        answered.acquire()
        assert [type(answer) for answer in answers] == [DeadlineExceeded, Overloaded]
    with pytest.raises(Overloaded, match="beyond its deadline") as refusal:
        runner.infer(graphs.spin(1))
    assert refusal.value.retry_after > 0

    def answers_again() -> bool:
        try:
            return float(runner.infer(graphs.spin(3))["y"][0, 0]) == 3.0
        except Overloaded:
            return False

    while not answers_again():
        time.sleep(0.01)
    assert len(answers) == (0 if way == "infer" else 2), "the late answer is nobody's any more"


def test_a_full_queue_refuses(engine: Engine, long_call: int) -> None:
    runner = opened(engine, graphs.onnx_spinner(), deadline=60.0, queue=2)
    callers = [threading.Thread(target=runner.infer, args=(graphs.spin(n),)) for n in (long_call, 1, 1)]
    callers[0].start()
    while runner._running is None:
        time.sleep(0.001)
    for caller in callers[1:]:
        caller.start()
    while len(runner._waiting) < 2:
        time.sleep(0.001)
    with pytest.raises(Overloaded, match="2 requests wait already") as refusal:
        runner.infer(graphs.spin(1))
    assert refusal.value.retry_after > 0
    with pytest.raises(Overloaded):
        on_loop(engine, lambda: runner.submit(to_tensors(graphs.spin(1)), lambda *got: None))
    for caller in callers:
        caller.join()
