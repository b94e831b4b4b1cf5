"""Carry actions out: a local topic, a webhook, a file. None of them waits for another."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import msgspec
import numpy as np

from edgeward.clock import Clock
from edgeward.errors import InvalidDocument
from edgeward.wire.streams import Action

log = logging.getLogger(__name__)

WEBHOOK_QUEUE = 256
WEBHOOK_SECONDS = 5.0
_KEPT = 10_000

_Call = tuple[Action, bytes, float]


class Executor:
    """`publish` sends to the local broker; `folder` holds what `file` actions write.

    Topics and files are served on the caller's thread, webhooks by one thread behind a bounded queue: a
    dead webhook costs its own calls only.
    """

    def __init__(
        self, actions: Sequence[Action], publish: Callable[[str, bytes], bool], folder: Path, clock: Clock
    ) -> None:
        """Raises InvalidDocument for a file outside `folder`."""
        self._publish = publish
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._latencies: dict[str, list[float]] = {}
        self._calls: queue.Queue[_Call | None] = queue.Queue(WEBHOOK_QUEUE)
        self._thread: threading.Thread | None = None
        for index, action in enumerate(actions):
            if action.file is not None:
                confined(folder, action.file, f"spec.actions[{index}].file")
        if any(action.webhook for action in actions):
            self._thread = threading.Thread(target=self._call_all, name="webhooks", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Wait at most one call's time for the webhooks that are due."""
        if self._thread is not None:
            try:
                self._calls.put_nowait(None)
            except queue.Full:
                log.warning("webhooks that wait are given up")
            self._thread.join(WEBHOOK_SECONDS)

    def run(self, action: Action, topic: str | None, message: dict[str, object], received: float) -> None:
        """`received` is when the sample came in, in monotonic seconds: latency counts from there."""
        body = msgspec.json.encode(message)
        if topic is not None:
            self._done(action.name, self._publish(topic, body), received)
        elif action.file is not None:
            self._done(action.name, self._write(action.file, body), received)
        else:
            try:
                self._calls.put_nowait((action, body, received))
            except queue.Full:
                self._done(action.name, False, received)

    def _done(self, name: str, worked: bool, received: float) -> None:
        spent = (self._clock.monotonic() - received) * 1e3
        with self._lock:
            self._counts[(name, "run" if worked else "failed")] += 1
            kept = self._latencies.setdefault(name, [])
            if worked and len(kept) < _KEPT:
                kept.append(spent)

    def _write(self, file: str, body: bytes) -> bool:
        path = confined(self._folder, file, "file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # One write call, so that lines of several streams never mix.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o640)
            try:
                os.write(descriptor, body + b"\n")
            finally:
                os.close(descriptor)
        except OSError as error:
            log.error("action file %s: %s", path, error.strerror)
            return False
        return True

    def _call_all(self) -> None:
        with httpx.Client(timeout=WEBHOOK_SECONDS, follow_redirects=False, trust_env=False) as client:
            while (call := self._calls.get()) is not None:
                action, body, received = call
                self._done(action.name, _called(client, action, body), received)

    def take(self) -> dict[str, dict[str, float]]:
        """Since the last time, per action: `run`, `failed`, and latency `p50`, `p95`, `p99` in milliseconds."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            latencies, self._latencies = self._latencies, {}
        figures: dict[str, dict[str, float]] = {}
        for (name, what), number in counts.items():
            figures.setdefault(name, {"run": 0, "failed": 0})[what] = number
        for name, spent in latencies.items():
            if spent:
                p50, p95, p99 = np.percentile(spent, [50, 95, 99]).tolist()
                figures[name] |= {"p50": p50, "p95": p95, "p99": p99}
        return figures


def _called(client: httpx.Client, action: Action, body: bytes) -> bool:
    try:
        answer = client.post(action.webhook or "", content=body, headers={"Content-Type": "application/json"})
    except httpx.HTTPError as error:
        log.warning("webhook of action %s: %s", action.name, error or type(error).__name__)
        return False
    if answer.is_success:
        return True
    log.warning("webhook of action %s answered %d", action.name, answer.status_code)
    return False


def confined(folder: Path, file: str, field: str) -> Path:
    """The path of a file below `folder`. Raises InvalidDocument for any other."""
    path = Path(file)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise InvalidDocument(
            f"{file!r} leaves the agent's folder for actions",
            field=field,
            hint="give a relative path without ..",
        )
    whole = folder / path
    if not whole.parent.resolve().is_relative_to(folder.resolve()):
        raise InvalidDocument(f"{file!r} leads out of the agent's folder for actions", field=field)
    return whole
