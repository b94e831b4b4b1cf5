"""What a bridge remembers over restarts: one small file, replaced durably after each batch."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct, field

from edgeward.errors import Conflict, EdgewardError, NotFound
from edgeward.identifiers import check_name
from edgeward.storage import make_folder, write_atomic
from trends.bridges.feed import Position, Skipped

#: The newest entries of what was skipped; the count is of all.
MAX_SKIPPED = 100


class Lane(Struct):
    """One table of a bridge. `rows` were handed on, `skipped_rows` could not be; `changed` is in seconds since 1970."""

    position: Position = field(default_factory=Position)
    rows: int = 0
    skipped_rows: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    changed: float = 0.0


class State(Struct):
    """`kind` and `target` say where to, without secrets; `births` counts connections of a Sparkplug node."""

    kind: str = ""
    target: str = ""
    tables: dict[str, Lane] = field(default_factory=dict)
    births: int = 0
    problem: str = ""


class Cursor:
    """The state of the bridge `name` of a store, in `STORE/bridges/NAME.json`."""

    def __init__(self, store: Path, name: str) -> None:
        """Raises InvalidDocument for an impossible name, EdgewardError for a file that is damaged."""
        self.name = check_name(name)
        self._folder = store / "bridges"
        self._path = self._folder / f"{name}.json"
        self.state = State()
        self._saving = threading.Lock()
        if self._path.exists():
            try:
                self.state = msgspec.json.decode(self._path.read_bytes(), type=State)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise EdgewardError(
                    f"{self._path} is damaged: {error}",
                    hint="remove it: the bridge starts from the beginning, with the same keys",
                ) from None

    def save(self) -> None:
        """Durable when it returns; from any thread. Raises OSError."""
        with self._saving:
            write_atomic(self._path, msgspec.json.encode(self.state), mode=0o600)

    def next_birth(self) -> int:
        """0 to 255 and again, one more with each call over all restarts: Sparkplug's bdSeq."""
        number = self.state.births % 256
        self.state.births = number + 1
        self.save()
        return number

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises Conflict while another process runs this bridge."""
        make_folder(self._folder)
        lock = os.open(self._folder / f"{self.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Conflict(
                    f"another process runs the bridge {self.name}", hint="stop it, or give this one a --name"
                ) from None
            yield
        finally:
            os.close(lock)


def cursors(store: Path) -> list[Cursor]:
    """All bridges that have run in a store. Raises NotFound without a store."""
    if not store.is_dir():
        raise NotFound(f"{store} is no trend store", hint="pass the folder given to `edgeward trends enroll`")
    return [Cursor(store, path.stem) for path in sorted((store / "bridges").glob("*.json"))]
