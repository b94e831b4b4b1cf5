"""Who fetches from the controller, who waits for whom, and who is left alone: decided without I/O.

The order is that of rendezvous hashing, also "highest random weight" (Thaler and Ravishankar, "Using
Name-Based Mappings to Increase Hit Rates", IEEE/ACM Transactions on Networking 6(1), 1998): everyone who knows
the same names comes to the same order without a word, and a name more or less moves only its own digests.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

#: Seconds between one agent's turn to go to the controller and the next one's, growing ever less.
STEP = 3.0
#: Seconds left to those before me that do not want it (yet): all are told of a release at about the same time.
SETTLE = 0.3
#: Seconds for which a peer that downloads may bring nothing new; making a delta alone may take 36.
STALL = 60.0
#: Seconds for which a peer may say that it has the blob but no upload to spare.
FULL = 120.0
#: Seconds after which nobody is waited for any more, whatever it says: what a liar costs at most. Beside what the
#: site's cap makes of the file: nobody has it sooner than that.
TOTAL = 900.0
#: Seconds between two questions: the first, and the most.
POLL, POLL_MOST = 0.25, 2.0
#: Peers that are asked again while waiting.
ASKED_AGAIN = 16


@dataclass(frozen=True)
class Answer:
    """`has` it; it is `coming` there, `received` bytes by now; has it but is `full`; `wants` it, too; `missing`."""

    kind: Literal["has", "coming", "full", "wants", "missing"]
    received: int = 0


@dataclass(frozen=True)
class Awaited:
    """A peer that somebody waits for: since when (monotonic seconds), and what was new when."""

    since: float
    changed: float
    received: int


@dataclass(frozen=True)
class Take:
    peer: str


@dataclass(frozen=True)
class Wait:
    seconds: float


@dataclass(frozen=True)
class Go:
    """To the controller."""


Step = Take | Wait | Go


def order(digest: str, names: Iterable[str]) -> list[str]:
    """The names by their weight for this digest, the first one to go to the controller."""
    return sorted(
        set(names), key=lambda name: hashlib.sha256(f"{digest}\n{name}".encode()).digest(), reverse=True
    )


def grace(rank: int) -> float:
    """Seconds that an agent leaves to so many before it that want the same. Rises strictly, ever less."""
    return STEP * math.log2(1 + rank)


def watch(answer: Answer, before: Awaited | None, now: float) -> Awaited:
    """What is known of a peer that was asked again."""
    if before is None:
        return Awaited(now, now, answer.received)
    if answer.received != before.received:
        return replace(before, changed=now, received=answer.received)
    return before


def in_vain(answer: Answer, awaited: Awaited, now: float, total: float = TOTAL) -> bool:
    """Whether this peer was waited for long enough, of `total` seconds at most."""
    if now - awaited.since >= total:
        return True
    if answer.kind == "full":
        return now - awaited.since >= FULL
    return now - awaited.changed >= STALL


def next_step(digest: str, me: str, answers: Mapping[str, Answer], waited: float, poll: float) -> Step:
    """What to do after everybody has answered; `answers` are of those only that still count.

    `waited` is for how long, in seconds, nobody has had the blob or been fetching it.
    """
    having = [name for name, answer in answers.items() if answer.kind == "has"]
    if having:
        # Each taker has an order of its own, so that not all come to the same peer.
        return Take(order(f"{digest}\n{me}", having)[0])
    if any(answer.kind in ("coming", "full") for answer in answers.values()):
        return Wait(poll)
    before = _before(digest, me, answers)
    wanting = sum(answers[name].kind == "wants" for name in before)
    left = (grace(wanting) if wanting else SETTLE if before else 0.0) - waited
    return Wait(min(poll, left)) if left > 0 else Go()


def _before(digest: str, me: str, names: Iterable[str]) -> list[str]:
    ranked = order(digest, [*names, me])
    return ranked[: ranked.index(me)]


def ask_again(digest: str, me: str, answers: Mapping[str, Answer]) -> list[str]:
    """Whom to ask while waiting: who has it or will, then who goes to the controller before me."""
    before = _before(digest, me, answers)
    useful = [name for name in order(digest, answers) if answers[name].kind in ("has", "coming", "full")]
    wanting = [name for name in before if answers[name].kind == "wants"]
    return list(dict.fromkeys([*useful, *wanting, *before]))[:ASKED_AGAIN]


@dataclass(frozen=True)
class Standing:
    """How often in a row a peer has failed, and until when (monotonic seconds) it is left alone."""

    failures: int = 0
    until: float = -math.inf


def failed(standing: Standing, now: float, base: float, most: float = 3600.0) -> Standing:
    """After one failure more: `base` seconds for the first, twice as long for each further, at most `most`."""
    seconds = min(most, base * 2.0 ** min(standing.failures, 30))
    return Standing(standing.failures + 1, max(standing.until, now + seconds))
