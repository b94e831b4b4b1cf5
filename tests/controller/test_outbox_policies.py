"""What a Fleet says of its devices' outboxes reaches them, signed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from agent.desired import outbox_policies
from controller import devices
from edgeward.errors import InvalidDocument
from edgeward.wire.desired import DesiredState, encode
from edgeward.wire.lanes import LanePolicy
from tests.controller.conftest import resource


def test_the_fleets_outbox_travels_in_the_desired_state() -> None:
    fleet = resource(
        "Fleet",
        "line",
        matchLabels={"site": "north"},
        outbox={"alarm": {"bytes": 1 << 20, "fsync": "before-send"}},
    )
    draft = devices.compose("north", "d1", 1, 0.0, {}, [], outbox=fleet.spec.outbox)
    arrived = msgspec.json.decode(encode(draft), type=DesiredState)
    assert outbox_policies(arrived) == {"alarm": LanePolicy(bytes=1 << 20, fsync="before-send")}
    without = devices.compose("north", "d1", 1, 0.0, {}, [])
    assert outbox_policies(without) == {}
    again = devices.compose("north", "d1", 2, 9.0, {}, [], outbox=fleet.spec.outbox)
    assert devices.content_digest(draft) != devices.content_digest(without), (
        "another budget, another generation"
    )
    assert devices.content_digest(draft) == devices.content_digest(again)


def test_an_agent_that_does_not_understand_it_keeps_its_defaults() -> None:
    state = devices.compose("north", "d1", 1, 0.0, {}, [])
    odd = msgspec.structs.replace(state, policies={"outbox": {"alarm": {"bytes": "much"}}})
    assert outbox_policies(odd) == {}


@pytest.mark.parametrize(
    ("outbox", "says"),
    [
        ({"alarms": {}}, "alarms|outbox"),
        ({"alarm": {"bytes": 10}}, "outbox"),
        ({"alarm": {"timeToLive": 0}}, "outbox"),
        ({"alarm": {"fsync": "never"}}, "outbox"),
        ({"alarm": {"budget": 10}}, "budget"),
    ],
)
def test_a_mistake_is_refused_with_its_place(outbox: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidDocument, match=says):
        resource("Fleet", "line", matchLabels={"site": "north"}, outbox=outbox)


def test_it_reaches_the_devices_of_the_fleet(plant: Any, until: Any, make: Any) -> None:
    from tests.controller.test_controller_flow import opened

    plant.begin()
    device = plant.enroll("d1")
    plant.client.apply(
        [make("Fleet", "line", matchLabels={"site": "north"}, outbox={"result": {"bytes": 1 << 20}})]
    )
    found = until(lambda: (got := opened(device, wait=0)) and got.policies and got)
    assert outbox_policies(found) == {"result": LanePolicy(bytes=1 << 20)}
