"""The steps of one candidate on its way, each held against a newer wish."""

from __future__ import annotations

import logging
from typing import Unpack

from agent.lifecycle import Details, Event, SlotState, step
from agent.slots.board import Board

log = logging.getLogger(__name__)


class Replaced(Exception):
    """A newer wish has taken the candidate's place, or the agent stops."""


class Walk:
    """One candidate on its way; stops when a newer wish has come."""

    def __init__(self, board: Board, name: str, state: SlotState) -> None:
        self._board = board
        self.name = name
        self.state = state

    def check(self) -> None:
        """Raises Replaced when there is nothing to go on for."""
        board = self._board
        with board.lock:
            if board.stop or board.candidates.get(self.name) != self.state:
                raise Replaced

    def take(self, event: Event, **details: Unpack[Details]) -> None:
        """One step, not told to anyone yet. Raises Replaced."""
        board = self._board
        after = step(self.state, event, board.clock.now(), **details)
        with board.lock:
            self.check()
            board.candidates[self.name] = self.state = after

    def tell(self) -> None:
        target, after = self.state.target, self.state
        log.info(
            "slot %s: %s:%s is %s %s", self.name, target.model, target.version, after.phase, after.message
        )
        # Never with the lock held: whoever is told asks for a report.
        self._board.changed()

    def to(self, event: Event, **details: Unpack[Details]) -> None:
        self.take(event, **details)
        self.tell()
