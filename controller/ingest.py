"""What devices say of themselves, over MQTT or HTTP: verified, then kept in the Device's status.

A message moves something only when a certificate of this fleet signed it for exactly this topic, the
certificate names the topic's device, the device is not revoked, and the message is newer than all before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec

from controller.changes import Changes
from controller.identity import Authority
from controller.store import records, resources
from controller.store.database import Store
from controller.streams import streams_of, with_condition
from edgeward.clock import Clock
from edgeward.errors import InvalidDocument, TrustError
from edgeward.trust.certificates import DeviceIdentity
from edgeward.wire import topics
from edgeward.wire.envelope import open_envelope
from edgeward.wire.reports import Report, Reported, Status

MAX_MESSAGE_BYTES = 256 << 10
TYPES: dict[str, type[Status | Reported | Report]] = {
    "status": Status,
    "reported": Reported,
    "report": Report,
}
_MOST = 1 << 62


class Ingest:
    """`behind(device)` is called when a device shows that it has not got its newest desired state."""

    def __init__(
        self,
        store: Store,
        authority: Authority,
        clock: Clock,
        changes: Changes,
        behind: Callable[[str], None],
    ) -> None:
        self._store = store
        self._authority = authority
        self._clock = clock
        self._changes = changes
        self._behind = behind

    def accept(self, topic: str, raw: bytes) -> bool:
        """Take in one message; False for a repeat. Raises TrustError, Forbidden or InvalidDocument."""
        parsed = topics.parse(topic)
        type_ = TYPES.get(parsed.channel)
        if type_ is None:
            raise InvalidDocument("devices send status, reported and report here", source=topic)
        if len(raw) > MAX_MESSAGE_BYTES:
            raise InvalidDocument(f"larger than {MAX_MESSAGE_BYTES} bytes", source=topic)
        now = self._clock.now()
        opened = open_envelope(
            raw, topic, self._authority.anchor, now, find_certificate=self._authority.certificate
        )
        if opened.identity != DeviceIdentity(parsed.name):
            raise TrustError(f"{opened.identity} may not speak for {parsed.name}")
        self._authority.check_permitted(opened.identity, opened.keyid)
        message = opened.decode(type_)
        if not (0 <= message.boot < _MOST and 0 <= message.n < _MOST):
            raise InvalidDocument("boot and n must not be negative or above 2^62", source=topic)
        return self._record(parsed.name.device, parsed.channel, message, now)

    def _record(self, device: str, channel: str, message: Status | Reported | Report, now: float) -> bool:
        with self._store.writing() as session:
            row = resources.get(session, "Device", device, lock=True)
            if row is None or not records.advance(session, device, channel, message):
                return False
            if isinstance(message, Report):
                records.add_report(session, device, now, {**plain(message), "receivedAt": now})
            status = {**row.status, **observed(message), "lastSeen": now}
            resources.set_status(session, row, with_condition(status, row.status, now))
            desired = records.desired(session, device)
            generation = desired.generation if desired else 0
        # Outside the transaction: whoever is woken shall see what was written.
        if isinstance(message, Status) and message.state == "online":
            self._behind(device)
        if isinstance(message, Reported) and message.observed_generation < generation:
            self._behind(device)
        self._changes.bump()
        return True


def observed(message: Status | Reported | Report) -> dict[str, Any]:
    """The fields of a Device's status that a message sets."""
    match message:
        case Status(state="offline"):
            return {"connection": "Offline"}
        case Status():
            return {
                "connection": "Online",
                "agentVersion": message.agent_version,
                "inventory": plain(message.inventory),
            }
        case Reported():
            return {
                "connection": "Online",
                "observedGeneration": message.observed_generation,
                "slots": plain(message.slots),
                "conditions": plain(message.conditions),
                "quarantined": message.quarantined,
                "holds": plain(message.holds),
            }
        case Report():
            return {"connection": "Online", "streams": streams_of(message)}


def plain(value: Any) -> Any:
    """Builtins fit for JSON: entries that are NaN or infinite are left out, since no gate can weigh them."""
    return _finite(msgspec.to_builtins(value))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items() if not _odd(item)}
    if isinstance(value, list):
        return [_finite(item) for item in value if not _odd(item)]
    return value


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
