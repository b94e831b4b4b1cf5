"""A blob from a peer that has it, or from the controller when it is this agent's turn."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from agent.fetch import CONTROLLER, PEER, BlobStore, NoRoom
from agent.peers import choice
from agent.peers.choice import Answer, Awaited, Standing
from agent.peers.credentials import Credentials
from agent.peers.figures import Figures, Obtained
from agent.peers.probe import Probed, probe
from agent.peers.settings import Address
from edgeward.client.transport import Transport
from edgeward.clock import Clock
from edgeward.errors import DigestMismatch, EdgewardError, NotFound, TrustError, Unavailable

log = logging.getLogger(__name__)

#: Seconds for which a peer is left alone after its first failure; twice as long after each further.
UNREACHABLE, BROKE, LIED = 5.0, 30.0, 600.0


class Hints(Protocol):
    """Where peers may be."""

    def addresses(self) -> list[Address]: ...


@dataclass
class _Search:
    """One blob's way here."""

    digest: str
    size: int
    began: float
    #: Seconds after which nobody is waited for any more.
    total: float
    idle_since: float
    #: Who has written what has arrived from peers; "" stands for an earlier run, of which nobody knows.
    wrote: set[str]
    asked: dict[str, Answer]
    awaited: dict[str, Awaited]


class Peers:
    """What peers have is taken from them, checked like everything else: by the signed length and hash."""

    def __init__(
        self,
        blobs: BlobStore,
        hints: Hints,
        credentials: Credentials,
        clock: Clock,
        wait: Callable[[float], bool],
        figures: Figures,
    ) -> None:
        """`wait` lets so many seconds pass, and is true when the agent is to end."""
        self._blobs = blobs
        self._hints = hints
        self._credentials = credentials
        self._me = credentials.name.device
        self._clock = clock
        self._wait = wait
        self._figures = figures
        self._lock = threading.Lock()
        self._wanted: set[str] = set()
        self._coming: set[str] = set()
        self._at: dict[str, Address] = {}
        self._standings: dict[str, Standing] = {}

    def obtain(self, digest: str, size: int, download: Callable[[], None]) -> None:
        """Have the blob in the store: from a peer, or by `download`, which asks the controller.

        Raises what `download` raises, NoRoom and OSError when the disk does not take it, Unavailable when the
        agent ends meanwhile. Nothing that a peer does is raised.
        """
        if self._blobs.has(digest, size):
            return
        with self._among(self._wanted, digest):
            self._obtain(digest, size, download)

    def _obtain(self, digest: str, size: int, download: Callable[[], None]) -> None:
        now = self._clock.monotonic()
        wrote = {""} if self._blobs.arrived(digest, PEER) else set()
        pace = self._blobs.pace
        total = choice.TOTAL + (0.0 if pace is None else pace.seconds(size))
        search = _Search(digest, size, now, total, now, wrote, {}, {})
        answers, poll = self._ask(digest), choice.POLL
        while not self._blobs.has(digest, size):
            step = self._decide(search, answers, poll)
            if isinstance(step, choice.Go):
                with self._among(self._coming, digest):
                    download()
                self._figures.add(Obtained(controller_blobs=1, controller_bytes=size))
                return
            if isinstance(step, choice.Take):
                answer = self._take(search, step.peer)
                if answer is None:
                    answers.pop(step.peer)
                else:
                    answers[step.peer] = answer
                continue
            if self._wait(step.seconds):
                raise Unavailable(f"artifact {digest[:16]}: the agent ends")
            poll = min(choice.POLL_MOST, poll * 1.5)
            again = choice.ask_again(digest, self._me, answers)
            fresh = self._ask(digest, again)
            for name in again:
                if name in fresh:
                    answers[name] = fresh[name]
                else:
                    del answers[name]

    def wanted(self, digest: str) -> bool:
        """Whether it is looked for at this moment."""
        with self._lock:
            return digest in self._wanted

    def received(self, digest: str) -> int | None:
        """Bytes that have arrived of what is being downloaded at this moment, None when it is not."""
        with self._lock:
            if digest not in self._coming:
                return None
        deltas = self._blobs.folder.with_name("deltas")
        sizes = [self._blobs.arrived(digest, origin) for origin in (CONTROLLER, PEER)]
        for path in deltas.glob(f"{digest}.*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        return sum(sizes)

    def left_alone(self, key: str) -> bool:
        """Whether this device, or what answers at this address, has failed lately."""
        with self._lock:
            return self._standings.get(key, Standing()).until > self._clock.monotonic()

    # questions

    def _ask(self, digest: str, names: list[str] | None = None) -> dict[str, Answer]:
        """The answers of all peers, or of those of these names; who gives none is not in it."""
        if names is None:
            known = {address: name for name, address in self._at.items()}
            places = [
                address
                for address in self._hints.addresses()
                if not self.left_alone(str(address)) and not self.left_alone(known.get(address, ""))
            ]
        else:
            places = [self._at[name] for name in names if name in self._at and not self.left_alone(name)]
        if not places:
            return {}
        with ThreadPoolExecutor(max_workers=min(8, len(places)), thread_name_prefix="peers") as pool:
            probed = list(pool.map(lambda address: self._probe(address, digest), places))
        answers: dict[str, Answer] = {}
        for address, found in zip(places, probed, strict=True):
            if found is None or found.name in answers or self.left_alone(found.name):
                continue
            if found.name == self._me:
                self._failed(str(address), LIED)  # our own place: nothing to be had here
                continue
            self._at[found.name] = address
            answers[found.name] = found.answer
        return answers

    def _probe(self, address: Address, digest: str) -> Probed | None:
        try:
            found = probe(address, digest, self._credentials, self._clock)
        except ssl.SSLCertVerificationError as error:
            log.warning("%s is no peer: %s", address, error.strerror or error)
            self._failed(str(address), LIED)
        except (OSError, EdgewardError) as error:
            log.debug("peer at %s: %s", address, error)
            self._failed(str(address), UNREACHABLE)
        else:
            self._well(str(address))
            return found
        return None

    def _decide(self, search: _Search, answers: dict[str, Answer], poll: float) -> choice.Step:
        now = self._clock.monotonic()
        for name, answer in list(answers.items()):
            if answer.kind not in ("coming", "full"):
                continue
            awaited = choice.watch(answer, search.awaited.get(name), now)
            search.awaited[name] = awaited
            if choice.in_vain(answer, awaited, now, search.total):
                log.warning("peer %s promises %s and does not give it", name, search.digest[:16])
                self._failed(name, BROKE)
                del answers[name]
        if now - search.began >= search.total:
            return choice.Go()
        if any(answer.kind in ("has", "coming", "full") for answer in answers.values()):
            search.idle_since = now
        return choice.next_step(search.digest, self._me, answers, now - search.idle_since, poll)

    # transfers

    def _take(self, search: _Search, peer: str) -> Answer | None:
        """Try it; what to go by from now on, None when this peer does not count any more."""
        digest, address = search.digest, self._at[peer]
        before = self._blobs.arrived(digest, PEER)
        try:
            with self._among(self._coming, digest):
                transport = Transport(
                    f"https://{address}",
                    timeout=5.0,
                    context=self._credentials.context(server=False, expected=peer),
                )
                try:
                    self._blobs.fetch(transport, digest, search.size, self._clock, PEER)
                finally:
                    transport.close()
        except NoRoom:
            raise
        except DigestMismatch as error:
            if search.wrote <= {peer}:
                log.warning("peer %s gave other bytes than it was asked for: %s", peer, error)
                self._failed(peer, LIED)
                search.wrote.clear()
                return None
            # Somebody has lied, and it need not be this one: it alone, from the first byte, will show.
            log.warning("what %d peers gave together of %s is wrong", len(search.wrote) + 1, digest[:16])
            search.wrote.clear()
            return Answer("has")
        except NotFound:
            self._failed(peer, BROKE)
            return None
        except Unavailable as error:
            if self._blobs.arrived(digest, PEER) > before:
                search.wrote.add(peer)
            if error.retry_after is not None:
                return Answer("full")
            log.info("peer %s at %s: %s", peer, address, error)
            self._failed(peer, BROKE)
            return None
        except TrustError as error:
            log.warning("peer %s: %s", peer, error)
            self._failed(peer, LIED)
            return None
        except EdgewardError as error:
            log.info("peer %s at %s: %s", peer, address, error)
            self._failed(peer, BROKE)
            return None
        self._well(peer)
        self._figures.add(Obtained(peer_blobs=1, peer_bytes=search.size))
        log.info("%s: %d bytes from peer %s", digest[:16], search.size, peer)
        return Answer("has")

    @contextmanager
    def _among(self, digests: set[str], digest: str) -> Iterator[None]:
        with self._lock:
            digests.add(digest)
        try:
            yield
        finally:
            with self._lock:
                digests.discard(digest)

    def _failed(self, key: str, base: float) -> None:
        now = self._clock.monotonic()
        with self._lock:
            # Who announces ever new places must not fill the memory.
            if len(self._standings) >= 1024:
                self._standings = {
                    name: standing for name, standing in self._standings.items() if standing.until > now
                }
            if len(self._standings) < 4096:
                self._standings[key] = choice.failed(self._standings.get(key, Standing()), now, base)

    def _well(self, key: str) -> None:
        with self._lock:
            self._standings.pop(key, None)
