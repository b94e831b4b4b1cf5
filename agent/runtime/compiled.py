"""Compiled forms of a model on disk: optimised graphs, accelerator engines. Built once, checked at each use.

A form is only used when its SHA-256 is the one recorded when it was made. That finds what a power cut or
a worn flash left half written; someone who may write to the folder is kept out by its mode, not by this.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

#: Providers that keep their compiled forms in a folder, by themselves.
INTO_FOLDER = frozenset(
    {
        "TensorrtExecutionProvider",
        "OpenVINOExecutionProvider",
        "MIGraphXExecutionProvider",
        "CoreMLExecutionProvider",
    }
)
#: Providers that hand their compiled form to onnxruntime, which writes it into a model file (`EPContext` nodes).
INTO_MODEL = frozenset({"QNNExecutionProvider"})


def key(*parts: str | bytes) -> str:
    """What a form depends on (model, provider, runtime version), as 32 hex digits."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()[:32]


def processor(root: Path = Path("/")) -> str:
    """The CPU's architecture and what it can do, as the kernel states it."""
    try:
        lines = (root / "proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    able = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {able.partition(':')[2].strip()}"


def _replace(path: Path, data: bytes) -> None:
    """Write all of it or nothing."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


class CompiledFile:
    """One form in one file, `{folder}/{name}`; its digest lies beside it as `{name}.sha256`."""

    def __init__(self, folder: Path, name: str) -> None:
        """Makes the folder, for its owner only. Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / name
        self._record = folder / f"{name}.sha256"
        #: Where the runtime is to write a new form; `keep` makes it the form.
        self.draft = folder / f".{os.getpid()}.{name}"

    def read(self) -> bytes | None:
        """The form, or None when there is none or it is not what was kept."""
        try:
            data = self.path.read_bytes()
            record = self._record.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        if hashlib.sha256(data).hexdigest() != record:
            log.warning("%s is not what was kept there: it is made again", self.path)
            return None
        return data

    def keep(self) -> bool:
        """Take what the runtime wrote; False when it wrote nothing, or there is no room for it."""
        try:
            data = self.draft.read_bytes()
            # Between the two the old record refuses the new form, which is made again then.
            _replace(self.path, data)
            _replace(self._record, hashlib.sha256(data).hexdigest().encode())
        except OSError:
            return False
        finally:
            self.discard()
        return True

    def discard(self) -> None:
        """Forget an unfinished draft. One that the disk does not let go of must not cost the model."""
        with contextlib.suppress(OSError):
            self.draft.unlink(missing_ok=True)


class CompiledFolder:
    """Forms that a runtime writes and reads by itself (TensorRT engines): checked before it may read them.

    `seal` records every file's SHA-256; opening a folder whose files differ from the record empties it.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = path
        self._record = path.with_name(f"{path.name}.sha256")
        found = self._digests()
        if found and found != self._recorded():
            log.warning("%s does not hold what was kept there: it is made again", path)
            shutil.rmtree(path)
            path.mkdir(mode=0o700)

    def _digests(self) -> dict[str, str]:
        return {
            str(file.relative_to(self.path)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(self.path.rglob("*"))
            if file.is_file()
        }

    def _recorded(self) -> dict[str, str]:
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=dict[str, str])
        except (OSError, msgspec.DecodeError):
            return {}

    def seal(self) -> None:
        """Record what the runtime has written by now."""
        try:
            _replace(self._record, msgspec.json.encode(self._digests()))
        except OSError as error:
            log.warning("cannot keep %s: %s", self.path, error)
