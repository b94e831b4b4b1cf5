"""A disk that refuses one call, or all from there on, at every call of a roll-out and of a roll-back.

What runs goes on answering, nothing is quarantined for it, and the device gets there without a restart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.lifecycle import DISK_RETRY_MAX
from tests.faults.disk.harness import ROOT, compiled, environment


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("recorder"))


def tried(recorder: Path, base: Path, way: str, error: str, step: int, odd: int = 1) -> list[dict[str, Any]]:
    folder = base / "device"
    folder.mkdir()
    child = subprocess.run(
        [sys.executable, "-m", "tests.faults.disk.refused", folder, base / "side", way, error, str(step), str(odd)],
        cwd=ROOT, env=environment(recorder, folder), capture_output=True, text=True, check=False,
    )  # fmt: skip
    done = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, f"{done[-1:]}: {child.stderr[-3000:]}"
    return done


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_refused_call_delays_a_roll_out_and_no_more(recorder: Path, tmp_path: Path, error: str) -> None:
    done = tried(recorder, tmp_path, "rollout", error, 3)
    assert len(done) > 15
    # Another try of its own, however long the disk was full.
    assert max(entry["waited"] for entry in done) <= DISK_RETRY_MAX
    assert any(entry["waited"] > 20 for entry in done)


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_refused_call_delays_a_roll_back_and_no_more(recorder: Path, tmp_path: Path, error: str) -> None:
    done = tried(recorder, tmp_path, "rollback", error, 1)
    assert len(done) > 5
    assert max(entry["waited"] for entry in done) <= DISK_RETRY_MAX


@pytest.mark.long
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_whichever_call_of_a_roll_out_it_is(recorder: Path, tmp_path: Path, error: str, odd: int) -> None:
    done = tried(recorder, tmp_path, "rollout", error, 1, odd)
    assert len(done) > 50
    assert max(entry["waited"] for entry in done) <= DISK_RETRY_MAX
