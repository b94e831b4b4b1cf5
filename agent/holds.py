"""Local holds: somebody at the device keeps its slots on the models that they run.

One file in the agent's folder, written whole and renamed, under a lock that the agent takes for the moment of a
switch: once a hold has been set, no switch follows. Nothing that comes over a network writes it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edgeward.errors import EdgewardError
from edgeward.storage import write_atomic
from edgeward.wire.reports import Hold

log = logging.getLogger(__name__)

FILE, LOCK = "holds.json", "holds.lock"


class Holds:
    """`current` may be asked often: the file is read when it has changed."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._lock = folder / LOCK
        self._seen: tuple[int, ...] | None = None
        self._holds: tuple[Hold, ...] = ()

    def current(self) -> tuple[Hold, ...]:
        """What the file says, ended or not. One that cannot be read holds everything until it is put right:
        somebody wanted a hold."""
        since = 0.0
        try:
            try:
                found = self._file.stat()
            except FileNotFoundError:
                self._seen, self._holds = None, ()
                return ()
            since = found.st_mtime
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen != self._seen:
                self._holds = _decode(self._file.read_bytes())
                self._seen = seen
        except (OSError, msgspec.DecodeError) as error:
            if self._seen is not None or not self._holds:
                log.error("%s cannot be read, so every slot is held: %s", self._file, error)
            self._seen, self._holds = None, (Hold("", "", f"{self._file} cannot be read: {error}", since),)
        return self._holds

    def change(self, change: Callable[[tuple[Hold, ...]], tuple[Hold, ...]]) -> tuple[Hold, ...]:
        """Write what `change` makes of the holds; durable when it returns, and no switch is under way then.

        Raises EdgewardError when the file is damaged, OSError when it cannot be written.
        """
        with self.locked():
            try:
                before = _decode(self._file.read_bytes())
            except FileNotFoundError:
                before = ()
            except msgspec.DecodeError as error:
                raise EdgewardError(
                    f"{self._file} is damaged: {error}",
                    hint=f"every slot is held until it is removed: rm {self._file}",
                ) from None
            after = change(before)
            if after != before:
                write_atomic(self._file, msgspec.json.encode(after), mode=0o600)
            return after

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No hold is set or lifted meanwhile. Raises OSError."""
        lock = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _decode(raw: bytes) -> tuple[Hold, ...]:
    return msgspec.json.decode(raw, type=tuple[Hold, ...])


def placed(holds: tuple[Hold, ...], hold: Hold) -> tuple[Hold, ...]:
    """With `hold` instead of the one for the same slot."""
    return (*(one for one in holds if one.slot != hold.slot), hold)


def lifted(holds: tuple[Hold, ...], slot: str | None) -> tuple[Hold, ...]:
    """Without the hold for `slot`; None: without any."""
    return () if slot is None else tuple(one for one in holds if one.slot != slot)
