"""Agents of a site with the real controller, its certificates and its releases."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.fetch import BlobStore
from agent.peers import choice
from agent.peers.credentials import Credentials
from agent.peers.discovery import Directory
from agent.peers.figures import Figures, read_figures
from agent.peers.obtain import Peers
from agent.peers.server import Server
from agent.peers.settings import Address, Settings
from agent.state import State
from agent.trusted_clock import TrustedClock
from agent.verify import Verifier
from edgeward.broker import free_port
from edgeward.client.transport import Transport
from edgeward.errors import Unavailable
from edgeward.trust import keys, tokens
from edgeward.wire.desired import ModelRef
from tests.controller.bundles.carrying import Offline, agent, runs


class Member:
    """A device of the site as far as delivery goes."""

    def __init__(self, plant: Any, folder: Path, name: str) -> None:
        folder.mkdir()
        device = plant.enroll(name)
        clock = TrustedClock(plant.controller.clock, State(folder / "state.db"))
        (folder / "identity.key").write_bytes(keys.private_pem(device.key))
        ca = device.response.trust.ca
        credentials = Credentials(folder, device.name, ca, lambda: device.identity, clock.now)
        self.blobs = BlobStore(folder / "blobs", reserve=0)
        self.transport = Transport(plant.url, credential=lambda: tokens.mint(device.identity, clock.now()))
        self.figures = folder / "peers.json"

        def pause(seconds: float) -> bool:
            return self.server._stopped.wait(seconds)

        self.peers = Peers(self.blobs, self, credentials, clock, pause, Figures(self.figures))
        self.server = Server(
            Address("127.0.0.1", 0),
            self.blobs,
            credentials,
            clock,
            received=self.peers.received,
            wanted=self.peers.wanted,
        )
        self.server.start()
        self.verifier = Verifier(
            folder / "tuf",
            plant.client.trust()["tufRoot"].encode(),
            self.blobs,
            self.transport,
            clock,
            peers=self.peers,
        )
        self.directory = Directory(Settings(), clock)

    def addresses(self) -> list[Address]:
        return self.directory.addresses()

    def fetch(self, ref: ModelRef, earlier: list[ModelRef]) -> bytes:
        manifest = self.verifier.fetch_manifest(ref)
        self.verifier.fetch_blobs(manifest, manifest.variants[0], earlier)
        return self.verifier.open(ref, manifest, manifest.variants[0]).content

    def close(self) -> None:
        self.server.stop()
        self.transport.close()


@pytest.fixture
def members(plant: Any, tmp_path: Path) -> Iterator[list[Member]]:
    plant.begin()
    made = [Member(plant, tmp_path / f"d{number}", f"d{number}") for number in range(5)]
    places = Settings(static=tuple(member.server.address for member in made))
    for member in made:
        member.directory = Directory(places, plant.controller.clock)
    try:
        yield made
    finally:
        for member in made:
            member.close()


@pytest.fixture
def downloads(plant: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who was given a slot for a download by the controller."""
    given: list[str] = []
    slot: Callable[[str], Any] = plant.slots.slot

    @contextmanager
    def counted(holder: str) -> Iterator[Any]:
        with slot(holder) as held:
            given.append(holder)
            yield held

    monkeypatch.setattr(plant.slots, "slot", counted)
    return given


def test_a_release_crosses_the_sites_link_once_and_so_does_its_delta(
    plant: Any,
    package: Any,
    tmp_path: Path,
    members: list[Member],
    downloads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # All of them will want it: however slow this machine is, none is to be left behind.
    monkeypatch.setattr(choice, "STEP", 300.0)
    monkeypatch.setattr(choice, "SETTLE", 300.0)
    refs: list[ModelRef] = []
    for number in (1, 2):
        content = b"\x08\x08\x12\x04test" + bytes(range(256)) * 400 + b"%d" % number * 500
        manifest, paths = package(tmp_path, "m", number, onnx=content)
        for path in paths:
            plant.client.upload_artifact(path)
        answer = plant.client.publish_release(plant.releases.add(manifest, "m", number), manifest)
        refs.append(ModelRef("m", number, answer["digest"]))
    taken = []
    for index, ref in enumerate(refs):
        with ThreadPoolExecutor(5) as pool:
            running = [pool.submit(member.fetch, ref, refs[:index]) for member in members]
            assert len({done.result() for done in running}) == 1
        taken.append(len(downloads))
    assert taken == [3, 5], "manifest, model and golden vectors; then the next manifest and a delta"
    figures = [read_figures(member.figures) for member in members]
    assert sum(one.controller_blobs for one in figures) == 5
    assert sum(one.peer_blobs for one in figures) == 20


def test_a_site_without_its_link_passes_on_what_one_of_it_has(
    plant: Any, members: list[Member], downloads: list[str]
) -> None:
    ref = plant.publish(1)
    first, second, *_ = members
    content = first.fetch(ref, [])
    second.verifier.target_length(ref)  # the metadata has come before the link broke
    before = len(downloads)
    nowhere = Transport("http://127.0.0.1:1")
    second.verifier._transport = nowhere
    with pytest.raises(Unavailable):
        second.verifier.fetch_manifest(ref)
    manifest = first.verifier.reopen_manifest(ref)
    second.verifier.fetch_blobs(manifest, manifest.variants[0])
    assert second.blobs.read(manifest.variants[0].blob.digest, len(content)) == content
    assert len(downloads) == before
    nowhere.close()


def test_real_agents_take_a_release_from_the_first_that_has_it_and_say_so(
    plant: Any, make: Any, until: Any, tmp_path: Path, downloads: list[str]
) -> None:
    plant.releases.init(plant.client)
    plant.client.apply(
        [make("Site", "north"), make("Fleet", "line", matchLabels={"site": "north"}, streams=[])]
    )
    site = Offline(plant, tmp_path, until)
    site.release(1)
    folders = [site.device(f"d{number}") for number in range(3)]
    site.roll_out(1)
    ports = [free_port() for _ in folders]
    others = [word for port in ports for word in ("--peer", f"127.0.0.1:{port}")]
    with ExitStack() as running:

        def start(number: int) -> Callable[[], dict[str, Any]]:
            options = ["--peers-listen", f"127.0.0.1:{ports[number]}", *others]
            return running.enter_context(agent(folders[number], options=options))

        until(runs(start(0), 1), 60.0)
        for slot in (start(1), start(2)):
            until(runs(slot, 1), 60.0)
        told = [status(folder) for folder in folders]
    assert len(downloads) == 3
    assert sum(figures["controller_blobs"] for figures in told) == 3
    assert sum(figures["peer_blobs"] for figures in told) == 6


def status(folder: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "edgeward.cli.main", "agent", "status", "--dir", str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "files: " in said and "from the controller" in said
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["obtained"]  # type: ignore[no-any-return]
