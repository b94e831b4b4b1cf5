"""Agents of one site over real TLS: one of them goes to the controller, nobody else is let in."""

from __future__ import annotations

import random
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.fetch import PEER, BlobStore
from agent.pace import Pace
from agent.peers import choice
from agent.peers.choice import Answer
from agent.peers.figures import Obtained, read_figures
from agent.peers.probe import probe
from agent.peers.server import Bounds
from agent.peers.settings import Settings
from agent.peers.site import Site as Real
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import Unavailable
from edgeward.identifiers import DeviceName
from edgeward.storage import sha256_hex
from tests.agent.peers.conftest import Agent, Authority, Site, first
from tests.agent.peers.test_wire import asked

CONTENT = random.Random(3).randbytes(1 << 20)
NAMES = [f"line-{number}" for number in range(5)]


def test_five_agents_that_start_at_once_fetch_each_blob_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A thread that gets no processor for a second is not what this is about.
    monkeypatch.setattr(choice, "STEP", 300.0)
    monkeypatch.setattr(choice, "SETTLE", 300.0)
    contents = [random.Random(seed).randbytes(size) for seed, size in ((1, 300), (2, 2 << 20), (3, 40_000))]
    controller = site.controller(*contents)
    agents = [site.agent(name, controller) for name in NAMES]

    def all_of_them(agent: Agent) -> None:
        for content in contents:
            agent.obtain(content)

    with ThreadPoolExecutor(5) as pool:
        for done in [pool.submit(all_of_them, agent) for agent in agents]:
            done.result()
    assert sorted(controller.asked) == sorted(controller.contents)
    assert controller.sent == sum(map(len, contents))
    figures = [read_figures(agent.figures) for agent in agents]
    assert sum(one.controller_blobs for one in figures) == 3
    assert sum(one.peer_bytes for one in figures) == 4 * sum(map(len, contents))
    assert all(agent.peers.left_alone(str(agent.server.address)) for agent in agents), "nobody asks itself"
    left = [path.name for agent in agents for path in agent.blobs.folder.iterdir() if path.suffix]
    assert left == [], "nothing half-fetched lies about"


def test_an_agent_that_comes_later_asks_its_peers_first(site: Site) -> None:
    controller = site.controller(CONTENT)
    site.agent("old", controller).put(CONTENT)
    late = site.agent("late", controller)
    late.obtain(CONTENT)
    assert controller.asked == []
    assert read_figures(late.figures) == Obtained(peer_blobs=1, peer_bytes=len(CONTENT))


def test_what_came_in_part_from_elsewhere_goes_once_it_is_whole(site: Site) -> None:
    controller = site.controller(CONTENT)
    agent = site.agent("alone", controller)
    path = agent.blobs.path(sha256_hex(CONTENT))
    path.with_suffix(".peer").write_bytes(CONTENT[:5])
    agent.obtain(CONTENT)
    assert list(agent.blobs.folder.iterdir()) == [path]
    path.with_suffix(".part").write_bytes(CONTENT[:5])  # a delta has made it whole
    agent.blobs.fetch(agent.transport, path.name, len(CONTENT), agent.clock)
    assert list(agent.blobs.folder.iterdir()) == [path] and len(controller.asked) == 1


def test_without_peers_everything_is_as_before(site: Site) -> None:
    controller = site.controller(CONTENT)
    site.agent("alone", controller).obtain(CONTENT)
    assert controller.asked == [sha256_hex(CONTENT)]


def test_others_wait_while_the_first_is_downloading_over_a_slow_link(site: Site) -> None:
    controller, slow = site.controller(CONTENT), threading.Event()
    controller.before = slow.wait  # type: ignore[assignment]
    agents = {name: site.agent(name, controller) for name in ("a", "b")}
    leader = agents.pop(first(CONTENT, ["a", "b"]))
    (other,) = agents.values()
    with ThreadPoolExecutor(2) as pool:
        leading = pool.submit(leader.obtain, CONTENT)
        while not controller.asked:
            assert not leading.done()
        found = probe(leader.server.address, sha256_hex(CONTENT), other.credentials, SystemClock())
        assert found.answer == Answer("coming", 0)
        waiting = pool.submit(other.obtain, CONTENT)
        while leader.name not in other.peers._at:
            assert not waiting.done()
        slow.set()
        leading.result()
        waiting.result()
    assert len(controller.asked) == 1


def test_when_the_first_is_dead_the_next_goes_within_its_patience(site: Site) -> None:
    controller, clock = site.controller(CONTENT), ManualClock()
    waited: list[float] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        clock.advance(seconds)
        return False

    leader_name = first(CONTENT, ["a", "b", "c"])
    agents = {name: site.agent(name, controller, clock=clock, wait=wait) for name in ("a", "b", "c")}
    agents[leader_name].server.stop()
    second = first(CONTENT, [name for name in agents if name != leader_name])
    agents[second].obtain(CONTENT)
    assert waited == [] and len(controller.asked) == 1, "it knows that nobody before it answers"


def test_a_first_that_does_not_want_it_is_not_waited_for_long(site: Site) -> None:
    controller, clock = site.controller(CONTENT), ManualClock()

    def wait(seconds: float) -> bool:
        clock.advance(seconds)
        return False

    agents = {name: site.agent(name, controller, clock=clock, wait=wait) for name in ("a", "b")}
    last = next(name for name in agents if name != first(CONTENT, ["a", "b"]))
    began = clock.monotonic()
    agents[last].obtain(CONTENT)
    assert clock.monotonic() - began == pytest.approx(choice.SETTLE)
    assert len(controller.asked) == 1


def test_a_first_that_wants_it_and_never_begins_is_left_behind(site: Site) -> None:
    controller, clock = site.controller(CONTENT), ManualClock()

    def wait(seconds: float) -> bool:
        clock.advance(seconds)
        return False

    agents = {name: site.agent(name, controller, clock=clock, wait=wait) for name in ("a", "b")}
    leader = agents.pop(first(CONTENT, ["a", "b"]))
    (other,) = agents.values()
    began = clock.monotonic()
    with leader.peers._among(leader.peers._wanted, sha256_hex(CONTENT)):
        other.obtain(CONTENT)
    assert clock.monotonic() - began == pytest.approx(choice.STEP)
    assert len(controller.asked) == 1


def test_a_first_whose_download_fails_leaves_it_to_the_next(site: Site) -> None:
    controller = site.controller(CONTENT)
    agents = {name: site.agent(name, controller) for name in ("a", "b")}
    leader = agents.pop(first(CONTENT, ["a", "b"]))
    (other,) = agents.values()

    def fails() -> None:
        assert leader.peers.received(sha256_hex(CONTENT)) == 0
        raise Unavailable("the controller is away")

    with pytest.raises(Unavailable, match="the controller is away"):
        leader.peers.obtain(sha256_hex(CONTENT), len(CONTENT), fails)
    assert leader.peers.received(sha256_hex(CONTENT)) is None
    other.obtain(CONTENT)
    assert len(controller.asked) == 1


def test_the_end_of_the_agent_ends_waiting(site: Site) -> None:
    controller = site.controller(CONTENT)
    agents = {name: site.agent(name, controller) for name in ("a", "b")}
    last = agents[next(name for name in agents if name != first(CONTENT, ["a", "b"]))]
    last.ending.set()
    with pytest.raises(Unavailable, match="the agent ends"):
        last.obtain(CONTENT)


def test_a_peer_killed_in_the_middle_is_followed_by_another(site: Site) -> None:
    controller = site.controller(CONTENT)
    halfway = threading.Event()

    def pace(size: int) -> None:
        sent.append(size)
        if sum(sent) > len(CONTENT) // 2:
            halfway.set()
            raise ConnectionResetError("killed")

    sent: list[int] = []
    dying = site.agent("dying", controller, pace=pace)
    getter = site.agent("getter", controller)
    dying.put(CONTENT)
    good = site.agent("good", controller)
    getter.hints = [dying.server.address]
    digest = sha256_hex(CONTENT)
    received: list[int] = []

    def controller_is_away() -> None:
        raise Unavailable("no link")

    with pytest.raises(Unavailable, match="no link"):
        getter.peers.obtain(digest, len(CONTENT), controller_is_away)
    assert halfway.is_set() and getter.peers.left_alone("dying")
    kept = getter.blobs.arrived(digest, PEER)
    assert 0 < kept < len(CONTENT)
    good.put(CONTENT)
    good.server._pace = received.append
    getter.hints = [dying.server.address, good.server.address]
    getter.obtain(CONTENT)
    assert sum(received) == len(CONTENT) - kept, "it went on where the other had ended"
    assert controller.asked == []


# who is let in


def test_no_other_sites_device_and_no_other_kind_is_answered(site: Site, tmp_path: Path) -> None:
    controller = site.controller(CONTENT)
    here = site.agent("here", controller)
    here.put(CONTENT)
    own = site.authority.credentials(tmp_path / "own", "own")
    assert asked(here.server.address, sha256_hex(CONTENT), own)[0] == 200
    others = {
        "another site": site.authority.credentials(tmp_path / "o", "own", "other"),
        "another fleet": Authority().credentials(tmp_path / "f", "own"),
        "a trend store": site.authority.credentials(tmp_path / "s", "own", store=True),
        "an ended one": site.authority.credentials(tmp_path / "e", "own", lifetime=-1800),
    }
    for what, credentials in others.items():
        assert asked(here.server.address, sha256_hex(CONTENT), credentials)[0] is None, what


def test_without_a_certificate_there_is_no_answer(site: Site) -> None:
    here = site.agent("here", site.controller(CONTENT))
    here.put(CONTENT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = f"GET /blobs/{sha256_hex(CONTENT)} HTTP/1.1\r\n\r\n".encode()
    with socket.create_connection(here.server.address) as plain:
        plain.sendall(request)
        assert _all(plain).find(b"HTTP") == -1
    with (
        socket.create_connection(here.server.address) as plain,
        context.wrap_socket(plain) as connection,
        pytest.raises(ssl.SSLError),
    ):
        connection.sendall(request)
        assert connection.recv(10) == b"", "TLS 1.3 tells a client late"
        raise ssl.SSLError("closed")


def _all(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except OSError:
        return found
    return found


def test_nothing_is_taken_from_another_sites_agent(site: Site, tmp_path: Path) -> None:
    controller = site.controller(CONTENT)
    getter = site.agent("getter", controller)
    stranger = Agent(site.authority, tmp_path / "x", "stranger", controller, site="other")
    try:
        stranger.put(CONTENT)
        getter.hints = [stranger.server.address]
        getter.obtain(CONTENT)
        assert controller.asked == [sha256_hex(CONTENT)]
        assert getter.peers.left_alone(str(stranger.server.address))
    finally:
        stranger.close()


def test_the_dates_of_a_certificate_count_by_the_trusted_time_not_by_the_machines(
    site: Site, tmp_path: Path
) -> None:
    """OpenSSL would judge by the machine's clock, which is right here: these two believe in another year."""
    later = SystemClock().now() + 10 * 365 * 86400
    here = site.agent("here", site.controller())
    client = site.authority.credentials(tmp_path / "c", "c", now=lambda: later)
    assert asked(here.server.address, "0" * 64, client)[0] is None, "the server's has ended by then"
    good = site.authority.credentials(tmp_path / "d", "d")
    here.credentials._now = lambda: later
    assert asked(here.server.address, "0" * 64, good)[0] is None, "and so has the client's"


def test_certificates_that_ended_by_the_machines_clock_alone_are_good(site: Site, tmp_path: Path) -> None:
    """The machine's clock is ahead, and the agent knows it."""
    earlier = SystemClock().now() - 2400
    here = site.agent("here", site.controller())
    for end in ("here", "client"):
        folder = tmp_path / f"old-{end}"
        old = site.authority.credentials(folder, end, lifetime=-1800, now=lambda: earlier)
        if end == "here":
            here.server._credentials = old
        else:
            assert asked(here.server.address, "0" * 64, old)[0] == 404


def test_a_device_holds_two_uploads_and_all_together_four(site: Site, tmp_path: Path) -> None:
    go, sending = threading.Event(), threading.Semaphore(0)

    def pace(size: int) -> None:
        sending.release()
        go.wait()

    here = site.agent("here", site.controller(), pace=pace)
    here.put(CONTENT)
    devices = [site.authority.credentials(tmp_path / name, name) for name in ("a", "b", "c")]
    digest = sha256_hex(CONTENT)
    with ThreadPoolExecutor(4) as pool:
        running = []
        for credentials in (devices[0], devices[0], devices[1], devices[1]):
            running.append(pool.submit(asked, here.server.address, digest, credentials))
            sending.acquire()
            if len(running) == 2:
                status, fields, _ = asked(here.server.address, digest, devices[0])
                assert (status, fields["retry-after"]) == (503, "2"), "the third of one device"
        assert asked(here.server.address, digest, devices[2])[0] == 503, "the fifth of all"
        go.set()
        assert [done.result()[2] == CONTENT for done in running] == [True] * 4
    assert asked(here.server.address, digest, devices[2])[0] == 200


def test_a_reader_that_does_not_read_loses_its_slot(site: Site, tmp_path: Path) -> None:
    big = random.Random(5).randbytes(16 << 20)
    bounds = Bounds(uploads=1, window=0.3, rate=1e6, request=300.0)
    here = site.agent("here", site.controller(), bounds=bounds)
    here.put(big)
    slow = site.authority.credentials(tmp_path / "slow", "slow")
    other = site.authority.credentials(tmp_path / "other", "other")
    context = slow.context(server=False)
    with socket.create_connection(here.server.address) as plain, context.wrap_socket(plain) as connection:
        connection.sendall(f"GET /blobs/{sha256_hex(big)} HTTP/1.1\r\n\r\n".encode())
        connection.recv(10)
        while asked(here.server.address, sha256_hex(CONTENT), other, "HEAD")[0] == 503:
            pass
        status = None
        while status != 200:
            status = asked(here.server.address, sha256_hex(big), other, "HEAD")[0]


def test_more_connections_than_that_are_closed_at_once(site: Site) -> None:
    here = site.agent("here", site.controller(), bounds=Bounds(connections=2, request=60.0))
    silent = [socket.create_connection(here.server.address) for _ in range(2)]
    with socket.create_connection(here.server.address) as third:
        assert third.recv(1) == b""
    for one in silent:
        one.close()


def test_a_request_that_drips_is_cut_off(site: Site, tmp_path: Path) -> None:
    here = site.agent("here", site.controller(), bounds=Bounds(request=0.3))
    own = site.authority.credentials(tmp_path / "own", "own")
    context, over = own.context(server=False), threading.Event()
    with (
        socket.create_connection(here.server.address) as plain,
        context.wrap_socket(plain) as connection,
        pytest.raises(OSError),
    ):
        while not over.wait(0.05):
            connection.sendall(b"G")


def test_silence_holds_no_connection(site: Site, tmp_path: Path) -> None:
    bounds = Bounds(connections=2, request=0.3)
    here = site.agent("here", site.controller(), bounds=bounds)
    own = site.authority.credentials(tmp_path / "own", "own")
    silent = [socket.create_connection(here.server.address) for _ in range(2)]
    try:
        for one in silent:
            assert one.recv(1) == b"", "cut after the time for a request"
        while asked(here.server.address, "0" * 64, own)[0] != 404:
            pass  # the time for a request is short here
    finally:
        for one in silent:
            one.close()


def test_what_runs_is_looked_after_while_a_peer_is_waited_for(site: Site, tmp_path: Path) -> None:
    """The guard does not wait a quarter of an hour: who waits for a peer is the slots' own thread."""
    authority, clock = site.authority, SystemClock()
    signer = authority.credentials(tmp_path / "me", "me")._signer
    trust = SimpleNamespace(ca=authority.pem)
    identity = SimpleNamespace(
        name=DeviceName("plant", "me"), enrollment=SimpleNamespace(trust=trust), signer=signer
    )
    looked = threading.Semaphore(0)
    pace = Pace(clock)
    pace.meanwhile = looked.release
    liar = site.liar(
        "liar", lambda connection, offset: None, to_head=b"HTTP/1.1 503 X\r\nEdgeward-Received: 7\r\n\r\n"
    )
    made = Real(
        tmp_path / "me",
        Settings(static=(liar.address,)),
        identity,  # type: ignore[arg-type]
        BlobStore(tmp_path / "me" / "blobs", reserve=0, pace=pace),
        clock,
        lambda digest: True,
    )
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(made.peers.obtain, sha256_hex(CONTENT), len(CONTENT), lambda: None)
        for _ in range(3):
            assert looked.acquire(timeout=30)
        made.stop()
        with pytest.raises(Unavailable, match="the agent ends"):
            waiting.result()
