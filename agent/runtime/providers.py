"""On what shall a model run here, and may it run on what it got? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeward.wire.package import Runtime
from edgeward.wire.providers import ACCELERATORS, CPU
from edgeward.wire.reports import Condition
from edgeward.wire.slots import SlotPolicy

#: All names under which a model may turn out to run on the processor: LiteRT's own kernels are the last one.
PROCESSORS = frozenset({*CPU.values(), "CPU"})


@dataclass(frozen=True)
class Plan:
    """`attempts` are to be tried in this order; `meant` is the accelerator the model should run on.

    `cpu_named` when policy or package name the processor after it: then it is allowed, if not in silence.
    """

    attempts: tuple[str, ...]
    meant: str = ""
    cpu_named: bool = False


def plan(runtime: Runtime, available: Sequence[str], variant: Sequence[str], policy: SlotPolicy) -> Plan:
    """What to try. Empty `attempts`: the device has nothing that may run this variant.

    The policy's providers are all that may be used, of those the ones that the package is meant for; without
    a policy's the package's; without either, the device's accelerators come before its processor, best
    first. The processor is tried after an accelerator that somebody named only if `cpu_fallback` allows it.
    """
    cpu = CPU[runtime]
    wished = policy.providers or variant
    named = [name for name in wished if name == cpu or name in ACCELERATORS[runtime]]
    if policy.providers and variant:
        named = [name for name in named if name in variant or name == cpu]
    if not named and wished:
        # Somebody named some, and none of them is for this: that is a fallback, not another choice.
        return Plan((cpu,) if policy.cpu_fallback else (), wished[0])
    if not named:
        found = [name for name in ACCELERATORS[runtime] if name in available]
        # Nobody asked for an accelerator, so the processor is no fallback but the other choice.
        return Plan((*found, cpu))
    usable = [name for name in named if name in available or name == cpu]
    first = next((name for name in named if name != cpu), "") if named[0] != cpu else ""
    if first and cpu not in usable and policy.cpu_fallback:
        usable.append(cpu)
    return Plan(tuple(usable), first, bool(first) and cpu in named)


@dataclass(frozen=True)
class Verdict:
    """`fault` says why what a model got is not acceptable; `condition` what the device shall tell of it."""

    fault: str = ""
    condition: Condition | None = None


def judge(plan: Plan, used: str, policy: SlotPolicy) -> Verdict:
    """May a model run on what it got, when something else was meant?

    `used` may name several joined by `+`: where the processor has a part of the model, it is named, too.
    """
    if not plan.meant or PROCESSORS.isdisjoint(used.split("+")):
        return Verdict()
    message = f"{plan.meant} was meant, the model runs on {used}"
    if not policy.cpu_fallback and not plan.cpu_named:
        return Verdict(fault=message)
    return Verdict(condition=Condition("ProviderFallback", "True", "AcceleratorNotUsed", message))


class Rules:
    """These rules as a port; tests put others in their place."""

    plan = staticmethod(plan)
    judge = staticmethod(judge)
