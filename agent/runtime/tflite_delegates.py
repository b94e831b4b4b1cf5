"""LiteRT's delegates and the shared libraries that have them. Imports no runtime."""

from __future__ import annotations

import ctypes.util

LIBRARIES = {
    "EdgeTPU": "libedgetpu.so.1",
    "GPU": "libtensorflowlite_gpu_delegate.so",
    "NNAPI": "libnnapi_delegate.so",
}


def found() -> list[str]:
    """The delegates whose library lies where the loader looks, and XNNPACK, which LiteRT brings."""
    return [*(name for name, library in LIBRARIES.items() if _is_there(library)), "XNNPACK"]


def _is_there(library: str) -> bool:
    return ctypes.util.find_library(library.removeprefix("lib").partition(".so")[0]) is not None
