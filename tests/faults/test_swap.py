"""Models that are swapped under load: every request is answered, by the old model or by the new one.

Real clients over REST and gRPC, real workers.
"""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from agent.runtime.engine import Engine
from agent.serving.inference import Models
from agent.serving.server import Server
from agent.serving.settings import Settings
from agent.slots.catalog import SlotCatalog
from agent.slots.opened import Setup
from agent.slots.slots import Slots
from agent.state import State
from edgeward.clock import SystemClock
from edgeward.wire.desired import ModelRef, SlotTarget
from edgeward.wire.slots import GuardPolicy, SlotPolicy
from tests.agent.conftest import Releaser, doubler
from tests.faults.bad_models import ask, bad, let_them

#: One request at a time, so that a queue takes long; nobody is refused for its length.
ONE = {"max_batch": 1, "queue": 4096}


class Plant:
    """Slots and the local server in front of them, as the daemon puts them together."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.releaser = Releaser()
        self.engine = engine
        self.state = State(folder / "state.db")
        setup = Setup(machine="here", compiled=folder / "compiled", seconds=0.05)
        self.slots = Slots(
            self.state, self.releaser, engine, {"onnx": "onnxruntime 1"}, SystemClock(),  # type: ignore[arg-type]
            lambda: self.catalog.refresh(), setup,
        )  # fmt: skip
        self.catalog = SlotCatalog(self.slots)
        self.slots.start()
        self.catalog.settle()
        self.server = Server(self.catalog, Settings(port=0, grpc_port=0), SystemClock())
        engine.call(self.server.start())

    def stop(self) -> None:
        self.engine.call(self.server.stop())
        self.slots.stop()
        self.state.close()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)

    def wish(self, ref: ModelRef, **policy: Any) -> None:
        self.slots.wish({"default": SlotTarget(ref, policy=SlotPolicy(**policy))})


@pytest.fixture
def plant(tmp_path: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    let_them(monkeypatch, tmp_path)
    made = Plant(tmp_path, engine)
    yield made
    made.stop()


def running(plant: Plant, ref: ModelRef, until: Any) -> Any:
    return until(lambda: (model := plant.slots.active("default")) is not None and model.ref == ref and model)


class Load:
    """Clients that ask without a pause until they are told to stop."""

    def __init__(self, plant: Plant, rest: int, grpc: int) -> None:
        self._plant = plant
        self._stop = threading.Event()
        self.answers: Counter[str] = Counter()
        self.versions: set[str] = set()
        self._lock = threading.Lock()
        work: list[Callable[[], None]] = [self._rest] * rest + [self._grpc] * grpc
        self._threads = [threading.Thread(target=one) for one in work]
        for thread in self._threads:
            thread.start()

    def _note(self, answer: str, version: str = "") -> None:
        with self._lock:
            self.answers[answer] += 1
            self.versions.add(version)

    def _rest(self) -> None:
        connection = self._plant.connect()
        while not self._stop.is_set():
            status, got = ask(connection, 5.0)
            right = status == 200 and got["outputs"][0]["data"] == [10.0, 2.0, 4.0, 6.0]
            self._note("right" if right else f"{status} {got}", got.get("model_version", ""))
        connection.close()

    def _grpc(self) -> None:
        with triton.InferenceServerClient(f"127.0.0.1:{self._plant.server.grpc_port}") as client:
            row = triton.InferInput("x", [1, 4], "FP32")
            row.set_data_from_numpy(np.array([[5, 1, 2, 3]], np.float32))
            while not self._stop.is_set():
                try:
                    got = client.infer("m", [row])
                except InferenceServerException as error:
                    self._note(str(error))
                    continue
                right = got.as_numpy("y").tolist() == [[10.0, 2.0, 4.0, 6.0]]
                self._note("right" if right else "wrong", got.get_response().model_version)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_many_swaps_under_load_cost_nobody_an_answer(plant: Plant, until: Any) -> None:
    """From process to process, into the agent's own and back, by wishes and by a roll-back."""
    refs = [plant.releaser.release(number, ("only", doubler())) for number in range(1, 13)]
    plant.wish(refs[0])
    running(plant, refs[0], until)
    load = Load(plant, rest=4, grpc=2)
    try:
        for number, ref in enumerate(refs[1:], 1):
            before = sum(load.answers.values())
            plant.wish(
                ref, isolation="in-process" if number % 3 == 2 else "process", guard=GuardPolicy(minimum=10)
            )
            model = running(plant, ref, until)
            until(lambda before=before: sum(load.answers.values()) > before + 50)
        # The server counts on, too: its answers must not outweigh these.
        model.health.failed += 10 * (model.health.answered + 100)
        running(plant, refs[-2], until)
        before = sum(load.answers.values())
        until(lambda: sum(load.answers.values()) > before + 50)
    finally:
        load.stop()
    assert set(load.answers) == {"right"} and len(load.versions) == 12
    assert sum(load.answers.values()) > 12 * 50


@pytest.mark.parametrize("defended", [True, False])
def test_a_queue_that_the_old_model_cannot_empty_in_time_goes_over_to_the_new_one(
    plant: Plant, until: Any, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 50 ms each, 200 wait, and after its deadline of 2 s the old worker is ended."""
    if not defended:
        monkeypatch.setattr(Models, "successor", lambda *_: None)
    old = plant.releaser.release(1, ("only", bad("slow", "golden")))
    new = plant.releaser.release(2, ("only", doubler()))
    plant.wish(old, deadline=2.0, **ONE)
    model = running(plant, old, until)
    count = 200
    answers: list[tuple[int, Any]] = []

    def one() -> None:
        connection = plant.connect()
        answers.append(ask(connection, 5.0))
        connection.close()

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    until(lambda: len(model.runner._backlog) > 100)
    plant.wish(new, deadline=30.0, **ONE)
    for thread in threads:
        thread.join()
    statuses = Counter(status for status, _ in answers)
    if defended:
        versions = Counter(answer["model_version"] for _, answer in answers)
        assert statuses == {200: count} and versions["1"] > 0 and versions["2"] > 0
        assert all(answer["outputs"][0]["data"][0] == 10.0 for _, answer in answers)
    else:
        assert statuses[503] > 0


def test_who_asks_for_a_version_is_not_answered_by_another(plant: Plant, until: Any) -> None:
    old = plant.releaser.release(1, ("only", bad("slow", "golden")))
    plant.wish(old, deadline=1.0, **ONE)
    model = running(plant, old, until)
    answers: list[tuple[int, Any]] = []

    def one() -> None:
        connection = plant.connect()
        answers.append(ask(connection, 5.0, "/v2/models/m/versions/1/infer"))
        connection.close()

    threads = [threading.Thread(target=one) for _ in range(100)]
    for thread in threads:
        thread.start()
    until(lambda: len(model.runner._backlog) > 60)
    plant.wish(plant.releaser.release(2, ("only", doubler())), **ONE)
    for thread in threads:
        thread.join()
    assert {answer.get("model_version", "1") for _, answer in answers} == {"1"}
    assert {status for status, _ in answers} <= {200, 404, 503}


def test_servers_let_go_at_once_of_a_model_that_fell_under_a_newer_wish(plant: Plant, until: Any) -> None:
    """The slot's state is about the newer wish then: the change must be told all the same."""
    refs = [plant.releaser.release(number, ("only", doubler())) for number in (1, 2, 3)]
    for ref in refs[:2]:
        plant.wish(ref, guard=GuardPolicy(minimum=10))
        model = running(plant, ref, until)
    plant.releaser.offline = True
    plant.wish(refs[2], guard=GuardPolicy(minimum=10))
    until(lambda: plant.slots.report()["default"].reason == "Unavailable")
    model.health.failed += 50
    running(plant, refs[0], until)
    until(lambda: model.runner.pid is None)
    connection = plant.connect()
    status, got = ask(connection, 5.0)
    connection.close()
    assert (status, got.get("model_version")) == (200, "1")
