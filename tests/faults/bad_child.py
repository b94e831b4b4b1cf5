"""A worker process whose model misbehaves as its own description says: `fault:WHAT:PLACE`, in real workers.

Started in the place of `agent.runtime.child`. PLACE is `load`, `golden` (at every inference) or `live` (from the
first input of LIVE or more on).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from typing import Any

import numpy as np

from agent.runtime import child, port

#: No golden input is as large.
LIVE = 1000.0
SLOW_SECONDS = 0.05
LEAK_BYTES = 200 << 20

_FAULT = re.compile(rb"fault:([a-z]+):([a-z]+)")
_load = port.load
_leaked: list[bytearray] = []


def strike(what: str) -> None:
    """What ends, stops or fattens the process; NaN is not made here."""
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "hang":
        while True:
            time.sleep(1)
    elif what == "leak":
        _leaked.append(bytearray(os.urandom(1) * LEAK_BYTES))
    elif what == "slow":
        time.sleep(SLOW_SECONDS)


class Bad:
    """The model inside, until its fault comes."""

    def __init__(self, model: Any, what: str, place: str) -> None:
        self._model = model
        self._what = what
        self._struck = place == "golden"
        self.provider, self.inputs, self.outputs = model.provider, model.inputs, model.outputs

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._struck = self._struck or any((values >= LIVE).any() for values in inputs.values())
        outputs: dict[str, Any] = self._model.infer(inputs)
        if self._struck:
            strike(self._what)
            if self._what == "nan":
                return {name: np.full_like(values, np.nan) for name, values in outputs.items()}
        return outputs


def load(runtime: Any, content: bytes, options: Any = None) -> Any:
    found = _FAULT.search(content)
    what, place = (found[1].decode(), found[2].decode()) if found else ("", "")
    if place == "load":
        for _ in range(4 if what == "leak" else 1):
            strike(what)
    model = _load(runtime, content, options)
    return Bad(model, what, place) if place in ("golden", "live") else model


if __name__ == "__main__":
    child.load = load
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the agent is gone
        child.main(int(sys.argv[-2]), int(sys.argv[-1]))
