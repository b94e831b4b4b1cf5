"""Which execution providers and delegates the installed runtimes have, without importing them here.

onnxruntime costs 30 MB of memory, which the agent's own process does without: a child is asked, once per
installed version.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from agent.runtime.port import installed

log = logging.getLogger(__name__)

#: Seconds. On a slow device with a cold disk, importing onnxruntime takes several.
_TIMEOUT = 60.0
_ASK = "import json, onnxruntime; print(); print(json.dumps(onnxruntime.get_available_providers()))"
_CACHE = "providers.json"
_LIBRARIES = ("lib", "usr/lib", "usr/local/lib", "lib/*", "usr/lib/*-linux-*")

_known: dict[str, list[str]] = {}


class _Kept(msgspec.Struct):
    version: str
    providers: list[str]


def _version() -> str:
    """Of onnxruntime as installed, so that another build of the same version is another one; empty: none."""
    version = installed().get("onnx", "")
    spec = importlib.util.find_spec("onnxruntime") if version else None
    if spec is None or not spec.origin:
        return ""
    changed = ""
    with contextlib.suppress(OSError):
        changed = str(Path(spec.origin).stat().st_mtime_ns)
    return f"{version} {spec.origin} {changed}"


def _read(folder: Path, version: str) -> list[str] | None:
    try:
        kept = msgspec.json.decode((folder / _CACHE).read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return kept.providers if kept.version == version else None


def _write(folder: Path, version: str, providers: list[str]) -> None:
    draft = folder / f".{_CACHE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(msgspec.json.encode(_Kept(version, providers)))
        draft.replace(folder / _CACHE)
    except OSError as error:
        log.warning("cannot keep what onnxruntime can use: %s", error)


def _ask() -> list[str] | None:
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", _ASK],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT, check=False,
        )  # fmt: skip
        if answer.returncode == 0:
            return msgspec.json.decode(answer.stdout.splitlines()[-1], type=list[str])
        why = (answer.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        log.warning("onnxruntime cannot be asked for its providers: %s", why)
    except (OSError, subprocess.TimeoutExpired, msgspec.DecodeError, IndexError) as error:
        log.warning("onnxruntime cannot be asked for its providers: %s", error)
    return None


def _onnx(folder: Path | None) -> list[str]:
    version = _version()
    if not version:
        return []
    if version in _known:
        return _known[version]
    found = _read(folder, version) if folder is not None else None
    if found is None:
        found = _ask()
        if found is None:
            # Not kept: the next start asks again.
            return []
        if folder is not None:
            _write(folder, version, found)
    _known[version] = found
    return found


def _tflite(root: Path) -> list[str]:
    """Delegates whose library lies where the dynamic linker looks, and XNNPACK, which is built in."""
    if "tflite" not in installed():
        return []
    from agent.runtime.delegates import LIBRARIES

    found = [
        name
        for name, library in LIBRARIES.items()
        if any(next(root.glob(f"{place}/{library.file}"), None) is not None for place in _LIBRARIES)
    ]
    return [*found, "XNNPACK"]


def available(folder: Path | None = None, *, root: Path = Path("/")) -> list[str]:
    """Execution providers and delegates, as their runtimes name them.

    Waits for a child process the first time after an installation (about as long as onnxruntime's import);
    `folder` keeps its answer for later starts. Empty when the runtime cannot be asked.
    """
    return [*_onnx(folder), *_tflite(root)]
