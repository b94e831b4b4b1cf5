"""Child processes: started, waited for, killed and ended, each by its own process id.

Every child leads a session of its own, so that Ctrl-C in a terminal reaches this process alone and the
children end in order; a child's own workers belong to its group and end with it. A SIGKILL to this process
ends them, too, by way of a watchman.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeward.clock import SystemClock
from edgeward.errors import EdgewardError

_POLL = 0.05

#: Ends the groups that it was told of once its standard input closes: when its parent was killed, too.
_WATCHMAN = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    sign, group = line[0], int(line[1:])
    groups.add(group) if sign == "+" else groups.discard(group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
"""


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log file, empty when there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def wait_until(
    condition: Callable[[], bool], *, what: str, timeout: float, log: Path | None = None, poll: float = _POLL
) -> None:
    """Raises EdgewardError saying what was waited for, with the log's end, after `timeout` seconds."""
    clock = SystemClock()
    deadline = clock.monotonic() + timeout
    while not condition():
        if clock.monotonic() > deadline:
            raise EdgewardError(_with_log(f"waited {timeout:.0f} s for {what}", log))
        time.sleep(poll)


def _with_log(message: str, log: Path | None) -> str:
    end = tail(log) if log else ""
    return f"{message}; the end of {log}:\n{end}" if end else message


def _end_group(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to what is left of a child's group: itself when it still runs, and its workers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class Watchman:
    """A process of its own that ends this one's children when this one is killed and cannot."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _WATCHMAN], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def guard(self, group: int) -> None:
        self._tell(f"+{group}")

    def release(self, group: int) -> None:
        """It has ended: its number may soon be somebody else's."""
        self._tell(f"-{group}")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        # Without a watchman everything still works; only a SIGKILL to this process leaves children.
        with self._lock, contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def dismiss(self) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()


@dataclass
class Child:
    """A running child; standard output and error go to `log`."""

    name: str
    arguments: list[str]
    log: Path
    environment: Mapping[str, str]
    watchman: Watchman
    process: subprocess.Popen[bytes] = field(init=False)
    started: int = field(init=False, default=0)

    def start(self) -> None:
        """Start it, or start it again after its end; the log goes on."""
        if hasattr(self, "process"):
            self.watchman.release(self.process.pid)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(self.environment),
                start_new_session=True,
            )
        self.watchman.guard(self.process.pid)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        """What it wrote since it was last started."""
        with self.log.open("rb") as file:
            file.seek(self.started)
            return file.read().decode("utf-8", errors="replace")

    def check_running(self) -> None:
        """Raises EdgewardError with the log's end when it has ended."""
        if not self.running:
            raise EdgewardError(
                _with_log(f"{self.name} ended by itself with {self.process.returncode}", self.log)
            )

    def wait_ready(self, line: str, timeout: float) -> None:
        """Until `line` stands in its output. Raises EdgewardError on its end or the deadline."""

        def ready() -> bool:
            if line in self.said():
                return True
            self.check_running()
            return False

        wait_until(ready, what=f"{self.name} to say {line!r}", timeout=timeout, log=self.log)

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises EdgewardError when it runs on after `timeout` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise EdgewardError(
                _with_log(f"waited {timeout:.0f} s for {self.name} to end", self.log)
            ) from None

    def kill(self) -> None:
        """SIGKILL to this one process, as the kernel does when memory runs out."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout: float = 10.0) -> int:
        """SIGTERM, and SIGKILL to its whole group after `timeout` seconds. Returns the exit code."""
        if self.running:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        _end_group(self.process)
        code = self.process.wait()
        self.watchman.release(self.process.pid)
        return code


class Processes:
    """All children of one run. Leaving the context ends every one, whatever happened."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"} | dict(environment or {})
        self.children: dict[str, Child] = {}
        self._commands: set[subprocess.Popen[str]] = set()
        self._writing = threading.Lock()
        self._watchman = Watchman()

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(self, name: str, arguments: list[str]) -> Child:
        """Raises EdgewardError when a child of that name is running."""
        before = self.children.get(name)
        if before is not None and before.running:
            raise EdgewardError(f"{name} is running already")
        child = Child(name, arguments, self.log(name), self.environment, self._watchman)
        child.start()
        self.children[name] = child
        return child

    def run(self, name: str, arguments: list[str], timeout: float) -> str:
        """Run to the end and return the standard output. Raises EdgewardError with its error text."""
        done = self.attempt(name, arguments, timeout)
        if done.returncode != 0:
            raise EdgewardError(
                f"{name} failed with {done.returncode}: {' '.join(arguments[-12:])}\n"
                f"{done.stderr.strip()[-2000:]}"
            )
        return done.stdout

    def attempt(self, name: str, arguments: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run to the end, whatever the exit code. Raises EdgewardError after `timeout` seconds."""
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
        )
        self._commands.add(process)
        self._watchman.guard(process.pid)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise EdgewardError(
                f"waited {timeout:.0f} s for {name} to end: {' '.join(arguments[-12:])}"
            ) from None
        finally:
            self._commands.discard(process)
            _end_group(process)
            self._watchman.release(process.pid)
        with self._writing, self.log("commands").open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(arguments)}\n{output}{errors}[exit {process.returncode}]\n")
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    def stop_all(self, timeout: float = 10.0) -> None:
        """SIGTERM to all at once, then wait for each: as fast as the slowest."""
        running = [child for child in self.children.values() if child.running]
        for child in running:
            child.process.terminate()
        for process in list(self._commands):
            _end_group(process)
        for child in running:
            child.stop(timeout)

    def __enter__(self) -> Processes:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop_all()
        finally:
            self._watchman.dismiss()


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises KeyboardInterrupt like Ctrl-C, so that the way out is the same."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
