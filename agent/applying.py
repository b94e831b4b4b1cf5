"""Desired states on their way into effect: accepted durably, applied, and set aside when that ends the agent."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable

from agent.attempts import HEALTHY_SECONDS, Attempts, Risk
from agent.desired import check, stored
from agent.state import State
from agent.trusted_clock import TrustedClock
from edgeward.errors import TrustError
from edgeward.identifiers import DeviceName
from edgeward.wire.desired import DesiredState
from edgeward.wire.reports import Condition

log = logging.getLogger(__name__)

CONDITION = "DesiredStateApplied"
#: Monotonic seconds until what could not be accepted or applied is tried again.
AGAIN_SECONDS = 30.0

_KEY = "desired"


class Applying:
    """From the daemon's thread only. Whatever a desired state does, nothing is raised here."""

    def __init__(
        self,
        state: State,
        attempts: Attempts,
        name: DeviceName,
        trusted_keys: Callable[[], list[str]],
        apply: Callable[[DesiredState], None],
        clock: TrustedClock,
    ) -> None:
        """`apply` puts a desired state into effect; it may be called again with the same one."""
        self._state = state
        self._attempts = attempts
        self._name = name
        self._trusted_keys = trusted_keys
        self._apply = apply
        self._clock = clock
        self._waiting: DesiredState | None = None
        self._offered: bytes | None = None
        self._damaged = False
        self._again_at = 0.0
        self._healthy_at: float | None = None
        self._condition: Condition | None = None

    def restore(self) -> None:
        """What was accepted before goes on after a restart, without a network and whatever its expiry."""
        raw = self._state.desired()
        if raw is None:
            return
        try:
            desired = stored(raw, self._trusted_keys(), self._name, self._state.generation())
        except TrustError as error:
            log.error("the stored desired state is damaged, waiting for a new one: %s", error)
            self._damaged = True
            self._say("Damaged", f"what was stored cannot be used: {error}; it is taken again when it comes")
            return
        self._waiting = desired
        self._try()

    def offer(self, raw: bytes) -> None:
        """What came by MQTT, HTTPS or in a bundle: anybody's bytes."""
        if not raw:  # of a device that was deleted or revoked, or of somebody at the broker
            log.warning("the broker keeps no desired state for this device any more; what runs goes on")
            return
        try:
            desired = check(raw, self._trusted_keys(), self._name, self.held, self._clock)
        except TrustError as error:
            log.warning("refused desired state: %s", error)
            return
        if desired is None:
            return
        try:
            self._state.accept_desired(desired.generation, raw)
        except (OSError, sqlite3.Error) as error:
            log.exception("desired generation %d is not accepted yet", desired.generation)
            self._offered = raw
            self._again_at = self._clock.monotonic() + AGAIN_SECONDS
            self._say("NotAccepted", f"generation {desired.generation} cannot be written down: {error}")
            return
        log.info("desired generation %d", desired.generation)
        self._damaged = False
        self._offered, self._waiting = None, desired
        self._try()

    def look(self) -> None:
        """Try again what waits, and note that what was applied did no harm; call it now and then."""
        now = self._clock.monotonic()
        if self._healthy_at is not None and now >= self._healthy_at:
            self._healthy_at = None
            self._attempts.end(_KEY)
        if now < self._again_at:
            return
        if self._offered is not None:
            raw, self._offered = self._offered, None
            self.offer(raw)
        elif self._waiting is not None:
            self._try()

    def stop(self) -> None:
        """In order: what is in effect has done nothing wrong."""
        self._attempts.leave(_KEY)

    @property
    def held(self) -> int:
        """The newest generation that is here: one that was accepted and then lost on the disk may come again."""
        accepted = self._state.generation()
        return accepted - 1 if self._damaged else accepted

    @property
    def unkept(self) -> bool:
        """Whether what was offered could not be written down yet, and is offered again."""
        return self._offered is not None

    def conditions(self) -> list[Condition]:
        """Why the newest desired state is not in effect; empty when it is."""
        return [] if self._condition is None else [self._condition]

    def _try(self) -> None:
        desired = self._waiting
        if desired is None:
            return
        subject, what = str(desired.generation), f"generation {desired.generation}"
        spent = self._attempts.spent(_KEY, subject)
        if spent is not None:
            self._waiting = None
            why = spent.why("over it")
            if self._condition is not None and self._condition.reason == "ApplyFailed":
                why = f"{why}; last: {self._condition.message}"
            log.error("desired %s is set aside: %s", what, why)
            self._say("SetAside", f"{what} is set aside until a newer one comes: {why}")
            return
        self._begin(subject, Risk.APPLYING)
        try:
            self._apply(desired)
        except Exception as error:
            log.exception("desired %s", what)
            if isinstance(error, OSError | sqlite3.Error):
                self._attempts.leave(_KEY)  # the disk's doing
            else:
                self._attempts.failed(_KEY)
            self._again_at = self._clock.monotonic() + AGAIN_SECONDS
            self._say("ApplyFailed", f"{what}: {type(error).__name__}: {error}")
            return
        self._waiting, self._condition = None, None
        # What it has begun runs in threads of its own, and may still end the agent.
        self._begin(subject, Risk.SETTLING)
        self._healthy_at = self._clock.monotonic() + HEALTHY_SECONDS

    def _begin(self, subject: str, risk: Risk) -> None:
        try:
            self._attempts.begin(_KEY, subject, risk)
        except sqlite3.Error as error:  # a full disk must not keep the device from what it shall do
            log.warning("that desired generation %s is applied is not written down: %s", subject, error)

    def _say(self, reason: str, message: str) -> None:
        self._condition = Condition(CONDITION, "False", reason, message, self._clock.now())
