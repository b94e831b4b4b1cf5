"""What devices say of their streams, as people read it: pure functions over reports and statuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from edgeward.wire.reports import Condition, Report, StreamReport

#: The condition of a device with a stream that does not run; absent while all run.
CONDITION = "StreamsRunning"
#: Devices named with their reasons in a Stream's status, and characters of a reason.
NAMED, REASON_LENGTH = 5, 500


def streams_of(report: Report) -> list[dict[str, Any]]:
    """The newest report of each stream, for a Device's status; counts are since the report before."""
    return [_stream(one) for one in sorted(report.streams, key=lambda one: one.stream)]


def _stream(report: StreamReport) -> dict[str, Any]:
    problems: Counter[str] = Counter()
    for problem, count in report.problems.items():
        problems[problem.partition(":")[0]] += count  # `range:flow` counts as `range`
    actions = {
        how: {name: int(count) for name, count in counts.items()}
        for how, counts in report.actions.items()
        if how != "latency_ms" and counts
    }
    return {
        "name": report.stream,
        "digest": report.digest,
        "rows": report.rows,
        "alarms": report.alarms,
        "late": report.late,
        "rejected": report.rejected,
        "dropped": report.dropped,
        "errors": report.errors,
        "problems": dict(sorted(problems.items())),
        "actions": actions,
        "reason": report.reason[:REASON_LENGTH],
    }


def with_condition(status: dict[str, Any], before: Mapping[str, Any], now: float) -> dict[str, Any]:
    """A Device's status with the condition that follows from its `streams`, beside the device's own ones.

    `before` is its status until now: the condition keeps the time at which it came.
    """
    conditions = [one for one in status.get("conditions", []) if one["type"] != CONDITION]
    blocked = [one for one in status.get("streams", []) if one["reason"]]
    if blocked:
        held = [one for one in before.get("conditions", []) if one["type"] == CONDITION]
        condition = Condition(
            CONDITION,
            "False",
            "StreamBlocked",
            "; ".join(f"stream {one['name']}: {one['reason']}" for one in blocked),
            held[0]["lastTransitionTime"] if held else now,
            status.get("observedGeneration", 0),
        )
        conditions.append(msgspec.to_builtins(condition))
    return {**status, "conditions": conditions}


def summary(stream: str, wanted: Iterable[str], statuses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A Stream's status: how many of the devices that shall run it do, and the first that do not, with why.

    `wanted` names those devices, `statuses` holds the Devices' statuses by name.
    """
    names = sorted(wanted)
    running, reasons = 0, []
    for name in names:
        found = next((one for one in statuses[name].get("streams", []) if one["name"] == stream), None)
        if found is None:
            continue
        if found["reason"]:
            reasons.append({"device": name, "reason": found["reason"]})
        else:
            running += 1
    return {
        "devices": len(names),
        "running": running,
        "notRunning": len(reasons),
        "reasons": reasons[:NAMED],
    }
