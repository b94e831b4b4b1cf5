"""What actions do: publish on the local broker, call a webhook, append to a file."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, TypedDict

import httpx
import msgspec
import numpy as np

from edgeward.clock import Clock
from edgeward.errors import InvalidDocument
from edgeward.wire.streams import Action

log = logging.getLogger(__name__)

QUEUE_CALLS = 256
CALL_SECONDS = 5.0
LATENCIES = 10_000

_appending = threading.Lock()


class Figures(TypedDict):
    """Since the last time: runs that were done and that failed, by action; `latency_ms` has p50, p95 and
    p99 from the arrival of the samples to the end of the action, empty without any."""

    run: dict[str, int]
    failed: dict[str, int]
    latency_ms: dict[str, float]


class Executor:
    """Runs actions. Messages and files inline, webhooks in a thread for each action that has one.

    `publish` gives whether the broker took the message. A webhook has CALL_SECONDS from connecting to the
    status line, however slowly its server drips; redirects are not followed, proxies not used, and what is
    not 2xx has failed. At most QUEUE_CALLS calls of an action wait, more fail at once. Files lie within `folder`.

    Raises InvalidDocument for an action of `actions` whose file is absolute or leaves `folder`.
    """

    def __init__(
        self,
        publish: Callable[[str, bytes], bool],
        folder: Path,
        clock: Clock,
        actions: Sequence[Action] = (),
    ) -> None:
        self._publish = publish
        self._folder = folder
        self._clock = clock
        for index, action in enumerate(actions):
            if action.file is not None:
                _inside(folder, action.file, f"spec.actions[{index}].file")
        self._figures = threading.Lock()
        self._run: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._callers: dict[str, _Caller] = {}
        self._stop = threading.Event()

    def run(self, action: Action, topic: str | None, message: dict[str, Any], received: float) -> None:
        """Run `action` now. `topic` is its topic filled in, `received` monotonic seconds. Never raises for
        a target that does not answer: that is counted."""
        body = msgspec.json.encode(message)
        if action.webhook is not None:
            self._call_later(action, body, received)
            return
        try:
            if topic is not None:
                done = self._publish(topic, body)
            else:
                self._append(action, body)
                done = True
        except (OSError, InvalidDocument) as error:
            log.warning("action %s: %s", action.name, error)
            done = False
        self._count(action, done, received)

    def stop(self) -> None:
        """Let the call under way end; those that wait have failed."""
        self._stop.set()
        for caller in self._callers.values():
            caller.thread.join(CALL_SECONDS * 2)
            while not caller.calls.empty():
                action, _, received = caller.calls.get()
                self._count(action, False, received)

    def take(self) -> Figures:
        """The figures since the last time."""
        with self._figures:
            run, self._run = self._run, Counter()
            failed, self._failed = self._failed, Counter()
            latencies = list(self._latencies)
            self._latencies.clear()
        latency = {}
        if latencies:
            points = np.percentile(latencies, [50, 95, 99]).tolist()
            latency = dict(zip(("p50", "p95", "p99"), points, strict=True))
        return {"run": dict(run), "failed": dict(failed), "latency_ms": latency}

    def _count(self, action: Action, done: bool, received: float) -> None:
        with self._figures:
            (self._run if done else self._failed)[action.name] += 1
            if done:
                self._latencies.append((self._clock.monotonic() - received) * 1e3)

    def _append(self, action: Action, body: bytes) -> None:
        path = _inside(self._folder, action.file or "", "file")
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            # One after the other: streams may share a file, and what is cut off must be nobody else's line.
            with _appending:
                size = os.fstat(target).st_size
                if os.write(target, body + b"\n") != len(body) + 1:
                    os.ftruncate(target, size)
                    raise OSError(f"{path} took a part of the line only")
        finally:
            os.close(target)

    def _call_later(self, action: Action, body: bytes, received: float) -> None:
        caller = self._callers.get(action.name)
        if caller is None:
            caller = self._callers[action.name] = _Caller(action.name, self._work)
        try:
            if self._stop.is_set():
                raise queue.Full
            caller.calls.put_nowait((action, body, received))
        except queue.Full:
            self._count(action, False, received)

    def _work(self, calls: _Calls) -> None:
        # An event loop for the sake of its timeouts: httpx's own begin anew with each byte that arrives.
        with asyncio.Runner() as runner:
            client = httpx.AsyncClient(timeout=CALL_SECONDS, follow_redirects=False, trust_env=False)
            while not self._stop.is_set():
                try:
                    action, body, received = calls.get(timeout=0.2)
                except queue.Empty:
                    continue
                self._count(action, runner.run(_call(client, action, body)), received)
            runner.run(client.aclose())


_Calls = queue.Queue[tuple[Action, bytes, float]]


class _Caller:
    """One action's calls, in order: a webhook that does not answer delays no other."""

    def __init__(self, name: str, work: Callable[[_Calls], None]) -> None:
        self.calls: _Calls = queue.Queue(QUEUE_CALLS)
        self.thread = threading.Thread(target=work, args=(self.calls,), name=f"webhook-{name}", daemon=True)
        self.thread.start()


async def _call(client: httpx.AsyncClient, action: Action, body: bytes) -> bool:
    """Whether the webhook answered with 2xx in time."""
    try:
        async with (
            asyncio.timeout(CALL_SECONDS),
            client.stream(
                "POST", action.webhook or "", content=body, headers={"Content-Type": "application/json"}
            ) as response,
        ):
            if response.is_success:
                return True
            log.warning("action %s: the webhook answered %d", action.name, response.status_code)
    # Addresses that are none raise from anywhere below (InvalidURL, UnicodeError, a group with an
    # OverflowError); one must not end the thread of all webhooks.
    except Exception as error:  # noqa: BLE001
        log.warning("action %s: the webhook failed: %s", action.name, error or type(error).__name__)
    return False


def _inside(folder: Path, file: str, field: str) -> Path:
    """The path of `file` in `folder`. Raises InvalidDocument when it leaves it, by a link as well."""
    asked = PurePath(file)
    path = folder / asked
    if asked.is_absolute() or ".." in asked.parts:
        raise InvalidDocument(
            f"{file!r} leaves the folder for action files", field=field, hint="e.g. alarms.jsonl"
        )
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise InvalidDocument(f"{file!r} leaves the folder for action files by a link", field=field)
    return path
