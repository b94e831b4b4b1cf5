"""Enrolment that waits for a person: nobody gets in before, and nobody else by it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.identity import Identity, enroll
from agent.state import State
from agent.trusted_clock import TrustedClock
from controller import approval
from edgeward.cli.main import main
from edgeward.client import ControllerClient
from edgeward.clock import ManualClock
from edgeward.errors import Conflict, EdgewardError, Forbidden, InvalidDocument, NotFound, Unavailable
from edgeward.trust import keys
from edgeward.trust.certificates import make_csr
from edgeward.wire.enrollment import EnrollPending, EnrollRequest, EnrollResponse


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(time.time())


@pytest.fixture
def plant(tmp_path: Path, start: Any, clock: ManualClock) -> Iterator[Any]:
    with start(tmp_path, clock=clock) as made:
        made.begin()
        yield made


class Asking:
    """A device with its key and token, which may ask again and again."""

    def __init__(self, plant: Any, name: str, *, approval: bool = True, **token: Any) -> None:
        self.plant, self.name, self.key = plant, name, keys.generate_key()
        self.token = plant.client.create_enrollment_token(["north"], approval=approval, **token)

    def ask(self, *, name: str = "", key: Any = None) -> EnrollResponse | EnrollPending:
        name = name or self.name
        csr = make_csr(key or self.key, name)
        answer: EnrollResponse | EnrollPending = self.plant.client.enroll(
            EnrollRequest(self.token, name, csr, {"row": "1"})
        )
        return answer


def decide(plant: Any, name: str, decision: str = "approve") -> None:
    (found,) = [item for item in plant.client.enrollment_requests() if item["name"] == name]
    plant.client.decide_enrollment(name, decision, found["fingerprint"])


def test_nothing_exists_before_a_person_approves(plant: Any) -> None:
    device = Asking(plant, "d1", labels={"fleet": "a"})
    for _ in range(2):
        pending = device.ask()
        assert isinstance(pending, EnrollPending) and pending.retry_after > 0
    (shown,) = plant.client.enrollment_requests()
    assert (shown["name"], shown["site"], shown["labels"]) == ("d1", "north", {"row": "1", "fleet": "a"})
    assert shown["fingerprint"] == pending.fingerprint and len(pending.fingerprint) == 64
    assert plant.client.find("Device") == []
    decide(plant, "d1")
    assert plant.client.find("Device") == [] and plant.client.enrollment_requests() == []
    answer = device.ask()
    assert isinstance(answer, EnrollResponse) and (answer.name, answer.sites) == ("d1", ["north"])
    assert plant.device("d1")["metadata"]["labels"]["fleet"] == "a"
    # The answer may have been lost on the way: the same key may fetch it again, nobody else.
    assert isinstance(device.ask(), EnrollResponse)
    for others in ({"key": keys.generate_key()}, {"name": "d2"}):
        with pytest.raises(Forbidden, match="another name or key"):
            device.ask(**others)
    audit = [item["action"] for item in plant.client.audit() if item["name"] == "d1"]
    assert audit[:3] == ["request", "approve", "enroll"]
    assert "approved by admin" in plant.client.audit()[-1]["detail"]


def test_a_site_may_want_it_for_each_device(plant: Any, make: Any) -> None:
    with pytest.raises(InvalidDocument, match="approval"):
        make("Site", "north", approval="maybe")
    plant.client.apply([make("Site", "north", approval="required")])
    assert isinstance(Asking(plant, "d1", approval=False).ask(), EnrollPending)
    store = Asking(plant, "store", approval=False, role="store")
    assert isinstance(store.ask(), EnrollResponse), "devices only"
    with pytest.raises(InvalidDocument, match="one by one"):
        Asking(plant, "store", role="store")
    plant.client.apply([make("Site", "north")])
    assert isinstance(Asking(plant, "d2", approval=False).ask(), EnrollResponse)


def test_who_is_denied_stays_out(plant: Any) -> None:
    device = Asking(plant, "d1")
    device.ask()
    decide(plant, "d1", "deny")
    for _ in range(2):
        with pytest.raises(Forbidden, match="admin has denied"):
            device.ask()
    with pytest.raises(NotFound):
        plant.client.decide_enrollment("d1", "approve", "0" * 64)
    assert isinstance(Asking(plant, "d1").ask(), EnrollPending), "the name is free again"


def test_an_approval_can_be_taken_back_until_it_is_used(plant: Any) -> None:
    device = Asking(plant, "d1")
    pending = device.ask()
    decide(plant, "d1")
    plant.client.decide_enrollment("d1", "deny", pending.fingerprint)
    with pytest.raises(Forbidden, match="denied"):
        device.ask()


def test_a_deleted_device_does_not_come_back_by_its_old_approval(plant: Any, make: Any) -> None:
    device = Asking(plant, "d1")
    device.ask()
    decide(plant, "d1")
    assert isinstance(device.ask(), EnrollResponse)
    plant.client._http.request("DELETE", "/api/v1/certificates/d1")
    with pytest.raises(Conflict):
        device.ask()
    plant.client.delete("Device", "d1")
    with pytest.raises(Forbidden, match="wrong, used or expired"):
        device.ask()


def test_the_approval_is_for_the_key_that_the_person_saw(plant: Any) -> None:
    first, second = Asking(plant, "d1"), Asking(plant, "d1")
    seen = first.ask()
    with pytest.raises(Conflict, match="another device has asked"):
        second.ask()
    decide(plant, "d1", "deny")
    second.ask()
    with pytest.raises(Conflict, match="another key"):
        plant.client.decide_enrollment("d1", "approve", seen.fingerprint)
    assert isinstance(second.ask(), EnrollPending)


def test_a_taken_name_is_refused_before_anybody_is_asked(plant: Any) -> None:
    plant.enroll("d1")
    with pytest.raises(Conflict, match="taken"):
        Asking(plant, "d1").ask()
    assert plant.client.enrollment_requests() == []


def test_a_request_outlives_its_token_but_not_for_ever(plant: Any, clock: ManualClock) -> None:
    device = Asking(plant, "d1", ttl=60.0)
    device.ask()
    clock.advance(approval.LIFETIME - 1)
    assert isinstance(device.ask(), EnrollPending)
    clock.advance(2)
    assert plant.client.enrollment_requests() == []
    with pytest.raises(Forbidden, match="longer than 7 days"):
        device.ask()


def test_the_same_device_may_come_with_a_newer_token(plant: Any) -> None:
    first, second = Asking(plant, "d1"), Asking(plant, "d1")
    second.key = first.key
    first.ask()
    second.ask()
    assert len(plant.client.enrollment_requests()) == 1
    with pytest.raises(Forbidden):
        first.ask()
    decide(plant, "d1")
    assert isinstance(second.ask(), EnrollResponse)


def test_only_an_admin_decides(plant: Any) -> None:
    Asking(plant, "d1").ask()
    for role in ("viewer", "operator", "releaser"):
        body = {"name": role, "role": role}
        token = plant.client._http.request("POST", "/api/v1/apitokens", json=body).json()["token"]
        with ControllerClient(plant.url, token) as person:
            (item,) = person.enrollment_requests()
            with pytest.raises(Forbidden, match="needs one of admin"):
                person.decide_enrollment("d1", "approve", item["fingerprint"])
    assert httpx.get(f"{plant.url}/api/v1/enrollmentrequests", trust_env=False).status_code == 401


# the agent and the command line


def test_the_agent_waits_and_survives_a_restart_and_a_cut_link(
    plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    folder, token = tmp_path / "d1", plant.client.create_enrollment_token(["north"], approval=True)

    def again(wait: Callable[[EnrollPending], None] | None) -> EnrollResponse:
        return enroll(folder, plant.url, token, "d1", {}, wait=wait)

    with pytest.raises(Unavailable, match="device approve d1"):
        again(None)

    class Killed(Exception):
        pass

    def kill(pending: EnrollPending) -> None:
        raise Killed

    with pytest.raises(Killed):
        again(kill)
    assert not (folder / "enrollment.json").exists()
    rounds: list[EnrollPending] = []
    real = ControllerClient.enroll

    def cut(client: ControllerClient, request: EnrollRequest) -> Any:
        if len(rounds) == 1:
            raise Unavailable("cannot reach it")
        return real(client, request)

    monkeypatch.setattr(ControllerClient, "enroll", cut)

    def wait(pending: EnrollPending) -> None:
        rounds.append(pending)
        if len(rounds) == 3:
            decide(plant, "d1")

    assert again(wait).name == "d1" and len(rounds) == 3
    state = State(folder / "state.db")
    identity = Identity(folder, TrustedClock(clock, state))
    assert identity.client.desired(newer_than=99, wait=0.0) is None
    state.close()


def test_the_command_line_from_both_sides(
    plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, until: Any
) -> None:
    admin = tmp_path / "admin.token"
    admin.write_text(plant.token)
    monkeypatch.setenv("EDGEWARD_URL", plant.url)
    monkeypatch.setenv("EDGEWARD_TOKEN_FILE", str(admin))

    def edgeward(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["edgeward", *arguments])
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise EdgewardError(capsys.readouterr().err) from None
        said: str = capsys.readouterr().out
        return said

    assert "no device waits" in edgeward("device", "requests")
    token = tmp_path / "device.token"
    token.write_text(edgeward("token", "create", "--site", "north", "--approval"))
    folder = tmp_path / "line-1a"
    command = [sys.executable, "-m", "edgeward.cli.main", "agent", "enroll", "--url", plant.url]
    command += ["--token-file", str(token), "--name", "line-1a", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = child.stdout.readline()
        assert "line-1a waits for approval at site north" in said
        fingerprint = said.split()[-1]
        assert fingerprint[:16] in edgeward("device", "requests")
        with pytest.raises(EdgewardError, match="another key"):
            edgeward("device", "approve", "line-1a", "--fingerprint", "x")
        assert "line-1a approved" in edgeward(
            "device", "approve", "line-1a", "--fingerprint", fingerprint[:8]
        )
        rest = child.stdout.read()
    assert child.returncode == 0 and "enrolled device line-1a at site north" in rest
    with pytest.raises(EdgewardError, match="no device waits"):
        edgeward("device", "deny", "line-1a")
