"""LiteRT's accelerators: which shared library each delegate is. Imports no runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PLACES = ("lib", "usr/lib", "usr/local/lib", "lib/*", "usr/lib/*-linux-*")


@dataclass(frozen=True)
class Library:
    """An accelerator's delegate: its shared library, and what installs it."""

    file: str
    hint: str


#: Delegate -> its library, as the dynamic linker finds it.
LIBRARIES = {
    "EdgeTPU": Library("libedgetpu.so.1", "install libedgetpu1-std from Coral's packages"),
    "GPU": Library("libtensorflowlite_gpu_delegate.so", "build LiteRT's GPU delegate for this device"),
    "NNAPI": Library("libnnapi_delegate.so", "NNAPI is there on Android only"),
}


def found(root: Path = Path("/")) -> list[str]:
    """Delegates whose library lies where the dynamic linker looks, and XNNPACK, which LiteRT brings."""
    here = [
        name
        for name, library in LIBRARIES.items()
        if any(next(root.glob(f"{place}/{library.file}"), None) is not None for place in _PLACES)
    ]
    return [*here, "XNNPACK"]
