"""Residency: the policy that a trend store gets for its sites, and its decisions as audit records."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from sqlmodel import Session

from controller.store import records, resources
from controller.store.tables import PositionRow
from edgeward.errors import Forbidden
from edgeward.trust.certificates import Identity, StoreIdentity
from edgeward.wire.residency import Decision, ResidencyPolicy
from edgeward.wire.resources import SiteSpec

#: For how long a store goes by a policy without the controller; as long as devices go by a desired state.
LIFETIME = 7 * 86400.0
_CHANNEL = "residency"


def store_of(identity: Identity) -> StoreIdentity:
    """Raises Forbidden for a device."""
    if not isinstance(identity, StoreIdentity):
        raise Forbidden(f"{identity} is no trend store")
    return identity


def policy_for(session: Session, store: StoreIdentity, now: float) -> ResidencyPolicy:
    """What may leave the store's sites, from `now` (seconds since 1970) on. A site that was deleted is not named."""
    sites = {
        row.name: msgspec.convert(row.spec, SiteSpec).residency
        for row in resources.find(session, "Site")
        if row.name in store.sites
    }
    return ResidencyPolicy(now, now + LIFETIME, sites)


def accept(session: Session, store: StoreIdentity, decisions: Iterable[Decision], now: float) -> int:
    """Keep what is new as audit records; how many. What a store reports again is known by its number.

    Raises Forbidden for a site that is not one of the store's.
    """
    new = 0
    known = session.get(PositionRow, (store.name, _CHANNEL))
    if known is None:
        known = PositionRow(device=store.name, channel=_CHANNEL, boot=0, n=0)
    for each in decisions:
        if each.site not in store.sites:
            raise Forbidden(f"{store} decides nothing for site {each.site}")
        if (each.chain, each.number) <= (known.boot, known.n):
            continue
        expected = known.n + 1 if each.chain == known.boot else 1
        missing = (
            f"; {each.number - expected} records before it are missing" if each.number > expected else ""
        )
        detail = (
            f"{each.lane} rows: {each.forwarded} forwarded, {each.withheld} withheld, {each.lost} lost before,"
            f" {each.bytes} bytes; {len(each.spans)} sequences; policy {each.policy[:16]};"
            f" record {each.number} of {each.chain}, {each.since:.0f} to {each.until:.0f}{missing}"
        )
        action = "forward" if each.forwarded else "withhold"
        records.audit(session, now, str(store), action, "Site", each.site, detail)
        known.boot, known.n = each.chain, each.number
        new += 1
    session.add(known)
    return new
