"""Whether an action runs now: the rules of the resource, without doing anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agent.streams.keys import Recent
from edgeward.wire.streams import Action

Verdict = Literal["run", "idle", "counting", "held", "once", "rate"]


@dataclass(slots=True)
class _State:
    """Of one key: windows in a row for which the condition held, the last run, whether it ran since false."""

    length: int = 0
    last_run: float | None = None
    ran: bool = False


class Gate:
    """The rules of one action. `now` is monotonic seconds. The first line that fits decides:

    | condition | and                                                   | verdict  | effect                |
    |-----------|-------------------------------------------------------|----------|-----------------------|
    | false     |                                                       | idle     | counting begins anew, |
    |           |                                                       |          | `once` is armed       |
    | true      | fewer than `windows` in a row for this key            | counting | one more counted      |
    | true      | less than `hold` seconds since this key's last run    | held     |                       |
    | true      | `once`, and this key ran since it was last false      | once     |                       |
    | true      | the action, over all keys, has no run left            | rate     |                       |
    | true      |                                                       | run      | one run is taken      |

    `rate` fills up evenly to `rate` runs (at least one) per minute and begins full. Of at most MAX_KEYS
    keys the state is remembered, the one unseen longest is forgotten and counts from the beginning.
    """

    def __init__(self, action: Action) -> None:
        self._action = action
        self._states: Recent[_State] = Recent()
        self._left = self._most = max(1.0, action.rate or 1.0)
        self._filled: float | None = None

    @property
    def idle(self) -> bool:
        """Whether a false condition would change nothing for any key."""
        return not self._states

    def decide(self, key: str, holds: bool, now: float) -> Verdict:
        """The verdict on the next window of `key`; `holds` is the value of its condition."""
        action = self._action
        state = self._states.get(key)
        if not holds:
            if state is not None:
                state.length, state.ran = 0, False
                if state.last_run is None or now - state.last_run >= action.hold:
                    del self._states[key]
            return "idle"
        if state is None:
            state = _State()
        self._states[key] = state
        state.length = min(state.length + 1, action.windows)
        if state.length < action.windows:
            return "counting"
        if state.last_run is not None and now - state.last_run < action.hold:
            return "held"
        if action.once and state.ran:
            return "once"
        if not self._take_run(now):
            return "rate"
        state.last_run, state.ran = now, True
        return "run"

    def _take_run(self, now: float) -> bool:
        if self._action.rate is None:
            return True
        if self._filled is not None:
            self._left = min(self._most, self._left + (now - self._filled) * self._action.rate / 60)
        self._filled = now
        if self._left < 1 - 1e-9:  # the sum of many fractions may lack a little
            return False
        self._left -= 1
        return True
