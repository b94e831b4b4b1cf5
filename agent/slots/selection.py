"""Which variant of a model a device runs: pure rules over what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeward.wire.reports import VariantMeasure
from edgeward.wire.slots import SlotPolicy

#: A report must stay small however long a runtime's complaint is.
_REASON_CHARACTERS = 200


@dataclass(frozen=True)
class Candidate:
    """A variant and what is known of it. Latencies are milliseconds of one example.

    `installed` says whether its runtime is there, `fault` why it cannot run here although it is. Figures are
    None until it has been measured. `quality` is better the larger it is; None counts as the best.
    """

    name: str
    runtime: str
    quality: float | None = None
    installed: bool = True
    fault: str = ""
    provider: str = ""
    p50_ms: float | None = None
    p95_ms: float | None = None
    memory_bytes: int | None = None

    @property
    def runnable(self) -> bool:
        return self.installed and not self.fault


@dataclass(frozen=True)
class Choice:
    """`chosen` is a variant's name, or empty: then `reason`, `message`, `measured` and `limit` say why.

    `table` holds every candidate in its order. Reasons: NoRuntime, NotRunnable, LatencyCeiling (ms),
    MemoryCeiling (bytes).
    """

    chosen: str
    table: tuple[VariantMeasure, ...]
    reason: str = ""
    message: str = ""
    measured: float | None = None
    limit: float | None = None


def _short(candidate: Candidate, policy: SlotPolicy, best: float | None) -> str:
    """Why a runnable candidate's quality rules it out; empty when it does not."""
    quality = candidate.quality
    if quality is None or best is None or quality >= best - policy.quality_tolerance:
        return ""
    return f"quality {quality:.6g} is more than {policy.quality_tolerance:g} below the best, {best:.6g}"


def _best(runnable: Sequence[Candidate]) -> float | None:
    return max((item.quality for item in runnable if item.quality is not None), default=None)


def eligible(candidates: Sequence[Candidate], policy: SlotPolicy) -> list[Candidate]:
    """Those that can run and whose quality is within tolerance of the best that can run."""
    runnable = [candidate for candidate in candidates if candidate.runnable]
    best = _best(runnable)
    return [candidate for candidate in runnable if not _short(candidate, policy, best)]


def to_measure(candidates: Sequence[Candidate], policy: SlotPolicy) -> list[str]:
    """The names that must be measured before `choose` can decide.

    None when there is only one candidate and nothing to keep. A candidate that turns out not to run may
    let others of lower quality in: ask again after each round.
    """
    left = eligible(candidates, policy)
    if len(left) == 1 and policy.max_latency_ms is None and policy.memory_bytes is None:
        return []
    return [candidate.name for candidate in left if candidate.p95_ms is None]


def choose(candidates: Sequence[Candidate], policy: SlotPolicy) -> Choice:
    """The fastest eligible candidate (by median, then p95) that keeps the policy's ceilings.

    Candidates that were not measured count only where `to_measure` asks for none. The first named wins
    between equals.
    """
    left = eligible(candidates, policy)
    if not to_measure(candidates, policy) and len(left) == 1 and left[0].p95_ms is None:
        return Choice(left[0].name, _table(candidates, policy, left[0].name))
    measured = [candidate for candidate in left if candidate.p95_ms is not None]
    fitting = [candidate for candidate in measured if not _over(candidate, policy)]
    if fitting:
        best = min(fitting, key=lambda item: (item.p50_ms or 0.0, item.p95_ms or 0.0))
        return Choice(best.name, _table(candidates, policy, best.name))
    table = _table(candidates, policy, "")
    if measured:
        return _none_fits(measured, policy, table)
    if not any(candidate.installed for candidate in candidates):
        needed = ", ".join(sorted({candidate.runtime for candidate in candidates}))
        return Choice("", table, "NoRuntime", f"the model needs one of these runtimes: {needed}")
    faults = "; ".join(
        f"{item.name}: {item.fault or 'not measured'}" for item in candidates if item.installed
    )
    return Choice("", table, "NotRunnable", faults)


def _over(candidate: Candidate, policy: SlotPolicy) -> str:
    """Which ceilings a measured candidate breaks, in words; empty when it keeps them."""
    parts = []
    if _slow(candidate, policy):
        parts.append(f"p95 latency {candidate.p95_ms:.4g} ms, limit {policy.max_latency_ms:g} ms")
    if _large(candidate, policy):
        parts.append(f"memory {candidate.memory_bytes} bytes, limit {policy.memory_bytes} bytes")
    return "; ".join(parts)


def _slow(candidate: Candidate, policy: SlotPolicy) -> bool:
    limit = policy.max_latency_ms
    return limit is not None and (candidate.p95_ms is None or candidate.p95_ms > limit)


def _large(candidate: Candidate, policy: SlotPolicy) -> bool:
    limit = policy.memory_bytes
    return limit is not None and (candidate.memory_bytes is None or candidate.memory_bytes > limit)


def _none_fits(measured: list[Candidate], policy: SlotPolicy, table: tuple[VariantMeasure, ...]) -> Choice:
    """The candidate that came nearest gives the figure: of those small enough, the fastest."""
    small = [candidate for candidate in measured if not _large(candidate, policy)]
    if small:
        nearest = min(small, key=lambda item: item.p95_ms or 0.0)
        reason, figure, limit = "LatencyCeiling", nearest.p95_ms, policy.max_latency_ms
    else:
        nearest = min(measured, key=lambda item: item.memory_bytes or 0)
        reason, figure = "MemoryCeiling", _number(nearest.memory_bytes)
        limit = _number(policy.memory_bytes)
    message = f"no variant keeps the slot's ceilings; {nearest.name}: {_over(nearest, policy)}"
    return Choice("", table, reason, message, figure, limit)


def _number(value: int | None) -> float | None:
    return None if value is None else float(value)


def _table(candidates: Sequence[Candidate], policy: SlotPolicy, chosen: str) -> tuple[VariantMeasure, ...]:
    best = _best([candidate for candidate in candidates if candidate.runnable])
    return tuple(
        VariantMeasure(
            name=item.name,
            runtime=item.runtime,
            provider=item.provider,
            p50_ms=item.p50_ms,
            p95_ms=item.p95_ms,
            memory_bytes=item.memory_bytes,
            quality=item.quality,
            chosen=item.name == chosen,
            reason="" if item.name == chosen else _why_not(item, policy, best)[:_REASON_CHARACTERS],
        )
        for item in candidates
    )


def _why_not(candidate: Candidate, policy: SlotPolicy, best: float | None) -> str:
    if not candidate.installed:
        return f"runtime {candidate.runtime} is not installed"
    if candidate.fault:
        return candidate.fault
    short = _short(candidate, policy, best)
    if short:
        return short
    if candidate.p95_ms is None:
        return "not measured"
    return _over(candidate, policy) or "slower than the chosen one"
