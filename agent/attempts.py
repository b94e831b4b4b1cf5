"""What the agent was about whenever it ended without warning, so that nothing can end it again and again.

Whatever may take the agent down with it is written down before it begins and crossed out when it has come to
its end. What is found open at a start was cut off. The narrowest thing that was open takes the blame, nothing
else: an agent that died while a candidate was tested says nothing of the models that served meanwhile.

A power cut looks the same, but for one thing: the kernel has another boot id afterwards. So a machine that goes
down in the same place is believed to be bad luck for far longer than an agent that does. An orderly stop counts
as nothing.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Protocol

import msgspec

log = logging.getLogger(__name__)

#: So many deaths of the agent in a row over one thing, or of the whole machine, and it is not tried again.
DEATHS, REBOOTS = 3, 10
#: Monotonic seconds after which what was begun at boot is no part of a loop any more.
HEALTHY_SECONDS = 60.0


class Risk(IntEnum):
    """What may take the agent down, the narrowest first: an earlier one takes the blame from a later one."""

    OPENING = 0
    TESTING = 1
    APPLYING = 2
    SERVING = 3
    SETTLING = 4


class Attempt(msgspec.Struct, frozen=True):
    """`subject` is what is tried: a model's digest, or a desired state's generation.

    `deaths` of the agent's process and `reboots` of the machine in the middle of it, since it last came to its
    end. `boot` is the kernel's id of the boot in which it was begun.
    """

    subject: str
    risk: Risk
    boot: str = ""
    open: bool = True
    deaths: int = 0
    reboots: int = 0

    @property
    def spent(self) -> bool:
        return self.deaths >= DEATHS or self.reboots >= REBOOTS

    def figures(self) -> tuple[float, float]:
        """How often, and how often it may be."""
        if self.deaths >= DEATHS or self.reboots < REBOOTS:
            return float(self.deaths), float(DEATHS)
        return float(self.reboots), float(REBOOTS)

    def why(self, what: str) -> str:
        who = "machine" if self.reboots >= REBOOTS > 0 and self.deaths < DEATHS else "agent"
        return f"the {who} went down {self.figures()[0]:.0f} times in a row {what}"


def begun(before: Attempt | None, subject: str, risk: Risk, boot: str) -> Attempt:
    """Another try; what was counted stays as long as it is about the same."""
    if before is None or before.subject != subject:
        return Attempt(subject, risk, boot)
    return msgspec.structs.replace(before, risk=risk, boot=boot, open=True)


def after_death(found: Mapping[str, Attempt], boot: str) -> dict[str, Attempt]:
    """What the attempts of an agent that is gone are to its successor: the ones that changed."""
    left = {key: attempt for key, attempt in found.items() if attempt.open}
    narrowest = min((attempt.risk for attempt in left.values()), default=None)
    after = {}
    for key, attempt in left.items():
        deaths, reboots = attempt.deaths, attempt.reboots
        if attempt.risk is narrowest:
            same = attempt.boot == boot
            deaths, reboots = deaths + same, reboots + (not same)
        after[key] = msgspec.structs.replace(attempt, open=False, deaths=deaths, reboots=reboots)
    return after


class Store(Protocol):
    """Where attempts outlive this process: `agent.state.State`."""

    def attempts(self) -> dict[str, Attempt]: ...

    def set_attempts(self, changes: Mapping[str, Attempt | None]) -> None:
        """All or none of them, durable; None: forget it."""
        ...


class Attempts:
    """The attempts of this start of the agent. Make it once, before anything is begun. Thread-safe."""

    def __init__(self, store: Store, boot: str | None = None) -> None:
        """Count what the agent before this one has left open. `boot`: the kernel's id of this boot."""
        self._store = store
        self._boot = kernel_boot() if boot is None else boot
        self._lock = threading.Lock()
        self._known = store.attempts()
        changed = after_death(self._known, self._boot)
        self._known.update(changed)
        for key, attempt in changed.items():
            log.warning("the agent ended in the middle of %s (%s)", key, attempt.risk.name.lower())
        if changed:
            try:
                store.set_attempts(changed)
            except sqlite3.Error as error:  # what runs must run on a full disk, too
                log.warning("what the agent ended in is not written down: %s", error)

    def begin(self, key: str, subject: str, risk: Risk) -> None:
        """Durable before it returns. Raises sqlite3.Error."""
        with self._lock:
            attempt = begun(self._known.get(key), subject, risk, self._boot)
            self._store.set_attempts({key: attempt})
            self._known[key] = attempt

    def failed(self, key: str) -> None:
        """It came to a bad end without taking the agent down: that counts as a death."""
        with self._lock:
            attempt = self._known.get(key)
            if attempt is not None:
                self._put(key, msgspec.structs.replace(attempt, open=False, deaths=attempt.deaths + 1))

    def leave(self, key: str) -> None:
        """It was stopped in order, which says nothing of it."""
        with self._lock:
            attempt = self._known.get(key)
            if attempt is not None and attempt.open:
                counted = attempt.deaths or attempt.reboots
                self._put(key, msgspec.structs.replace(attempt, open=False) if counted else None)

    def end(self, key: str) -> None:
        """It came to its end, good or bad."""
        with self._lock:
            if key in self._known:
                self._put(key, None)

    def spent(self, key: str, subject: str) -> Attempt | None:
        """What was tried too often; None while it may be tried."""
        with self._lock:
            attempt = self._known.get(key)
        return attempt if attempt is not None and attempt.subject == subject and attempt.spent else None

    def all(self) -> dict[str, Attempt]:
        with self._lock:
            return dict(self._known)

    def _put(self, key: str, attempt: Attempt | None) -> None:
        """Written down if that is possible: the worst is that one end too many is counted."""
        if attempt is None:
            self._known.pop(key, None)
        else:
            self._known[key] = attempt
        try:
            self._store.set_attempts({key: attempt})
        except sqlite3.Error as error:
            log.warning("%s is not crossed out: %s", key, error)


def kernel_boot() -> str:
    """The kernel's id of this boot; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
