"""MQTT topics. `{root}` is `edgeward/v1/{site}/{device}`; one client may use its own root only."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from edgeward.errors import InvalidDocument
from edgeward.identifiers import DeviceName, check_name

Lane = Literal["alarm", "result", "trend", "sample"]
LANES: tuple[Lane, ...] = get_args(Lane)

PREFIX = "edgeward/v1"

ALL_STATUS = f"{PREFIX}/+/+/status"
ALL_REPORTED = f"{PREFIX}/+/+/reported"
ALL_REPORT = f"{PREFIX}/+/+/report"
ALL_UP = f"{PREFIX}/+/+/up/+"
ALL_FORWARD = f"{PREFIX}/+/+/forward/+"


def root(name: DeviceName) -> str:
    return f"{PREFIX}/{name.site}/{name.device}"


def desired(name: DeviceName) -> str:
    return f"{root(name)}/desired"


def reported(name: DeviceName) -> str:
    return f"{root(name)}/reported"


def status(name: DeviceName) -> str:
    return f"{root(name)}/status"


def report(name: DeviceName) -> str:
    return f"{root(name)}/report"


def up(name: DeviceName, lane: Lane) -> str:
    return f"{root(name)}/up/{lane}"


def ack(name: DeviceName, lane: Lane) -> str:
    return f"{root(name)}/ack/{lane}"


def forward(name: DeviceName, lane: Lane) -> str:
    """Batches of a device's rows from its site's trend store to a central one, which signs nothing as the device."""
    return f"{root(name)}/forward/{lane}"


def forwarded(name: DeviceName, lane: Lane) -> str:
    """Acks of the central trend store for `forward`."""
    return f"{root(name)}/forwarded/{lane}"


def all_forwarded(site: str) -> str:
    return f"{PREFIX}/{site}/+/forwarded/+"


class Parsed(NamedTuple):
    name: DeviceName
    channel: str
    lane: Lane | None


def parse(topic: str) -> Parsed:
    """Split a device topic into its device, its channel and its lane, where it has one.

    Raises InvalidDocument when it is not one of the topics above.
    """
    parts = topic.split("/")
    if len(parts) < 5 or parts[:2] != PREFIX.split("/"):
        raise InvalidDocument("not an Edgeward topic", source=topic[:200])
    name = DeviceName(check_name(parts[2], "site"), check_name(parts[3], "device"))
    channel, rest = parts[4], parts[5:]
    if channel in ("up", "ack", "forward", "forwarded") and len(rest) == 1:
        for lane in LANES:
            if rest[0] == lane:
                return Parsed(name, channel, lane)
    elif channel in ("desired", "reported", "status", "report") and not rest:
        return Parsed(name, channel, None)
    raise InvalidDocument("not an Edgeward topic", source=topic[:200])


def matches(pattern: str, topic: str) -> bool:
    """MQTT v5, section 4.7: `+` stands for one level, `#` for the rest; neither for `$` topics at the start."""
    levels, names = pattern.split("/"), topic.split("/")
    if topic.startswith("$") and levels[0] in ("+", "#"):
        return False
    for index, level in enumerate(levels):
        if level == "#":
            return True
        if index >= len(names) or level not in ("+", names[index]):
            return False
    return len(levels) == len(names)
