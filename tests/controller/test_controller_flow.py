"""The way of a model through the controller: release, enrolment, rollout, desired state, halt."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from rich.console import Console

from controller.devices import slots_of
from edgeward.cli.resources import table
from edgeward.errors import EdgewardError
from edgeward.trust import dsse
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState
from edgeward.wire.reports import Hold, Phase, ShadowReport, SlotReport, VariantMeasure
from edgeward.wire.schedule import ActivationTerms, Delivery, Schedule
from edgeward.wire.slots import SlotPolicy


def opened(device: Any, newer_than: int = 0, wait: float = 10.0) -> DesiredState | None:
    raw = device.http.desired(newer_than=newer_than, wait=wait)
    if raw is None:
        return None
    return dsse.verify(raw, PAYLOAD_TYPE, device.response.trust.desired_keys, DesiredState)


def test_a_good_version_reaches_all_and_a_bad_one_stops_at_the_canary(
    plant: Any, until: Any, rollout: Any
) -> None:
    plant.begin()
    one, two = plant.enroll("d1"), plant.enroll("d2")
    v1, v2 = plant.publish(1), plant.publish(2)
    first = opened(one)
    assert first is not None and first.slots == {} and first.device == "d1"
    assert [stream.name for stream in first.streams] == ["s1"]

    for device in (one, two):
        device.http.send(*device.birth())
    plant.client.apply([rollout("r1", 1)])
    canary = opened(one, first.generation)
    assert canary is not None and canary.slots["default"].active == v1
    assert "default" not in opened(two).slots  # the second wave waits
    one.http.send(*one.runs(v1, canary.generation))
    last = until(lambda: (got := opened(two, wait=0)) and got.slots and got)
    two.http.send(*two.runs(v1, last.generation))
    until(lambda: plant.client.get("Rollout", "r1")["status"]["phase"] == "Complete")
    until(lambda: plant.device("d2")["status"]["state"] == "UpToDate")
    assert plant.device("d1")["status"]["slots"]["default"]["running"]["version"] == 1

    plant.client.apply([rollout("r2", 2)])
    tried = opened(one, canary.generation)
    assert tried is not None and tried.slots["default"].active == v2
    failed = SlotReport(
        Phase.QUARANTINED, "SelfTestFailed", "output 0 is off", measured=0.5, limit=0.1, target=v2, running=v1
    )
    one.http.send(*one.reported(tried.generation, {"default": failed}, [v2.digest]))
    back = opened(one, tried.generation)
    assert back is not None and back.slots["default"].active == v1
    assert back.generation > tried.generation  # going back is a newer generation
    status = plant.client.get("Rollout", "r2")["status"]
    assert status["phase"] == "Halted" and status["reason"] == "SelfTestFailed"
    event = next(line for line in status["timeline"] if line["reason"] == "SelfTestFailed")
    assert (event["device"], event["measured"], event["limit"]) == ("d1", 0.5, 0.1)
    assert "output 0 is off" in event["message"] and "0.5" in status["message"]
    assert opened(two).slots["default"].active == v1

    # A device that joins later gets what the fleet runs, not what it refused.
    three = plant.enroll("d3")
    late = until(lambda: (got := opened(three, wait=0)) and got.slots and got)
    assert late.slots["default"].active == v1


def test_the_policy_of_the_fleet_that_brought_a_model_travels_with_it(
    plant: Any, until: Any, make: Any, rollout: Any
) -> None:
    plant.begin()
    device = plant.enroll("d1")
    plant.publish(1)
    line = {"matchLabels": {"site": "north"}, "streams": ["s1"]}
    plant.client.apply(
        [
            make("Fleet", "line", **line, slots={"default": {"maxLatencyMs": 5.0, "threads": 2}}),
            # This one matches the device too, but did not bring the model.
            make("Fleet", "other", matchLabels={"device": "d1"}, slots={"default": {"threads": 8}}),
            rollout("r1", 1),
        ]
    )
    first = until(lambda: (got := opened(device, wait=0)) and got.slots and got)
    assert first.slots["default"].policy == SlotPolicy(threads=2, max_latency_ms=5.0)

    plant.client.apply([make("Fleet", "line", **line, slots={"default": {"threads": 4}})])
    changed = opened(device, first.generation)
    assert changed is not None and changed.generation > first.generation
    assert changed.slots["default"].policy == SlotPolicy(threads=4)
    assert changed.slots["default"].active == first.slots["default"].active

    plant.client.apply([make("Fleet", "line", **line, slots={"unused": {"threads": 4}})])
    back = opened(device, changed.generation)
    assert back is not None and back.slots["default"].policy == SlotPolicy()


def test_a_fleet_names_what_runs_beside_without_acting(
    plant: Any, until: Any, make: Any, rollout: Any
) -> None:
    plant.begin()
    device = plant.enroll("d1")
    v1, v2 = plant.publish(1), plant.publish(2)
    line = {"matchLabels": {"site": "north"}, "streams": ["s1"]}
    beside = {"default": {"model": v2.model, "version": 2}, "unused": {"model": v2.model, "version": 2}}
    plant.client.apply([make("Fleet", "line", **line, shadows=beside), rollout("r1", 1)])
    first = until(lambda: (got := opened(device, wait=0)) and got.slots and got)
    assert (first.slots["default"].active, first.slots["default"].shadow) == (v1, v2)
    assert set(first.slots) == {"default"}, "beside nothing, nothing can run"
    same = {"default": {"model": v1.model, "version": 1}}
    plant.client.apply([make("Fleet", "line", **line, shadows=same)])
    after = opened(device, first.generation)
    assert after is not None and after.slots["default"].shadow is None
    with pytest.raises(EdgewardError, match=r"there is no ModelVersion"):
        plant.client.apply(
            [make("Fleet", "line", **line, shadows={"default": {"model": "m", "version": 99}})]
        )


def test_a_shadow_s_figures_are_in_the_status(plant: Any) -> None:
    plant.begin()
    device, model = plant.enroll("d1"), plant.publish(1)
    shadow = ShadowReport("2" * 64, "running", seen=10, agreed=9, psi=0.1, latency_ms={"p95": 2.0})
    report = SlotReport(Phase.SHADOW, target=model, running=model, shadow=shadow)
    device.http.send(*device.reported(1, {"default": report}))
    status = plant.device("d1")["status"]
    assert status["slots"]["default"]["shadow"]["agreed"] == 9
    assert slots_of(status)["default"].shadow == shadow and status["state"] != "Error"


def test_what_a_device_measured_of_each_variant_is_in_its_status(plant: Any) -> None:
    plant.begin()
    device, model = plant.enroll("d1"), plant.publish(1)
    table = [
        VariantMeasure("int8", "onnx", "CPU", 1.5, 2.5, 64 << 20, 0.9, chosen=True),
        VariantMeasure("edge", "tflite", reason="runtime tflite is not installed"),
    ]
    report = SlotReport(Phase.ACTIVE, target=model, running=model, variants=table)
    device.http.send(*device.reported(1, {"default": report}))
    status = plant.device("d1")["status"]
    kept = status["slots"]["default"]["variants"]
    assert kept[0]["p95_ms"] == 2.5 and kept[0]["chosen"] and "not installed" in kept[1]["reason"]
    assert slots_of(status)["default"].variants == table


def test_a_policy_that_forbids_what_runs_is_told_once_and_named(
    plant: Any, until: Any, make: Any, rollout: Any
) -> None:
    plant.begin()
    device, model = plant.enroll("d1"), plant.publish(1)
    device.http.send(*device.birth())
    plant.client.apply([rollout("r1", 1)])
    first = until(lambda: (got := opened(device, wait=0)) and got.slots and got)
    device.http.send(*device.runs(model, first.generation))
    until(lambda: plant.client.get("Rollout", "r1")["status"]["phase"] == "Complete")

    line = {"matchLabels": {"site": "north"}, "streams": ["s1"]}
    cuda = {"default": {"providers": ["CUDAExecutionProvider"]}}
    plant.client.apply([make("Fleet", "line", **line, slots=cuda)])
    changed = opened(device, first.generation)
    assert changed is not None and changed.slots["default"].active == model
    refusal = SlotReport(Phase.QUARANTINED, "NotRunnable", "no CUDA here", target=model, running=model)
    device.http.send(*device.reported(changed.generation, {"default": refusal}))
    until(lambda: plant.device("d1")["status"]["state"] == "Error")
    until(lambda: plant.client.get("Rollout", "r1")["status"]["updated"] == 0)
    status = plant.device("d1")["status"]
    assert status["slots"]["default"]["message"] == "no CUDA here"
    assert status["desiredGeneration"] == changed.generation

    plant.client.apply([make("Fleet", "line", **line)])
    back = opened(device, changed.generation)
    assert back is not None and back.generation == changed.generation + 1
    assert back.slots["default"].active == model and back.slots["default"].policy == SlotPolicy()


def test_a_site_s_hours_and_a_rollout_s_time_travel_and_holds_are_shown(
    plant: Any, until: Any, make: Any, rollout: Any, edgeward_table: Any
) -> None:
    plant.begin()
    device = plant.enroll("d1")
    v1, v2 = plant.publish(1), plant.publish(2)
    device.http.send(*device.birth())
    plant.client.apply([rollout("r1", 1)])
    before = until(lambda: (got := opened(device, wait=0)) and got.slots and got)
    assert before.delivery == Delivery() and before.slots["default"].terms == ActivationTerms()
    device.http.send(*device.runs(v1, before.generation))
    until(lambda: plant.client.get("Rollout", "r1")["status"]["phase"] == "Complete")

    night = {"zone": "Europe/Berlin", "windows": [{"from": "22:00", "to": "05:00", "days": ["sat"]}]}
    delivery = {"schedule": night, "rate": 65536}
    plant.client.apply([make("Site", "north", delivery=delivery)])
    capped = opened(device, before.generation)
    assert capped is not None and capped.delivery == msgspec.convert(delivery, Delivery)
    plant.client.apply([make("Site", "north", delivery=delivery, maintenance=night)])
    after = opened(device, capped.generation)
    assert after is not None
    assert after.slots["default"].terms.maintenance == msgspec.convert(night, Schedule)

    line = {"matchLabels": {"site": "north"}, "streams": ["s1"]}
    always = {"windows": [{"from": "00:00", "to": "24:00"}]}
    plant.client.apply([make("Fleet", "line", **line, maintenance=always)])
    own = opened(device, after.generation)
    assert own is not None and own.slots["default"].terms.maintenance == msgspec.convert(always, Schedule)

    plant.client.apply([rollout("r2", 2, activateAt="2100-01-01T01:00:00+01:00")])
    timed = opened(device, own.generation)
    assert timed is not None and timed.slots["default"].active == v2
    assert timed.slots["default"].terms.at == 4102444800.0
    held = SlotReport(Phase.HELD, "LocalHold", "held by anna: audit", target=v2, running=v1)
    holds = [Hold("", "anna", "audit", time.time() - 7300)]
    device.http.send(*device.reported(timed.generation, {"default": held}, holds=holds))
    until(lambda: plant.client.get("Rollout", "r2")["status"].get("reason") == "LocalHold")
    assert plant.device("d1")["status"]["holds"][0]["by"] == "anna"
    assert "by anna for 2h: audit" in edgeward_table("Device", plant.client.find("Device"))

    # The way back is for the site's hours, not for the time of the model that it leads away from.
    failed = SlotReport(Phase.QUARANTINED, "SelfTestFailed", "off", target=v2, running=v1)
    device.http.send(*device.reported(timed.generation, {"default": failed}, [v2.digest]))
    back = opened(device, timed.generation)
    assert back is not None and back.slots["default"].active == v1
    assert back.slots["default"].terms == ActivationTerms(maintenance=msgspec.convert(always, Schedule))


@pytest.fixture
def edgeward_table() -> Any:
    """What `edgeward get` prints, on a wide terminal."""

    def show(kind: str, items: list[dict[str, Any]]) -> str:
        console = Console(width=300)
        with console.capture() as capture:
            console.print(table(kind, items))
        return capture.get()

    return show
