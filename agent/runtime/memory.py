"""What a worker takes of the machine's memory, and whom the kernel takes when there is none left."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from pathlib import Path

_M_ARENA_MAX = -8
_OOM_SCORE = 500
_PAGE = os.sysconf("SC_PAGE_SIZE")


def offer_to_the_kernel() -> None:
    """When memory runs out the kernel shall end this process and not the one that started it (Linux)."""
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        score.write_text(str(min(int(score.read_text()) + _OOM_SCORE, 1000)))


def resident_bytes() -> int:
    """This process's resident memory; 0 where it is not told."""
    return _statm(1)


def bound_growth(size: int) -> bool:
    """From now on allocations that take more than `size` bytes together fail; whether that is so (Linux).

    Counts private memory that may be written (RLIMIT_DATA), whether or not it has been touched. Address space
    (RLIMIT_AS) is no measure: runtimes reserve it without using it.
    """
    now = _statm(5)
    if not now:
        return False
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wish = now + size
        resource.setrlimit(
            resource.RLIMIT_DATA, (wish if hard == resource.RLIM_INFINITY else min(wish, hard), hard)
        )
    except (OSError, ValueError):
        return False
    return True


def _statm(field: int) -> int:
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[field]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def share_one_heap() -> None:
    """At the start, with glibc: by default each thread gets a heap of its own, of which most stays empty."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """After loading, with glibc: parsing a model or starting up leaves as much freed as used memory behind."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
