"""Where a demo happens: its folder, its child processes and the commands that it runs."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from edgeward.client import ControllerClient
from edgeward.clock import Clock, SystemClock
from edgeward.errors import Conflict, EdgewardError, UsageError
from simulators.processes import Child, Processes

MARKER = ".edgeward-demo"


@contextmanager
def prepared(folder: Path) -> Iterator[None]:
    """An empty folder with a marker, ours within; a former demo's is replaced, any other is left alone.

    Raises UsageError when the folder holds something else, Conflict when a demo runs in it.
    """
    marker = folder / MARKER
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not marker.is_file():
            raise UsageError(f"{folder} is not empty and not a demo's folder", hint="choose another --dir")
        with _locked(marker, folder):
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry != marker:
                    entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(marker, folder) as file:
        file.truncate(0)
        file.write("made by `edgeward simulate demo`; replaced by its next run\n")
        file.flush()
        yield


@contextmanager
def _locked(marker: Path, folder: Path) -> Iterator[TextIO]:
    """The lock goes with this process, also by SIGKILL; children do not inherit it."""
    with marker.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Conflict(f"a demo runs in {folder}", hint="end it, or choose another --dir") from None
        yield file


def find_configs(configs: Path | None) -> Path:
    """The folder with `demo/` and `demo-rollouts/`. Raises UsageError when it is not there."""
    found = configs or Path(__file__).resolve().parents[2] / "fleet_configs"
    for name in ("demo", "demo-rollouts"):
        if not (found / name).is_dir():
            raise UsageError(
                f"{found / name} does not exist", hint="pass --configs with fleet_configs of the source"
            )
    return found


@dataclass
class Place:
    """`say` prints a step with the seconds since the beginning; safe from several threads."""

    folder: Path
    configs: Path
    processes: Processes
    url: str
    console: Console
    clock: Clock = field(default_factory=SystemClock)
    began: float = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.began = self.clock.monotonic()

    @property
    def token_file(self) -> Path:
        return self.folder / "controller" / "admin.token"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def seconds(self) -> float:
        return self.clock.monotonic() - self.began

    def agent(self, device: str) -> Path:
        return self.folder / "agents" / device

    def package(self, name: str) -> Path:
        return self.folder / "packages" / name

    def produced(self, device: str) -> Path:
        return self.folder / "produced" / f"{device}.jsonl"

    def say(self, text: str, style: str = "") -> None:
        with self._lock:
            self.console.print(f"[{self.seconds:5.1f} s] {text}", style=style, markup=False, highlight=False)

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "edgeward.cli.main", *map(str, arguments)]

    def run(self, *arguments: str | Path, timeout: float = 60.0) -> str:
        """A command to its end; its output. Raises EdgewardError when it fails."""
        return self.processes.run(f"edgeward {arguments[0]}", self.command(*arguments), timeout)

    def attempt(self, *arguments: str | Path, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        return self.processes.attempt(f"edgeward {arguments[0]}", self.command(*arguments), timeout)

    def start(self, name: str, *arguments: str | Path) -> Child:
        return self.processes.start(name, self.command(*arguments))

    def client(self) -> ControllerClient:
        return ControllerClient(self.url, self.token_file.read_text().strip())


def answer_json(text: str, what: str) -> Any:
    """Raises EdgewardError when a command that should print JSON printed something else."""
    try:
        return json.loads(text)
    except ValueError:
        raise EdgewardError(f"{what} did not print JSON: {text[:200]!r}") from None


class Background:
    """A step in a thread of its own; `result` gives its value or raises what it raised."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        self.name = name
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._value = work()
        except BaseException as error:  # noqa: BLE001  # handed to whoever asks for the result
            self._error = error

    def result(self, timeout: float) -> Any:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise EdgewardError(f"waited {timeout:.0f} s for: {self.name}")
        if self._error is not None:
            raise self._error
        return self._value
