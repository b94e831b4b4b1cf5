"""May this desired state be applied? A pure decision after the signature has been checked."""

from __future__ import annotations

from edgeward.errors import TrustError
from edgeward.identifiers import DeviceName
from edgeward.trust import dsse
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState


def check(
    raw: bytes, trusted_keys: list[str], name: DeviceName, generation: int, now: float
) -> DesiredState | None:
    """The desired state in `raw`, None when it is the one accepted already.

    Raises TrustError for a wrong signature, another device's state, an older generation, or an expired one.
    """
    desired = dsse.verify(raw, PAYLOAD_TYPE, trusted_keys, DesiredState)
    if (desired.site, desired.device) != name:
        raise TrustError(f"desired state is for {desired.site}/{desired.device}, this is {name}")
    if desired.generation == generation:
        return None
    if desired.generation < generation:
        raise TrustError(f"desired state of generation {desired.generation} is older than {generation}")
    if now > desired.expires_at:
        raise TrustError(f"desired state of generation {desired.generation} has expired")
    return desired
