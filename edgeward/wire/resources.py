"""Resources: the documents people write and read, Kubernetes-shaped.

`apiVersion, kind, metadata, spec, status`; unknown fields are refused, with the path that is wrong.
One struct per kind is the only declaration: the API, the CLI and the controller's tables use it.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from edgeward.errors import InvalidDocument
from edgeward.fields import explain, name_keys, split_error
from edgeward.identifiers import check_digest, check_name
from edgeward.wire import API_VERSION
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.providers import check_providers
from edgeward.wire.schedule import Delivery, Schedule, check_schedule
from edgeward.wire.slots import SlotPolicy, check_policy
from edgeward.wire.spec import Fraction, Positive, Seconds, SpecStruct
from edgeward.wire.stream_checks import check_stream
from edgeward.wire.streams import StreamSpec
from edgeward.wire.topics import Lane


class Metadata(Struct, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """`generation` counts changes of the spec, `resource_version` every change; both are set by the controller."""

    name: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: float = 0.0


# --- Site, Device, Fleet, Model -------------------------------------------------------------------


class Residency(SpecStruct, frozen=True):
    """What may leave the site's trend store towards a central one. Raw inputs stay by default.

    `forward` names the lanes. Of trend rows, those whose series matches one of the patterns `series`
    (`output:*`, fnmatch) go; what sums up inputs (`feature:` series) goes as `inputs` says: `moments` is without
    single values (least, greatest, sketch) and only for `least_samples` or more, `full` as it is. `redact`
    empties columns of other rows: `key`, or `source` (the sensor's own epoch and sequence number).
    """

    forward: list[Literal["alarm", "result", "trend", "sample"]] = msgspec.field(
        default_factory=lambda: ["trend"]
    )
    series: list[str] = msgspec.field(default_factory=lambda: ["*"])
    inputs: Literal["moments", "full"] = "moments"
    least_samples: Positive = 10
    redact: list[Literal["key", "source"]] = msgspec.field(default_factory=lambda: ["key"])


class SiteSpec(SpecStruct, frozen=True):
    """With `approval: required` a person approves each device that enrols here.

    Artifacts come to its devices as `delivery` says; a model takes over within `maintenance` only (None: at
    any time).
    """

    description: str = ""
    approval: Literal["automatic", "required"] = "automatic"
    residency: Residency = Residency()
    delivery: Delivery = Delivery()
    maintenance: Schedule | None = None


class DeviceSpec(SpecStruct, frozen=True):
    """Created by enrolment; `site` cannot change. A revoked device is refused at every endpoint."""

    site: str
    revoked: bool = False


class ShadowModel(SpecStruct, frozen=True):
    """A released version that runs beside what a slot runs, without acting, for as long as it stands here."""

    model: str
    version: Positive


class FleetSpec(SpecStruct, frozen=True):
    """The devices whose labels equal every pair of `match_labels`, the streams they run, and how their slots run.

    Each device has the labels `site` and `device` besides its own. `maintenance` takes the place of its
    site's for the slots that this fleet's rollouts fill. `shadows` are, by slot, versions that run without
    acting: the slot's policy gives their budget (`shadow`, or its defaults). `outbox` says what each
    lane may keep on the device while the trend store is away; a lane that is absent has
    `edgeward/wire/lanes.py`'s default.
    """

    match_labels: Annotated[dict[str, str], Meta(min_length=1)]
    streams: list[str] = []
    slots: dict[str, SlotPolicy] = {}
    maintenance: Schedule | None = None
    shadows: dict[str, ShadowModel] = {}
    outbox: dict[Lane, LanePolicy] = {}


class ModelSpec(SpecStruct, frozen=True):
    description: str = ""


class ModelVersionSpec(SpecStruct, frozen=True):
    """Made by publishing a signed package, never by `apply`. The signed manifest is the whole truth."""

    model: str
    version: Positive
    digest: str
    manifest: dict[str, Any]


# --- Rollout --------------------------------------------------------------------------------------


class Wave(SpecStruct, frozen=True):
    """Either a number of devices or a share (0-1] of the fleet, cumulative; the last wave must reach all."""

    count: Positive | None = None
    share: Annotated[float, Meta(gt=0, le=1)] | None = None


class Gate(SpecStruct, frozen=True):
    """What a wave must show before the next starts: the share of its devices on the new version.

    `soak` seconds must pass with the share held; `max_psi` bounds the drift figure that its devices report.
    """

    min_success: Fraction = 1.0
    soak: Annotated[float, Meta(ge=0)] = 0.0
    max_psi: float | None = None


class RolloutSpec(SpecStruct, frozen=True):
    """A model version to a fleet. `deadline` seconds bound each wave; then the rollout halts with a reason.

    Devices fetch and verify the model at once and switch to it at `activate_at` or later. While a device waits
    for that, for its site's hours, or because somebody there holds it, the deadline does not run for it.
    """

    fleet: str
    model: str
    version: Positive
    slot: str = "default"
    waves: Annotated[list[Wave], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: [Wave(count=1), Wave(share=1.0)]
    )
    gate: Gate = Gate()
    deadline: Seconds = 600.0
    activate_at: Annotated[datetime, Meta(tz=True)] | None = None
    paused: bool = False


class RolloutEvent(Struct, frozen=True, rename="camel"):
    """One line of a rollout's timeline."""

    at: float
    reason: str
    message: str
    wave: int = 0
    device: str = ""
    measured: float | None = None
    limit: float | None = None


class WaveStatus(Struct, frozen=True, rename="camel"):
    """`excused` holds the devices that the site's hours or a hold kept from going on: None while they do, else
    when they were seen to go on, which is when their deadline began to run."""

    devices: list[str]
    started_at: float
    succeeded: int = 0
    failed: int = 0
    passed_at: float | None = None
    held_since: float | None = None
    excused: dict[str, float | None] = {}


class RolloutStatus(Struct, frozen=True, rename="camel"):
    phase: Literal["Pending", "Progressing", "Paused", "Halted", "Complete", "Superseded"] = "Pending"
    reason: str = ""
    message: str = ""
    observed_generation: int = 0
    devices: int = 0
    updated: int = 0
    waves: list[WaveStatus] = []
    timeline: list[RolloutEvent] = []


Kind = Literal["Site", "Device", "Fleet", "Model", "ModelVersion", "Stream", "Rollout"]

SPECS: dict[str, type[SpecStruct]] = {
    "Site": SiteSpec,
    "Device": DeviceSpec,
    "Fleet": FleetSpec,
    "Model": ModelSpec,
    "ModelVersion": ModelVersionSpec,
    "Stream": StreamSpec,
    "Rollout": RolloutSpec,
}

#: Kinds a person may write with `apply`; in the order in which they may refer to one another.
APPLICABLE = ("Site", "Model", "Stream", "Fleet", "Device", "Rollout")

PLURALS = {kind.lower() + "s": kind for kind in SPECS}


class Resource(Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """The envelope of every resource. `spec` is one of SPECS, chosen by `kind`."""

    api_version: str = API_VERSION
    kind: str
    metadata: Metadata
    spec: Any = {}
    status: dict[str, Any] = {}


def kind_of(word: str) -> str:
    """The kind meant by `rollout`, `rollouts` or `Rollout`. Raises InvalidDocument for anything else."""
    for kind in SPECS:
        if word.lower() in (kind.lower(), kind.lower() + "s"):
            return kind
    raise InvalidDocument(f"unknown kind {word!r}", field="kind", hint=f"one of {', '.join(SPECS)}")


def _convert(value: Any, type_: Any, source: str, prefix: str) -> Any:
    try:
        return msgspec.convert(value, type=type_)
    except msgspec.ValidationError as error:
        text, field = split_error(error)
        named = name_keys(value, type_, text, field)
        where = ".".join(part for part in (prefix, named) if part).replace(".[", "[")
        raise InvalidDocument(explain(text, type_, field), source=source, field=where) from None


def parse_resource(document: Any, *, source: str = "") -> Resource:
    """A checked resource from a plain mapping (YAML or JSON).

    Raises InvalidDocument naming `source` and the field, for a wrong type, an unknown field, an
    unknown kind or API version, a bad name or an inconsistent spec.
    """
    if not isinstance(document, dict):
        raise InvalidDocument(
            f"expected a mapping with apiVersion, kind, metadata and spec, got {type(document).__name__}",
            source=source,
        )
    resource: Resource = _convert(document, Resource, source, "")
    if resource.api_version != API_VERSION:
        raise InvalidDocument(
            f"expected {API_VERSION}, got {resource.api_version!r}", source=source, field="apiVersion"
        )
    if resource.kind not in SPECS:
        raise InvalidDocument(
            f"unknown kind {resource.kind!r}", source=source, field="kind", hint=f"one of {', '.join(SPECS)}"
        )
    check_name(resource.metadata.name, "metadata.name", source)
    resource.spec = _convert(resource.spec, SPECS[resource.kind], source, "spec")
    try:
        _check(resource.spec)
    except InvalidDocument as error:
        raise InvalidDocument(error.problem, source=source, field=error.field, hint=error.hint) from None
    return resource


def _check(spec: SpecStruct) -> None:
    """What types alone cannot say."""
    match spec:
        case RolloutSpec():
            check_name(spec.fleet, "spec.fleet")
            check_name(spec.model, "spec.model")
            check_name(spec.slot, "spec.slot")
            for index, wave in enumerate(spec.waves):
                if (wave.count is None) == (wave.share is None):
                    raise InvalidDocument(
                        "expected exactly one of count and share", field=f"spec.waves[{index}]"
                    )
            if spec.waves[-1].share != 1.0:
                raise InvalidDocument(
                    "the last wave must reach the whole fleet: expected share: 1.0",
                    field=f"spec.waves[{len(spec.waves) - 1}]",
                )
            if spec.gate.max_psi is not None and not math.isfinite(spec.gate.max_psi):
                raise InvalidDocument("expected a finite number", field="spec.gate.maxPsi")
        case StreamSpec():
            check_stream(spec)
        case FleetSpec():
            for index, stream in enumerate(spec.streams):
                check_name(stream, f"spec.streams[{index}]")
            for slot, policy in spec.slots.items():
                check_name(slot, "spec.slots")
                check_providers(policy.providers, f"spec.slots.{slot}.providers")
                check_policy(policy, f"spec.slots.{slot}")
            check_schedule(spec.maintenance, "spec.maintenance")
            for slot, shadow in spec.shadows.items():
                check_name(slot, "spec.shadows")
                check_name(shadow.model, f"spec.shadows.{slot}.model")
        case SiteSpec():
            for index, pattern in enumerate(spec.residency.series):
                if not pattern:
                    raise InvalidDocument(
                        "expected a pattern like output:*", field=f"spec.residency.series[{index}]"
                    )
            check_schedule(spec.delivery.schedule, "spec.delivery.schedule")
            check_schedule(spec.maintenance, "spec.maintenance")
        case DeviceSpec():
            check_name(spec.site, "spec.site")
        case ModelVersionSpec():
            check_name(spec.model, "spec.model")
            check_digest(spec.digest, "spec.digest")


def model_version_name(model: str, version: int) -> str:
    """The resource name of a model version: `{model}-v{version}`."""
    return f"{model}-v{version}"
