"""What a person types wrongly: one line that names it, and the exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgeward.cli.main import main


@pytest.fixture
def edgeward(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> object:
    """Runs the command line in an empty folder; answers the exit code and what stands on each output."""
    monkeypatch.chdir(tmp_path)
    for name in ("EDGEWARD_TOKEN", "EDGEWARD_TOKEN_FILE", "EDGEWARD_URL"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeward", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def rows(path: Path, count: int = 100) -> None:
    path.write_text("a,b\n" + "".join(f"{index % 9},{index % 7}\n" for index in range(count)))


def test_a_training_file_trains_and_a_recipe_needs_no_version(edgeward, tmp_path: Path) -> None:
    rows(tmp_path / "rows.csv")
    (tmp_path / "t.yaml").write_text(
        "recipe: anomaly-detection\nmodel: m\nversion: 2\ndata: rows.csv\nparameters: {trees: 5}\n"
    )
    code, said, _ = edgeward("train", "-f", "t.yaml", "--out", "p2")
    assert code == 0 and "m version 2 in p2" in said
    code, said, _ = edgeward(
        "train", "anomaly-detection", "--data", "rows.csv", "--model", "m", "--set", "trees=5", "--out", "p1"
    )
    assert code == 0 and "m version 1 in p1" in said
    code, _, error = edgeward("train", "-f", "t.yaml", "--version", "3", "--out", "p3")
    assert code == 2 and "a training file says all but --out" in error


def test_a_training_file_with_an_unknown_field_names_those_there_are(edgeward, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("recipe: r\nmodel: m\nversion: 1\ndataste: shuttle\n")
    code, _, error = edgeward("train", "-f", "t.yaml", "--out", "p")
    assert code == 2 and not (tmp_path / "p").exists()
    assert error.startswith("error: t.yaml: unknown field `dataste`, expected one of data, dataset, features")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "t: holds no token"),
        ("tök".encode(), "t: holds no token"),
        (b"two words", "t: holds no token"),
        (b"", "t: holds no token"),
        (None, "t: cannot read the token: No such file or directory"),
    ],
)
def test_a_token_file_without_a_token_is_named(
    edgeward, tmp_path: Path, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    for command in (
        ("get", "sites", "--token-file", "t"),
        ("agent", "enroll", "--url", "http://127.0.0.1:9", "--token-file", "t", "--name", "d", "--dir", "d"),
        ("trends", "enroll", "--url", "http://127.0.0.1:9", "--token-file", "t", "--name", "s", "--dir", "s"),
    ):
        code, _, error = edgeward(*command)
        assert (code, error.count("\n")) == (2, 1)
        assert error.startswith(f"error: {says}")


@pytest.mark.parametrize("url", ["host", "ftp://host", "http://", "http://[::bad", "http://h:99999"])
def test_an_impossible_address_is_named(edgeward, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("EDGEWARD_TOKEN", "x")
    code, _, error = edgeward("get", "sites", "--url", url)
    assert code == 2 and f"{url!r} is not the address of a controller" in error


def test_a_folder_that_cannot_be_made_is_one_line(edgeward, tmp_path: Path) -> None:
    rows(tmp_path / "rows.csv")
    (tmp_path / "file").touch()
    code, _, error = edgeward(
        "train", "anomaly-detection", "--data", "rows.csv", "--model", "m", "--out", "file/below/p"
    )
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith("error: file/below") and error.endswith(": Not a directory\n")


def test_a_role_that_is_none_is_usage(edgeward) -> None:
    code, _, error = edgeward("token", "create", "--site", "s", "--role", "king")
    assert code == 2 and "device" in error and "store" in error
