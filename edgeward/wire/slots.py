"""How a model slot runs its model: limits, isolation, and what may be traded for what."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from edgeward.errors import InvalidDocument
from edgeward.wire.spec import Fraction, Positive, Seconds, SpecStruct

Bytes = Annotated[int, Meta(ge=1 << 20)]


def check_policy(policy: SlotPolicy, field: str) -> None:
    """What types alone cannot say. Raises InvalidDocument naming what is below `field`."""
    if policy.isolation == "in-process" and policy.memory_bytes is not None:
        raise InvalidDocument(
            "in-process a model has no memory of its own that could be bounded",
            field=f"{field}.memoryBytes",
            hint="leave it out, or use isolation: process",
        )


class GuardPolicy(SpecStruct, frozen=True):
    """When a model that has passed its self-test gives way to its predecessor all the same.

    Judged on the device alone over the last `window` seconds, from `minimum` inferences in them on; a limit
    that is absent is not looked at. `error_rate` is the share of inferences that failed (refused by the
    runtime, not answered in time, lost with their worker; not those of a request's own fault), `nan_rate`
    the share that gave NaN or infinity, `alarm_rate` the share of a stream's that the package's decision
    called an alarm, `latency_ms` the p95 of an inference. `crash_loop`: so does a worker that is lost again
    and again.

    A model that breaks it is quarantined on the device, and its predecessor runs; without one it goes on,
    Degraded.
    """

    window: Seconds = 60.0
    minimum: Positive = 20
    error_rate: Fraction | None = 0.5
    nan_rate: Fraction | None = 0.5
    alarm_rate: Fraction | None = None
    latency_ms: Annotated[float, Meta(gt=0)] | None = None
    output_drift: Annotated[float, Meta(gt=0)] | None = None
    crash_loop: bool = True


class ShadowPolicy(SpecStruct, frozen=True):
    """How a candidate that has passed its self-test proves itself on live inputs before it may act.

    It sees a random `sample` (share) of what the acting model answers, in a worker of its own with the lowest
    priority, until `inferences` are compared. Then at least `min_agreement` of them must agree: the same
    verdict where both packages have a decision, the same label where the models give labels or
    probabilities, otherwise every number within `tolerance * max(1, |incumbent's|)`. `max_score_shift` bounds the
    population stability index between both models' scores on these inputs, in tenths of the incumbent's
    (Siddiqi, Credit Risk Scorecards, 2006: above 0.25 much has changed), `max_error_rate` the share that
    failed or, with `nan: reject`, gave NaN or infinity, `max_latency_ms` the p95 of one inference. A limit
    that is absent is not looked at.

    When too few have come by `deadline` seconds, what was seen is judged, and `on_deadline` says what follows
    if nothing spoke against the candidate.

    The budget: the worker is busy for at most `cpu` of a core (its threads counted); above `memory_bytes`
    (resident set) the shadow ends and the candidate is refused; above `max_temperature` degrees Celsius it
    pauses until 5 degrees below. A device without a sensor is not judged by it and says so.
    """

    inferences: Positive = 200
    sample: Annotated[float, Meta(gt=0, le=1)] = 0.1
    deadline: Seconds = 3600.0
    on_deadline: Literal["refuse", "activate"] = "refuse"
    min_agreement: Fraction | None = 0.95
    tolerance: Annotated[float, Meta(ge=0)] = 0.05
    max_score_shift: Annotated[float, Meta(gt=0)] | None = 0.25
    max_error_rate: Fraction = 0.0
    max_latency_ms: Annotated[float, Meta(gt=0)] | None = None
    memory_bytes: Bytes | None = None
    max_temperature: float | None = None
    cpu: Annotated[float, Meta(gt=0, le=1)] = 0.25


class SlotPolicy(SpecStruct, frozen=True):
    """Part of a Fleet (`spec.slots`), carried to the device in its desired state.

    `threads` bounds the runtime's intra-op threads, `concurrency` how many requests run at once.
    `memory_bytes` is the worker's ceiling (resident set), `gpu_memory_bytes` the accelerator arena's.
    `deadline` seconds bound one inference. `isolation` `in-process` spares the worker for a trusted,
    small model: its crash is then the agent's, it has no ceiling, one request runs at once, and a call
    beyond its deadline cannot be ended.

    `providers` are the execution providers or delegates allowed, best first (empty: all that the package
    allows); with `cpu_fallback` a model that ends up on the CPU although an accelerator was meant is a
    condition on the device, without it the model is refused. Variants may fall `quality_tolerance` below
    the best variant's quality; the fastest that keeps `max_latency_ms` (p95 of one example) is taken.

    `max_batch` examples of different requests run as one when the model allows it; a request waits
    `queue_delay_us` for company at most; `queue` requests may wait before more are refused. `nan`
    `reject` refuses requests and results that hold NaN. `guard` says when the model gives way to the one
    before it. With `shadow` a successor first runs beside it without acting.
    """

    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    concurrency: Annotated[int, Meta(ge=1, le=64)] = 1
    memory_bytes: Bytes | None = None
    gpu_memory_bytes: Bytes | None = None
    deadline: Seconds = 10.0
    isolation: Literal["process", "in-process"] = "process"
    providers: list[str] = []
    cpu_fallback: bool = False
    quality_tolerance: Annotated[float, Meta(ge=0)] = 0.0
    max_latency_ms: Annotated[float, Meta(gt=0)] | None = None
    max_batch: Positive = 64
    queue_delay_us: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    queue: Positive = 256
    nan: Literal["reject", "allow"] = "reject"
    guard: GuardPolicy = GuardPolicy()
    shadow: ShadowPolicy | None = None
