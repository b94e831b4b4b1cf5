"""Node values of an OPC UA server. Needs the extra `agent-opcua`."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agent.streams.decode.columns import clean_text
from agent.streams.sources.polling import Pace, Reported, check_features, one_sample, start_thread
from agent.streams.sources.port import Sink
from agent.streams.sources.waiting import Backoff
from edgeward.clock import Clock
from edgeward.errors import InvalidDocument, MissingDependency
from edgeward.wire.streams import Check, OpcuaSource

try:
    from asyncua import ua
    from asyncua.client.client import Client
    from asyncua.ua.uaerrors import UaError, UaStatusCodeError
except ImportError as error:
    raise MissingDependency(
        "OPC UA sources need asyncua", hint="pip install 'edgeward[agent-opcua]'"
    ) from error

TIMEOUT_S: Final = 4.0


class OpcuaSampleSource:
    """Asks for all nodes with one request every interval. A value whose status is not Good is missing.

    Counts `reconnects`, `errors` (attempts that failed), and samples `dropped` because the stream had no
    room: the next reading is newer.
    """

    def __init__(
        self, spec: OpcuaSource, features: Sequence[str], quality: Mapping[str, Check], clock: Clock
    ) -> None:
        """Raises InvalidDocument for a feature without a node, or a node id that is none."""
        check_features(features, list(spec.nodes), "spec.source.opcua.nodes")
        for name in features:
            try:
                ua.NodeId.from_string(spec.nodes[name])
            except (UaError, ValueError) as error:
                raise InvalidDocument(str(error), field=f"spec.source.opcua.nodes.{name}") from error
        self._spec = spec
        self._features = tuple(features)
        self._units = {
            name: quality[name].unit for name in features if name in quality and quality[name].unit
        }
        self._clock = clock
        self._stopping = threading.Event()
        self._cancel: Any = None
        self._thread: threading.Thread | None = None
        self._reported = Reported(f"opcua {spec.endpoint}")

    def start(self, sink: Sink) -> None:
        self._thread = start_thread(
            f"opcua {self._spec.endpoint}", lambda: asyncio.run(self._until_stopped(sink))
        )

    def stop(self) -> None:
        self._stopping.set()
        cancel = self._cancel
        if cancel is not None:
            cancel()
        if self._thread is not None:
            self._thread.join(5)

    def committed(self, epoch: str, seq: int) -> None:
        """Node values are not numbered."""

    async def _until_stopped(self, sink: Sink) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()

        def cancel() -> None:
            # The loop may have ended by itself in the meantime.
            if not loop.is_closed():
                loop.call_soon_threadsafe(stop.set)

        self._cancel = cancel
        if self._stopping.is_set():
            return
        work = asyncio.create_task(self._work(sink))
        waiting = asyncio.create_task(stop.wait())
        await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        work.cancel()
        # Its own `finally` closes the session, for a bounded time.
        await asyncio.wait({work}, timeout=3)
        if work.done() and not work.cancelled():
            work.result()

    async def _work(self, sink: Sink) -> None:
        backoff = Backoff(most=max(5.0, self._spec.interval))
        connected_before = False
        while True:
            client = Client(self._spec.endpoint, timeout=TIMEOUT_S)
            try:
                await asyncio.wait_for(client.connect(), TIMEOUT_S)
                if connected_before:
                    sink.count("reconnects")
                connected_before = True
                await self._poll(client, sink, backoff)
            # Whatever a foreign stack raises on what a server sent: the next attempt may work.
            except Exception as error:  # noqa: BLE001
                sink.count("errors")
                self._reported.failed(f"{type(error).__name__}: {error}")
            finally:
                await _close(client)
            await asyncio.sleep(backoff.delay())

    async def _poll(self, client: Client, sink: Sink, backoff: Backoff) -> None:
        nodes = [client.get_node(self._spec.nodes[name]) for name in self._features]
        wrong_units = await self._wrong_units(client)
        problem = next(iter(wrong_units.values()), "")
        pace = Pace(self._clock, self._spec.interval)
        while True:
            read = await asyncio.wait_for(client.read_attributes(nodes), TIMEOUT_S)
            backoff.reset()
            self._reported.works()
            values = [
                math.nan if name in wrong_units else _number(value)
                for name, value in zip(self._features, read, strict=True)
            ]
            if not sink.take(one_sample(values, self._features, self._clock.now(), problem)):
                sink.count("dropped")
            await asyncio.sleep(pace.next())

    async def _wrong_units(self, client: Client) -> dict[str, str]:
        """What is wrong, by feature, where the server names another unit than the stream expects."""
        wrong = {}
        for name, expected in self._units.items():
            node = client.get_node(self._spec.nodes[name])
            try:
                holder = await node.get_child("0:EngineeringUnits")
                information = await holder.read_value()
            except UaStatusCodeError:
                continue  # Many servers say no unit.
            given = getattr(getattr(information, "DisplayName", None), "Text", None)
            if given and given != expected:
                wrong[name] = f"{name}: unit is {clean_text(given)!r}, expected {expected!r}"
        return wrong


def _number(value: Any) -> float:
    """NaN for a status that is not Good, and for what is no number."""
    if value.Value is None or (value.StatusCode is not None and not value.StatusCode.is_good()):
        return math.nan
    inner = value.Value.Value
    return float(inner) if isinstance(inner, bool | int | float) else math.nan


async def _close(client: Client) -> None:
    try:
        await asyncio.wait_for(client.disconnect(), 2)
    except Exception:  # noqa: BLE001 - the server may be gone, and the socket is closed all the same
        client.disconnect_socket()
