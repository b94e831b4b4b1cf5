"""What came from peers and what from the controller, for `edgeward agent status`."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec

from edgeward.storage import write_atomic

log = logging.getLogger(__name__)

#: In the agent's folder.
FIGURES = "peers.json"


class Obtained(msgspec.Struct, frozen=True):
    """Blobs obtained so far and their sizes in bytes, by who gave them; a delta counts as its whole."""

    peer_blobs: int = 0
    peer_bytes: int = 0
    controller_blobs: int = 0
    controller_bytes: int = 0


def read_figures(path: Path) -> Obtained:
    """Zeros where there is nothing, or nothing readable."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Obtained)
    except (OSError, msgspec.MsgspecError):
        return Obtained()


class Figures:
    """Added up over restarts. A disk that does not take them costs the figures only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def add(self, more: Obtained) -> None:
        with self._lock:
            had = read_figures(self._path)
            names = Obtained.__struct_fields__
            total = Obtained(**{name: getattr(had, name) + getattr(more, name) for name in names})
            try:
                write_atomic(self._path, msgspec.json.encode(total))
            except OSError as error:
                log.info("the figures of what peers gave are not kept: %s", error)
