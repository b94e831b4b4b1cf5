"""Clocks that lie: ten years ahead, ten behind, 1970 at boot. Real TUF metadata, real durable state.

Expired metadata is never accepted when signed evidence on the device proves it expired, and no wrong clock
locks the device out for longer than it is wrong.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata, Root, Targets, Timestamp
from tuf.ngclient.fetcher import FetcherInterface

from agent.desired import check
from agent.release_metadata import MetadataExpired, refresh
from agent.state import State
from agent.trusted_clock import ASK_EVERY, KEEP_EVERY, LATEST, TrustedClock, lower
from controller.artifacts import FolderArtifacts
from controller.releases import SNAPSHOT_LIFETIME, TIMESTAMP_LIFETIME, Releases
from edgeward.clock import ManualClock
from edgeward.errors import TrustError, Unavailable
from edgeward.identifiers import DeviceName
from edgeward.trust import dsse, keys
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState
from edgeward.wire.desired import encode as encode_desired
from edgeward.wire.signed_time import TUF_FIELD

DAY = 86400.0
YEAR = 365 * DAY
ME = DeviceName("north", "turbine-1")


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=0)


class Server(FetcherInterface):
    """What answers on the line: the controller's metadata of now, or a copy that somebody kept."""

    def __init__(self, folder: Path, *, targets_life: float = 8 * YEAR) -> None:
        self.clock = ManualClock()
        self.folder = folder / "served"
        self.releases = Releases(
            self.folder, folder / "keys", FolderArtifacts(folder / "artifacts"), self.clock
        )
        self.root_signer, self.targets_signer = (CryptoSigner(keys.generate_key()) for _ in range(2))
        root = Root(version=1, expires=at(self.clock.now() + 20 * YEAR))
        root.add_key(self.root_signer.public_key, "root")
        root.add_key(self.targets_signer.public_key, "targets")
        for role in ("snapshot", "timestamp"):
            root.add_key(self.releases._signer.public_key, role)
        self.root = self._signed(root, self.root_signer)
        targets = Targets(version=1, expires=at(self.clock.now() + targets_life))
        self.releases.install_root(self.root, self._signed(targets, self.targets_signer))
        self.desired_key = keys.generate_key()
        self.source = self.folder
        self._copies = folder / "copies"

    @staticmethod
    def _signed(signed: Root | Targets, signer: CryptoSigner) -> bytes:
        metadata = Metadata(signed)
        metadata.sign(signer)
        return metadata.to_bytes()

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = self.source / url.rpartition("/")[2]
        if not path.is_file():
            raise DownloadHTTPError("there is none", 404)
        yield path.read_bytes()

    def copy(self) -> Path:
        """All metadata of now, to be served again later."""
        made = self._copies / f"{self.clock.now():.0f}"
        shutil.copytree(self.folder, made, dirs_exist_ok=True)
        return made

    def desired(self, generation: int, issued_at: float | None = None) -> bytes:
        now = self.clock.now() if issued_at is None else issued_at
        state = DesiredState(ME.site, ME.device, generation, now, now + 7 * DAY, {}, [])
        return dsse.sign(encode_desired(state), PAYLOAD_TYPE, self.desired_key)


class Device:
    """What of a device has to do with time; `boot` is a start of the agent after any while without power."""

    def __init__(self, folder: Path, server: Server) -> None:
        self._folder = folder
        self._server = server
        self.state = State(folder / "state.db")
        self.generation = 0
        (folder / "tuf").mkdir()
        self.boot(server.clock.now())

    def boot(self, wall: float) -> None:
        self.machine = ManualClock(wall)
        self.clock = TrustedClock(self.machine, self.state)

    def close(self) -> None:
        self.state.close()

    def refresh(self) -> None:
        refresh(self._folder / "tuf", "http://controller/tuf/", self._server, self._server.root, self.clock)

    def accepts(self) -> bool:
        try:
            self.refresh()
        except Unavailable:
            return False
        return True

    def learn(self, raw: bytes) -> bool:
        """Whether the desired state was accepted."""
        trusted = [keys.public_pem(self._server.desired_key.public_key())]
        try:
            found = check(raw, trusted, ME, self.generation, self.clock)
        except TrustError:
            return False
        self.generation = found.generation if found else self.generation
        return found is not None

    def ask(self) -> None:
        self.clock.answered(self._server.clock.now(), self.clock.monotonic())


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.fixture
def device(tmp_path: Path, server: Server) -> Iterator[Device]:
    (tmp_path / "device").mkdir()
    made = Device(tmp_path / "device", server)
    yield made
    made.close()


def pass_time(seconds: float, server: Server, device: Device) -> None:
    server.clock.advance(seconds)
    device.machine.advance(seconds)


@pytest.mark.parametrize("wall", [0.0, ManualClock().now() - 10 * YEAR, -1e9])
def test_a_clock_that_is_behind_does_not_revive_old_metadata(
    wall: float, server: Server, device: Device, tmp_path: Path
) -> None:
    old = server.copy()
    server.clock.advance(3 * DAY)
    server.releases.refresh()
    assert device.learn(server.desired(1))
    device.boot(wall)
    server.source = old
    assert not device.accepts(), "three days old, and the desired state proves that they have passed"
    assert device.clock.now() >= server.clock.now() - 1
    (tmp_path / "newcomer").mkdir()
    newcomer = Device(tmp_path / "newcomer", server)
    newcomer.boot(wall)
    assert newcomer.accepts(), "the control: without the floor it would have been taken"
    newcomer.close()
    server.source = server.folder
    assert device.accepts()


@pytest.mark.parametrize("years", [10, 100, 1e6])
def test_a_clock_that_is_ahead_locks_nobody_out(years: float, server: Server, device: Device) -> None:
    device.learn(server.desired(1))
    device.boot(server.clock.now() + years * YEAR)
    with pytest.raises(MetadataExpired, match=r"expired.*clock right"):
        device.refresh()
    for _ in range(3):
        device.clock.keep()
        pass_time(KEEP_EVERY + 1, server, device)
    assert device.state.time_floor() <= server.clock.now(), "the wall clock has not moved the floor"
    # Either of the two makes it well again: the controller's word, or the clock put right.
    device.ask()
    assert abs(device.clock.now() - server.clock.now()) < 60
    assert device.accepts()
    device.boot(server.clock.now() + years * YEAR)
    assert not device.accepts()
    device.machine.set_wall(server.clock.now())
    assert device.accepts()


def test_what_the_timestamp_proves_counts_against_the_rest(tmp_path: Path) -> None:
    """The targets have expired; a device without any idea of the time learns it from the timestamp."""
    server = Server(tmp_path, targets_life=30 * DAY)
    (tmp_path / "device").mkdir()
    device = Device(tmp_path / "device", server)
    server.clock.advance(40 * DAY)
    server.releases.refresh()
    device.boot(0.0)
    assert not device.accepts()
    assert device.state.time_floor() >= 1_700_000_000 + 40 * DAY
    device.close()


def test_an_older_timestamp_without_its_time_is_taken(server: Server, device: Device) -> None:
    path = server.folder / "timestamp.json"
    metadata: Metadata[Timestamp] = Metadata.from_bytes(path.read_bytes())
    assert metadata.signed.unrecognized_fields.pop(TUF_FIELD) == int(server.clock.now())
    metadata.sign(server.releases._signer)
    path.write_bytes(metadata.to_bytes())
    assert device.accepts()


def test_desired_states_are_judged_by_what_they_prove_themselves(server: Server, device: Device) -> None:
    stale = server.desired(2)
    server.clock.advance(10 * DAY)
    device.boot(0.0)
    assert device.learn(server.desired(1)), "the clock of 1970 is no reason to refuse"
    assert not device.learn(stale), "and does not help what has expired by the first"
    assert device.learn(server.desired(3))


def test_evidence_from_a_controller_that_was_ahead_is_taken_back_by_its_answer(
    server: Server, device: Device
) -> None:
    device.learn(server.desired(1, issued_at=server.clock.now() + 10 * YEAR))
    device.boot(server.clock.now())
    assert not device.accepts()
    device.ask()
    assert device.accepts()
    device.boot(0.0)
    assert device.accepts(), "durably"
    device.learn(server.desired(2, issued_at=1e300))
    assert device.clock.now() < LATEST, "what is no time is no evidence"


def test_the_floor_rises_with_the_time_that_the_agent_runs(server: Server, device: Device) -> None:
    device.learn(server.desired(1))
    old = server.copy()
    device.boot(0.0)
    for _ in range(48):
        pass_time(KEEP_EVERY, server, device)
        device.clock.keep()
    device.boot(0.0)
    server.source = old
    assert not device.accepts(), "two days have passed since, as the monotonic clock has seen"
    assert device.state.time_floor() <= server.clock.now()


def test_it_asks_when_it_must(server: Server, device: Device) -> None:
    assert device.clock.should_ask(), "after a start"
    device.ask()
    assert not device.clock.should_ask()
    pass_time(ASK_EVERY, server, device)
    assert device.clock.should_ask(), "each hour"
    device.ask()
    device.machine.set_wall(0.0)
    assert device.clock.should_ask(), "after a jump"
    device.ask()
    assert not device.clock.should_ask(), "a clock that stays wrong is no reason to ask each minute"
    device.learn(server.desired(1, issued_at=server.clock.now() + DAY))
    assert device.clock.should_ask(), "when evidence refutes the answer: this machine was suspended"


def test_a_full_disk_costs_only_the_memory_of_it(server: Server, device: Device) -> None:
    device.state.close()
    device.learn(server.desired(1))
    assert device.clock.now() >= server.clock.now()


@dataclass
class Copy:
    folder: Path
    expires: float


class Clocks(RuleBasedStateMachine):
    """True time is the server's. Whatever the device's wall clock does and whatever is replayed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "device").mkdir()
        self.server = Server(self.folder)
        self.device = Device(self.folder / "device", self.server)
        self.copies: list[Copy] = []
        self.states: list[tuple[float, bytes]] = []
        self.generation = 0
        self.proven = 0.0
        """The latest time that a trusted signature has proven to the device."""

    def teardown(self) -> None:
        self.device.close()
        shutil.rmtree(self.folder)

    @property
    def now(self) -> float:
        return self.server.clock.now()

    @rule(seconds=st.sampled_from([1.0, 3600.0, DAY, 9 * DAY]), powered=st.booleans())
    def time_passes(self, seconds: float, powered: bool) -> None:
        if powered:
            pass_time(seconds, self.server, self.device)
            self.device.clock.keep()
        else:
            self.server.clock.advance(seconds)
            self.device.boot(self.device.machine.now())
        self.server.releases.refresh()

    walls = st.sampled_from([0.0, 1e6, -10 * YEAR, 10 * YEAR, 1000.0, 0.5, 1e12])

    @rule(wall=walls, boot=st.booleans(), relative=st.booleans())
    def the_wall_clock_jumps(self, wall: float, boot: bool, relative: bool) -> None:
        wall += self.now if relative else 0.0
        if boot:
            self.device.boot(wall)
        else:
            self.device.machine.set_wall(wall)

    @rule()
    def somebody_keeps_a_copy(self) -> None:
        first = min(TIMESTAMP_LIFETIME, SNAPSHOT_LIFETIME)
        signed = Metadata[Timestamp].from_bytes((self.server.folder / "timestamp.json").read_bytes()).signed
        assert signed.expires.timestamp() <= self.now + first
        self.copies.append(Copy(self.server.copy(), signed.expires.timestamp()))

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def a_copy_is_served(self, data: st.DataObject) -> None:
        copy = data.draw(st.sampled_from(self.copies))
        self.server.source = copy.folder
        accepted = self.device.accepts()
        self.server.source = self.server.folder
        assert not (accepted and copy.expires <= self.proven), "expired by evidence"

    @rule()
    def the_controllers_metadata_is_served(self) -> None:
        if self.device.accepts():
            timestamp = Metadata[Timestamp].from_bytes((self.server.folder / "timestamp.json").read_bytes())
            self.proven = max(self.proven, timestamp.signed.unrecognized_fields[TUF_FIELD])

    @rule(keep=st.booleans())
    def a_desired_state_comes(self, keep: bool) -> None:
        self.generation += 1
        raw = self.server.desired(self.generation)
        if keep:
            self.states.append((self.now, raw))
        else:
            self.device.learn(raw)
            self.proven = max(self.proven, self.now)

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def a_kept_state_comes(self, data: st.DataObject) -> None:
        issued_at, raw = data.draw(st.sampled_from(self.states))
        accepted = self.device.learn(raw)
        assert not (accepted and issued_at + 7 * DAY < self.proven), "expired by evidence"
        self.proven = max(self.proven, issued_at)

    @rule(late=st.sampled_from([0.0, 0.2, 15.0]))
    def it_asks(self, late: float) -> None:
        asked, signed = self.device.clock.monotonic(), self.now
        pass_time(late, self.server, self.device)
        self.device.clock.answered(signed, asked)
        self.proven = max(self.proven, signed)
        assert abs(self.device.clock.now() - self.now) <= 75.0 + 1

    @rule()
    def nobody_is_locked_out(self) -> None:
        self.it_asks(0.0)
        assert self.device.accepts(), "the controller's answer and its metadata of now are enough"
        self.generation += 1
        assert self.device.learn(self.server.desired(self.generation))
        self.proven = max(self.proven, self.now)

    @rule()
    def nor_when_the_clock_is_put_right(self) -> None:
        self.device.boot(self.now)
        assert self.device.accepts(), "without any answer"

    @invariant()
    def the_floor_is_never_ahead_of_the_true_time(self) -> None:
        assert self.device.state.time_floor() <= self.now
        assert lower(self.device.clock._known, self.device.machine.monotonic()) <= self.now + 1e-3
        assert self.device.clock.now() >= self.proven - 1


Clocks.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
test_no_sequence_of_clocks_and_replays_breaks_it = Clocks.TestCase
