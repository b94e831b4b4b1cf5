"""What a stream decides, purely: examples, signatures, refusals, positions, topics."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.streams.decode.sequence import Joining, continue_sequence
from agent.streams.examples import make_examples
from agent.streams.infer import Array, infer_all, infer_fitting
from agent.streams.local_link import LocalLink, StreamLink
from agent.streams.positions import Positions
from agent.streams.samples import Samples
from agent.streams.signature import match
from agent.streams.window import Closed, Windows
from edgeward.errors import InvalidDocument, PackageError, RuntimeFault
from edgeward.mqtt import Message
from edgeward.wire.package import Decision, TensorSpec
from edgeward.wire.streams import (
    Action,
    CameraSource,
    MqttSource,
    Source,
    StreamSpec,
    Window,
)
from edgeward.wire.topics import matches

NAN = float("nan")


def samples(
    values: Any, keys: tuple[str, ...] = (), problems: dict[int, str] | None = None, first: int = 0
) -> Samples:
    array = np.asarray(values, dtype=np.float64)
    count = len(array)
    return Samples(
        np.arange(first, first + count), array, keys, "e", np.arange(first, first + count), problems or {}
    )


# --- examples and signatures ----------------------------------------------------------------------


def test_each_sample_belongs_to_the_example_made_from_it() -> None:
    windows = [
        Closed("", samples([[1], [2], [3]], problems={1: "bad"})),
        Closed("", samples([[9]], first=3), late=True),
        Closed("", samples([[5]], first=4)),
    ]
    made = make_examples(windows, "none", 3)
    assert made.owner.tolist() == [0, -1, 1, -1, 2] and made.late == 1
    assert made.inputs.tolist() == [[1], [3], [5]] and made.stands.event_time.tolist() == [0, 2, 4]

    made = make_examples(windows, "mean", 3)
    assert made.inputs.tolist() == [[2], [5]], "without the bad one"
    assert made.owner.tolist() == [0, -1, 0, -1, 1] and made.stands.event_time.tolist() == [2, 4]

    made = make_examples([Closed("", samples([[1], [2]]))], "stack", 2)
    assert made.inputs.shape == (1, 2, 1) and made.owner.tolist() == [0, 0]
    made = make_examples([Closed("", samples([[1]]))], "stack", 2)
    assert len(made) == 0 and made.owner.tolist() == [-1], "a window that is not full cannot be stacked"

    overlapping = Closed("", samples([[1], [2], [3]]), fresh=np.array([2]))
    made = make_examples([overlapping], "maximum", 3)
    assert made.inputs.tolist() == [[3]] and made.samples.seq is not None
    assert made.samples.seq.tolist() == [2], "the others were accounted for by an earlier window"

    again = Closed("k", samples([[1], [2], [3]], ("k", "k", "k")), fresh=np.array([], np.intp))
    made = make_examples([again, Closed("j", samples([[7]], ("j",), first=9))], "mean", 3)
    assert made.inputs.tolist() == [[2], [7]] and made.samples.seq is not None
    assert made.samples.seq.tolist() == [9] and made.owner.tolist() == [1]
    assert (made.stands.keys, made.stands.event_time.tolist()) == (("k", "j"), [2, 9]), "each its own"

    nothing = make_examples([Closed("", samples([[1], [2]], problems={0: "x", 1: "y"}))], "mean", 2)
    assert len(nothing) == 0 and nothing.owner.tolist() == [-1, -1]


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 60), st.sampled_from("ab"), st.booleans()), min_size=1, max_size=6),
        max_size=6,
    ),
    st.sampled_from([(5.0, 1.0), (5.0, 5.0), (4.0, 3.0)]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_whatever_the_gaps_an_example_stands_for_a_sample_of_its_own_window(
    messages: list[list[tuple[int, str, bool]]], sizes: tuple[float, float], per_key: bool
) -> None:
    size, slide = sizes
    windows = Windows(Window(size=size, slide=slide, aggregate="mean", per_key=per_key, timeout=60))
    told, came_out = 0, 0
    for number, message in enumerate([*messages, None]):
        if message is None:
            closed = windows.flush()
        else:
            times, keys, good = zip(*message, strict=True)
            at = np.array(times, np.int64) * 1_000_000
            bad = {index: "bad" for index, fine in enumerate(good) if not fine}
            closed = windows.add(Samples(at, at[:, np.newaxis] / 1e6, keys, problems=bad), float(number))
            told += len(message)
        if not closed:
            continue
        made = make_examples(closed, "mean", 1)
        came_out += len(made.samples)
        asked = [
            window
            for window in closed
            if not window.late and len(window.samples) > len(window.samples.problems)
        ]
        assert len(made) == len(made.inputs) == len(asked)
        for window, at_us, key in zip(asked, made.stands.event_time.tolist(), made.stands.keys, strict=True):
            assert window.start_us is not None and window.end_us is not None
            assert window.start_us <= at_us < window.end_us
            assert key == window.key or not per_key
    assert came_out == told


def spec(features: list[str], **more: Any) -> StreamSpec:
    source = more.pop("source", Source(mqtt=MqttSource(topic="t")))
    return StreamSpec(source=source, features=features, **more)


OUT = [TensorSpec("score", "float32", [-1, 2])]


def test_a_stream_feeds_the_model_as_its_signature_asks() -> None:
    rows = np.array([[1.0, 2.0], [3.0, 4.0]])
    matrix = match(spec(["a", "b"]), [TensorSpec("x", "float32", [-1, 2])], OUT, None)
    fed = matrix.feed(rows, ["a", "b"])["x"]
    assert fed.dtype == np.float32 and fed.tolist() == rows.tolist()
    columns = match(
        spec(["a", "b"]), [TensorSpec("b", "float64", [-1, 1]), TensorSpec("a", "int64", [-1, 1])], OUT, None
    )
    assert {name: array.tolist() for name, array in columns.feed(rows, ["a", "b"]).items()} == {
        "b": [[2.0], [4.0]],
        "a": [[1], [3]],
    }
    stacked = match(
        spec(["a", "b"], window=Window(count=4, aggregate="stack")),
        [TensorSpec("x", "float32", [1, 4, 2])], OUT, None,
    )  # fmt: skip
    assert stacked.single
    camera = Source(camera=CameraSource(url="x", width=6, height=4))
    images = np.full((1, 4, 6, 3), 255, np.uint8)
    planes = match(spec([], source=camera), [TensorSpec("x", "float32", [1, 3, 4, 6])], OUT, None)
    assert planes.feed(images, [])["x"].shape == (1, 3, 4, 6) and planes.feed(images, [])["x"].max() == 1.0
    pixels = match(spec([], source=camera), [TensorSpec("x", "uint8", [-1, 4, 6, 3])], OUT, None)
    assert pixels.feed(images, [])["x"].max() == 255


def test_features_come_as_the_model_was_made_from_them() -> None:
    stream, inputs = spec(["a", "b"]), [TensorSpec("x", "float32", [-1, 2])]
    match(stream, inputs, OUT, None, ["a", "b"])
    with pytest.raises(
        PackageError, match=r"made from the features b, a, the stream gives in another order: a, b"
    ):
        match(stream, inputs, OUT, None, ["b", "a"])
    with pytest.raises(PackageError, match=r"other ones: a, b"):
        match(stream, inputs, OUT, None, ["a", "c"])
    named = [TensorSpec("b", "float32", [-1, 1]), TensorSpec("a", "float32", [-1, 1])]
    match(stream, named, OUT, None, ["b", "a"])  # each goes by its name


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        ("int8", [-128, 127, 5], [300, -3.7, 1e20, -129]),
        ("uint16", [0, 65535], [-1, 65536, 0.5]),
        ("int64", [-(2**63), 2**62], [2.0**63, -(2.0**63) - 2048]),
        ("float16", [65504, -1.5], [70000, -1e9]),
        ("float32", [3.4e38, 1e-30], [1e39]),
        ("float64", [1e149], []),
        ("bool", [0, 1], [2, 0.5, -1]),
    ],
)
def test_what_the_models_type_cannot_hold_is_never_shown_to_it(dtype: str, good: Any, bad: Any) -> None:
    found = match(spec(["a", "b"]), [TensorSpec("x", dtype, [-1, 2])], OUT, None)
    rows = np.array([[0, value] for value in [*good, *bad]], dtype=np.float64)
    misfits = found.misfits(rows, ["a", "b"])
    assert sorted(misfits) == list(range(len(good), len(rows)))
    assert all(feature == "b" and f"the model's type {dtype}" in text for feature, text in misfits.values())
    fed = found.feed(rows[: len(good)], ["a", "b"])["x"]
    assert fed.dtype == np.dtype(dtype)
    asked: list[Array] = []

    def ask(examples: Array) -> dict[str, Array]:
        asked.append(examples)
        return {"y": examples[:, 1] * 2}

    got, answered, _ = infer_fitting(ask, rows, misfits, single=False)
    assert answered.tolist() == [index not in misfits for index in range(len(rows))]
    assert np.concatenate(asked).tolist() == rows[: len(good)].tolist()
    assert got["y"][: len(good), 0].tolist() == (rows[: len(good), 1] * 2).tolist()


@pytest.mark.parametrize(
    ("stream", "inputs", "decision", "says"),
    [
        (
            spec(["a"]), [TensorSpec("x", "float32", [-1, 2])], None,
            r"input x expects \[-1, 2\], the stream gives one tensor \[n, 1\]",
        ),
        (spec(["a"]), [TensorSpec("x", "float32", [4, 1])], None, r"expects \[4, 1\]"),
        (spec(["a"]), [TensorSpec("x", "bytes", [-1, 1])], None, "type bytes"),
        (spec(["a"]), [TensorSpec("x", "float32", [-1, 1])] * 2, None, "the model has the inputs x float32"),
        (spec(["a"]), [TensorSpec("x", "float32", [-1, 1])], Decision("gone", 1.0), "names output 'gone'"),
        (
            spec(["a"], window=Window(count=3, aggregate="stack")),
            [TensorSpec("x", "float32", [-1, 4, 1])], None, "expects",
        ),
        (
            spec([], source=Source(camera=CameraSource(url="x", width=5))),
            [TensorSpec("x", "float32", [1, 3, -1, 6])], None, "expects width 6",
        ),
    ],
)  # fmt: skip
def test_a_stream_that_does_not_fit_says_what_was_expected(
    stream: StreamSpec, inputs: list[TensorSpec], decision: Decision | None, says: str
) -> None:
    with pytest.raises(PackageError, match=says):
        match(stream, inputs, OUT, decision)


def test_a_condition_may_name_outputs_their_columns_and_features_only() -> None:
    inputs = [TensorSpec("x", "float32", [-1, 1])]
    good = Action(name="a", when="score[1] > 0.5 && temp < 3 || alarm && score > threshold", publish="t")
    match(spec(["temp"], actions=[good]), inputs, OUT, None)
    for when in ("pressure > 1", "score[2] > 1"):
        with pytest.raises(InvalidDocument, match="neither an output of the model nor a feature"):
            match(spec(["temp"], actions=[Action(name="a", when=when, publish="t")]), inputs, OUT, None)


@settings(max_examples=100)
@given(st.sets(st.integers(0, 30)), st.booleans())
def test_refused_examples_are_found_and_cost_no_other(poison: set[int], single: bool) -> None:
    examples = np.arange(31.0).reshape(-1, 1)

    def ask(rows: np.ndarray) -> dict[str, np.ndarray]:
        if poison & set(rows[:, 0].astype(int).tolist()):
            raise RuntimeFault("refused")
        return {"y": rows * 2}

    if len(poison) == 31:
        with pytest.raises(RuntimeFault):
            infer_all(ask, examples, single=single)
        return
    got, answered, refusal = infer_all(ask, examples, single=single)
    assert answered.tolist() == [index not in poison for index in range(31)]
    assert got["y"][answered].tolist() == (examples[answered] * 2).tolist()
    assert refusal == ("refused" if poison else "")


def test_outputs_that_are_not_one_per_example_are_a_fault() -> None:
    with pytest.raises(RuntimeFault, match=r"output y has shape \[1, 1\] for 3 examples"):
        infer_all(lambda rows: {"y": rows[:1]}, np.zeros((3, 1)), single=False)


# --- positions -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=8), st.data())
def test_the_position_is_that_of_the_last_settled_sample(sizes: list[int], data: st.DataObject) -> None:
    positions, added = Positions(), 0
    for size in sizes:
        positions.add(samples(np.zeros((size, 1)), first=added))
        added += size
    settled = 0
    while settled < added:
        before = settled
        settled = data.draw(st.integers(settled, added))
        assert positions.at(settled) == (("e", settled - 1) if settled > before else None)


# --- topics ---------------------------------------------------------------------------------------


def test_topics_match_as_mqtt_says() -> None:
    for pattern, topic, expected in [
        ("a/+/c", "a/b/c", True), ("a/+/c", "a/b/d", False), ("a/+", "a/b/c", False), ("a/#", "a", True),
        ("a/#", "a/b/c", True), ("#", "a/b", True), ("#", "$SYS/x", False), ("+/x", "$SYS/x", False), ("a", "a", True),
        ("+", "", True), ("a/b", "a", False),
    ]:  # fmt: skip
        assert matches(pattern, topic) is expected, (pattern, topic)


def test_streams_share_a_topic_until_the_last_one_leaves() -> None:
    wire: list[tuple[str, str]] = []
    link = LocalLink(
        lambda topic: wire.append(("subscribe", topic)),
        lambda topic: wire.append(("unsubscribe", topic)),
        lambda topic, payload: True,
    )
    one, other, got = StreamLink(link), StreamLink(link), []
    one.subscribe("a/+", lambda topic, payload: got.append(("one", topic)))
    other.subscribe("a/+", lambda topic, payload: got.append(("other", topic)))
    link.dispatch(Message("a/b", b"", False, lambda: None))
    link.dispatch(Message("c", b"", False, lambda: None))
    one.unsubscribe("a/+")
    link.dispatch(Message("a/c", b"", False, lambda: None))
    assert got == [("one", "a/b"), ("other", "a/b"), ("other", "a/c")]
    assert ("unsubscribe", "a/+") not in wire
    other.unsubscribe("a/+")
    assert wire[-1] == ("unsubscribe", "a/+")


def test_a_sensor_that_several_read_hears_what_all_of_them_have() -> None:
    told: list[Any] = []
    link = LocalLink(
        lambda topic: None,
        lambda topic: None,
        lambda topic, payload: bool(told.append(json.loads(payload))) or True,
    )
    one, other = StreamLink(link), StreamLink(link)
    for reader, position in ((one, ("e", 5)), (other, None)):
        reader.subscribe("t", lambda topic, payload: None)
        reader.expect_acks("t", position)
    one.acknowledge("t", "e", 9)
    assert told == [], "the other has nothing yet"
    other.acknowledge("t", "e", 7)
    one.acknowledge("t", "e", 12)
    assert told == [{"epoch": "e", "seq": 7}] * 2
    other.acknowledge("t", "f", 3)
    assert len(told) == 2, "of two epochs neither is what both have"
    one.acknowledge("t", "f", 1)
    assert told[-1] == {"epoch": "f", "seq": 1}
    other.expect_acks("t", None, expected=False)
    one.acknowledge("t", "f", 8)
    assert told[-1] == {"epoch": "f", "seq": 8}, "the other takes nothing at the moment"
    other.expect_acks("t", ("f", 3))
    one.acknowledge("t", "f", 9)
    assert told[-1] == {"epoch": "f", "seq": 3}
    other.unsubscribe("t")
    one.acknowledge("t", "f", 9)
    assert told[-1] == {"epoch": "f", "seq": 9}


def numbered(first: int, count: int, epoch: str = "e") -> Samples:
    at = np.arange(first, first + count)
    return Samples(at, np.zeros((count, 1)), epoch=epoch, seq=at)


def test_a_stream_that_is_newer_than_the_sensors_numbers_begins_where_the_sensor_begins_again() -> None:
    joining, position = Joining(), None
    for first, expected in ((20, None), (25, None), (21, None), (25, ("e", 24))):
        position = joining.position(numbered(first, 5), position)
        assert position == expected
    got, position = continue_sequence(numbered(25, 5), position)
    assert len(got) == 5 and position == ("e", 29)
    assert joining.position(numbered(40, 5), position) == position, "a hole is a hole"
    assert joining.position(numbered(40, 5), position) == position
    assert joining.position(numbered(3, 1, "f"), position) == position, "number 0 may only be late"
    assert joining.position(numbered(0, 1, "f"), position) == position
    assert continue_sequence(numbered(0, 1, "f"), position)[1] == ("f", 0)
