"""Why a stream does not run, from a device's report to what people see."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from controller.streams import NAMED, REASON_LENGTH, streams_of, summary, with_condition
from edgeward.broker import free_port
from edgeward.cli.resources import table
from edgeward.wire import topics
from edgeward.wire.envelope import seal
from edgeward.wire.reports import Condition, OutboxReport, Phase, Report, Reported, SlotReport, StreamReport

WHY = "input x expects [-1, 1], the stream gives one tensor [n, 3]"
FALLBACK = Condition("ProviderFallback", "True", "AcceleratorNotUsed", "runs on the CPU")


def report(*streams: StreamReport, n: int = 1) -> Report:
    return Report(1, n, time.time(), 10.0, list(streams), OutboxReport(0, 0, 0, 0))


def test_a_status_says_what_the_newest_report_counted_by_kind_of_problem() -> None:
    said = streams_of(
        report(
            StreamReport("b", "", 0, 0, 0, 0, reason="r" * (REASON_LENGTH + 1)),
            StreamReport(
                "a", "1" * 64, 90, 2, 5, 1, late=3, dropped=4,
                problems={"range:flow": 1, "range:temp": 2, "missing:flow": 1, "stuck:flow": 1},
                actions={"run": {"slow": 2.0}, "failed": {}, "latency_ms": {"p50": 0.5}},
            ),
        )
    )  # fmt: skip
    assert said[0] == {
        "name": "a", "digest": "1" * 64, "rows": 90, "alarms": 2, "late": 3, "rejected": 5, "dropped": 4,
        "errors": 1, "problems": {"missing": 1, "range": 3, "stuck": 1}, "actions": {"run": {"slow": 2}},
        "reason": "",
    }  # fmt: skip
    assert said[1]["name"] == "b" and len(said[1]["reason"]) == REASON_LENGTH


def test_the_condition_comes_stays_since_it_came_and_goes() -> None:
    blocked = {"streams": [{"name": "s", "reason": WHY}], "conditions": [{"type": "ProviderFallback"}]}
    first = with_condition(blocked, {}, 5.0)
    fallback, condition = first["conditions"]
    assert fallback == {"type": "ProviderFallback"}
    assert (condition["type"], condition["status"]) == ("StreamsRunning", "False")
    assert condition["message"] == f"stream s: {WHY}" and condition["lastTransitionTime"] == 5.0
    # What the device reports of itself does not take it away, nor does a claim of its own stand.
    claim = {"type": "StreamsRunning", "status": "True"}
    again = with_condition({**first, "conditions": [claim]}, first, 9.0)
    assert again["conditions"] == [condition]
    runs = with_condition({**first, "streams": [{"name": "s", "reason": ""}]}, first, 10.0)
    assert runs["conditions"] == [{"type": "ProviderFallback"}]


def test_a_streams_status_counts_all_and_names_the_first() -> None:
    statuses: dict[str, Any] = {f"d{n}": {"streams": [{"name": "s", "reason": f"r{n}"}]} for n in range(7)}
    statuses["ok"] = {"streams": [{"name": "s", "reason": ""}, {"name": "t", "reason": "other"}]}
    statuses["new"] = {}
    made = summary("s", statuses, statuses)
    assert (made["devices"], made["running"], made["notRunning"]) == (9, 1, 7)
    assert made["reasons"] == [{"device": f"d{n}", "reason": f"r{n}"} for n in range(NAMED)]
    assert summary("s", {"ok"}, statuses)["reasons"] == []


def test_people_see_where_a_stream_does_not_run_and_why(plant: Any, until: Any) -> None:
    plant.begin()
    one, two = plant.enroll("d1"), plant.enroll("d2")
    model = plant.publish(1)

    def send(device: Any, reason: str) -> None:
        device.n += 1
        topic = topics.report(device.name)
        stream = StreamReport("s1", model.digest, 7, 0, 0, 0, reason=reason)
        device.http.send(topic, seal(report(stream, n=device.n), topic, device.identity))

    def stream() -> Any:
        return plant.client.get("Stream", "s1")["status"]

    send(one, WHY)
    send(two, "")
    until(lambda: stream().get("running") == 1 and stream())
    assert stream() == {
        "devices": 2, "running": 1, "notRunning": 1, "reasons": [{"device": "d1", "reason": WHY}],
    }  # fmt: skip
    # What it says of its slots comes on another channel and leaves this as it is.
    topic = topics.reported(one.name)
    slots = {"default": SlotReport(Phase.ACTIVE, target=model, running=model)}
    one.n += 1
    reported = Reported(1, one.n, time.time(), 99, slots, conditions=[FALLBACK])
    one.http.send(topic, seal(reported, topic, one.identity))
    status = plant.device("d1")["status"]
    assert [one["type"] for one in status["conditions"]] == ["ProviderFallback", "StreamsRunning"]
    assert status["conditions"][1]["message"] == f"stream s1: {WHY}"
    assert (status["streams"][0]["name"], status["streams"][0]["rows"]) == ("s1", 7)
    assert plant.device("d2")["status"]["conditions"] == []

    def shown(kind: str) -> str:
        wide = Console(width=250)
        with wide.capture() as caught:
            wide.print(table(kind, plant.client.find(kind)))
        return " ".join(caught.get().split())

    assert "ProviderFallback, StreamsRunning=False" in shown("Device")
    assert f"s1 mqtt 1/2 d1: {WHY}" in shown("Stream")

    send(one, "")
    until(lambda: stream()["running"] == 2)
    assert stream()["reasons"] == []
    assert [one["type"] for one in plant.device("d1")["status"]["conditions"]] == ["ProviderFallback"]


def test_an_agent_without_a_model_says_so_everywhere(
    plant_with_broker: Any, make: Any, until: Any, tmp_path: Path
) -> None:
    plant, port = plant_with_broker, free_port()
    plant.begin()
    http = make("Stream", "push", source={"http": {}}, features=["a"])
    fleet = make("Fleet", "line", matchLabels={"site": "north"}, streams=["push"])
    plant.client.apply([http, fleet])
    folder, token = tmp_path / "agent", tmp_path / "token"
    token.write_text(plant.client.create_enrollment_token(["north"]))
    agent = [sys.executable, "-m", "edgeward.cli.main", "agent"]
    enroll = ["enroll", "--url", plant.url, "--token-file", str(token), "--name", "d1", "--dir", str(folder)]
    subprocess.run([*agent, *enroll], check=True)
    run = ["run", "--dir", str(folder), "--report-interval", "0.5", "--serve", f"127.0.0.1:{port}"]
    running = subprocess.Popen([*agent, *run])
    try:
        why = "slot default has no model"
        until(lambda: plant.client.get("Stream", "push")["status"].get("notRunning") == 1, timeout=60.0)
        assert plant.client.get("Stream", "push")["status"]["reasons"] == [{"device": "d1", "reason": why}]
        (condition,) = plant.device("d1")["status"]["conditions"]
        assert condition["message"] == f"stream push: {why}"
        samples = f"http://127.0.0.1:{port}/v1/streams/push/samples"
        answer = httpx.post(samples, json={"a": 1}, trust_env=False)
        assert answer.status_code == 503 and why in answer.json()["error"]
        assert answer.headers["retry-after"] == "1"
    finally:
        running.terminate()
        running.wait()
    said = subprocess.run(
        [*agent, "status", "--dir", str(folder)], check=True, capture_output=True, text=True
    ).stdout
    assert f"stream push: does not run: {why}" in said
