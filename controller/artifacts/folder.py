"""Artifacts in a folder in which every file is named by its SHA-256."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controller.artifacts.store import MAX_ARTIFACT_BYTES, Upload
from edgeward.errors import NotFound
from edgeward.identifiers import check_digest
from edgeward.storage import fsync_folder, sha256_hex


class FolderArtifacts:
    def __init__(self, folder: Path, limit: int = MAX_ARTIFACT_BYTES) -> None:
        self._folder = folder
        self._limit = limit
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("incoming/*.part"):
            left.unlink()

    def receive(self, digest: str) -> Upload:
        """Raises InvalidDocument for an impossible digest."""

        def keep(path: Path) -> None:
            place = self._folder / digest[:2] / digest
            place.parent.mkdir(exist_ok=True)
            path.replace(place)
            fsync_folder(place.parent)
            fsync_folder(self._folder)

        return Upload(self._folder / "incoming", digest, self._limit, keep)

    def add(self, data: bytes) -> str:
        """Store bytes that are in memory already; their digest."""
        digest = sha256_hex(data)
        if not self.has(digest):
            upload = self.receive(digest)
            try:
                upload.write(data)
                upload.finish()
            finally:
                upload.abandon()
        return digest

    def has(self, digest: str) -> bool:
        return (self._folder / digest[:2] / check_digest(digest)).is_file()

    def path(self, digest: str) -> Path:
        """Raises NotFound."""
        if not self.has(digest):
            raise NotFound(f"there is no artifact {digest}")
        return self._folder / digest[:2] / digest

    def size(self, digest: str) -> int:
        return self.path(digest).stat().st_size

    @contextmanager
    def local(self, digest: str) -> Iterator[Path]:
        yield self.path(digest)

    def source(self, digest: str) -> Path:
        return self.path(digest)
