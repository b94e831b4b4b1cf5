"""LiteRT's accelerators: which shared library each delegate is."""

from __future__ import annotations

from dataclasses import dataclass


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
