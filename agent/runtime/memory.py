"""Keep the C library from holding more memory than the process uses. Does nothing without glibc."""

from __future__ import annotations

import ctypes
import gc

_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """At the start: by default each thread gets a heap of its own, of which most stays empty."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """After loading: parsing a model or starting up leaves as much freed as used memory behind."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
