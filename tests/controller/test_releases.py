"""TUF releases with real metadata, read back by a real TUF client; and what is refused."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, TargetFile
from tuf.ngclient import FetcherInterface, Updater

from controller.artifacts import FolderArtifacts
from controller.releases import SNAPSHOT_LIFETIME, TIMESTAMP_LIFETIME, Releases
from edgeward.clock import ManualClock
from edgeward.errors import Conflict, EdgewardError, Forbidden, InvalidDocument
from edgeward.trust import keys
from edgeward.wire.package import target_path


class Fetcher(FetcherInterface):
    def __init__(self, client: Any) -> None:
        self._client = client

    def _fetch(self, url: str) -> Any:
        from tuf.api.exceptions import DownloadHTTPError

        data = self._client.tuf_metadata(url.rpartition("/")[2])
        if data is None:
            raise DownloadHTTPError("none", 404)
        yield data


def updater(plant: Any, folder: Path) -> Updater:
    """A fresh TUF client that trusts the root from the enrolment answer."""
    folder.mkdir(exist_ok=True)
    root = plant.client.trust()["tufRoot"].encode()
    made = Updater(str(folder), f"{plant.url}/tuf/", fetcher=Fetcher(plant.client), bootstrap=root)
    made.refresh()
    return made


def test_a_tuf_client_follows_the_releases(plant: Any, tmp_path: Path) -> None:
    assert plant.client.trust()["tufRoot"] == ""
    assert plant.client.tuf_metadata("timestamp.json") is None
    plant.begin()
    for version in (1, 2):
        model = plant.publish(version)
        found = updater(plant, tmp_path / "client").get_targetinfo(target_path("m", version))
        assert found is not None and found.hashes["sha256"] == model.digest
    assert [version["spec"]["version"] for version in plant.client.find("ModelVersion")] == [1, 2]
    assert plant.client.get("Model", "m")
    assert plant.client.has_artifact(model.digest)


def test_a_root_is_installed_once_and_only_with_separate_keys(plant: Any) -> None:
    tool, online = plant.releases, plant.client.trust()["onlineKeys"]
    stranger = CryptoSigner(keys.generate_key()).public_key
    for bad_online in ({}, {stranger.keyid: stranger.to_dict()}):
        with pytest.raises(InvalidDocument, match="online key"):
            plant.client.init_release_root(tool.root(bad_online), tool.signed_targets())
    with pytest.raises(Forbidden):
        plant.client.init_release_root(tool.root(online), tool.signed_targets(tool.root_signer))
    old = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    with pytest.raises(InvalidDocument, match="expired"):
        plant.client.init_release_root(tool.root(online, expires=old), tool.signed_targets())
    for junk in (b"{}", b"[]", tool.signed_targets()):
        with pytest.raises(InvalidDocument):
            plant.client.init_release_root(junk, tool.signed_targets())
    tool.init(plant.client)
    with pytest.raises(Conflict, match="already"):
        tool.init(plant.client)


Refused = tuple[type[EdgewardError], str]
CASES: dict[str, Refused] = {
    "wrong key": (Forbidden, "valid signature"),
    "same version": (Conflict, "not the next one"),
    "skipped version": (Conflict, "not the next one"),
    "changed target": (InvalidDocument, "cannot change"),
    "removed target": (InvalidDocument, "cannot change"),
    "two targets": (InvalidDocument, "one new target"),
    "other manifest": (InvalidDocument, "not the one that was signed"),
    "other path": (InvalidDocument, "the signed target is"),
    "broken manifest": (InvalidDocument, "missing required field"),
    "expired": (InvalidDocument, "expired"),
    "missing blob": (Conflict, "has not been uploaded"),
    "pickle": (InvalidDocument, "pickle"),
    "bad golden": (InvalidDocument, "golden"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_release_is_refused_and_changes_nothing(plant: Any, package: Any, case: str) -> None:
    plant.begin()
    plant.publish(1)
    tool = plant.releases
    extra = {"pickle": {"onnx": b"\x80\x04\x95" + bytes(70)}, "bad golden": {"golden": b"\x80\x04x"}}
    manifest, paths = package(plant.folder, "m", 2, **extra.get(case, {}))
    for path in paths:
        if case != "missing blob":
            plant.client.upload_artifact(path)
    before = copy.deepcopy(tool.targets)
    if case == "broken manifest":
        manifest = b"{}"
    signed = tool.add(manifest, "m", 2)
    targets = tool.targets
    match case:
        case "wrong key":
            signed = tool.signed_targets(tool.root_signer)
        case "same version" | "skipped version":
            targets.version = before.version + (2 if case == "skipped version" else 0)
            signed = tool.signed_targets()
        case "changed target":
            targets.targets["m/1/manifest.json"] = TargetFile(1, {"sha256": "0" * 64}, "m/1/manifest.json")
            signed = tool.signed_targets()
        case "removed target":
            del targets.targets["m/1/manifest.json"]
            signed = tool.signed_targets()
        case "two targets":
            targets.targets["m/3/manifest.json"] = TargetFile(1, {"sha256": "0" * 64}, "m/3/manifest.json")
            signed = tool.signed_targets()
        case "other manifest":
            manifest = manifest.replace(b'"description":""', b'"description":"x"')
        case "other path":
            targets.targets["m/7/manifest.json"] = targets.targets.pop("m/2/manifest.json")
            signed = tool.signed_targets()
        case "expired":
            targets.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
            signed = tool.signed_targets()
    timestamp = plant.client.tuf_metadata("timestamp.json")
    kind, text = CASES[case]
    with pytest.raises(kind, match=text):
        plant.client.publish_release(signed, manifest)
    assert plant.client.tuf_metadata("timestamp.json") == timestamp
    assert len(plant.client.find("ModelVersion")) == 1
    # The next honest release goes through.
    tool.targets = before
    plant.publish(3)


def test_timestamp_and_snapshot_are_signed_again_in_time(tmp_path: Path) -> None:
    import json

    clock = ManualClock(datetime.now(UTC).timestamp())
    (tmp_path / "keys").mkdir()
    releases = Releases(tmp_path / "tuf", tmp_path / "keys", FolderArtifacts(tmp_path / "a"), clock)
    assert not releases.refresh()
    from securesystemslib.signer import SSlibKey
    from tuf.api.metadata import Root, Targets

    signer = CryptoSigner(keys.generate_key())
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=365)
    root, targets = Root(expires=expires), Targets(expires=expires)
    for role in ("root", "targets"):
        root.add_key(signer.public_key, role)
    for keyid, key in releases.online_keys().items():
        for role in ("snapshot", "timestamp"):
            root.add_key(SSlibKey.from_dict(keyid, dict(key)), role)
    made = [Metadata(root), Metadata(targets)]
    for metadata in made:
        metadata.sign(signer)
    releases.install_root(made[0].to_bytes(), made[1].to_bytes())

    def timestamp() -> dict[str, Any]:
        signed: dict[str, Any] = json.loads(releases.file("timestamp.json"))["signed"]
        return signed

    assert not releases.refresh()
    clock.advance(TIMESTAMP_LIFETIME * 0.6)
    assert releases.refresh() and not releases.refresh()
    assert timestamp()["version"] == 2 and timestamp()["meta"]["snapshot.json"]["version"] == 1
    clock.advance(SNAPSHOT_LIFETIME * 0.6)
    assert releases.refresh()
    assert timestamp()["meta"]["snapshot.json"]["version"] == 2
    assert releases.file("2.snapshot.json")


def test_a_release_whose_database_write_was_lost_is_found_again(tmp_path: Path, start: Any) -> None:
    with start(tmp_path) as plant:
        plant.begin()
        plant.publish(1)
    (tmp_path / "data" / "controller.db").unlink()
    for left in (tmp_path / "data").glob("controller.db-*"):
        left.unlink()
    with start(tmp_path) as plant:
        assert [row["metadata"]["name"] for row in plant.client.find("ModelVersion")] == ["m-v1"]
