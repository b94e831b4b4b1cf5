"""A store's forwarder with what it lives on: its ledger, the policy and the reports to the controller."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from edgeward.clock import Clock
from edgeward.errors import EdgewardError
from edgeward.mqtt import Broker
from trends.forwarder import Forwarder, Pace
from trends.identity import Identity
from trends.journal import Journal
from trends.ledger import Ledger
from trends.read_back import ReadBack

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Forward:
    """To which broker the central store listens."""

    broker: Broker
    pace: Pace = field(default_factory=Pace)


class Sender:
    def __init__(
        self,
        forward: Forward,
        read_back: ReadBack,
        journal: Journal,
        ledger: Ledger,
        identity: Identity,
        clock: Clock,
    ) -> None:
        self._ledger = ledger
        self._identity = identity
        self._clock = clock
        self._forwarder = Forwarder(
            journal, read_back, ledger, forward.broker, identity.anchor, identity.store, identity.signer, clock,
            forward.pace,
        )  # fmt: skip
        self.changed(identity)

    def changed(self, fresh: Identity) -> None:
        """The certificate, the deny-list or the policy is new."""
        self._forwarder.sign_as(fresh.signer)
        self._forwarder.denied = fresh.denied
        self._forwarder.policy = fresh.residency

    def chores(self, identity: Identity) -> tuple[tuple[str, Callable[[], bool]], ...]:
        """What is to be done from time to time where the controller can be reached, with its name."""
        return (
            ("the residency policy", identity.learn_residency),
            ("the report of residency decisions", lambda: identity.report_decisions(self._ledger)),
        )

    def start(self) -> None:
        # Before the first row goes: a policy that is stricter than the default may be waiting.
        try:
            self._identity.learn_residency()
            self.changed(self._identity)
        except EdgewardError as error:
            what = "the default" if self._identity.residency is None else "the policy that is known"
            log.warning("forwarding by %s, a newer policy cannot be had: %s", what, error)
        self._forwarder.start()

    def stop(self) -> None:
        """What was decided becomes a record, and is reported if the controller can be reached."""
        self._forwarder.stop()
        self._ledger.record(self._clock.now())
        try:
            while self._identity.report_decisions(self._ledger):
                pass
        except EdgewardError as error:
            log.warning("residency decisions are reported with the next start: %s", error)
        log.info("forwarded: %s", dict(self._forwarder.counts))
        self._ledger.close()
