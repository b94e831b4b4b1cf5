"""When an action runs: debounce, hold, once, rate. Pure.

A verdict on each evaluation of the condition, per key, by the first line that fits:

| condition | state of the key                          | verdict    |
|-----------|-------------------------------------------|------------|
| false     | any                                       | idle       | the run of windows ends, `once` is free again
| true      | fewer than `windows` in a row, this one included | counting |
| true      | `once`, and it ran since the condition was last false | once |
| true      | it ran less than `hold` seconds ago       | held       |
| true      | `rate` runs in the last minute are used up (all keys together) | rate |
| true      | else                                      | run        |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeward.wire.streams import Action

Verdict = Literal["idle", "counting", "once", "held", "rate", "run"]

#: Keys whose state is kept; beyond, the one that changed longest ago is forgotten.
MAX_KEYS = 10_000


@dataclass
class _Key:
    in_row: int = 0
    ran: bool = False
    last: float | None = None


class Gate:
    """One action's. `rate` is a token bucket that holds a minute's runs."""

    def __init__(self, action: Action) -> None:
        self._action = action
        self._keys: dict[str, _Key] = {}
        self._tokens = max(action.rate or 0.0, 1.0)
        self._filled: float | None = None

    @property
    def idle(self) -> bool:
        """Whether a false condition would change nothing for any key."""
        return not any(key.in_row or key.ran for key in self._keys.values())

    def decide(self, key: str, holds: bool, now: float) -> Verdict:
        """`now` is monotonic seconds."""
        action = self._action
        state = self._keys.pop(key, None) or _Key()
        if not holds:
            state.in_row, state.ran = 0, False
            if state.last is not None and now - state.last < action.hold:
                self._keys[key] = state
            return "idle"
        if len(self._keys) >= MAX_KEYS:
            del self._keys[next(iter(self._keys))]
        self._keys[key] = state
        state.in_row += 1
        if state.in_row < action.windows:
            return "counting"
        if action.once and state.ran:
            return "once"
        if state.last is not None and now - state.last < action.hold:
            return "held"
        if not self._spend(now):
            return "rate"
        state.ran, state.last = True, now
        return "run"

    def _spend(self, now: float) -> bool:
        rate = self._action.rate
        if rate is None:
            return True
        if self._filled is not None:
            self._tokens = min(max(rate, 1.0), self._tokens + (now - self._filled) * rate / 60.0)
        self._filled = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
