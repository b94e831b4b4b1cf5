"""From a verified manifest to a tested runner: which variant, on which provider, and whether it is good enough."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from agent.runtime.engine import Engine
from agent.runtime.port import LoadOptions, Runner
from agent.runtime.providers import Plan
from agent.runtime.worker import DeadlineExceeded
from agent.slots import measure, prepare, selftest
from agent.slots.opened import Opened, Refused, Setup
from agent.slots.selection import Candidate, Choice, choose, eligible, to_measure
from agent.state import Measurement, SlotRecord, State
from agent.verify import VerifiedPackage, Verifier
from edgeward.clock import Clock
from edgeward.errors import PackageError, RuntimeFault
from edgeward.wire.desired import ModelRef
from edgeward.wire.package import Manifest, Variant
from edgeward.wire.reports import Condition
from edgeward.wire.slots import SlotPolicy

log = logging.getLogger(__name__)

#: The lowest priority that a process without privileges can take.
SHADOW_NICENESS = 19


class _ProviderFault(RuntimeFault):
    """The runtime does not use the provider that the policy wants."""


@dataclass
class _Attempt:
    """To open one model under one policy. `joined` are the variants that were compiled ahead, and whether they
    take `max_batch` rows; `faults` says why some do not run here."""

    ref: ModelRef
    manifest: Manifest
    policy: SlotPolicy
    going_on: Callable[[], None]
    joined: dict[str, bool] = field(default_factory=dict)
    faults: dict[str, RuntimeFault] = field(default_factory=dict)

    def fault(self, candidate: Candidate, error: RuntimeFault) -> Candidate:
        """The candidate with what keeps it from running. Raises what `going_on` raises: a worker that ends
        because the agent does says nothing of its model."""
        self.going_on()
        self.faults[candidate.name] = error
        return replace(candidate, fault=str(error))


class Activation:
    """One model at a time; from the slots' thread only."""

    def __init__(
        self,
        state: State,
        verifier: Verifier,
        engine: Engine,
        runtimes: dict[str, str],
        clock: Clock,
        setup: Setup | None = None,
    ) -> None:
        self._state = state
        self._verifier = verifier
        self._engine = engine
        self._runtimes = runtimes
        self._clock = clock
        self._setup = setup or Setup()

    def fetch(self, manifest: Manifest, policy: SlotPolicy, earlier: Sequence[ModelRef] = ()) -> None:
        """Get the blobs that are needed to choose, as deltas from `earlier` models if possible.

        Raises Refused when no variant can run here.
        """
        candidates = self._candidates(manifest, policy)
        if not eligible(candidates, policy):
            raise self._refused(manifest, choose(candidates, policy), {})
        for variant in self._needed(manifest, policy):
            self._verifier.fetch_blobs(manifest, variant, earlier)

    def verify(self, ref: ModelRef, manifest: Manifest, policy: SlotPolicy) -> None:
        """Hash and check what `fetch` got. Raises DigestMismatch, PackageError."""
        for variant in self._needed(manifest, policy):
            self._verifier.open(ref, manifest, variant)

    def _needed(self, manifest: Manifest, policy: SlotPolicy) -> list[Variant]:
        """The variants to be measured; when enough was measured before, the one that will be chosen."""
        candidates = self._candidates(manifest, policy)
        for index, variant in enumerate(manifest.variants):
            asked = self._wanted(variant, policy)
            found = self._state.measurement(self._key(variant, policy, asked)) if asked.attempts else None
            if found is not None:
                known = _with_figures(candidates[index], found)
                candidates[index] = replace(
                    known, fault=self._setup.rules.judge(asked, found.provider, policy).fault
                )
        names = to_measure(candidates, policy) or [choose(candidates, policy).chosen]
        return [variant for variant in manifest.variants if variant.name in names]

    def open(
        self, ref: ModelRef, manifest: Manifest, policy: SlotPolicy, going_on: Callable[[], None]
    ) -> Opened:
        """Measure what must be measured, choose, and test the chosen variant with the golden vectors.

        `going_on` may raise to stop at any step. A variant that does not run gives way to the next best.
        Raises Refused, DigestMismatch, PackageError, Unavailable.
        """
        attempt = _Attempt(ref, manifest, policy, going_on)
        candidates = self._candidates(manifest, policy)
        variants = {variant.name: variant for variant in manifest.variants}
        while True:
            while names := to_measure(candidates, policy):
                for index, candidate in enumerate(candidates):
                    if candidate.name in names:
                        going_on()
                        candidates[index] = self._measured(attempt, variants[candidate.name], candidate)
            choice = choose(candidates, policy)
            if not choice.chosen:
                raise self._refused(manifest, choice, attempt.faults)
            going_on()
            try:
                opened = self._test(attempt, variants[choice.chosen], choice)
            except RuntimeFault as error:
                index = next(at for at, item in enumerate(candidates) if item.name == choice.chosen)
                candidates[index] = attempt.fault(candidates[index], error)
                continue
            return opened

    def reopen(self, ref: ModelRef, record: SlotRecord) -> Opened:
        """What ran before, as it ran: from verified bytes on disk, without a network and without measuring.

        Raises RuntimeFault, DigestMismatch, PackageError, EdgewardError.
        """
        manifest = self._verifier.reopen_manifest(ref)
        installed = [variant for variant in manifest.variants if variant.runtime in self._runtimes]
        named = [variant for variant in installed if variant.name == record.variant]
        variant = next(iter(named or installed), None)
        if variant is None:
            raise PackageError(f"{ref.model}:{ref.version}: no variant's runtime is installed any more")
        package = self._verifier.open(ref, manifest, variant)
        batchable = record.batchable and bool(named)
        try:
            # What was compiled may be damaged, or of a runtime that has been replaced since: it must not be
            # compiled in the slot's deadline, by the first request.
            batchable = self._build(package, record.policy, lambda: None) and batchable
        except RuntimeFault as error:
            log.warning("%s:%s: not compiled ahead: %s", *_name(ref), error)
        runner, condition = self._open(package, record.policy, batchable)
        return Opened(package, runner, batchable, condition, tuple(record.variants))

    def shadow(self, opened: Opened, policy: SlotPolicy) -> Runner:
        """A tested model once more, in a worker under `policy` that gives way to every other process.

        Raises RuntimeFault.
        """
        package = opened.package
        asked = self._wanted(package.variant, policy)
        options = msgspec.structs.replace(
            self._options(package.variant, policy, asked), niceness=SHADOW_NICENESS
        )
        name = f"{package.ref.model}:{package.ref.version} shadow"
        runner = self._engine.open(package.variant.runtime, package.content, name, policy, options)
        try:
            self._judge(asked, runner.provider, policy)
        except BaseException:
            runner.stop(at_once=True)
            raise
        return runner

    def acting(self, opened: Opened, policy: SlotPolicy) -> Opened:
        """A tested model that does not run any more, on a new runner under the slot's own policy.

        Raises RuntimeFault.
        """
        runner, condition = self._open(opened.package, policy, opened.batchable)
        return replace(opened, runner=runner, condition=condition)

    def sweep(self, keep: Iterable[str]) -> None:
        """Remove the compiled forms of every blob that is not in `keep`."""
        folder = self._setup.compiled
        if folder is None or not folder.is_dir():
            return
        wanted = set(keep)
        try:
            for entry in list(folder.iterdir()):
                if entry.name not in wanted:
                    shutil.rmtree(entry, ignore_errors=True)
        except OSError as error:
            log.warning("compiled forms stay on the disk: %s", error)

    # parts

    def _candidates(self, manifest: Manifest, policy: SlotPolicy) -> list[Candidate]:
        candidates = []
        for variant in manifest.variants:
            missing = "" if self._wanted(variant, policy).attempts else self._missing(variant, policy)
            candidates.append(
                Candidate(
                    variant.name,
                    variant.runtime,
                    variant.quality,
                    installed=variant.runtime in self._runtimes,
                    fault=missing,
                )
            )
        return candidates

    def _missing(self, variant: Variant, policy: SlotPolicy) -> str:
        parts = [f"it is meant for {', '.join(variant.providers)}"] if variant.providers else []
        parts += [f"the slot allows {', '.join(policy.providers)}"] if policy.providers else []
        here = ", ".join(self._setup.available) or "only its processor"
        return f"{', '.join(parts)}; this device has {here}"

    def _measured(self, attempt: _Attempt, variant: Variant, candidate: Candidate) -> Candidate:
        """The candidate with its figures, or with the reason why it does not run here."""
        ref, policy = attempt.ref, attempt.policy
        asked = self._wanted(variant, policy)
        key = self._key(variant, policy, asked)
        found = self._state.measurement(key)
        try:
            if found is None:
                found = self._measure(attempt, variant, asked)
                self._state.set_measurement(key, found, self._clock.now())
            self._judge(asked, found.provider, policy)
        except RuntimeFault as error:
            log.warning("%s:%s %s does not run here: %s", ref.model, ref.version, variant.name, error)
            return attempt.fault(candidate, error)
        return _with_figures(candidate, found)

    def _key(self, variant: Variant, policy: SlotPolicy, asked: Plan) -> str:
        runtime = self._runtimes.get(variant.runtime, "")
        return measure.key(variant.blob.digest, self._setup.machine, runtime, policy, asked.attempts)

    def _measure(self, attempt: _Attempt, variant: Variant, asked: Plan) -> Measurement:
        ref, policy, going_on = attempt.ref, attempt.policy, attempt.going_on
        self._verifier.fetch_blobs(attempt.manifest, variant)
        package = self._verifier.open(ref, attempt.manifest, variant)
        attempt.joined[variant.name] = self._build(package, policy, going_on)
        golden = selftest.golden_inputs(package.golden)
        trial = measure.trial_policy(policy)
        name = f"{ref.model}:{ref.version} {variant.name}"
        options = self._options(variant, policy, asked)
        runner = self._engine.open(variant.runtime, package.content, name, trial, options)
        try:
            self._judge(asked, runner.provider, policy)
            limit = policy.memory_bytes
            return measure.measure(
                self._engine, runner, golden, limit, self._clock, going_on, self._setup.seconds
            )
        finally:
            runner.stop(at_once=True)

    def _test(self, attempt: _Attempt, variant: Variant, choice: Choice) -> Opened:
        """The chosen variant under the slot's own policy. Raises Refused, RuntimeFault."""
        ref, manifest, policy = attempt.ref, attempt.manifest, attempt.policy
        self._verifier.fetch_blobs(manifest, variant)
        package = self._verifier.open(ref, manifest, variant)
        if variant.name not in attempt.joined:
            attempt.joined[variant.name] = self._build(package, policy, attempt.going_on)
        inputs = selftest.golden_inputs(package.golden)
        tolerance = (manifest.golden.atol, manifest.golden.rtol)
        batchable = free_rows(variant) and attempt.joined[variant.name]
        runner, condition = self._open(package, policy, batchable)
        try:
            verdict = selftest.judge(package.golden, runner.infer(inputs), *tolerance)
            if not verdict.passed:
                raise Refused(
                    "SelfTestFailed",
                    verdict.message,
                    measured=verdict.measured,
                    limit=verdict.limit,
                    lasting=True,
                    table=choice.table,
                )
            if batchable and not selftest.row_independent(runner, inputs, tolerance, runner.outputs):
                log.info("%s:%s: requests are not joined: its rows may depend on one another", *_name(ref))
                batchable = False
                runner.stop()
                runner, condition = self._open(package, policy, batchable)
        except BaseException:
            runner.stop()
            raise
        return Opened(package, runner, batchable, condition, choice.table, verdict.measured, verdict.limit)

    def _build(self, package: VerifiedPackage, policy: SlotPolicy, going_on: Callable[[], None]) -> bool:
        """Compile in a worker that is thrown away; the forms that it leaves are found again.

        False when the accelerator cannot take `max_batch` rows: joined requests would have it try again, each
        time. Raises RuntimeFault, and what `going_on` raises.
        """
        asked = self._wanted(package.variant, policy)
        if not prepare.compiles(asked.attempts):
            return True
        options = self._options(package.variant, policy, asked)
        if not options.compiled:
            return True
        if self._build_for(package, policy, options, policy.max_batch, going_on):
            return True
        self._build_for(package, policy, options, 1, going_on)
        return False

    def _build_for(
        self,
        package: VerifiedPackage,
        policy: SlotPolicy,
        options: LoadOptions,
        max_batch: int,
        going_on: Callable[[], None],
    ) -> bool:
        variant, ref = package.variant, package.ref
        name = f"{ref.model}:{ref.version} {variant.name} compiles"
        build = prepare.build_policy(policy)
        runner = self._engine.open(variant.runtime, package.content, name, build, options)
        try:
            golden = selftest.golden_inputs(package.golden)
            return prepare.build(self._engine, runner, golden, max_batch, going_on)
        finally:
            runner.stop(at_once=True)

    def _open(
        self, package: VerifiedPackage, policy: SlotPolicy, batchable: bool
    ) -> tuple[Runner, Condition | None]:
        variant, ref = package.variant, package.ref
        asked = self._wanted(variant, policy)
        options = self._options(variant, policy, asked)
        name = f"{ref.model}:{ref.version}"
        runner = self._engine.open(
            variant.runtime, package.content, name, policy, options, batchable=batchable
        )
        try:
            return runner, self._judge(asked, runner.provider, policy)
        except BaseException:
            runner.stop()
            raise

    def _wanted(self, variant: Variant, policy: SlotPolicy) -> Plan:
        return self._setup.rules.plan(variant.runtime, self._setup.available, variant.providers, policy)

    def _judge(self, asked: Plan, used: str, policy: SlotPolicy) -> Condition | None:
        verdict = self._setup.rules.judge(asked, used, policy)
        if verdict.fault:
            raise _ProviderFault(verdict.fault)
        return verdict.condition

    def _options(self, variant: Variant, policy: SlotPolicy, asked: Plan) -> LoadOptions:
        compiled = ""
        if self._setup.compiled is not None:
            folder = self._setup.compiled / variant.blob.digest
            # A compiled model is native code: nobody else may put one there.
            try:
                self._setup.compiled.mkdir(mode=0o700, exist_ok=True)
                folder.mkdir(mode=0o700, exist_ok=True)
                compiled = str(folder)
            except OSError as error:
                # A full disk must cost time only, not the model.
                log.warning("compiled forms cannot be kept in %s: %s", folder, error)
        return LoadOptions(
            threads=policy.threads,
            providers=asked.attempts,
            gpu_memory_bytes=policy.gpu_memory_bytes,
            compiled=compiled,
        )

    def _refused(self, manifest: Manifest, choice: Choice, faults: dict[str, RuntimeFault]) -> Refused:
        reason, message, lasting = choice.reason, choice.message, False
        if reason == "NoRuntime":
            message = f"{message}; this device has: {', '.join(self._runtimes) or 'none'}"
        elif reason == "NotRunnable" and faults:
            reason = _reason(next(iter(faults.values())))
            # Another policy may bring another provider or more time; a model that does not load stays as it is.
            lasting = all(_reason(fault) == "RuntimeFault" for fault in faults.values())
        return Refused(
            reason,
            f"{manifest.model}:{manifest.version}: {message}",
            measured=choice.measured,
            limit=choice.limit,
            lasting=lasting,
            table=choice.table,
        )


def _with_figures(candidate: Candidate, found: Measurement) -> Candidate:
    return replace(
        candidate,
        provider=found.provider,
        p50_ms=found.p50_ms,
        p95_ms=found.p95_ms,
        memory_bytes=found.memory_bytes,
    )


def _reason(fault: RuntimeFault) -> str:
    if isinstance(fault, _ProviderFault):
        return "ProviderFallback"
    return "DeadlineExceeded" if isinstance(fault, DeadlineExceeded) else "RuntimeFault"


def _name(ref: ModelRef) -> tuple[str, int]:
    return ref.model, ref.version


def free_rows(variant: Variant) -> bool:
    """Whether every tensor has a free first dimension."""
    return all(spec.shape and spec.shape[0] == -1 for spec in (*variant.inputs, *variant.outputs))
