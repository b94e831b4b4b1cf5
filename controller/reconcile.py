"""The level-triggered loop: from resources and reports to rollout steps and signed desired states."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import msgspec
from sqlmodel import Session

from controller import devices as device_rules
from controller.changes import Changes
from controller.releases import Releases
from controller.rollouts.plan import ENDED, Seen, plan, predecessor
from controller.store import records, resources
from controller.store.database import Store
from controller.store.tables import AssignmentRow, DesiredRow, ResourceRow
from controller.streams import summary
from edgeward.clock import Clock
from edgeward.errors import EdgewardError
from edgeward.identifiers import DeviceName
from edgeward.trust import dsse
from edgeward.trust.keys import PrivateKey
from edgeward.wire import topics
from edgeward.wire.desired import PAYLOAD_TYPE, ModelRef, StreamTarget
from edgeward.wire.desired import encode as encode_desired
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.resources import FleetSpec, RolloutSpec, RolloutStatus, SiteSpec, model_version_name
from edgeward.wire.schedule import ActivationTerms
from edgeward.wire.slots import SlotPolicy
from edgeward.wire.streams import StreamSpec
from edgeward.wire.topics import Lane

log = logging.getLogger(__name__)

_BUSY = 1.0
_IDLE = 5.0
_BREATH = 0.1
_REFRESH_EVERY = 60.0

Assignments = dict[tuple[str, str], AssignmentRow]


class Reconciler:
    """`publish(topic, payload)` puts a retained message onto the broker; an empty payload clears it."""

    def __init__(
        self,
        store: Store,
        releases: Releases,
        key: PrivateKey,
        clock: Clock,
        changes: Changes,
        publish: Callable[[str, bytes], None],
    ) -> None:
        self._store = store
        self._releases = releases
        self._key = key
        self._clock = clock
        self._changes = changes
        self._publish = publish
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._all = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._refreshed = -_REFRESH_EVERY

    def republish(self, device: str) -> None:
        """Send a device its newest desired state again with the next step."""
        with self._lock:
            self._wanted.add(device)
        self._changes.bump()

    def republish_all(self) -> None:
        """After a reconnect: the broker may have forgotten its retained messages."""
        with self._lock:
            self._all = True
        self._changes.bump()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="reconcile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._changes.bump()
        if self._thread is not None:
            self._thread.join(10)

    def _run(self) -> None:
        seen, timeout = -1, 0.0
        while not self._stop.is_set():
            revision = self._changes.revision
            if revision == seen:
                self._changes.wait(seen, timeout)
                if self._stop.wait(_BREATH):  # one step for a burst of messages
                    return
                revision = self._changes.revision
            seen = revision
            try:
                timeout = _BUSY if self.step() else _IDLE
            except EdgewardError as error:
                log.error("reconciling failed, trying again: %s", error)
                timeout = _IDLE
            except Exception:
                log.exception("reconciling failed, trying again")
                timeout = _IDLE

    def step(self) -> bool:
        """Bring everything one step further; whether a rollout is under way."""
        if self._clock.monotonic() - self._refreshed >= _REFRESH_EVERY:
            if self._releases.refresh():
                log.info("signed the TUF timestamp again")
            self._refreshed = self._clock.monotonic()
        with self._lock:
            wanted, every = self._wanted, self._all
            self._wanted, self._all = set(), False
        outbox: dict[str, bytes] = {}
        try:
            with self._store.writing() as session:
                if not self._store.leads(session):
                    return True
                work = _Work(session, self._clock.now(), self._key)
                work.run()
                for name, row in work.desired.items():
                    device = work.devices.get(name)
                    if device is not None and (every or name in wanted or name in work.renewed):
                        topic = topics.desired(DeviceName(device.spec["site"], name))
                        outbox[topic] = b"" if device.spec["revoked"] else row.envelope
        except BaseException:
            with self._lock:
                self._wanted |= wanted
                self._all = self._all or every
            raise
        for topic, payload in outbox.items():
            self._publish(topic, payload)
        if work.changed:
            self._changes.bump()
        return work.busy


class _Work:
    """One pass inside one transaction."""

    def __init__(self, session: Session, now: float, key: PrivateKey) -> None:
        self._session = session
        self._now = now
        self._key = key
        self.devices = {row.name: row for row in resources.find(session, "Device")}
        self._fleets = {row.name: row for row in resources.find(session, "Fleet")}
        self._streams = {row.name: row for row in resources.find(session, "Stream")}
        self._versions = {row.name: row for row in resources.find(session, "ModelVersion")}
        self._rollouts = sorted(resources.find(session, "Rollout"), key=lambda row: row.id or 0)
        self._assignments: Assignments = records.assignments(session)
        self.desired = records.desired_states(session)
        specs = {name: msgspec.convert(row.spec, FleetSpec) for name, row in self._fleets.items()}
        self._specs = specs
        self._sites = {
            row.name: msgspec.convert(row.spec, SiteSpec) for row in resources.find(session, "Site")
        }
        self._rollout_specs = {row.name: msgspec.convert(row.spec, RolloutSpec) for row in self._rollouts}
        self._policies = {name: spec.slots for name, spec in specs.items()}
        self._shadows = {name: self._beside(spec) for name, spec in specs.items()}
        self._outboxes = {name: spec.outbox for name, spec in specs.items()}
        self._members = {name: self._match(spec) for name, spec in specs.items()}
        self.renewed: set[str] = set()
        self.changed = False
        self.busy = False

    def _beside(self, fleet: FleetSpec) -> dict[str, ModelRef]:
        """What runs without acting, by slot."""
        found = {}
        for slot, shadow in fleet.shadows.items():
            row = self._versions.get(model_version_name(shadow.model, shadow.version))
            if row is not None:
                found[slot] = ModelRef(shadow.model, shadow.version, row.spec["digest"])
        return found

    def _match(self, fleet: FleetSpec) -> list[str]:
        """Devices of a fleet that may get something: revoked ones get nothing any more."""
        return [
            name
            for name, row in self.devices.items()
            if not row.spec["revoked"] and device_rules.matches(row.labels, fleet.match_labels)
        ]

    def run(self) -> None:
        self._drop_strays()
        groups: dict[tuple[str, str], list[ResourceRow]] = {}
        for row in self._rollouts:
            groups.setdefault((row.spec["fleet"], row.spec["slot"]), []).append(row)
        for group in groups.values():
            complete = [row.name for row in group if row.status["phase"] == "Complete"]
            for row in group:
                newer = group[-1].name if row is not group[-1] else ""
                self._roll(row, newer, adopts=bool(complete) and complete[-1] == row.name)
        self._models: dict[str, dict[str, ModelRef]] = {}
        self._slot_policies: dict[str, dict[str, SlotPolicy]] = {}
        self._slot_shadows: dict[str, dict[str, ModelRef]] = {}
        for (device, slot), assigned in self._assignments.items():
            self._models.setdefault(device, {})[slot] = _model(assigned.active)
            # Devices may be in several fleets: the one whose rollout brought the model also says how it runs.
            policy = self._policies.get(assigned.fleet, {}).get(slot)
            if policy is not None:
                self._slot_policies.setdefault(device, {})[slot] = policy
            beside = self._shadows.get(assigned.fleet, {}).get(slot)
            if beside is not None:
                self._slot_shadows.setdefault(device, {})[slot] = beside
        self._summarise_streams()
        for row in self.devices.values():
            self._desire(row)

    def _drop_strays(self) -> None:
        """A device that left the fleet whose rollout gave it a model no longer has that model."""
        for key, row in list(self._assignments.items()):
            if row.device not in self._members.get(row.fleet, []):
                self._session.delete(row)
                del self._assignments[key]
                self.changed = True

    def _roll(self, row: ResourceRow, superseded_by: str, *, adopts: bool) -> None:
        spec = self._rollout_specs[row.name]
        status = msgspec.convert(row.status, RolloutStatus)
        version = self._versions.get(model_version_name(spec.model, spec.version))
        if version is None or status.phase in ("Halted", "Superseded"):
            return
        target = ModelRef(spec.model, spec.version, version.spec["digest"])
        fleet = {name: self._see(name, spec, target) for name in self._members.get(spec.fleet, [])}
        made = plan(
            spec,
            status,
            target,
            fleet,
            self._now,
            generation=row.generation,
            superseded_by=superseded_by,
            adopts=adopts,
        )
        for device, model in made.changes.items():
            previous = predecessor(fleet[device]) if model == target else None
            self._assign(device, spec, row.name, model, previous)
        self.changed |= resources.set_status(self._session, row, msgspec.to_builtins(made.status))
        for event in made.status.timeline[-3:]:
            if event.at == self._now and event not in status.timeline:
                log.info("rollout %s: %s: %s", row.name, event.reason, event.message)
        self.busy |= made.status.phase not in ENDED

    def _see(self, name: str, spec: RolloutSpec, target: ModelRef) -> Seen:
        status = self.devices[name].status
        assigned = self._assignments.get((name, spec.slot))
        return Seen(
            slot=device_rules.slots_of(status).get(spec.slot),
            quarantined=frozenset(status.get("quarantined", [])),
            online=status.get("connection") == "Online",
            psi=None if spec.gate.max_psi is None else self._psi(name, target),
            assigned=_model(assigned.active) if assigned else None,
            previous=_model(assigned.previous) if assigned and assigned.previous else None,
        )

    def _psi(self, device: str, target: ModelRef) -> float | None:
        newest = records.reports(self._session, device, 1)
        return device_rules.worst_psi(newest[0] if newest else None, target.digest)

    def _assign(
        self, device: str, spec: RolloutSpec, rollout: str, model: ModelRef | None, previous: ModelRef | None
    ) -> None:
        self.changed = True
        key = (device, spec.slot)
        row = self._assignments.get(key)
        if model is None:
            if row is not None:
                self._session.delete(row)
                del self._assignments[key]
            return
        if row is None:
            row = AssignmentRow(device=device, slot=spec.slot, fleet="", rollout="", active={})
            self._assignments[key] = row
        row.fleet, row.rollout, row.active = spec.fleet, rollout, msgspec.to_builtins(model)
        row.previous = msgspec.to_builtins(previous)
        self._session.add(row)

    def _desire(self, row: ResourceRow) -> None:
        """A new generation when the device shall run something else, or its state ends soon."""
        name, status = row.name, dict(row.status)
        if row.spec["revoked"]:
            # Its retained state is cleared once; `content` remembers that.
            held = self.desired.get(name)
            if held is not None and held.content:
                held.content = ""
                self.renewed.add(name)
                self.changed = True
            return
        models = self._models.get(name, {})
        streams = self._streams_of(name)
        policies = self._slot_policies.get(name, {})
        outbox: dict[Lane, LanePolicy] = {}
        for fleet, members in sorted(self._members.items()):
            if name in members:  # of several fleets that name a lane, the last by name
                outbox |= self._outboxes[fleet]
        site = self._sites.get(row.spec["site"], SiteSpec())
        terms = {slot: self._terms(site, name, slot, model) for slot, model in models.items()}
        draft = device_rules.compose(
            row.spec["site"],
            name,
            0,
            self._now,
            models,
            streams,
            policies,
            terms,
            site.delivery,
            self._slot_shadows.get(name, {}),
            outbox,
        )
        content = device_rules.content_digest(draft)
        held = self.desired.get(name)
        if (
            held is None
            or held.content != content
            or held.expires_at - self._now < device_rules.REISSUE_BEFORE
        ):
            state = msgspec.structs.replace(draft, generation=held.generation + 1 if held else 1)
            if held is None:
                held = DesiredRow(device=name, generation=0, content="", envelope=b"", expires_at=0.0)
                self.desired[name] = held
            held.generation, held.content, held.expires_at = state.generation, content, state.expires_at
            held.envelope = dsse.sign(encode_desired(state), PAYLOAD_TYPE, self._key)
            self._session.add(held)
            self.renewed.add(name)
            self.changed = True
        seen = status.get("lastSeen", 0.0)
        if status.get("connection") == "Online" and self._now - seen > device_rules.SILENCE:
            status["connection"] = "Offline"
        status["desiredGeneration"] = held.generation
        status["state"] = device_rules.device_state(status, models, held.generation)
        self.changed |= resources.set_status(self._session, row, status)

    def _terms(self, site: SiteSpec, device: str, slot: str, model: ModelRef) -> ActivationTerms:
        assigned = self._assignments[device, slot]
        fleet, rollout = self._specs.get(assigned.fleet), self._rollout_specs.get(assigned.rollout)
        return device_rules.terms_of(site, fleet, rollout, model)

    def _summarise_streams(self) -> None:
        statuses = {name: row.status for name, row in self.devices.items()}
        for name, row in self._streams.items():
            wanted = {
                device
                for fleet, members in self._members.items()
                if name in self._fleets[fleet].spec["streams"]
                for device in members
            }
            self.changed |= resources.set_status(self._session, row, summary(name, wanted, statuses))

    def _streams_of(self, device: str) -> list[StreamTarget]:
        names = {
            stream
            for fleet, members in self._members.items()
            if device in members
            for stream in self._fleets[fleet].spec["streams"]
        }
        return [
            StreamTarget(name, row.generation, msgspec.convert(row.spec, StreamSpec))
            for name in sorted(names)
            if (row := self._streams.get(name)) is not None
        ]


def _model(plain: dict[str, Any]) -> ModelRef:
    return msgspec.convert(plain, ModelRef)
