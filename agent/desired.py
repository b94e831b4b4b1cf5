"""May this desired state be applied? Pure, but for what the clock learns."""

from __future__ import annotations

import logging

import msgspec

from agent.trusted_clock import TrustedClock
from edgeward.errors import TrustError
from edgeward.identifiers import DeviceName
from edgeward.trust import dsse
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState
from edgeward.wire.lanes import LanePolicy
from edgeward.wire.topics import Lane

log = logging.getLogger(__name__)


def check(
    raw: bytes, trusted_keys: list[str], name: DeviceName, generation: int, clock: TrustedClock
) -> DesiredState | None:
    """The desired state in `raw`, None when it is the one accepted already.

    Raises TrustError for a wrong signature, another device's state, an older generation, or an expired one.
    When it was issued has passed, whatever else is wrong with it: the clock learns that first.
    """
    desired = dsse.verify(raw, PAYLOAD_TYPE, trusted_keys, DesiredState)
    clock.learn(desired.issued_at)
    if (desired.site, desired.device) != name:
        raise TrustError(f"desired state is for {desired.site}/{desired.device}, this is {name}")
    if desired.generation == generation:
        return None
    if desired.generation < generation:
        raise TrustError(f"desired state of generation {desired.generation} is older than {generation}")
    if clock.now() > desired.expires_at:
        raise TrustError(f"desired state of generation {desired.generation} has expired")
    return desired


def stored(raw: bytes, trusted_keys: list[str], name: DeviceName, generation: int) -> DesiredState:
    """The desired state that was accepted before, whatever its expiry, as this device's disk gave it back.

    Raises TrustError when that is not what was accepted as `generation`.
    """
    desired = dsse.verify(raw, PAYLOAD_TYPE, trusted_keys, DesiredState)
    if (desired.site, desired.device) != name:
        raise TrustError(f"desired state is for {desired.site}/{desired.device}, this is {name}")
    if desired.generation != generation:
        raise TrustError(f"desired state is of generation {desired.generation}, accepted was {generation}")
    return desired


def outbox_policies(desired: DesiredState) -> dict[Lane, LanePolicy]:
    """What the fleet says of each outbox lane; nothing where it says nothing that this agent understands."""
    try:
        return msgspec.convert(desired.policies.get("outbox", {}), dict[Lane, LanePolicy])
    except msgspec.ValidationError as error:
        log.error("the outbox keeps its default budgets: %s", error)
        return {}
