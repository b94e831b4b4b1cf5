"""What `edgeward bundle export` writes and says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from edgeward.cli.main import main
from edgeward.client import ControllerClient
from edgeward.errors import Conflict, Forbidden, TrustError
from tests.controller.bundles.carrying import Offline, contents


def test_an_export_is_the_same_twice_and_says_what_it_holds_and_until_when(
    offline: Offline, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline.release(1)
    offline.device("d1")
    offline.roll_out(1)
    assert offline.export("d1").read_bytes() == offline.export("d1").read_bytes()
    out = offline.folder / "x.edgeward-bundle"
    monkeypatch.setenv("EDGEWARD_URL", offline.plant.url)
    monkeypatch.setenv("EDGEWARD_TOKEN", offline.plant.token)
    monkeypatch.setattr(sys, "argv", ["edgeward", "bundle", "export", "--site", "north", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    timestamp = json.loads(contents(out)["tuf/timestamp.json"])["signed"]["expires"]
    assert f"import it before {timestamp[:10]} {timestamp[11:16]} UTC" in said
    assert re.search(r"device d1: generation \d+, default=m:1", said) and "model m:1:" in said
    listing = subprocess.run(["tar", "tf", str(out)], capture_output=True, text=True, check=True)
    assert "tuf/timestamp.json" in listing.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "x.edgeward-bundle"], "for which devices? (pass either --device"),
        (["--device", "d1", "--site", "north", "--out", "x.edgeward-bundle"], "for which devices?"),
        (["--device", "d1", "--out", "x.zip"], "a bundle's name ends in .edgeward-bundle"),
        (["--device", "nope", "--out", "x.edgeward-bundle"], "nope"),
        (["--site", "nope", "--out", "x.edgeward-bundle"], "nope"),
        (
            ["--site", "north", "--out", "x.edgeward-bundle"],
            "site north has no device (`edgeward get devices`",
        ),
    ],
)
def test_an_export_of_nothing_says_so_and_writes_nothing(
    offline: Offline, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(offline.folder)
    monkeypatch.setenv("EDGEWARD_URL", offline.plant.url)
    monkeypatch.setenv("EDGEWARD_TOKEN", offline.plant.token)
    monkeypatch.setattr(sys, "argv", ["edgeward", "bundle", "export", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert says in capsys.readouterr().err
    assert not list(offline.folder.glob("*x.*"))


def test_a_damaged_artifact_and_a_revoked_device_are_not_exported(offline: Offline, make: Any) -> None:
    ref = offline.release(1)
    offline.device("d1")
    offline.roll_out(1)
    manifest = msgspec.json.decode(b"".join(offline.plant.client.artifact(ref.digest)))
    digest = manifest["variants"][0]["blob"]["digest"]
    stored = offline.plant.controller.artifacts.path(digest)
    content = stored.read_bytes()
    for wrong in (content[:-1] + b"\0", content + b"x", content[:-1]):
        stored.write_bytes(wrong)
        with pytest.raises(TrustError, match="what the controller sent is not it"):
            offline.export("d1")
    assert not list(offline.folder.glob("*d1-*"))
    stored.write_bytes(content)
    with pytest.raises(Forbidden, match="no valid API token"), ControllerClient(offline.plant.url) as nobody:
        nobody.desired("d1")
    offline.plant.client.apply([make("Device", "d1", site="north", revoked=True)])
    with pytest.raises(Conflict, match=r"no desired state .*revoked"):
        offline.export("d1")
