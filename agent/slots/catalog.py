"""The agent's slots as a catalog for the local server."""

from __future__ import annotations

import threading

from agent.serving.catalog import Served
from agent.slots.active import ActiveModel
from agent.slots.slots import Slots
from edgeward.wire.reports import SlotReport


class SlotCatalog:
    """Answers from a snapshot that `refresh` replaces whenever a slot has changed; from any thread."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._by_name: dict[tuple[str, str], Served] = {}
        self._all: list[Served] = []
        self._refreshing = threading.Lock()
        self._settled = False

    @property
    def settled(self) -> bool:
        return self._settled

    def settle(self) -> None:
        """Say that every model which ran before, and every one wanted since, is in the slots."""
        self.refresh()
        self._settled = True

    def refresh(self) -> None:
        """Take over what the slots hold now."""
        # One after the other: an older snapshot must not replace a newer one.
        with self._refreshing:
            self._refresh()

    def _refresh(self) -> None:
        reports = self._slots.report()
        active = [self._slots.active(slot) for slot in reports]
        found = [_served(model) for model in active if model is not None]
        found += [waiting for report in reports.values() if (waiting := _waiting(report)) is not None]
        by_name: dict[tuple[str, str], Served] = {}
        everything = []
        for served in found:
            # Several slots may hold one version: the first that serves it answers for all.
            if by_name.setdefault((served.name, served.version), served) is served:
                everything.append(served)
            by_name.setdefault((served.name, ""), served)
        self._by_name, self._all = by_name, everything

    def find(self, name: str, version: str = "") -> Served | None:
        return self._by_name.get((name, version))

    def all(self) -> list[Served]:
        return self._all


def _served(active: ActiveModel) -> Served:
    package, policy = active.package, active.policy
    return Served(
        name=package.ref.model,
        version=str(package.ref.version),
        runtime=package.variant.runtime,
        digest=package.ref.digest,
        inputs=active.runner.inputs,
        outputs=active.runner.outputs,
        runner=active.runner,
        max_batch=policy.max_batch,
        nan=policy.nan,
        health=active.health,
        score=active.score if active.health.scores is not None else "",
        tap=active.tap,
    )


def _waiting(report: SlotReport) -> Served | None:
    """The slot's newest wish while it does not serve: known, but not ready."""
    target = report.target
    if target is None or target == report.running:
        return None
    reason = ": ".join(part for part in (str(report.phase), report.reason, report.message) if part)
    return Served(
        name=target.model,
        version=str(target.version),
        runtime="onnx",
        digest=target.digest,
        inputs=[],
        outputs=[],
        runner=None,
        reason=reason,
    )
