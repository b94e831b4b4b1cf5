"""Power cuts at every call of a device's life with its models: see tests/faults/disk/.

Whatever of the un-fsynced writes and names is lost, the device runs the model that it last told of or its
successor, never a damaged one; what it has accepted (generation, verdicts, release metadata) never goes back.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata
from tuf.ngclient.fetcher import FetcherInterface

from agent.fetch import BlobStore
from agent.imports import Imports
from agent.release_metadata import MetadataRefused, refresh
from agent.runtime.engine import Engine
from agent.state import State
from agent.trusted_clock import TrustedClock
from agent.verify import Verifier
from edgeward.client.transport import Transport
from edgeward.clock import SystemClock
from edgeward.storage import sha256_file
from tests.faults.disk.device import Device
from tests.faults.disk.harness import compiled, cut_everywhere, record
from tests.faults.disk.replay import Disk, Record, crash_states, materialise

NOWHERE = "http://127.0.0.1:9"
#: The timestamp's version in the copy that was kept: two versions are released.
OLD = 3


@dataclass
class Life:
    """What was recorded of a device, and what its releaser served at different times."""

    records: list[Record]
    folder: Path
    side: Path
    scratch: Path
    root: bytes = b""
    facts: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    base = tmp_path_factory.mktemp("life")
    recorder = compiled(base)
    folder, side = base / "device", base / "side"
    command = [sys.executable, "-m", "tests.faults.disk.rollout", str(folder), str(side)]
    records = record(recorder, folder, command, base / "log")
    facts = [msgspec.json.decode(entry.data) for entry in records if entry.op == "m"]
    root = (side / "root.json").read_bytes()
    # In memory where there is some: what is opened thousands of times is fsynced as often.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as scratch:
        yield Life(records, folder, side, Path(scratch) / "device", root, facts)


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Engine]:
    engine = Engine()
    engine.start()
    yield engine
    engine.stop()


class _Copy(FetcherInterface):
    """Somebody on the link who serves the metadata of an earlier time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self._folder / url.rpartition("/")[2]
        if not path.is_file():
            raise DownloadHTTPError("there is none", 404)
        yield path.read_bytes()


class _Checker:
    """Opens what is left as an agent's start does."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._offline = Transport(NOWHERE)

    def __call__(self, number: int, marks: list[bytes], folder: Path) -> None:
        told: dict[str, Any] = {}
        for text in marks:
            told |= msgspec.json.decode(text)
        self._metadata(folder, told)
        state = State(folder / "state.db")
        try:
            self._state(state, told, len(marks))
            self._models(state, folder)
        finally:
            state.close()
        if told.get("imported"):
            self._import(folder)

    def _state(self, state: State, told: dict[str, Any], marks: int) -> None:
        kept = state.slots().get("default")
        running = kept.running.version if kept is not None and kept.running else None
        coming = [fact["running"] for fact in self._life.facts[marks:] if "running" in fact]
        now = told.get("running")
        after = next((version for version in coming if version != now), now)
        assert running in (now, after), f"runs {running}, told {now}, then {after}"
        assert state.generation() >= told.get("generation", 0), "the generation went back"
        assert set(state.quarantined()) >= set(told.get("quarantined", ())), "a verdict is gone"
        assert state.time_floor() >= told.get("floor", 0.0), "the time floor went back"
        assert state.next_boot() > told.get("boot", 0), "a boot's number came again"

    def _models(self, state: State, folder: Path) -> None:
        for kept in state.slots().values():
            for ref in (kept.running, kept.previous):
                if ref is None:
                    continue
                clock = TrustedClock(SystemClock(), state)
                blobs = BlobStore(folder / "blobs", reserve=0)
                verifier = Verifier(folder / "tuf", self._life.root, blobs, self._offline, clock)
                manifest = verifier.reopen_manifest(ref)
                verifier.open(ref, manifest, manifest.variants[0])

    def _metadata(self, folder: Path, told: dict[str, Any]) -> None:
        for role, version in told.get("tuf", {}).items():
            left = Metadata[Any].from_bytes((folder / "tuf" / f"{role}.json").read_bytes()).signed
            assert left.version >= version, f"{role} went from version {version} back to {left.version}"

    def _import(self, folder: Path) -> None:
        """Whole where it was received, or some of it in the store already."""
        found = Imports(folder).newest()
        assert found is not None, "an import is gone"
        for path in (found.folder / "blobs").iterdir():
            assert sha256_file(path) == path.name


def test_the_log_holds_everything_that_reached_the_folder(life: Life) -> None:
    """Else a cut would be of another program: with all of it done, the folder is the one that is there."""
    disk = Disk()
    for entry in life.records:
        disk.apply(entry)
    left = disk.now()
    there = {str(path.relative_to(life.folder)): path for path in life.folder.rglob("*")}
    assert set(left) == set(there)
    for name, content in left.items():
        if isinstance(content, bytes):
            assert there[name].read_bytes() == content, name


def test_a_cut_at_any_call_leaves_a_verified_model_and_takes_nothing_back(life: Life) -> None:
    cuts = cut_everywhere(life.records, _Checker(life), life.scratch, variants=8)
    assert not cuts.wrong, "\n".join(f"{number}: {what}" for number, what in cuts.wrong)
    assert cuts.states >= 2000, cuts.states


@pytest.mark.long
def test_nor_in_a_hundred_ways_for_each_call(life: Life) -> None:
    cuts = cut_everywhere(life.records, _Checker(life), life.scratch, variants=100)
    assert not cuts.wrong, "\n".join(f"{number}: {what}" for number, what in cuts.wrong)


def test_a_device_starts_from_what_is_left_offline_and_refuses_older_metadata(
    life: Life, shared_engine: Engine
) -> None:
    seen: set[int | None] = set()
    refused = 0
    for number, marks, left in list(crash_states(life.records, 2))[::10]:
        materialise(left, life.scratch, lambda name: name.endswith("-shm"))
        told: dict[str, Any] = {}
        for text in marks:
            told |= msgspec.json.decode(text)
        device = Device(life.scratch, NOWHERE, life.root, shared_engine, SystemClock())
        device.start()
        try:
            seen.add(version := device.running())
            assert version is not None or told.get("running") is None, (
                f"cut after call {number}: no model runs"
            )
            if version is not None:
                assert device.answer() == version
            if told.get("tuf", {}).get("timestamp", 0) > OLD:
                clock = TrustedClock(SystemClock(), device.state)
                with pytest.raises(MetadataRefused):
                    refresh(life.scratch / "tuf", NOWHERE, _Copy(life.side / "old"), life.root, clock)
                refused += 1
        finally:
            device.close()
    assert seen == {None, 1, 2, 3, 4} and refused > 10


#: The fsyncs without which a device would not survive, by (below, of a folder).
DEFENCES: dict[str, Callable[[str, bool], bool]] = {
    "a blob's bytes": lambda path, is_folder: path.startswith("blobs/"),
    "a blob's name": lambda path, is_folder: path == "blobs",
    "the names of what is in the agent's folder": lambda path, is_folder: path == ".",
    "synchronous=FULL": lambda path, is_folder: path.startswith("state.db"),
    "the metadata's bytes": lambda path, is_folder: path.startswith("tuf/") and not is_folder,
    "the metadata's names": lambda path, is_folder: path == "tuf",
    "an import's bytes": lambda path, is_folder: path.startswith("imports/") and not is_folder,
    "the names in an import": lambda path, is_folder: path.startswith("imports/") and is_folder,
    "an import's name": lambda path, is_folder: path == "imports",
    "every folder": lambda path, is_folder: is_folder,
    "every file": lambda path, is_folder: not is_folder,
}


@pytest.mark.parametrize("defence", DEFENCES)
def test_without_one_of_its_fsyncs_a_cut_does_harm(life: Life, defence: str) -> None:
    """The control: the same cuts, with some fsyncs that did nothing."""
    cuts = cut_everywhere(life.records, _Checker(life), life.scratch, 4, forgets=DEFENCES[defence], enough=1)
    assert cuts.wrong, f"nothing needs {defence}"


def test_an_fsync_after_the_rename_is_too_late(life: Life) -> None:
    """The control for the order of the two: an empty file under the final name."""
    late = [*life.records]
    for at, entry in enumerate(late):
        if entry.op == "s" and late[at + 1].op == "r" and late[at + 1].path == entry.path:
            late[at], late[at + 1] = late[at + 1], replace(entry, path=late[at + 1].more)
    assert late != life.records
    assert cut_everywhere(late, _Checker(life), life.scratch, 4, enough=1).wrong
