"""The command line against a running controller: what it says when the controller refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from edgeward.cli.main import main


@pytest.fixture
def edgeward(plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    token = tmp_path / "admin.token"
    token.write_text(plant.token)
    monkeypatch.setenv("EDGEWARD_URL", plant.url)
    monkeypatch.setenv("EDGEWARD_TOKEN_FILE", str(token))

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["edgeward", *arguments])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_a_wrong_token_is_named_by_its_file(edgeward: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.token"
    wrong.write_text("edgeward-api-wrong\n")
    code, said = edgeward("get", "sites", "--token-file", str(wrong))
    assert code == 1 and said.startswith(f"error: {wrong}: the API token is not known")
    for command in ("agent", "trends"):
        folder = tmp_path / command
        code, said = edgeward(
            command, "enroll", "--token-file", str(wrong), "--name", "x", "--dir", str(folder)
        )
        assert code == 1 and said.startswith(f"error: {wrong}: the enrolment token is wrong, used or expired")
        assert not (folder / "enrollment.json").exists()


def test_a_reference_to_nothing_names_file_and_field_and_nothing_is_applied(
    edgeward: Any, plant: Any, tmp_path: Path
) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(
        "apiVersion: edgeward.dev/v1alpha1\nkind: Site\nmetadata: {name: plant}\nspec: {}\n---\n"
        "apiVersion: edgeward.dev/v1alpha1\nkind: Fleet\nmetadata: {name: f}\n"
        "spec: {matchLabels: {a: b}, streams: [nope]}\n"
    )
    code, said = edgeward("apply", "-f", str(file))
    assert code == 2
    assert said.startswith(f"error: {file} (document 2): Fleet/f: spec.streams[0]: there is no Stream 'nope'")
    assert plant.client.find("Site") == []


def test_a_line_of_a_rollout_stays_one_line_behind_a_pipe(
    edgeward: Any, plant: Any, make: Any, rollout: Any
) -> None:
    plant.begin()
    plant.publish(1)
    plant.client.apply([rollout("a-rollout-with-a-long-name-for-a-narrow-terminal-of-80-columns", 1)])
    _, said = edgeward("rollout", "status", "a-rollout-with-a-long-name-for-a-narrow-terminal-of-80-columns")
    assert any(len(line) > 80 for line in said.splitlines())
    code, said = edgeward(
        "rollout", "status", "a-rollout-with-a-long-name-for-a-narrow-terminal-of-80-columns", "-w",
        "--timeout", "0",
    )  # fmt: skip
    assert code == 1 and "has not ended yet" in said


def test_a_revoked_device_is_shown_as_one(edgeward: Any, plant: Any, make: Any) -> None:
    plant.begin()
    plant.enroll("d1")
    plant.client.apply([make("Device", "d1", site="north", revoked=True)])
    _, said = edgeward("get", "devices")
    assert "Revoked" in said
