"""The folders that a power cut may leave, from a log of what a process asked of the disk.

After ALICE (Pillai et al., OSDI 2014) and the crash tests of SQLite, with POSIX taken at its word:

- of a file, only what an fsync of it covered is certain; of the writes and truncations since, none, all, the first
  few, or any may be there, the last of them torn between sectors, or the file's size without its bytes (zeros);
- of a folder, only the entries that an fsync *of the folder* covered are certain; of the changes since, none, all,
  the first few, or any may be there. A rename is atomic: both of its halves are there, or neither.

Bytes and names are independent: a file may have its new name and none of its bytes.
"""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

SECTOR = 512

_HEAD = struct.Struct("<cIIQQ")


@dataclass(frozen=True)
class Record:
    """One call. `op`: c(reate), t(runcate to `at`), w(rite `data` at `at`), r(ename `path` to `more`), u(nlink),
    d (mkdir), y (symlink to `more`), l(ink), s(ync), m(ark `data`)."""

    op: str
    path: str
    more: str
    at: int
    data: bytes


def read_log(path: Path, folder: Path) -> list[Record]:
    """The recorder's log, with paths relative to `folder` (`` is the folder itself)."""
    raw, at, found = path.read_bytes(), 0, []
    root = str(folder)
    while at < len(raw):
        op, first, second, offset, size = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        parts = []
        for length in (first, second, size):
            parts.append(raw[at : at + length])
            at += length
        name, more = parts[0].decode(), parts[1].decode()
        if name.endswith(" (deleted)"):
            continue
        kind = op.decode()
        found.append(
            Record(kind, _below(name, root), more if kind == "y" else _below(more, root), offset, parts[2])
        )
    return found


def _below(path: str, root: str) -> str:
    return str(PurePosixPath(path).relative_to(root)) if path else ""


@dataclass(eq=False)
class File:
    """`certain` bytes, and the writes since the last fsync as (offset, bytes), or (size, None) for a truncation."""

    certain: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)


@dataclass(eq=False)
class Link:
    """A symbolic link: its target comes with its name."""

    target: str


@dataclass(eq=False)
class Folder:
    """`live` entries as the process sees them, `certain` ones, and the changes since: (call, name, entry or None)."""

    live: dict[str, Entry] = field(default_factory=dict)
    certain: dict[str, Entry] = field(default_factory=dict)
    pending: list[tuple[int, str, Entry | None]] = field(default_factory=list)

    def set(self, call: int, name: str, entry: Entry | None) -> None:
        if entry is None:
            self.live.pop(name, None)
        else:
            self.live[name] = entry
        self.pending.append((call, name, entry))


Entry = File | Folder | Link


class Disk:
    """What is certain and what is under way after the calls so far; `apply` them in order.

    `forgets(path)` says which fsyncs have no effect: a defence that is taken away, for control tests.
    """

    def __init__(self, forgets: Callable[[str, bool], bool] = lambda path, is_folder: False) -> None:
        self.root = Folder()
        self._forgets = forgets
        self._call = 0
        #: Renames of which one folder's half is certain, and so is the other.
        self._settled: set[int] = set()

    def forgotten(self, records: Iterable[Record]) -> Iterator[int]:
        """The fsyncs that have no effect, by number; on a disk that nothing was applied to."""
        trial = Disk()
        for number, record in enumerate(records):
            if record.op == "s" and self._forgets(record.path, isinstance(trial.find(record.path), Folder)):
                yield number
            trial.apply(record)

    def apply(self, record: Record) -> None:
        self._call += 1
        match record.op:
            case "c":
                self._change(record.path, File())
            case "d":
                self._change(record.path, Folder())
            case "y":
                self._change(record.path, Link(record.more))
            case "u":
                self._change(record.path, None)
            case "l":
                self._change(record.more, self.find(record.path))
            case "r":
                entry = self.find(record.path)
                self._change(record.path, None)
                self._change(record.more, entry)
            case "w" | "t":
                file = self.find(record.path)
                assert isinstance(file, File), record.path
                file.pending.append((record.at, record.data if record.op == "w" else None))
            case "s":
                self._sync(record.path)

    def find(self, path: str) -> Entry:
        found: Entry = self.root
        for part in PurePosixPath(path).parts:
            assert isinstance(found, Folder), path
            found = found.live[part]
        return found

    def _change(self, path: str, entry: Entry | None) -> None:
        where = PurePosixPath(path)
        parent = self.find(str(where.parent))
        assert isinstance(parent, Folder)
        parent.set(self._call, where.name, entry)

    def _sync(self, path: str) -> None:
        found = self.find(path)
        if self._forgets(path, isinstance(found, Folder)):
            return
        if isinstance(found, File):
            found.certain = written(found.certain, found.pending)
        elif isinstance(found, Folder):
            found.certain = dict(found.live)
            self._settled.update(call for call, *_ in found.pending)
        else:
            raise AssertionError(f"fsync of a link: {path}")
        found.pending.clear()

    def crash(self, chance: random.Random) -> dict[str, bytes | str | None]:
        """One state that a power cut now may leave: bytes of files, targets of links, None for folders."""
        calls = sorted(self._uncertain(self.root, set()))
        kept = self._settled | set(some(calls, chance))
        left: dict[str, bytes | str | None] = {}
        self._walk(self.root, "", kept, chance, left, {})
        return left

    def now(self) -> dict[str, bytes | str | None]:
        """The folder as the process sees it."""
        left: dict[str, bytes | str | None] = {}

        def walk(folder: Folder, path: str) -> None:
            for name, entry in folder.live.items():
                if isinstance(entry, Folder):
                    left[path + name] = None
                    walk(entry, f"{path}{name}/")
                elif isinstance(entry, Link):
                    left[path + name] = entry.target
                else:
                    left[path + name] = written(entry.certain, entry.pending)

        walk(self.root, "")
        return left

    def _uncertain(self, folder: Folder, seen: set[int]) -> set[int]:
        """Every call that changed a folder that is or may be in the tree, and is not certain."""
        if id(folder) in seen:
            return set()
        seen.add(id(folder))
        found = {call for call, *_ in folder.pending}
        below = [*folder.certain.values(), *(entry for *_, entry in folder.pending)]
        for entry in below:
            if isinstance(entry, Folder):
                found |= self._uncertain(entry, seen)
        return found - self._settled

    def _walk(
        self,
        folder: Folder,
        path: str,
        kept: set[int],
        chance: random.Random,
        left: dict[str, bytes | str | None],
        bytes_of: dict[int, bytes],
    ) -> None:
        entries = dict(folder.certain)
        for call, name, entry in folder.pending:
            if call in kept:
                if entry is None:
                    entries.pop(name, None)
                else:
                    entries[name] = entry
        for name, entry in sorted(entries.items(), key=lambda item: item[0]):
            where = f"{path}{name}"
            if isinstance(entry, Folder):
                left[where] = None
                self._walk(entry, f"{where}/", kept, chance, left, bytes_of)
            elif isinstance(entry, Link):
                left[where] = entry.target
            else:
                # One file under two names has the same bytes under both.
                if id(entry) not in bytes_of:
                    bytes_of[id(entry)] = surviving(entry, chance)
                left[where] = bytes_of[id(entry)]


def some(calls: list[int], chance: random.Random) -> list[int]:
    """None, all, the first few, or any of them."""
    match chance.randrange(4):
        case 0:
            return []
        case 1:
            return calls
        case 2:
            return calls[: chance.randint(0, len(calls))]
        case _:
            return [call for call in calls if chance.random() < 0.5]


def written(before: bytes, writes: Iterable[tuple[int, bytes | None]]) -> bytes:
    content = bytearray(before)
    for at, data in writes:
        end = at if data is None else at + len(data)
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        if data is None:
            del content[at:]
        else:
            content[at:end] = data
    return bytes(content)


def surviving(file: File, chance: random.Random) -> bytes:
    """What may be left of a file's bytes."""
    writes = file.pending
    if not writes:
        return file.certain
    match chance.randrange(5):
        case 0:
            return file.certain
        case 1:
            return written(file.certain, writes)
        case 2:  # the first few, the last of them torn
            kept = writes[: chance.randint(1, len(writes))]
            at, data = kept[-1]
            if data is not None:
                sectors = -(-len(data) // SECTOR)
                kept = [*kept[:-1], (at, data[: chance.randint(0, sectors) * SECTOR])]
            return written(file.certain, kept)
        case 3:  # any of them, in any order on the disk
            return written(file.certain, [write for write in writes if chance.random() < 0.5])
        case _:  # its size, and zeros where bytes had not arrived
            size = len(written(file.certain, writes))
            return file.certain[:size].ljust(size, b"\0")


def crash_states(
    records: list[Record], variants: int, disk: Disk | None = None
) -> Iterator[tuple[int, list[bytes], dict[str, bytes | str | None]]]:
    """`variants` states for a cut after each call: the call's number, the marks before it, what is left.

    The same log gives the same states; states that cannot differ (nothing is under way) come once.
    """
    disk = disk or Disk()
    marks: list[bytes] = []
    for number, record in enumerate(records):
        if record.op == "m":
            marks.append(record.data)
        disk.apply(record)
        seen = set()
        for variant in range(variants):
            left = disk.crash(random.Random(f"{number}:{variant}"))
            key = hash(frozenset(left.items()))
            if key not in seen:
                seen.add(key)
                yield number, list(marks), left


def materialise(left: dict[str, bytes | str | None], folder: Path, ignore: Callable[[str], bool]) -> None:
    """Make `folder` be that state, without the files to `ignore`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in left.items():
        path = folder / name
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        elif not ignore(name):
            path.write_bytes(content)
