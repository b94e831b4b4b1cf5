"""How far a site's store has come with forwarding, and by which terms."""

from __future__ import annotations

from collections import defaultdict

from msgspec import Struct

from edgeward.intervals import size
from edgeward.wire.residency import ResidencyPolicy
from edgeward.wire.topics import Lane
from trends.forwarding import pending, settled_spans
from trends.journal import Journal
from trends.ledger import Counts, Ledger, check_chain
from trends.residency import terms_for


class LaneStatus(Struct, frozen=True):
    """Numbers of one lane of a site: settled `here`, and those of them that the central store has not acknowledged."""

    site: str
    lane: Lane
    here: int
    behind: int


class SiteTerms(Struct, frozen=True):
    """`policy` is the digest of what holds, `source` where it comes from; `held` why nothing is forwarded now."""

    site: str
    source: str
    policy: str
    held: str
    forward: list[str]


class ForwardStatus(Struct, frozen=True):
    """`open` is what was decided and is in no record yet; `records` of which the controller has `reported`."""

    terms: list[SiteTerms]
    lanes: list[LaneStatus]
    open: list[Counts]
    records: int
    reported: int


def forward_status(
    journal: Journal, ledger: Ledger, sites: frozenset[str], policy: ResidencyPolicy | None, now: float
) -> ForwardStatus:
    """`now` is seconds since 1970. Raises EdgewardError when the log of decisions was changed."""
    here: defaultdict[tuple[str, Lane], int] = defaultdict(int)
    behind: defaultdict[tuple[str, Lane], int] = defaultdict(int)
    there = ledger.cursors()
    for sequence, settled in journal.positions().items():
        key = (sequence.name.site, sequence.lane)
        here[key] += size(settled_spans(settled))
        behind[key] += size(pending(settled, there.get(sequence), ()))
    decisions = ledger.decisions()
    check_chain(decisions)
    return ForwardStatus(
        terms=[_terms(site, policy, now) for site in sorted(sites)],
        lanes=[LaneStatus(*key, here[key], behind[key]) for key in sorted(here)],
        open=ledger.tallies(),
        records=len(decisions),
        reported=ledger.reported,
    )


def _terms(site: str, policy: ResidencyPolicy | None, now: float) -> SiteTerms:
    terms = terms_for(site, policy, now)
    lanes: list[str] = list(terms.residency.forward) if terms.residency is not None else []
    return SiteTerms(site, "default" if policy is None else "controller", terms.policy, terms.held, lanes)
