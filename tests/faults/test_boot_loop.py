"""A model that takes the agent down with it, at each start again: three times, then the device goes on without it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from agent import attempts
from agent.state import State
from tests.faults.rollout_child import released

ROOT = Path(__file__).parents[2]

#: The cap taken away, for the control.
ENDLESS = "import agent.attempts as a; a.DEATHS = 10**9; "


def boot(folder: Path, place: str, control: str = "") -> str:
    """One start of the agent: what it prints, or nothing when it went down."""
    run = f"{control}import pathlib; from tests.faults.boot_loop_child import main; "
    child = subprocess.run(
        [sys.executable, "-c", f"{run}main(pathlib.Path({str(folder)!r}), {place!r})"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode == -signal.SIGKILL:
        return ""
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


@pytest.mark.parametrize("place", ["test", "open", "serve"])
@pytest.mark.parametrize("capped", [True, False])
def test_a_model_that_takes_the_agent_down_gives_way_after_three_times(
    tmp_path: Path, place: str, capped: bool
) -> None:
    if place != "test":
        assert boot(tmp_path, "none") == "2 - Active SelfTestPassed"
    deaths = [boot(tmp_path, place, "" if capped else ENDLESS) for _ in range(attempts.DEATHS)]
    assert deaths == [""] * attempts.DEATHS
    after = boot(tmp_path, place, "" if capped else ENDLESS)
    assert after == ("1 BootLoop Quarantined BootLoop" if capped else "")
    if capped:
        assert boot(tmp_path, "none") == "1 BootLoop Quarantined BootLoop", "for good"
        state = State(tmp_path / "state.db")
        (verdict,) = state.quarantined().values()
        assert (verdict.measured, verdict.limit) == (3.0, 3.0) and not state.attempts()


def test_without_a_predecessor_the_agent_comes_up_without_a_model(tmp_path: Path) -> None:
    assert boot(tmp_path, "none") == "2 - Active SelfTestPassed"
    state = State(tmp_path / "state.db")
    record = state.slots()["default"]
    state.set_slot("default", msgspec.structs.replace(record, previous=None))
    state.close()
    for _ in range(attempts.DEATHS):
        assert boot(tmp_path, "open") == ""
    assert boot(tmp_path, "open") == "0 BootLoop Quarantined BootLoop"


def test_what_is_served_by_a_worker_is_not_blamed(tmp_path: Path) -> None:
    """It cannot have taken the agent down: whatever did, the model stays."""
    assert boot(tmp_path, "none") == "2 - Active SelfTestPassed"
    state = State(tmp_path / "state.db")
    record = state.slots()["default"]
    state.set_slot("default", msgspec.structs.replace(record, policy=type(record.policy)()))
    state.close()
    for _ in range(attempts.DEATHS + 1):
        assert boot(tmp_path, "isolated") == ""
    state = State(tmp_path / "state.db")
    assert state.slots()["default"].running == released()[2] and not state.quarantined()


def test_power_cuts_do_not_condemn_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine goes down with the agent: after three times the model is still there."""
    assert boot(tmp_path, "none") == "2 - Active SelfTestPassed"
    for number in range(attempts.DEATHS + 1):
        assert (
            boot(tmp_path, "serve", f"import agent.attempts as a; a.kernel_boot = lambda: '{number}'; ") == ""
        )
    state = State(tmp_path / "state.db")
    assert state.slots()["default"].running == released()[2] and not state.quarantined()
