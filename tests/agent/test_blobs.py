"""What is on the disk of a device, and what is removed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.fetch import BlobStore
from agent.verify import Verifier
from edgeward.clock import SystemClock
from edgeward.errors import EdgewardError
from edgeward.storage import sha256_hex


def test_a_dropped_blob_is_gone_with_what_had_arrived_of_it(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    lost, kept, partial = (sha256_hex(name) for name in (b"lost", b"kept", b"partial"))
    blobs.path(lost).write_bytes(b"lost")
    blobs.path(kept).write_bytes(b"kept")
    blobs.path(partial).with_suffix(".part").write_bytes(b"par")
    nothing: Any = None
    verifier = Verifier(tmp_path / "tuf", b"", blobs, nothing, SystemClock())
    verifier.drop([lost, partial, sha256_hex(b"never here")])
    assert [path.name for path in blobs.folder.iterdir()] == [kept]
    with pytest.raises(EdgewardError):
        verifier.drop(["../tuf"])
    assert (tmp_path / "tuf").is_dir()
