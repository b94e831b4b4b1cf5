"""What is on the disk of a device, and what is removed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.fetch import BlobStore
from agent.verify import Verifier
from edgeward.errors import EdgewardError
from edgeward.storage import sha256_hex
from edgeward.wire import API_VERSION
from edgeward.wire.desired import ModelRef
from edgeward.wire.package import Blob, Golden, Lineage, Manifest, Variant


def test_a_models_blobs_stay_with_its_manifest_and_what_is_still_to_come(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    nothing: Any = None
    verifier = Verifier(tmp_path / "tuf", b"", blobs, nothing, nothing)
    refs = {}
    for version in (1, 2):
        content, golden = b"\x08\x08\x12\x04test%d" % version, b"golden%d" % version
        for data in (content, golden):
            blobs.path(sha256_hex(data)).write_bytes(data)
        manifest = Manifest(
            API_VERSION, "m", version, "2026-11-24T00:00:00Z", [],
            [Variant("only", "onnx", Blob(sha256_hex(content), len(content)), [], [])],
            Golden(Blob(sha256_hex(golden), len(golden)), 1e-5, 1e-4),
            Lineage("test", {}, "none", "0" * 64, 1, "all", {}),
        )  # fmt: skip
        raw = msgspec.json.encode(manifest)
        blobs.path(sha256_hex(raw)).write_bytes(raw)
        refs[version] = ModelRef("m", version, sha256_hex(raw))
    coming = ModelRef("m", 3, sha256_hex(b"coming"))
    blobs.path(coming.digest).with_suffix(".part").write_bytes(b"com")
    before = {path.name for path in blobs.folder.iterdir()}
    assert verifier.collect(dict.fromkeys(refs.values())) == 3 and len(before) == 7
    blobs.path(coming.digest).with_suffix(".part").write_bytes(b"com")
    blobs.path(refs[1].digest).write_bytes(b"damaged")
    with pytest.raises(EdgewardError):
        verifier.collect(dict.fromkeys(refs.values()))
    assert len(list(blobs.folder.iterdir())) == 6, (
        "what is not known to be old stays; the damaged one is gone"
    )
    assert verifier.collect({refs[2]: None, coming: None}) > 0
    left = {path.name for path in blobs.folder.iterdir()}
    assert left == {
        refs[2].digest, sha256_hex(b"\x08\x08\x12\x04test2"), sha256_hex(b"golden2"), f"{coming.digest}.part",
    }  # fmt: skip
    # Of which no variant is needed: what says what it was stays, and what it was tested with.
    assert verifier.collect({refs[2]: set()}) > 0
    left = {path.name for path in blobs.folder.iterdir()}
    assert left == {refs[2].digest, sha256_hex(b"golden2")}
