"""A worker's memory ceiling: what it may still take while a request runs, and when it is ended. Pure."""

from __future__ import annotations

#: Between requests a worker above its ceiling is replaced. One request may take it so many times as high:
#: allocations beyond fail, and where those are not the measure (shared memory, accelerators) it is ended.
FACTOR = 1.5
#: Seconds between two looks while a request runs.
POLL = 0.05


def headroom(ceiling: int, resident: int) -> int:
    """Bytes by which a worker that holds `resident` bytes with its model loaded may grow."""
    return max(int(ceiling * FACTOR) - resident, 0)


def excess(ceiling: int, resident: int) -> str:
    """What is wrong with a worker while a request runs; empty while it may go on."""
    if resident <= ceiling * FACTOR:
        return ""
    return (
        f"held {resident >> 20} MiB during a request, more than {FACTOR:g} times its memory ceiling of "
        f"{ceiling >> 20} MiB"
    )


def refused(ceiling: int, problem: str) -> str:
    """For a request whose allocation failed."""
    return (
        f"the request needs more memory than {FACTOR:g} times the worker's ceiling of {ceiling >> 20} MiB "
        f"leaves: {problem}"
    )
