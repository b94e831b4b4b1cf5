"""What the demo consists of: devices, shares of the data, models, rollouts and what must come of them."""

from __future__ import annotations

from dataclasses import dataclass

DATASET = "shuttle"
HELD_OUT = "0.7:1.0"

STORE = "plant-store"
SITES = ("north", "south", "harbour")

#: Seconds that the sensors take for their rows when nothing is in the way.
REPLAY_SECONDS = 32.0

#: Seconds of event time between two rows of a sensor.
PERIOD = 2.0


@dataclass(frozen=True)
class DevicePlan:
    """`share` is the device's part of the held-out rows; the parts add up to 1, in order."""

    name: str
    site: str
    role: str
    stream: str
    share: float

    @property
    def topic(self) -> str:
        return f"plant/{self.site}/{self.name}/sensors"


DEVICES = (
    DevicePlan("turbine-1", "north", "turbine", "turbine-sensors", 0.235),
    DevicePlan("turbine-2", "north", "turbine", "turbine-sensors", 0.235),
    DevicePlan("turbine-3", "south", "turbine", "turbine-sensors", 0.235),
    DevicePlan("turbine-4", "south", "turbine", "turbine-sensors", 0.235),
    DevicePlan("pump-1", "harbour", "pump", "pump-sensors", 0.06),
)

#: The agent that is killed while it works. Not the canary of any rollout.
VICTIM = "turbine-4"


@dataclass(frozen=True)
class Training:
    """One run of `edgeward train`; `rows` is the share of the series that it learns from."""

    recipe: str
    model: str
    version: int
    rows: str

    @property
    def package(self) -> str:
        return f"{self.model}-v{self.version}"


ANOMALY, TINY = "shuttle-anomaly", "shuttle-tiny"
V1 = Training("anomaly-detection", ANOMALY, 1, "0:0.35")
V2 = Training("anomaly-detection", ANOMALY, 2, "0:0.7")
TINY_V1 = Training("anomaly-autoencoder-tiny", TINY, 1, "0:0.35")
V3_PACKAGE = f"{ANOMALY}-v3"

#: How each rollout must end.
ROLLOUTS = {"shuttle-v1": "Complete", "tiny-v1": "Complete", "shuttle-v2": "Complete", "shuttle-v3": "Halted"}

#: What each device must run in the end.
EXPECTED = {device.name: (ANOMALY, 2) if device.role == "turbine" else (TINY, 1) for device in DEVICES}


def split(total: int) -> dict[str, tuple[int, int]]:
    """The rows `[begin, end)` of each device; together they are all `total` rows, once each."""
    parts, begin, reached = {}, 0, 0.0
    for device in DEVICES:
        reached += device.share
        end = total if device is DEVICES[-1] else round(reached * total)
        parts[device.name] = (begin, end)
        begin = end
    return parts
