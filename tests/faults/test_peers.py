"""What peers may do: whatever it is, it costs time only, and not twice.

Each row of lies is a device of the site with a sound certificate. The blob comes whole in the end, the
controller sends no more than without peers, and the liar is left alone afterwards.
"""

from __future__ import annotations

import random
import ssl
import threading
from collections.abc import Callable
from typing import Any

import pytest

import agent.peers.obtain
from agent.fetch import CONTROLLER, PEER, Limits, NoRoom, Origin
from agent.pace import Pace
from agent.peers import choice
from edgeward.clock import ManualClock
from edgeward.storage import sha256_hex
from edgeward.wire.schedule import Delivery
from tests.agent.peers.conftest import Agent, Site, site
from tests.faults.conftest import head

__all__ = ["site"]

CONTENT = random.Random(4).randbytes(1 << 20)
DIGEST, SIZE = sha256_hex(CONTENT), len(CONTENT)
WRONG = bytes(byte ^ 1 for byte in CONTENT)
OVER = threading.Event()


def wrong_bytes(connection: Any, offset: int) -> None:
    connection.sendall(head(SIZE, offset) + WRONG[offset:])


def one_bit(connection: Any, offset: int) -> None:
    changed = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    connection.sendall(head(SIZE, offset) + changed[offset:])


def truncated(connection: Any, offset: int) -> None:
    connection.sendall(head(SIZE, offset) + WRONG[offset : offset + 50_000])


def endless(connection: Any, offset: int) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(1000):
        connection.sendall(WRONG)


def longer(connection: Any, offset: int) -> None:
    connection.sendall(head(SIZE + 1, offset) + CONTENT[offset:] + b"x")


def shorter(connection: Any, offset: int) -> None:
    connection.sendall(head(SIZE - 1, offset) + CONTENT[offset:-1])


def drip(connection: Any, offset: int) -> None:
    connection.sendall(head(SIZE, offset))
    while not OVER.wait(0.02):
        connection.sendall(b"x")


def silence(connection: Any, offset: int) -> None:
    OVER.wait()


def nonsense(connection: Any, offset: int) -> None:
    connection.sendall(b"\x00" * 5000)


def nothing(connection: Any, offset: int) -> None:
    connection.sendall(head(SIZE, offset))


def not_found(connection: Any, offset: int) -> None:
    connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


def redirect(connection: Any, offset: int) -> None:
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")


def forbidden(connection: Any, offset: int) -> None:
    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")


def compressed(connection: Any, offset: int) -> None:
    import gzip

    body = gzip.compress(bytes(64 << 20))
    connection.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )


LIES = [
    wrong_bytes, one_bit, truncated, endless, longer, shorter, drip, silence, nonsense, nothing, not_found,
    redirect, forbidden, compressed,
]  # fmt: skip


#: What only time can end.
WITHOUT_END = [drip, silence]


@pytest.fixture(autouse=True)
def over(site: Site) -> Any:
    """It ends before the site, which waits for its liars."""
    OVER.clear()
    yield
    OVER.set()


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits with a shorter time."""
    quick = Origin(
        PEER.path, PEER.partial, exact=True, limits=Limits(rate=16384.0, window=3.0, deadline=60.0)
    )
    monkeypatch.setattr(agent.peers.obtain, "PEER", quick)


def first_in_turn(name: str, me: str) -> bool:
    """Whether `me` would try this peer before `good`."""
    return choice.order(f"{DIGEST}\n{me}", [name, "good"])[0] == name


ME = next(name for name in (f"me{number}" for number in range(99)) if first_in_turn("liar", name))


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_time_only_and_a_good_peer_is_next(
    site: Site, lie: Callable[[Any, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if lie in WITHOUT_END:
        impatient(monkeypatch)
    controller = site.controller(CONTENT)
    site.agent("good", controller).put(CONTENT)
    liar, me = site.liar("liar", lie), site.agent(ME, controller)
    me.obtain(CONTENT)
    assert liar.gets == 1 and me.peers.left_alone("liar") and not me.peers.left_alone("good")
    assert controller.asked == []
    other = random.Random(9).randbytes(1000)
    controller.contents[sha256_hex(other)] = other
    heads = liar.heads
    me.obtain(other)
    assert liar.heads == heads, "it is not even asked"


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_does_not_cost_what_has_come_from_the_controller(
    site: Site, lie: Callable[[Any, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if lie in WITHOUT_END:
        impatient(monkeypatch)
    controller = site.controller(CONTENT)
    site.liar("liar", lie)
    me = site.agent(ME, controller)
    me.blobs.path(DIGEST).with_suffix(CONTROLLER.partial).write_bytes(CONTENT[: SIZE // 2])
    me.obtain(CONTENT)
    assert controller.asked == [DIGEST] and controller.sent == SIZE - SIZE // 2


@pytest.mark.parametrize("how", ["the whole for a range", "another range", "another size"])
def test_a_wrong_answer_to_a_range_does_not_cost_what_peers_have_sent(site: Site, how: str) -> None:
    def answer(connection: Any, offset: int) -> None:
        assert offset == 300_000
        answers = {
            "the whole for a range": head(SIZE) + WRONG,
            "another range": head(SIZE, offset, content_range=f"bytes 0-{SIZE - 300_001}/{SIZE}")
            + WRONG[300_000:],
            "another size": head(SIZE, offset, content_range=f"bytes 300000-{SIZE - 1}/{SIZE + 5}")
            + WRONG[300_000:],
        }
        connection.sendall(answers[how])

    controller, served = site.controller(CONTENT), []
    site.agent("good", controller, pace=served.append).put(CONTENT)
    liar, me = site.liar("liar", answer), site.agent(ME, controller)
    me.blobs.path(DIGEST).with_suffix(PEER.partial).write_bytes(CONTENT[:300_000])
    me.obtain(CONTENT)
    assert liar.gets == 1 and me.peers.left_alone("liar")
    assert sum(served) == SIZE - 300_000


def test_an_honest_peer_is_not_blamed_for_what_a_liar_began(site: Site) -> None:
    controller, served = site.controller(CONTENT), []
    site.agent("good", controller, pace=served.append).put(CONTENT)
    site.liar("liar", truncated)
    me = site.agent(ME, controller)
    me.obtain(CONTENT)
    assert sum(served) == SIZE - 50_000 + SIZE, "first the rest, then, alone, all of it"
    assert controller.asked == [] and not me.peers.left_alone("good")


def test_nor_for_what_lay_there_from_an_earlier_run(site: Site) -> None:
    controller = site.controller(CONTENT)
    site.agent("good", controller).put(CONTENT)
    me = site.agent(ME, controller)
    me.blobs.path(DIGEST).with_suffix(PEER.partial).write_bytes(WRONG[:300_000])
    me.obtain(CONTENT)
    assert controller.asked == [] and not me.peers.left_alone("good")


# promises

#: Somebody to whom the liar comes first in the order of who goes to the controller.
AFTER = next(
    name
    for name in (f"me{number}" for number in range(99))
    if choice.order(DIGEST, [name, "liar"])[1] == name
)


def patient(site: Site, controller: Any, name: str) -> tuple[Agent, ManualClock]:
    clock = ManualClock()

    def wait(seconds: float) -> bool:
        clock.advance(seconds)
        return False

    return site.agent(name, controller, clock=clock, wait=wait), clock


@pytest.mark.parametrize(
    ("said", "most"),
    [
        (b"HTTP/1.1 503 X\r\nEdgeward-Received: 7\r\n\r\n", choice.STALL),
        (b"HTTP/1.1 503 X\r\nRetry-After: 1\r\n\r\n", choice.FULL),
        ("growing", choice.TOTAL),
        ("growing under a cap", choice.TOTAL + len(CONTENT) / 4096),
        ("now and then", 90.0),
        ("has it and does not give it", choice.FULL),
    ],
)
def test_a_promise_that_is_not_kept_is_believed_for_so_long_once(
    site: Site, said: bytes | str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(said, str) and said.startswith("growing"):
        monkeypatch.setattr(choice, "POLL_MOST", 30.0)  # the same with fewer questions
    if said == "now and then":
        monkeypatch.setattr(choice, "TOTAL", most)
    controller = site.controller(CONTENT)

    def busy(connection: Any, offset: int) -> None:
        connection.sendall(b"HTTP/1.1 503 X\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")

    liar = site.liar("liar", busy)
    me, clock = patient(site, controller, AFTER)
    if isinstance(said, bytes):
        liar.to_head = said
    elif said != "has it and does not give it":

        class Growing:
            def __init__(self) -> None:
                self.count = 0

            def __call__(self) -> bytes:
                self.count += 1
                if said == "now and then" and self.count % 2 == 0:
                    return b"HTTP/1.1 404 X\r\nEdgeward-Wanted: 1\r\n\r\n"
                return b"HTTP/1.1 503 X\r\nEdgeward-Received: %d\r\n\r\n" % self.count

        liar.says = Growing()
    if said == "growing under a cap":  # nobody of the site has it sooner
        me.blobs.pace = Pace(clock, wait=clock.advance)
        me.blobs.pace.allow(Delivery(rate=4096), lambda: None)
    began = clock.monotonic()
    step = me.peers._decide
    went: list[float] = []

    def decide(*arguments: Any) -> choice.Step:
        found = step(*arguments)
        if isinstance(found, choice.Go):
            went.append(clock.monotonic())
        return found

    monkeypatch.setattr(me.peers, "_decide", decide)
    me.obtain(CONTENT)
    took = went[0] - began
    assert most <= took <= most + 2 * choice.POLL_MOST + choice.STEP, took
    assert len(controller.asked) == 1
    assert me.peers.left_alone("liar") or said in ("now and then", "growing under a cap")


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\n" + b"x" * 9000,
        b"HTTP/1.1 500 X\r\n\r\n",
        b"\x00" * 100,
        b"",
        b"HTTP/1.1 999999 \r\n\r\n",
    ],
)
def test_an_answer_without_sense_counts_as_none(site: Site, said: bytes) -> None:
    controller = site.controller(CONTENT)
    liar = site.liar("liar", wrong_bytes, to_head=said)
    me = site.agent(ME, controller)
    me.obtain(CONTENT)
    assert liar.gets == 0 and me.peers.left_alone(str(liar.address)) and len(controller.asked) == 1


def test_an_answer_to_the_question_that_has_no_end_is_not_read_to_it(site: Site) -> None:
    controller = site.controller(CONTENT)
    liar = site.liar("liar", wrong_bytes)

    def reply(connection: Any, offset: int) -> None:
        liar.heads += 1
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"x" * 9000)
        OVER.wait()

    liar._server.answer = reply
    me = site.agent(ME, controller)
    me.obtain(CONTENT)
    assert liar.heads == 1 and len(controller.asked) == 1


def test_a_drip_in_the_answer_to_the_question_ends_at_its_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    import agent.peers.probe

    monkeypatch.setattr(agent.peers.probe, "SECONDS", 0.3)
    controller = site.controller(CONTENT)
    liar = site.liar("liar", wrong_bytes)

    def reply(connection: Any, offset: int) -> None:
        liar.heads += 1
        for byte in b"HTTP/1.1 200 OK\r\n" + b"x" * 4000:
            connection.sendall(bytes([byte]))
            if OVER.wait(0.02):
                return

    liar._server.answer = reply
    me = site.agent(ME, controller)
    me.obtain(CONTENT)
    assert liar.heads == 1 and len(controller.asked) == 1


def test_another_device_than_was_asked_is_given_no_bytes_of_trust(site: Site) -> None:
    """A name's record must not be spent by whoever sits at its address later."""
    good = site.authority.credentials(site.folder / "good", "good")
    liar = site.authority.credentials(site.folder / "liar", "liar")
    client, server = good.context(server=False, expected="good"), liar.context(server=True)
    import socket

    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).recv(1)
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(ssl.SSLCertVerificationError, match="liar is where good was"):
        client.wrap_socket(ours)
    ours.close()
    thread.join()


def test_a_full_disk_is_said_and_is_nobodys_fault(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controller = site.controller(CONTENT)
    site.agent("good", controller).put(CONTENT)
    me = site.agent(ME, controller)
    me.blobs._reserve = 1 << 60
    with pytest.raises(NoRoom):
        me.obtain(CONTENT)
    assert not me.peers.left_alone("good") and controller.asked == []


def test_two_places_of_one_device_are_one_peer(site: Site) -> None:
    """So a liar is not a new one at each port."""
    controller = site.controller(CONTENT)
    one = site.liar("liar", wrong_bytes)
    two = site.liar("liar", wrong_bytes)
    me = site.agent(ME, controller)
    me.obtain(CONTENT)
    assert one.gets + two.gets == 1 and len(controller.asked) == 1
    other = CONTENT[:1000]
    controller.contents[sha256_hex(other)] = other
    me.obtain(other)
    assert one.gets + two.gets == 1 and len(controller.asked) == 2
