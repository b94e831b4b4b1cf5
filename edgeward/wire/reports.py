"""What a device says of itself: birth and will, reported state, and the small report for gates.

`boot` counts starts of the agent and `n` messages since that start; (boot, n) only grows, so a
receiver drops a replayed message by comparing. `*_at` are seconds since 1970.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from msgspec import Struct

from edgeward.wire.desired import ModelRef


class Phase(StrEnum):
    """A slot's lifecycle phase (`agent/lifecycle.py` holds the transition table)."""

    PENDING = "Pending"
    DOWNLOADING = "Downloading"
    VERIFYING = "Verifying"
    STAGED = "Staged"
    SELF_TEST = "SelfTest"
    SHADOW = "Shadow"
    ACTIVE = "Active"
    DEGRADED = "Degraded"
    ROLLING_BACK = "RollingBack"
    QUARANTINED = "Quarantined"
    HELD = "Held"


class Accelerator(Struct, frozen=True):
    kind: str
    name: str
    memory_bytes: int = 0


class Inventory(Struct, frozen=True):
    """What the device is: facts, found on the device itself.

    `soc` and `drivers` are what a measurement on the device is valid for; `providers` are onnxruntime's,
    `delegates` LiteRT's.
    """

    architecture: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    runtimes: dict[str, str] = {}
    providers: list[str] = []
    accelerators: list[Accelerator] = []
    node: dict[str, str] = {}
    soc: str = ""
    drivers: dict[str, str] = {}
    delegates: list[str] = []


class Status(Struct, frozen=True):
    """Birth (`online`) and, signed ahead as the last will, `offline`."""

    boot: int
    n: int
    at: float
    state: Literal["online", "offline"]
    agent_version: str = ""
    epoch: str = ""
    inventory: Inventory = Inventory()


class VariantMeasure(Struct, frozen=True):
    """What a device found out about one variant: one example's latency in milliseconds, its worker's memory.

    A figure that was not taken is None. `reason` says why the variant was not chosen.
    """

    name: str
    runtime: str
    provider: str = ""
    p50_ms: float | None = None
    p95_ms: float | None = None
    memory_bytes: int | None = None
    quality: float | None = None
    chosen: bool = False
    reason: str = ""


class ShadowReport(Struct, frozen=True):
    """What a candidate (`digest`) did on live inputs without acting, against the model that acted.

    Of the sampled inferences `seen` were answered by both, of which `agreed` gave the same; `failed` were not
    answered by the candidate, `not_finite` gave NaN or infinity, `skipped` were sampled but not asked since the
    budget did not allow it. `psi` is the population stability index between both models' scores, `score_mean`
    and `incumbent_mean` their means. `latency_ms` holds p50 and p95 of the candidate's inferences, measured at
    the lowest priority. `temperature` in degrees Celsius is None where the device has no sensor.
    """

    digest: str
    state: Literal["running", "paused", "passed", "refused", "ended"]
    reason: str = ""
    seen: int = 0
    agreed: int = 0
    failed: int = 0
    not_finite: int = 0
    skipped: int = 0
    score_mean: float | None = None
    incumbent_mean: float | None = None
    psi: float | None = None
    latency_ms: dict[str, float] = {}
    memory_bytes: int | None = None
    temperature: float | None = None


class SlotReport(Struct, frozen=True):
    """One slot: the phase of the newest wish for it, and what it really runs meanwhile.

    `measured` and `limit` say by how much a check failed or what is waited for. `variants` is what the
    newest selection was made from. `shadow` is the newest shadow run, also after its end.
    """

    phase: Phase
    reason: str = ""
    message: str = ""
    measured: float | None = None
    limit: float | None = None
    since: float = 0.0
    deadline: float | None = None
    target: ModelRef | None = None
    running: ModelRef | None = None
    previous: ModelRef | None = None
    variant: str = ""
    provider: str = ""
    variants: list[VariantMeasure] = []
    shadow: ShadowReport | None = None


class Condition(Struct, frozen=True, rename="camel"):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str = ""
    message: str = ""
    last_transition_time: float = 0.0
    observed_generation: int = 0


class WaitReason(StrEnum):
    """Why a slot that is fine does not go on: of the site's hours or people, not of the model or the link.

    A window is waited for as Pending (`BANDWIDTH_WINDOW`) or Staged, a hold as Held; `CLOCK_UNKNOWN` and
    `ZONE_UNKNOWN` say why a device cannot tell whether a window is open.
    """

    BANDWIDTH_WINDOW = "BandwidthWindow"
    ACTIVATION_TIME = "ActivationTime"
    MAINTENANCE_WINDOW = "MaintenanceWindow"
    CLOCK_UNKNOWN = "ClockUnknown"
    ZONE_UNKNOWN = "ZoneUnknown"
    LOCAL_HOLD = "LocalHold"


class Hold(Struct, frozen=True):
    """Somebody at the device keeps a slot on the model that it runs; `slot` is empty for all of them.

    Set and lifted on the device only. `by` is the local user, `until` when it ends by itself (None: never).
    """

    slot: str
    by: str
    reason: str
    since: float
    until: float | None = None


class Reported(Struct, frozen=True):
    """`observed_generation` is the newest desired generation the device has accepted as genuine."""

    boot: int
    n: int
    at: float
    observed_generation: int
    slots: dict[str, SlotReport]
    conditions: list[Condition] = []
    quarantined: list[str] = []
    holds: list[Hold] = []


class StreamReport(Struct, frozen=True):
    """Figures of one stream since the last report, for one model digest.

    `latency_ms` holds p50/p95 of one inference call; `psi` the population stability index of each
    live feature against the package's baseline (Siddiqi 2006; > 0.25 is a significant shift), over
    the last `psi_rows` rows.

    `problems` counts readings that were kept from the model by kind and feature (`range:flow`), `late`
    samples behind the watermark, `dropped` those that nobody could take, `other` what else was counted.
    `actions` holds how often each action `run`, `failed`, or was suppressed (`held`, `once`, `rate`), and
    `latency_ms` p50/p95/p99 from a sample's receipt to the action's end. `reason` says why the stream does not run.
    """

    stream: str
    digest: str
    rows: int
    alarms: int
    rejected: int
    errors: int
    score_mean: float | None = None
    latency_ms: dict[str, float] = {}
    psi: dict[str, float] = {}
    psi_rows: int = 0
    problems: dict[str, int] = {}
    late: int = 0
    dropped: int = 0
    other: dict[str, int] = {}
    actions: dict[str, dict[str, float]] = {}
    reason: str = ""


class LaneReport(Struct, frozen=True):
    """Rows of a lane that wait and what they cost in bytes; `lost` counts since the outbox was made."""

    rows: int
    bytes: int
    lost: int


class OutboxReport(Struct, frozen=True):
    """`gaps` are the rows of all lanes that were lost, `acked` those up to which all is stored."""

    rows: int
    bytes: int
    acked: int
    gaps: int
    lanes: dict[str, LaneReport] = {}


class Report(Struct, frozen=True):
    boot: int
    n: int
    at: float
    seconds: float
    streams: list[StreamReport]
    outbox: OutboxReport
    rss_bytes: int = 0
