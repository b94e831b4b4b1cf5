"""Residency from a Site to its store, and the store's decisions back into the audit records."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeward.broker import EmbeddedBroker, free_port
from edgeward.clock import SystemClock
from edgeward.errors import Forbidden, InvalidDocument, TrustError
from edgeward.mqtt import Broker, Link
from edgeward.trust import dsse
from edgeward.trust.keys import generate_key
from edgeward.wire import topics
from edgeward.wire.envelope import seal
from edgeward.wire.residency import (
    MAX_DECISIONS,
    PAYLOAD_TYPE,
    Decision,
    Decisions,
    ResidencyPolicy,
    Span,
    encode,
)
from edgeward.wire.resources import Residency
from edgeward.wire.rows import Batch, ResultRow, Row, TrendRow, encode_rows
from trends.identity import Identity, enroll
from trends.journal import Journal
from trends.ledger import Ledger
from trends.read_back import ReadBack
from trends.sender import Forward, Sender
from trends.tables import Tables


@pytest.fixture
def folder(plant: Any, tmp_path: Path) -> Path:
    plant.begin()
    made = tmp_path / "store"
    enroll(made, plant.url, plant.client.create_enrollment_token(["north"], role="store"), "plant-store")
    return made


def decision(number: int, chain: int = 5, site: str = "north", **changes: Any) -> Decision:
    values: dict[str, Any] = {
        "chain": chain, "number": number, "previous": "", "since": 1.0, "until": 2.0, "site": site,
        "lane": "trend", "policy": "a" * 64, "forwarded": 10, "withheld": 3, "lost": 1, "bytes": 99,
        "spans": [Span("d1", "e", 0, 13, 10, 3, 1)],
    }  # fmt: skip
    return Decision(**{**values, **changes})


def audit(plant: Any) -> list[dict[str, Any]]:
    return [each for each in plant.client.audit() if each["who"].startswith("trend store")]


def report(identity: Identity, *decisions: Decision) -> None:

    with identity._client() as client:
        client.report_decisions(Decisions(list(decisions)))


def test_a_store_learns_what_may_leave_its_sites_and_keeps_it(plant: Any, folder: Path, make: Any) -> None:
    plant.client.apply([make("Site", "south", residency={"forward": ["sample"]})])
    identity = Identity(folder, SystemClock())
    assert identity.residency is None
    assert identity.learn_residency() and not identity.learn_residency()
    assert identity.residency is not None and identity.residency.sites == {"north": Residency()}
    plant.client.apply(
        [
            make(
                "Site",
                "north",
                residency={"forward": ["trend", "alarm"], "redact": [], "series": ["output:*"]},
            )
        ]
    )
    assert identity.learn_residency()
    wanted = Residency(forward=["trend", "alarm"], redact=[], series=["output:*"])
    assert Identity(folder, SystemClock()).residency == identity.residency
    assert identity.residency.sites == {"north": wanted}
    assert identity.residency.expires_at > time.time() + 86400


def test_a_forged_old_or_ended_policy_changes_nothing(
    plant: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = Identity(folder, SystemClock())
    assert identity.learn_residency()
    known, now = identity.residency, time.time()
    key = plant.controller._desired_key
    open_ = ResidencyPolicy(now + 60, now + 999, {"north": Residency(forward=["sample"])})
    for answer in (
        dsse.sign(encode(open_), PAYLOAD_TYPE, generate_key()),
        dsse.sign(encode(open_), "application/vnd.edgeward.denied.v1+json", key),
        dsse.sign(encode(msgspec.structs.replace(open_, issued_at=now - 999)), PAYLOAD_TYPE, key),
        dsse.sign(encode(msgspec.structs.replace(open_, expires_at=now - 1)), PAYLOAD_TYPE, key),
        b"",
    ):
        monkeypatch.setattr(plant.controller, "signed_residency", lambda store, answer=answer: answer)
        with pytest.raises(TrustError):
            identity.learn_residency()
        assert identity.residency == known == Identity(folder, SystemClock()).residency
    # The control: the same one, newer and signed as it should be.
    good = dsse.sign(encode(open_), PAYLOAD_TYPE, key)
    monkeypatch.setattr(plant.controller, "signed_residency", lambda store: good)
    assert identity.learn_residency() and identity.residency == open_


def test_decisions_are_audit_records_once(plant: Any, folder: Path) -> None:
    identity = Identity(folder, SystemClock())
    report(identity, decision(1), decision(2, forwarded=0))
    report(identity, decision(1), decision(2, forwarded=0), decision(3))
    records = audit(plant)
    assert [(each["action"], each["kind"], each["name"]) for each in records] == [
        ("forward", "Site", "north"), ("withhold", "Site", "north"), ("forward", "Site", "north"),
    ]  # fmt: skip
    assert records[0]["who"] == "trend store plant-store (north)"
    assert (
        "10 forwarded, 3 withheld, 1 lost" in records[-1]["detail"]
        and "record 3 of 5" in records[-1]["detail"]
    )
    report(identity, decision(6))
    assert "2 records before it are missing" in audit(plant)[-1]["detail"]
    report(identity, decision(1, chain=9))
    assert len(audit(plant)) == 5 and "missing" not in audit(plant)[-1]["detail"]


def test_nobody_reports_for_others(plant: Any, folder: Path) -> None:
    identity = Identity(folder, SystemClock())
    with pytest.raises(Forbidden, match="decides nothing for site south"):
        report(identity, decision(1), decision(2, site="south"))
    assert audit(plant) == []
    with pytest.raises(InvalidDocument, match="more than"):
        report(identity, *(decision(number + 1) for number in range(MAX_DECISIONS + 1)))
    device = plant.enroll("d1")
    for ask in (device.http.residency, lambda: device.http.report_decisions(Decisions([decision(1)]))):
        with pytest.raises(Forbidden, match="no trend store"):
            ask()
    assert audit(plant) == []
    plant.client._http.request("DELETE", "/api/v1/certificates/plant-store")
    with pytest.raises(Forbidden, match="revoked"):
        identity.learn_residency()
    with pytest.raises(Forbidden, match="revoked"):
        report(identity, decision(1))


def test_a_revoked_store_is_on_the_deny_list(plant: Any, folder: Path, tmp_path: Path) -> None:
    """Else a central store would go on taking what it forwards."""
    other = tmp_path / "cloud"
    enroll(other, plant.url, plant.client.create_enrollment_token(["north"], role="store"), "cloud")
    keyid = Identity(folder, SystemClock()).signer.keyid
    cloud = Identity(other, SystemClock())
    assert cloud.learn_denied() is False
    plant.client._http.request("DELETE", "/api/v1/certificates/plant-store")
    assert cloud.learn_denied() and cloud.denied == {keyid}


def test_the_policy_is_asked_for_before_the_first_row_and_the_known_one_holds_without_the_controller(
    plant: Any, folder: Path, make: Any
) -> None:
    plant.client.apply([make("Site", "north", residency={"forward": []})])

    def started() -> ResidencyPolicy | None:
        journal = Journal(folder / "journal.db")
        read_back = ReadBack(Tables(folder / "tables", journal), journal)
        sender = Sender(
            Forward(Broker(f"mqtt://127.0.0.1:{free_port()}")), read_back, journal,
            Ledger(folder / "forward.db", time.time()), Identity(folder, SystemClock()), SystemClock(),
        )  # fmt: skip
        sender.start()
        policy = sender._forwarder.policy
        sender.stop()
        journal.close()
        return policy

    address = (folder / "controller.url").read_text()
    (folder / "controller.url").write_text(f"http://127.0.0.1:{free_port()}")
    assert started() is None
    (folder / "controller.url").write_text(address)
    policy = started()
    assert policy is not None and policy.sites == {"north": Residency(forward=[])}
    (folder / "controller.url").write_text(f"http://127.0.0.1:{free_port()}")
    assert started() == policy


# the whole way, as processes


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "edgeward.cli.main", "trends", "serve", "--dir", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "ready" in line, line + process.communicate()[1]
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def ask(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "edgeward.cli.main", "trends", *arguments, "--dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.e2e
def test_a_site_forwards_to_the_cloud_with_real_processes(
    plant_with_broker: Any, tmp_path: Path, until: Any, make: Any
) -> None:
    plant = plant_with_broker
    plant.begin()
    plant.client.apply([make("Site", "north", residency={"forward": ["trend", "result"]})])
    site, cloud = tmp_path / "site", tmp_path / "cloud"
    for folder, name in ((site, "plant-store"), (cloud, "cloud")):
        enroll(folder, plant.url, plant.client.create_enrollment_token(["north"], role="store"), name)
    device = plant.enroll("d1")
    at = int(time.time() * 1e6)
    results: list[Row] = [
        ResultRow(at, "s", 1, "part", "se", seq, "d", "v", "CPU", {"y": 1.0}, False) for seq in range(20)
    ]
    trends: list[Row] = [
        TrendRow(at, 60, "s", 1, "d", "v", "CPU", "output:y", 5, 0, 1.0, 0.0, 1.0, 1.0, [], [])
        for _ in range(3)
    ]
    acks: list[str] = []
    with EmbeddedBroker(tmp_path / "cloud-broker") as central:
        cloud_options = ("--broker", central.url, "--accept-forwarded")
        with serving(cloud, *cloud_options), serving(site, "--forward-to", central.url):
            link = Link(
                Broker(plant.broker.url), "d1", subscriptions=(f"{topics.root(device.name)}/ack/+",),
                on_message=lambda message: acks.append(message.topic),
            )  # fmt: skip
            link.start()
            until(lambda: link.connected)
            for topic, rows in (
                (topics.up(device.name, "result"), encode_rows(results)),
                (topics.up(device.name, "trend"), encode_rows(trends)),
            ):
                batch = Batch("e", 0, 20 if "result" in topic else 3, 0, rows)

                def send(topic: str = topic, batch: Batch = batch) -> bool:
                    link.publish(topic, seal(batch, topic, device.identity, with_certificate=True))
                    return topic.replace("/up/", "/ack/") in acks

                until(send, 60.0)
            count = (
                "query",
                "--sql",
                "select (select count(*) from results) + (select count(*) from trends) as n",
            )
            until(lambda: json.loads(ask(cloud, *count, "-o", "json"))[0]["n"] == 23, 60.0)

            def all_there() -> Any:
                status = json.loads(ask(site, "forward-status", "--json"))
                return all(lane["behind"] == 0 for lane in status["lanes"]) and status

            status = until(all_there, 60.0)
            assert status["terms"][0]["source"] == "controller"
            assert status["terms"][0]["forward"] == ["trend", "result"]
            link.stop()
    key = json.loads(ask(cloud, "query", "--sql", "select distinct key from results", "-o", "json"))
    assert key == [{"key": ""}]
    assert "2 records of decisions, 2 reported" in ask(site, "forward-status")
    assert len(ask(site, "residency-log").splitlines()) == 2
    assert {each["detail"].split(":")[0] for each in audit(plant)} == {"result rows", "trend rows"}
    ask(cloud, "verify")
