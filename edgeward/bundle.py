"""The offline bundle: release metadata, models and desired states in one file, for a device without a network.

A plain ustar archive (POSIX.1-1988), so that `tar tvf` lists it, but in exactly one form: names of a fixed
pattern in a fixed order, every header byte decided by name and size, zeros between and nothing after. What
differs in one bit of that is no bundle, so a reader needs to understand no links, devices, paths or extensions.
Nothing in it is trusted for being in it: members carry the signatures that they carry online.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import stat
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgeward.errors import PackageError
from edgeward.storage import fsync_folder

SUFFIX = ".edgeward-bundle"
FORMAT_NAME = "format"
FORMAT = b"edgeward-bundle 1\n"

#: A bundle for a thousand devices has fewer.
MAX_MEMBERS = 20_000

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 18
_END = bytes(2 * _BLOCK)

#: What a member may be called; they stand in this order, and in order of their names.
_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        FORMAT_NAME,
        r"tuf/(?:timestamp|[1-9][0-9]{0,8}\.[a-z0-9][-a-z0-9]{0,62})\.json",
        r"desired/[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?\.json",
        r"manifests/[0-9a-f]{64}\.json",
        r"blobs/[0-9a-f]{64}",
    )
)
_SIZE = re.compile(rb"[0-7]{11}")


def metadata_name(file: str) -> str:
    """The member for a TUF metadata file (`timestamp.json`, `7.targets.json`)."""
    return f"tuf/{file}"


def desired_name(device: str) -> str:
    return f"desired/{device}.json"


def manifest_name(digest: str) -> str:
    return f"manifests/{digest}.json"


def blob_name(digest: str) -> str:
    return f"blobs/{digest}"


def order(name: str) -> tuple[int, str]:
    """What members are sorted by. Raises PackageError when a bundle has no member of this name."""
    for rank, pattern in enumerate(_NAMES):
        if pattern.fullmatch(name):
            return rank, name
    raise PackageError(f"{name[:100]!r} has no place in a bundle")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    try:
        return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except ValueError:
        raise PackageError(f"{name}: {size} bytes do not fit into a bundle") from None


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


@dataclass(frozen=True)
class Source:
    """A member to be written: `size` bytes, which `chunks` must bring exactly."""

    name: str
    size: int
    chunks: Iterable[bytes]


def write_bundle(path: Path, members: Iterable[Source]) -> int:
    """Write a bundle beside `path` and rename it once it is whole; its size in bytes.

    `members` come in their order, without the format's own. Raises PackageError when they do not, or when
    one brings other than its size; whatever is raised, `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            last = order(FORMAT_NAME)
            _append(file, Source(FORMAT_NAME, len(FORMAT), [FORMAT]))
            for member in members:
                if order(member.name) <= last:
                    raise PackageError(f"{member.name} stands twice, or out of its order")
                last = order(member.name)
                _append(file, member)
            file.write(_END)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return size


def _append(file: BinaryIO, member: Source) -> None:
    file.write(_header(member.name, member.size))
    written = 0
    for chunk in member.chunks:
        written += file.write(chunk)
    if written != member.size:
        raise PackageError(f"{member.name}: got {written} bytes, announced were {member.size}")
    file.write(_padding(member.size))


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int


class Bundle:
    """A bundle's members by name; their contents are read when they are asked for, never all at once.

    Raises PackageError, also of the methods, for what is not a whole bundle or cannot be read.
    """

    def __init__(self, file: BinaryIO, source: str) -> None:
        self._file = file
        self._source = source
        self._members: dict[str, _Member] = {}
        self._scan()

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def size(self, name: str) -> int | None:
        """A member's size in bytes; None when it is not there."""
        member = self._members.get(name)
        return None if member is None else member.size

    def read(self, name: str, limit: int) -> bytes:
        """A member of at most `limit` bytes."""
        size = self._need(name).size
        if size > limit:
            raise self._bad(f"{name} has {size} bytes, at most {limit} are allowed")
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """A member's bytes, piece by piece."""
        member = self._need(name)
        at, end = member.offset, member.offset + member.size
        while at < end:
            chunk = self._read(at, min(_CHUNK, end - at))
            yield chunk
            at += len(chunk)

    def _need(self, name: str) -> _Member:
        member = self._members.get(name)
        if member is None:
            raise self._bad(f"it lacks {name}")
        return member

    def _bad(self, problem: str) -> PackageError:
        hint = "copy it again, or export it anew: `edgeward bundle export`"
        return PackageError(f"{self._source}: {problem}", hint=hint)

    def _read(self, at: int, count: int) -> bytes:
        try:
            self._file.seek(at)
            data = self._file.read(count)
        except OSError as error:
            hint = "is the medium still there?"
            raise PackageError(f"{self._source}: cannot be read: {error.strerror}", hint=hint) from None
        if len(data) != count:
            raise self._bad(f"it ends at byte {at + len(data)}, in the middle")
        return data

    def _scan(self) -> None:
        """Every header and all that stands between the members, held against what a bundle must have there."""
        total = self._file.seek(0, io.SEEK_END)
        if total < _BLOCK or self._read(0, _BLOCK) != _header(FORMAT_NAME, len(FORMAT)):
            raise self._bad("not an Edgeward bundle")
        at, last = 0, (-1, "")
        while (block := self._read(at, _BLOCK)) != bytes(_BLOCK):
            if len(self._members) == MAX_MEMBERS:
                raise self._bad(f"it has more than {MAX_MEMBERS} members")
            name, size = self._parse(block, at)
            if order(name) <= last:
                raise self._bad(f"{name} stands twice, or out of its order")
            last, start = order(name), at + _BLOCK
            at = start + size
            padding = _padding(size)
            if at + len(padding) + len(_END) > total:
                raise self._bad(f"it ends in the middle of {name}, which is said to have {size} bytes")
            if self._read(at, len(padding)) != padding:
                raise self._bad(f"{name} is followed by other than zeros")
            at += len(padding)
            self._members[name] = _Member(start, size)
        if total != at + len(_END) or self._read(at, len(_END)) != _END:
            raise self._bad("something stands behind its end")
        if self.read(FORMAT_NAME, len(FORMAT)) != FORMAT:
            raise self._bad("a bundle of another version than this agent knows")

    def _parse(self, block: bytes, at: int) -> tuple[str, int]:
        name = block[:100].rstrip(b"\0").decode("ascii", errors="backslashreplace")
        try:
            order(name)
        except PackageError as error:
            raise self._bad(error.message) from None
        digits = block[124:135]
        if not _SIZE.fullmatch(digits) or _header(name, int(digits, 8)) != block:
            raise self._bad(f"the header of {name} at byte {at} is damaged, or not that of a plain file")
        return name, int(digits, 8)


@contextlib.contextmanager
def open_bundle(path: Path) -> Iterator[Bundle]:
    """Raises PackageError when `path` cannot be opened or is not a bundle."""
    try:
        # Non-blocking, so that a pipe of that name cannot hold us.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PackageError(f"{path}: cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PackageError(f"{path}: not a file")
    with os.fdopen(fd, "rb") as file:
        yield Bundle(file, str(path))
