"""What of released models stays on the disk, for the slots' thread."""

from __future__ import annotations

import logging
import sqlite3

from agent.slots.activation import Activation
from agent.slots.board import RUNNING, Board
from agent.slots.records import kept, kept_blobs
from agent.state import State
from agent.verify import Verifier
from edgeward.errors import EdgewardError

log = logging.getLogger(__name__)


class Disk:
    def __init__(self, board: Board, state: State, verifier: Verifier, activation: Activation) -> None:
        self._board = board
        self._state = state
        self._verifier = verifier
        self._activation = activation

    def collect(self) -> None:
        """Remove the blobs that no slot runs, may go back to, or is on its way to."""
        try:
            condemned = self._state.quarantined()
            board = self._board
            with board.lock:
                wanted = [state.target for state in board.candidates.values() if state.phase not in RUNNING]
                models = kept(board.records.values(), board.active.values(), wanted, condemned)
            freed = self._verifier.collect(models)
        except (EdgewardError, OSError, sqlite3.Error) as error:
            log.warning("old blobs stay on the disk: %s", error)
            return
        if freed:
            log.info("%d KiB of old models are removed from the disk", freed >> 10)

    def sweep(self) -> None:
        """Compiled forms stay with the blobs that a slot runs or may go back to."""
        self._activation.sweep(kept_blobs(self._board.records.values(), self._board.active.values()))
