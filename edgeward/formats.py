"""Tell model file formats by their first bytes, without handing them to a parser.

Formats that can run code when loaded (pickle, joblib, TorchScript, Keras archives) are refused by
name, both when a package is published and on the device.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgeward.errors import PackageError
from edgeward.wire.package import Runtime

SNIFF_BYTES = 64

_NAMES: dict[Runtime, str] = {"onnx": "an ONNX", "tflite": "a TFLite"}

_PICKLE = re.compile(rb"\x80[\x02-\x05]|\(dp|\(lp|c[a-z_.]+\n", re.DOTALL)


def sniff(head: bytes) -> Runtime | None:
    """`tflite` by its FlatBuffers identifier, `onnx` by its protobuf fields 1 and 2..9, else None.

    Sources: tensorflow/lite/schema/schema.fbs (file_identifier "TFL3"); onnx.proto, ModelProto.
    """
    if head[4:8] == b"TFL3":
        return "tflite"
    if len(head) >= 4 and head[0] == 0x08 and 1 <= head[1] <= 0x7F and head[2] & 7 in (0, 2):
        return "onnx"
    return None


def check_model_file(path: Path, runtime: Runtime) -> None:
    """Raises PackageError unless the file looks like `runtime`'s format."""
    with path.open("rb") as file:
        head = file.read(SNIFF_BYTES)
    check_model_head(head, runtime, str(path))


def check_model_head(head: bytes, runtime: Runtime, source: str) -> None:
    """Raises PackageError unless `head`, a file's first SNIFF_BYTES, looks like `runtime`'s format."""
    if sniff(head) == runtime:
        return
    if _PICKLE.match(head):
        what = "a Python pickle, which can run code when loaded"
    elif head[:4] == b"PK\x03\x04":
        what = "a ZIP archive (TorchScript, Keras or NumPy), which is not accepted"
    elif not head:
        what = "empty"
    else:
        what = f"not {_NAMES[runtime]} model"
    raise PackageError(f"{source}: expected {_NAMES[runtime]} model, the file is {what}")
