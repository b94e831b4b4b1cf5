"""Samples posted over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from agent.streams.sources import push
from agent.streams.sources.push import PushSource
from edgeward.clock import ManualClock
from edgeward.wire.streams import HttpSource

Start = Callable[..., None]


def source(position: tuple[str, int] | None = None, **spec: Any) -> PushSource:
    return PushSource(HttpSource(**spec), ["a"], {}, ManualClock(), position)


def post(to: PushSource, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    status, answer = to.handle({name.replace("_", "-"): value for name, value in headers.items()}, body)
    return status, msgspec.json.decode(answer)


def test_the_answer_says_what_was_taken_and_what_is_durable(sink: Any, start: Start) -> None:
    taking = source(sequence=True, position=("e", 4))
    start(taking, sink)
    body = b'[{"epoch":"e","seq":5,"a":1},{"epoch":"e","seq":6,"a":2}]'
    status, answer = post(taking, body, content_type="application/json; charset=utf-8")
    assert (status, answer) == (200, {"taken": 2, "position": {"epoch": "e", "seq": 4}, "error": ""})
    taking.committed("e", 6)
    assert post(taking, b"[]")[1]["position"] == {"epoch": "e", "seq": 6}
    assert sink.values == [[1], [2]] and sink.seqs == [5, 6]


def test_a_full_queue_is_a_429_that_says_what_was_taken(new_sink: Any, start: Start) -> None:
    taking, sink = source(sequence=True), new_sink(room=1)
    start(taking, sink)
    body = b'[{"epoch":"e","seq":5,"a":1},{"epoch":"f","seq":0,"a":2}]'
    status, answer = post(taking, body)
    assert (status, answer["taken"]) == (429, 1) and "full" in answer["error"]
    assert post(taking, body)[1]["taken"] == 0
    assert sink.counts == {"refused": 3}


def test_a_stream_without_a_fitting_model_is_a_503_with_the_reason(new_sink: Any, start: Start) -> None:
    """A sender that is told of a full queue would wait for room that never comes."""
    taking, sink = source(), new_sink(room=0)
    sink.blocked = "slot default has no model"
    start(taking, sink)
    status, answer = post(taking, b'{"a":1}')
    assert (status, answer["taken"]) == (503, 0) and "slot default has no model" in answer["error"]
    assert sink.counts == {"refused": 1}
    sink.blocked = ""
    assert post(taking, b'{"a":1}')[0] == 429


@pytest.mark.parametrize(
    ("format", "kind", "body"),
    [
        ("json", "application/json", b'{"a":1}'),
        ("csv", "text/csv", b"a\n1\n"),
        ("msgpack", "application/msgpack", msgspec.msgpack.encode({"a": 1})),
    ],
)
def test_the_stream_says_the_format(format: str, kind: str, body: bytes, sink: Any, start: Start) -> None:
    taking = source(format=format)
    start(taking, sink)
    for content_type in (kind, "", "application/octet-stream"):
        assert post(taking, body, content_type=content_type)[0] == 200
    assert sink.values == [[1]] * 3
    others = {"application/json", "text/csv", "application/msgpack"} - {kind}
    assert {post(taking, body, content_type=other)[0] for other in others} == {415}
    assert len(sink.parts) == 3


def test_what_cannot_be_taken_is_refused_with_the_reason(
    sink: Any, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking = source()
    assert post(taking, b'{"a":1}')[0] == 503
    start(taking, sink)
    status, answer = post(taking, b"nonsense")
    assert status == 400 and "not JSON" in answer["error"]
    assert sink.counts == {"rejected": 1}
    assert post(taking, b'{"a":1}', content_encoding="gzip")[0] == 415
    monkeypatch.setattr(push, "MAX_BODY", 10)
    status, answer = post(taking, b'{"a":   1 }')
    assert status == 413 and answer["error"] == "11 bytes, at most 10"
    taking.stop()
    assert post(taking, b'{"a":1}')[0] == 503 and not sink.parts
