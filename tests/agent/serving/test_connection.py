"""HTTP/1.1 byte by byte, on a transport that keeps what is written and a clock that moves when told to."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.serving.connection import Connection
from agent.serving.exchange import Shared
from agent.serving.messages import JSON, Request, Respond, Response
from agent.serving.settings import Settings
from agent.serving.statistics import Statistics
from edgeward.clock import ManualClock


class Wire:
    """The transport's side of a connection."""

    def __init__(self, shared: Shared) -> None:
        self.sent = b""
        self.reading = True
        self.closed = self.aborted = self.ended = False
        self.connection = Connection(shared)
        self.connection.connection_made(self)  # type: ignore[arg-type]

    def write(self, data):
        assert not self.closed and not self.ended
        self.sent += bytes(data)

    def writelines(self, parts):
        self.write(b"".join(parts))

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.ended = True

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = self.aborted = True
        self.connection.connection_lost(None)

    def pause_reading(self):
        assert self.reading
        self.reading = False

    def resume_reading(self):
        assert not self.reading
        self.reading = True

    def receive(self, data: bytes):
        self.connection.data_received(data)
        return self

    @property
    def over(self):
        return self.closed or self.ended


class Service:
    """Answers at once with what it got, or keeps the requests for the test to answer."""

    def __init__(self, *, keep=False, **limits):
        self.clock = ManualClock()
        self.statistics = Statistics()
        self.kept: list[tuple[Request, Respond]] = []
        self.shared = Shared(self.handle, Settings(**limits), self.clock, self.statistics)
        self._keep = keep

    def handle(self, request, respond):
        if self._keep:
            self.kept.append((request, respond))
        else:
            respond(echo(request))

    def connect(self):
        return Wire(self.shared)

    def wait(self, seconds):
        self.clock.advance(seconds)
        for connection in list(self.shared.connections):
            connection.sweep(self.clock.monotonic())


def echo(request):
    content = [request.method.decode(), request.target.decode("latin-1"), request.body.hex()]
    return Response(200, [json.dumps(content).encode()], JSON)


def answers(sent: bytes):
    """Status, headers and body of each answer; HEAD's have none and must come last."""
    found = []
    while sent:
        head, _, sent = sent.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        status = int(first.split()[1])
        headers = dict(line.split(": ", 1) for line in lines)
        size = int(headers.get("content-length", 0))
        found.append((status, headers, sent[:size]))
        sent = sent[size:]
    return found


def statuses(wire):
    return [status for status, _, _ in answers(wire.sent)]


def post(body=b"x", target="/a", *headers):
    lines = [f"POST {target} HTTP/1.1", "Host: h", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


CHUNKED = b"POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: t\r\n\r\n"


def test_keep_alive_answers_one_after_the_other():
    wire = Service().connect()
    wire.receive(post(b"one")).receive(post(b"two"))
    assert [json.loads(body)[2] for _, _, body in answers(wire.sent)] == [b"one".hex(), b"two".hex()]
    assert not wire.over


def test_chunked_bodies_are_put_together():
    wire = Service().connect().receive(CHUNKED)
    assert json.loads(answers(wire.sent)[0][2])[2] == b"abcde".hex()


def test_pipelined_requests_are_answered_in_their_order():
    service = Service(keep=True)
    wire = service.connect().receive(post(b"1") + post(b"2") + post(b"3"))
    for index in (2, 0, 1):
        request, respond = service.kept[index]
        respond(echo(request))
    assert [json.loads(body)[2] for _, _, body in answers(wire.sent)] == ["31", "32", "33"]


def test_only_so_many_pipelined_requests_are_begun():
    service = Service(keep=True, max_pipelined=2)
    wire = service.connect().receive(post() * 5)
    assert len(service.kept) == 2
    assert not wire.reading
    for index in range(5):
        request, respond = service.kept[index]
        respond(echo(request))
    assert statuses(wire) == [200] * 5
    assert wire.reading


def test_a_client_that_does_not_read_gets_no_more_work_done():
    service = Service()
    wire = service.connect()
    wire.connection.pause_writing()
    assert not wire.reading
    wire.receive(post() * 3)
    assert wire.sent == b""
    wire.connection.resume_writing()
    assert statuses(wire) == [200] * 3
    assert wire.reading


def test_a_client_that_never_reads_is_cut_off():
    service = Service(write_seconds=30)
    wire = service.connect()
    wire.connection.pause_writing()
    service.wait(29)
    assert not wire.aborted
    service.wait(2)
    assert wire.aborted


def test_head_has_a_length_and_no_body():
    wire = Service().connect().receive(b"HEAD /v2 HTTP/1.1\r\nHost: h\r\n\r\n")
    assert wire.sent.endswith(b"\r\n\r\n")
    assert b"content-length: 18\r\n" in wire.sent
    assert wire.sent.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize(
    ("request_head", "stays"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", False),
    ],
)
def test_connections_stay_as_their_version_and_header_say(request_head, stays):
    wire = Service().connect().receive(request_head)
    headers = answers(wire.sent)[0][1]
    assert wire.over is not stays
    assert (headers.get("connection") == "close") is not stays
    if b"1.0" in request_head and stays:
        assert headers["connection"] == "keep-alive"


def test_expect_100_continue_is_answered_before_the_body_and_in_turn():
    service = Service(keep=True)
    wire = service.connect().receive(post(b"1"))
    whole = post(b"22", "/a", "Expect: 100-continue")
    wire.receive(whole[:-2])
    assert wire.sent == b""
    request, respond = service.kept[0]
    respond(echo(request))
    assert statuses(wire) == [200, 100]
    wire.receive(whole[-2:])
    service.kept[1][1](echo(service.kept[1][0]))
    assert statuses(wire) == [200, 100, 200]


def test_an_unknown_expectation_is_refused():
    wire = Service().connect().receive(post(b"1", "/a", "Expect: 200-maybe"))
    assert statuses(wire) == [417]


def test_an_oversized_body_is_refused_before_it_comes():
    wire = Service(max_body_bytes=10).connect()
    wire.receive(b"POST /a HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 11\r\n\r\n")
    status, headers, body = answers(wire.sent)[0]
    assert (status, headers["connection"]) == (413, "close")
    assert json.loads(body) == {"error": "the body has 11 bytes or more, at most 10 are taken"}


def test_an_oversized_chunked_body_is_refused_when_it_passes_the_limit():
    service = Service(max_body_bytes=10)
    wire = service.connect()
    wire.receive(b"POST /a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n12345678\r\n")
    assert wire.sent == b""
    wire.receive(b"8\r\n123")
    assert statuses(wire) == [413]
    assert service.statistics.held_bytes == 0


def test_all_bodies_together_are_bounded_until_they_are_answered():
    service = Service(keep=True, max_held_bytes=100)
    first, second = service.connect().receive(post(b"x" * 60)), service.connect()
    second.receive(post(b"y" * 60))
    assert statuses(second) == [503]
    assert answers(second.sent)[0][1]["retry-after"] == "1"
    request, respond = service.kept[0]
    respond(echo(request))
    assert statuses(first) == [200]
    assert service.statistics.held_bytes == 0
    assert len(service.connect().receive(post(b"z" * 60)).sent) == 0
    assert len(service.kept) == 2


@pytest.mark.parametrize(
    "endless",
    [
        [b"GET / HTTP/1.1\r\nHost: h\r\nA: ", b"b" * 700],
        [b"GET /", b"b" * 700],
        [b"GET / HTTP/1.1\r\nHost: h\r\n", b"a: b\r\n" * 100],
        [CHUNKED[:-7], b"t" * 700],
        [CHUNKED[: CHUNKED.index(b"y")], b"y" * 700],
    ],
)
def test_endless_headers_trailers_and_chunk_lines_are_refused(endless):
    wire = Service(max_header_bytes=1000).connect().receive(endless[0])
    for _ in range(20):
        wire.receive(endless[1])
    assert statuses(wire) == [431]
    assert wire.ended


def test_a_body_of_many_small_parts_is_no_endless_header():
    wire = Service(max_header_bytes=100).connect().receive(post(b"x" * 2000)[:-2000])
    for _ in range(2000):
        wire.receive(b"x")
    assert statuses(wire) == [200]


def test_a_slow_request_is_ended():
    service = Service(request_seconds=30, idle_seconds=1000)
    wire = service.connect().receive(b"GET / HT")
    for _ in range(29):
        service.wait(1)
        wire.receive(b"TP/1.1\r\nHost: h\r\nA: b" if b"x" in wire.sent else b"")
    assert wire.sent == b""
    service.wait(2)
    assert statuses(wire) == [408]
    assert service.statistics.timeouts == 1


def test_an_idle_connection_is_closed_and_a_waiting_one_is_not():
    service = Service(keep=True, idle_seconds=75)
    idle, waiting = service.connect(), service.connect().receive(post())
    service.wait(76)
    assert idle.closed and not waiting.closed
    service.kept[0][1](echo(service.kept[0][0]))
    service.wait(74)
    assert not waiting.closed
    service.wait(2)
    assert waiting.closed


def test_a_refused_client_may_read_why_before_the_end():
    service = Service(max_body_bytes=10)
    wire = service.connect().receive(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n")
    assert wire.ended and not wire.closed
    wire.receive(b"x" * 500)
    service.wait(3)
    assert wire.closed


def test_connections_over_the_cap_are_told_so():
    service = Service(max_connections=1)
    first, second = service.connect(), service.connect()
    assert statuses(second) == [503]
    assert second.closed
    first.receive(post())
    assert statuses(first) == [200]
    first.connection.connection_lost(None)
    assert not service.connect().closed


def test_a_client_that_leaves_costs_nothing_later():
    service = Service(keep=True)
    wire = service.connect().receive(post() + post(b"yy")[:-1])
    wire.closed = True
    wire.connection.connection_lost(None)
    request, respond = service.kept[0]
    respond(echo(request))
    assert service.statistics.disconnects == 1
    assert service.statistics.connections == 0
    assert service.statistics.held_bytes == 0


def test_a_client_that_half_closes_still_gets_its_answers():
    service = Service(keep=True)
    wire = service.connect().receive(post() + post())
    assert wire.connection.eof_received()
    for request, respond in service.kept:
        respond(echo(request))
    assert statuses(wire) == [200, 200]
    assert wire.closed
    assert not service.connect().connection.eof_received()


def test_draining_answers_what_is_due_and_says_close():
    service = Service(keep=True)
    idle, busy = service.connect(), service.connect().receive(post())
    service.shared.draining = True
    for wire in (idle, busy):
        wire.connection.drain()
    assert idle.closed and not busy.closed
    service.kept[0][1](echo(service.kept[0][0]))
    assert answers(busy.sent)[0][1]["connection"] == "close"
    assert busy.closed


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost : h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nA: b\nc: d\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_and_ends_the_connection(garbage):
    service = Service(keep=True)
    wire = service.connect().receive(garbage)
    assert statuses(wire) == [400]
    assert wire.ended
    assert service.kept == []


def test_an_error_waits_for_the_answers_before_it():
    service = Service(keep=True)
    wire = service.connect().receive(post() + b"\x00\x01")
    assert wire.sent == b""
    service.kept[0][1](echo(service.kept[0][0]))
    assert statuses(wire) == [200, 400]


def test_an_offer_to_upgrade_is_ignored():
    """Java's client offers HTTP/2 on its first request, whatever it is."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA")
    wire = Service().connect()
    wire.receive(post(b"body", "/a", *offer) + post(b"", "/b", *offer) + post(b"next"))
    assert [json.loads(body)[1:] for _, _, body in answers(wire.sent)] == [
        ["/a", b"body".hex()], ["/b", ""], ["/a", b"next".hex()],
    ]  # fmt: skip


def test_answering_twice_is_answering_once():
    service = Service(keep=True)
    wire = service.connect().receive(post(b"1") + post(b"2"))
    (first, respond_first), (second, respond_second) = service.kept
    respond_second(echo(second))
    respond_second(echo(first))
    respond_first(echo(first))
    respond_first(echo(second))
    assert [json.loads(body)[2] for _, _, body in answers(wire.sent)] == ["31", "32"]


SAMPLES = [
    post(b""),
    post(b"hello"),
    post(b"\x00" * 40),
    CHUNKED,
    b"GET /v2 HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET http://h/v2?x=1 HTTP/1.1\r\nHost: h\r\n\r\n",
    post(b"body", "/a", "Connection: Upgrade", "Upgrade: h2c"),
    b"POST /big HTTP/1.1\r\nHost: h\r\nContent-Length: 5000\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    b"nonsense\r\n\r\n",
]


@given(st.lists(st.sampled_from(SAMPLES), max_size=6), st.data())
@settings(max_examples=300, deadline=None)
def test_how_the_bytes_are_cut_does_not_matter(requests, data):
    stream = b"".join(requests)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    whole, cut = (Service(max_body_bytes=1000).connect() for _ in range(2))
    whole.receive(stream)
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        cut.receive(stream[start:end])
    assert cut.sent == whole.sent
    assert cut.over == whole.over


REPEATED = [
    post(b"one"),
    post(b"two"),
    post(b"\r\n\r"),
    post(b"one", "/b"),
    post(b"one", "/a", "X: 1"),
    post(b"one", "/a", "X: 2"),
    post(b"one") + b"\r\n",
    b"\r\n" + post(b"one"),
    post(b"one") + post(b"two"),
    post(b"GET"),
    post(b"\r\n\r\n"),
    post(b"x" * 2000),
    post(b"one", "/a", "Expect: 100-continue"),
    post(b"one", "/a", "Connection: Upgrade", "Upgrade: h2c"),
    CHUNKED,
    b"HEAD /v2 HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /v2 HTTP/1.0\r\nHost: h\r\nConnection: keep-alive\r\n\r\n",
    b"GET /v2 HTTP/1.0\r\nHost: h\r\n\r\n",
    b"GET /v2 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
]


@given(st.lists(st.tuples(st.sampled_from(REPEATED), st.integers(1, 3)), max_size=6))
@settings(max_examples=500, deadline=None)
def test_a_repeated_head_means_what_it_meant_before(requests):
    """Each in one piece, so that repeated heads are recognised, against cut in two, so that none is."""
    whole, cut = (Service(keep=True, max_body_bytes=1000) for _ in range(2))
    piece, pieces = whole.connect(), cut.connect()
    for request, times in requests:
        for _ in range(times):
            piece.receive(request)
            pieces.receive(request[:20]).receive(request[20:])
            for service in (whole, cut):
                for got, respond in service.kept:
                    respond(Response(200, [repr(got).encode()], JSON))
                service.kept.clear()
    assert piece.sent == pieces.sent
    assert piece.over == pieces.over
    assert whole.statistics.held_bytes == cut.statistics.held_bytes == 0


def test_nothing_counts_behind_a_request_that_closes():
    service = Service(keep=True)
    close = post(b"one", "/a", "Connection: close")
    wire = service.connect().receive(post(b"one")).receive(close)
    assert len(service.kept) == 2
    wire.receive(close).receive(post(b"one"))
    assert len(service.kept) == 2
    for request, respond in service.kept:
        respond(echo(request))
    assert statuses(wire) == [200, 200]
    assert wire.over
    assert service.statistics.held_bytes == 0


def test_a_repeated_request_counts_towards_what_is_held_too():
    service = Service(keep=True, max_held_bytes=25)
    wires = [service.connect().receive(post(b"0123456789")) for _ in range(2)]
    assert service.statistics.held_bytes == 20
    for request, respond in service.kept[:2]:
        respond(echo(request))
    for wire in wires:
        wire.receive(post(b"0123456789"))
    late = service.connect()
    late.receive(post(b"01234"))
    assert not late.sent
    wires[0].receive(post(b"0123456789"))
    (request, respond) = service.kept[2]
    respond(echo(request))
    assert statuses(wires[0]) == [200, 200, 503]


@given(
    st.one_of(
        st.lists(st.binary(max_size=80), max_size=8),
        st.lists(
            st.sampled_from([sample[i : i + 9] for sample in SAMPLES for i in range(0, len(sample), 9)])
        ),
    )
)
@settings(max_examples=500, deadline=None)
def test_no_bytes_break_it(parts):
    service = Service(max_body_bytes=1000, max_header_bytes=200)
    wire = service.connect()
    for part in parts:
        wire.receive(part)
    assert all(status in (100, 200, 400, 413, 417, 431) for status in statuses_of_any(wire.sent))
    wire.closed = True
    wire.connection.connection_lost(None)
    assert service.statistics.held_bytes == 0
    assert not service.shared.connections


def statuses_of_any(sent):
    """HEAD's answers have no body, so look at the status lines only."""
    return [int(line.split()[1]) for line in sent.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
