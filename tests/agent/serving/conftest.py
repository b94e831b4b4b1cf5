"""A real server on an event loop in a thread, over real ONNX models run inline and over runners that answer
as a test wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from agent.runtime.port import Done, Tensor, Timing
from agent.runtime.tensors import to_arrays, to_tensors
from agent.serving.catalog import Served
from agent.serving.messages import Handler
from agent.serving.server import Server
from agent.serving.settings import Settings
from edgeward.clock import Clock, ManualClock
from edgeward.errors import EdgewardError
from edgeward.wire.package import TensorSpec

Answer = list[Tensor] | EdgewardError
Work = Callable[[list[Tensor]], Answer]


class TestRunner:
    """A Runner that answers with what `work` makes of the inputs, a moment later on the loop."""

    __test__ = False
    provider = "CPUExecutionProvider"
    restarts = 0
    loss = ""

    def __init__(self, work: Work) -> None:
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self.seen: list[list[Tensor]] = []
        self._work = work

    def infer(self, inputs: Any) -> Any:
        raise NotImplementedError

    def submit(self, inputs: list[Tensor], done: Done) -> None:
        self.seen.append(inputs)
        result = self._work(inputs)
        timing = Timing(1_000, 2_000, 1 if isinstance(result, list) else 0)
        asyncio.get_running_loop().call_soon(done, result, timing)

    def stop(self) -> None:
        return


class Held(TestRunner):
    """Answers when `release` is called, in the order of its `order`."""

    def __init__(self) -> None:
        super().__init__(lambda inputs: inputs)
        self.waiting: list[tuple[list[Tensor], Done]] = []
        self.arrived = threading.Semaphore(0)

    def submit(self, inputs: list[Tensor], done: Done) -> None:
        self.waiting.append((inputs, done))
        self.arrived.release()

    def release(self, index: int) -> None:
        inputs, done = self.waiting[index]
        done([Tensor("out", item.dtype, item.shape, item.data) for item in inputs[:1]], Timing(0, 1, 1))


class Models:
    """A Catalog a test can fill."""

    def __init__(self) -> None:
        self.served: dict[str, Served] = {}
        self.settled = True

    def find(self, name: str, version: str = "") -> Served | None:
        served = self.served.get(name)
        return served if served is not None and version in ("", served.version) else None

    def all(self) -> list[Served]:
        return list(self.served.values())

    def add(
        self,
        name: str,
        work: Work | TestRunner | None,
        inputs: list[TensorSpec],
        outputs: list[TensorSpec],
        **more: Any,
    ) -> Served:
        runner = work if isinstance(work, TestRunner) or work is None else TestRunner(work)
        served = Served(name, "3", "onnx", "sha256:" + "0" * 64, inputs, outputs, runner, **more)
        self.served[name] = served
        return served

    def echo(
        self, name: str, dtype: str, shape: list[int], *, runner: TestRunner | None = None, **more: Any
    ) -> Served:
        """One input `in`, given back as `out`."""

        def work(inputs: list[Tensor]) -> Answer:
            return [Tensor("out", item.dtype, item.shape, item.data) for item in inputs]

        return self.add(
            name, runner or work, [TensorSpec("in", dtype, shape)], [TensorSpec("out", dtype, shape)], **more
        )

    def onnx(self, name: str, model: bytes, **more: Any) -> Served:
        """A real model: text arrives as str, as onnxruntime wants it."""
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        types = {"float": "float32", "double": "float64", "string": "bytes"}

        def spec(item: Any) -> TensorSpec:
            kind = item.type.removeprefix("tensor(").removesuffix(")")
            shape = [size if isinstance(size, int) else -1 for size in item.shape]
            return TensorSpec(item.name, types.get(kind, kind), shape)

        def work(inputs: list[Tensor]) -> Answer:
            arrays = {
                key: np.array([item.decode() for item in array.flat], object).reshape(array.shape)
                if array.dtype == object
                else array
                for key, array in to_arrays(inputs).items()
            }
            names = [item.name for item in session.get_outputs()]
            return to_tensors(dict(zip(names, session.run(names, arrays), strict=True)))

        return self.add(
            name,
            work,
            [spec(item) for item in session.get_inputs()],
            [spec(item) for item in session.get_outputs()],
            **more,
        )

    def change(self, name: str, **values: Any) -> None:
        self.served[name] = replace(self.served[name], **values)


class Running:
    """A started Server and the loop it runs on."""

    def __init__(self, server: Server, call: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self.server = server
        self.call = call

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def on_loop(self, work: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return work()

        return self.call(run())


@pytest.fixture(scope="session")
def call() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run a coroutine on the engine's kind of loop and wait for it."""
    import uvloop

    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="serving-tests", daemon=True)
    thread.start()
    yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def serve(models: Models, clock: Clock, call: Any) -> Iterator[Callable[..., Running]]:
    """Start a server over `models`; settings as keyword arguments."""
    started: list[Server] = []

    def start(*, routes: Mapping[str, Handler] | None = None, **settings: Any) -> Running:
        server = Server(models, Settings(**{"port": 0, "drain_seconds": 5.0, **settings}), clock, routes)
        started.append(server)
        call(server.start())
        return Running(server, call)

    yield start
    for server in started:
        call(server.stop())


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def runner() -> type[TestRunner]:
    return TestRunner


@pytest.fixture(scope="session")
def onnx_identity() -> Callable[[int, list[Any]], bytes]:
    """A model `in -> Identity -> out` of an ONNX element type."""

    def make(element: int, shape: list[Any]) -> bytes:
        graph = helper.make_graph(
            [helper.make_node("Identity", ["in"], ["out"])],
            "identity",
            [helper.make_tensor_value_info("in", element, shape)],
            [helper.make_tensor_value_info("out", element, shape)],
        )
        return _save(graph)

    return make


@pytest.fixture(scope="session")
def onnx_sum() -> bytes:
    """`a`, `b` [n, 2] of FP32 -> `sum`, `difference`."""
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2])
        for name in ("a", "b", "sum", "difference")
    }
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Sub", ["a", "b"], ["difference"]),
    ]
    graph = helper.make_graph(nodes, "sum", [values["a"], values["b"]], [values["sum"], values["difference"]])
    return _save(graph)


def _save(graph: Any) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@pytest.fixture
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Short enough for a Unix socket."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ew") as folder:
        yield Path(folder) / "s"
