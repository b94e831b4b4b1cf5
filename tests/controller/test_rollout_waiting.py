"""Whose time it is that passes while a device is on its way."""

from __future__ import annotations

import pytest

from controller.rollouts.waiting import excused, waits
from edgeward.wire.desired import ModelRef
from edgeward.wire.reports import Phase, SlotReport

TARGET, OTHER = ModelRef("m", 2, "2" * 64), ModelRef("m", 3, "3" * 64)


@pytest.mark.parametrize(
    ("deadline", "target", "now", "late"),
    [
        (3600.0, TARGET, 700.0, False),
        (3600.0, TARGET, 3600.0, True),
        (None, TARGET, 1.0, True),
        (9.0, OTHER, 1.0, True),
    ],
)
def test_a_device_is_not_late_for_as_long_as_its_policy_gives_a_shadow_run(
    deadline: float | None, target: ModelRef, now: float, late: bool
) -> None:
    """By default that is an hour, and a rollout's own deadline ten minutes."""
    slot = SlotReport(Phase.SHADOW, "Shadowing", deadline=deadline, target=target)
    assert waits(slot, TARGET, now) is not late


def test_its_own_time_begins_with_the_end_of_the_run() -> None:
    slot = SlotReport(Phase.SHADOW, "Shadowing", deadline=3600.0, target=TARGET)
    during = excused({}, {"a": slot}, TARGET, 700.0)
    assert during == {"a": None}
    assert excused(during, {"a": SlotReport(Phase.SELF_TEST, target=TARGET)}, TARGET, 900.0) == {"a": 900.0}
