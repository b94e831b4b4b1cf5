"""What goes into an activation, and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from agent.runtime.port import Runner
from agent.runtime.providers import Plan, Rules, Verdict
from agent.slots import measure
from agent.verify import VerifiedPackage
from edgeward.errors import EdgewardError
from edgeward.wire.package import Runtime
from edgeward.wire.reports import Condition, VariantMeasure
from edgeward.wire.slots import SlotPolicy


class ProviderRules(Protocol):
    """Which execution providers to ask for, and what to think of the one that the runtime took."""

    def plan(
        self, runtime: Runtime, available: Sequence[str], variant: Sequence[str], policy: SlotPolicy
    ) -> Plan: ...

    def judge(self, plan: Plan, used: str, policy: SlotPolicy) -> Verdict: ...


@dataclass(frozen=True)
class Setup:
    """What the device brings to an activation.

    `machine` identifies its chip and drivers (see measure.machine_key), `available` are the runtimes'
    providers, `compiled` the folder for compiled models (None: none are kept), `seconds` the time for
    measuring one variant.
    """

    machine: str = ""
    available: tuple[str, ...] = ()
    rules: ProviderRules = field(default_factory=Rules)
    compiled: Path | None = None
    seconds: float = measure.SECONDS


class Refused(EdgewardError):
    """A model must not run here. `lasting`: whatever the policy, so its digest is never tried again."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        measured: float | None = None,
        limit: float | None = None,
        lasting: bool = False,
        table: tuple[VariantMeasure, ...] = (),
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.measured = measured
        self.limit = limit
        self.lasting = lasting
        self.table = table


@dataclass(frozen=True)
class Opened:
    """A tested model on its runner. `measured` and `limit` are the golden vectors' worst difference."""

    package: VerifiedPackage
    runner: Runner
    batchable: bool
    condition: Condition | None = None
    table: tuple[VariantMeasure, ...] = ()
    measured: float | None = None
    limit: float | None = None
