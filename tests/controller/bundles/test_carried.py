"""From the controller into an enrolled device's folder, and through its agent, without a network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.bundle import import_bundle
from agent.fetch import BlobStore
from agent.identity import Identity
from agent.imports import Imports
from agent.state import State
from agent.trusted_clock import TrustedClock
from agent.verify import Verifier
from edgeward.bundle import order
from edgeward.cli.main import main
from edgeward.client.transport import Transport
from edgeward.clock import SystemClock
from edgeward.errors import NotFound, TrustError, Unavailable
from edgeward.storage import sha256_hex
from edgeward.trust import dsse
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState
from tests.controller.bundles.carrying import (
    Offline,
    agent,
    contents,
    multiplier,
    now,
    resigned,
    runs,
    written,
)


@pytest.mark.e2e
def test_a_device_without_a_network_runs_what_was_carried_to_it(
    tmp_path: Path, start: Any, until: Any, make: Any
) -> None:
    with start(tmp_path) as plant:
        plant.releases.init(plant.client)
        plant.client.apply(
            [make("Site", "north"), make("Fleet", "line", matchLabels={"site": "north"}, streams=[])]
        )
        made = Offline(plant, tmp_path, until)
        made.release(1)
        device = made.device("d1")
        made.roll_out(1)
        first = made.export("d1")
        made.release(2)
        made.roll_out(2)
        second = made.export("d1")
    # From here on there is neither controller nor broker.
    done = import_bundle(first, device, SystemClock())
    assert (done.news, done.taken, done.present, done.models[0].version) == (True, 3, 0, 1)
    with agent(device) as slot:
        until(runs(slot, 1), 60)
        until(lambda: Imports(device).newest() is None, 60)
        # While it runs, by the command that a person has; the device is up to date within its poll.
        said = subprocess.run(
            [sys.executable, "-m", "edgeward.cli.main", "bundle", "import", str(second), "--dir", str(device)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        assert "verified" in said.stdout and "m:2" in said.stdout
        until(runs(slot, 2), 60)
        # The same bundle again is no harm, an older one is refused.
        again = import_bundle(second, device, SystemClock())
        assert (again.news, again.taken, again.present) == (False, 0, 3)
        with pytest.raises(TrustError, match="older than"):
            import_bundle(first, device, SystemClock())
        until(lambda: Imports(device).newest() is None, 60)
        assert runs(slot, 2)()
    assert not list((device / "imports").glob("[0-9p]*"))
    # And with nothing left of the imports it starts from its own folder.
    with agent(device) as slot:
        until(runs(slot, 2), 60)


@pytest.mark.e2e
def test_what_mqtt_brought_without_its_model_goes_on_at_once_with_the_bundle(offline: Offline) -> None:
    """The generation is known, the artifacts cannot be fetched: a bundle of that generation brings them."""
    offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    path = offline.export("d1")
    raw = contents(path)["desired/d1.json"]
    (device / "controller.url").write_text("http://127.0.0.1:9")
    state = State(device / "state.db")
    state.accept_desired(
        dsse.verify(raw, PAYLOAD_TYPE, offline.plant.controller.desired_keys, DesiredState).generation, raw
    )
    state.close()
    with agent(device) as slot:
        log = device.with_suffix(".log")
        # Some failed tries, so that the next one is further away than the test would be.
        offline.until(lambda: log.read_text().count("is Pending") >= 3, 60)
        done = import_bundle(path, device, SystemClock())
        assert (done.news, done.taken) == (False, 3)
        offline.until(runs(slot, 1), 60)


@pytest.mark.e2e
@pytest.mark.parametrize("moment", ["taking import", "desired generation", "is Downloading", "is SelfTest"])
def test_an_agent_that_is_killed_while_it_takes_an_import_goes_on(offline: Offline, moment: str) -> None:
    offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    import_bundle(offline.export("d1"), device, SystemClock())
    (device / "controller.url").write_text("http://127.0.0.1:9")
    (device / "imports" / "part-left" / "blobs").mkdir(parents=True)  # by an import that was killed
    log = device.with_suffix(".log")
    with agent(device, signal.SIGKILL):
        offline.until(lambda: moment in log.read_text(), 60)
    with agent(device) as slot:
        offline.until(runs(slot, 1), 60)
        offline.until(lambda: Imports(device).newest() is None, 60)
    assert not list((device / "imports").glob("part-*"))


def test_an_import_whose_metadata_expires_before_it_is_used_waits_and_is_not_quarantined(
    offline: Offline, tmp_path: Path
) -> None:
    """TrustError would refuse the version on this device for good, however fresh the next bundle is."""
    ref = offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    members = contents(offline.export("d1"))
    import_bundle(written(tmp_path / "good", members), device, SystemClock())
    imports = Imports(device)
    waiting = imports.newest()
    assert waiting is not None
    root = json.loads((device / "enrollment.json").read_bytes())["trust"]["tuf_root"].encode()
    nowhere = Transport("http://127.0.0.1:9")
    clock = TrustedClock(SystemClock(), State(tmp_path / "state.db"))
    verifier = Verifier(tmp_path / "tuf", root, BlobStore(tmp_path / "b"), nowhere, clock, imports)
    stale = resigned(offline, members, expires=now() - timedelta(hours=1))["tuf/timestamp.json"]
    good = (waiting.folder / "tuf" / "timestamp.json").read_bytes()
    (waiting.folder / "tuf" / "timestamp.json").write_bytes(stale)
    with pytest.raises(
        Unavailable, match=r"cannot reach .* what was imported: the release metadata has expired"
    ):
        verifier.target_length(ref)
    (waiting.folder / "tuf" / "timestamp.json").write_bytes(good)
    manifest = verifier.fetch_manifest(ref)
    verifier.fetch_blobs(manifest, manifest.variants[0])
    assert verifier.open(ref, manifest, manifest.variants[0]).content == multiplier(1)
    imports.drop(waiting.number)
    with pytest.raises(Unavailable, match="cannot be had"):
        verifier.target_length(ref)
    nowhere.close()


def test_the_controllers_metadata_comes_before_what_was_imported(offline: Offline, tmp_path: Path) -> None:
    offline.release(1)
    device = offline.device("d1")
    offline.roll_out(1)
    import_bundle(offline.export("d1"), device, SystemClock())
    newer = offline.release(2)  # not in the bundle
    clock = TrustedClock(SystemClock(), State(tmp_path / "state.db"))
    identity = Identity(device, clock)
    root = identity.enrollment.trust.tuf_root.encode()
    verifier = Verifier(
        tmp_path / "tuf", root, BlobStore(tmp_path / "b"), identity.transport, clock, Imports(device)
    )
    assert verifier.target_length(newer) > 0
    identity.transport.close()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no file", "cannot be opened: No such file or directory"),
        ("no folder", "is not enrolled (run `edgeward agent enroll` first)"),
        ("not enrolled", "is not enrolled (run `edgeward agent enroll` first)"),
        ("no bundle", "not an Edgeward bundle (copy it again, or export it anew: `edgeward bundle export`)"),
        (
            "other user",
            "belongs to user 12345, whose agent could not use what another user writes there (sudo",
        ),
    ],
)
def test_what_a_person_gets_wrong_is_said_in_one_line(
    offline: Offline, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str, says: str
) -> None:
    device, file = offline.device("d1"), tmp_path / "x.edgeward-bundle"
    if case != "no file":
        file.write_bytes(b"x" * 2048)
    if case == "other user":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(device, 12345, -1)
    folder = {"no folder": tmp_path / "nope", "not enrolled": tmp_path}.get(case, device)
    monkeypatch.setattr(sys, "argv", ["edgeward", "bundle", "import", str(file), "--dir", str(folder)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code and says in said and said.count("\n") == 1 and said.startswith("error: ")


def test_a_bundle_for_many_devices_gives_each_only_its_own(offline: Offline, tmp_path: Path) -> None:
    offline.release(1)
    folders = {name: offline.device(name) for name in ("d1", "d2")}
    offline.roll_out(1)
    path, exported = offline.exported("d2", "d1")
    assert list(exported.desired) == ["d1", "d2"] and exported.models[0].devices == ("d1", "d2")
    assert path.stat().st_size == exported.size
    members = contents(path)
    stranger = b"nobody named this"
    members |= {f"blobs/{sha256_hex(stranger)}": stranger}
    with_more = written(tmp_path / "more", dict(sorted(members.items(), key=lambda item: order(item[0]))))
    for name, folder in folders.items():
        done = import_bundle(with_more, folder, SystemClock())
        assert (done.device, done.taken, done.left) == (f"north/{name}", 3, 2)
        found = Imports(folder).newest()
        assert found is not None and found.desired() == members[f"desired/{name}.json"]
        held = {path.name for path in (found.folder / "blobs").iterdir()}
        assert sha256_hex(stranger) not in held and len(held) == 3
    with pytest.raises(NotFound, match="nothing for device d3; it is for d1, d2"):
        import_bundle(path, offline.device("d3"), SystemClock())
