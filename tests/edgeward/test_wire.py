"""Topics, rows, manifests and resources: what is accepted and what is refused, naming the field."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import msgspec
import pytest
import zstandard
from hypothesis import given

from edgeward.errors import InvalidDocument, PackageError
from edgeward.formats import check_model_head
from edgeward.identifiers import DeviceName, check_name
from edgeward.manifests import read_resources
from edgeward.wire import topics
from edgeward.wire.package import parse_target_path, target_path
from edgeward.wire.resources import RolloutSpec, parse_resource
from edgeward.wire.rows import MAX_BATCH_BYTES, ResultRow, decode_rows, encode_rows, join_rows, split_rows

LABEL = st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?\Z")


def row(index: int) -> ResultRow:
    return ResultRow(index, "s", 1, "k", "e", index, "d" * 64, "v", "CPU", {"score": 0.5}, False)


@given(LABEL, LABEL, st.sampled_from(topics.LANES))
def test_topics_round_trip(site: str, device: str, lane: topics.Lane) -> None:
    name = DeviceName(site, device)
    assert topics.parse(topics.up(name, lane)) == (name, "up", lane)
    assert topics.parse(topics.ack(name, lane)) == (name, "ack", lane)
    for make, channel in (
        (topics.desired, "desired"),
        (topics.reported, "reported"),
        (topics.status, "status"),
        (topics.report, "report"),
    ):
        assert topics.parse(make(name)) == (name, channel, None)


@given(st.text(max_size=60))
def test_strange_topics_are_refused_or_canonical(text: str) -> None:
    try:
        parsed = topics.parse(text)
    except InvalidDocument:
        return
    assert text.startswith(topics.root(parsed.name))


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a/b", "a+", "a#", "a" * 64, "ä", "a\n"])
def test_names_that_could_escape_a_topic_or_path_are_refused(name: str) -> None:
    with pytest.raises(InvalidDocument):
        check_name(name)


def test_rows_round_trip() -> None:
    rows = [row(index) for index in range(100)]
    packed = encode_rows(list(rows))
    assert decode_rows("result", packed) == rows
    assert decode_rows("result", join_rows([msgspec.msgpack.encode(r) for r in rows])) == rows
    assert split_rows(packed)[3] == msgspec.msgpack.encode(rows[3])


def test_a_decompression_bomb_is_refused() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(b"\0" * (MAX_BATCH_BYTES + 1))
    assert len(bomb) < 10_000
    with pytest.raises(InvalidDocument, match="unpacks to more"):
        decode_rows("result", bomb)


@given(st.binary(max_size=300))
def test_random_bytes_are_no_rows(data: bytes) -> None:
    with pytest.raises(InvalidDocument):
        decode_rows("result", b"\x01" + data)
    with pytest.raises(InvalidDocument):
        decode_rows("result", zstandard.ZstdCompressor().compress(b"\xc1" + data))


def test_target_paths() -> None:
    assert parse_target_path(target_path("shuttle", 12)) == ("shuttle", 12)
    for path in ("shuttle/0/manifest.json", "../1/manifest.json", "a/1/other", "a/01/manifest.json"):
        with pytest.raises(InvalidDocument):
            parse_target_path(path)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"\x80\x04\x95abcdefgh", "pickle"),
        (b"PK\x03\x04xxxxxxx", "ZIP"),
        (b"", "empty"),
        (b"hello world", "not an ONNX"),
        (b"\x1c\x00\x00\x00TFL3....", "not an ONNX"),
    ],
)
def test_what_is_no_onnx_model_is_named(head: bytes, says: str) -> None:
    with pytest.raises(PackageError, match=says):
        check_model_head(head, "onnx", "model.onnx")


def test_model_heads_are_recognised() -> None:
    check_model_head(b"\x08\x08\x12\x07skl2onnx", "onnx", "m")
    check_model_head(b"\x1c\x00\x00\x00TFL3....", "tflite", "m")


ROLLOUT = """
apiVersion: edgeward.dev/v1alpha1
kind: Rollout
metadata: {name: r1}
spec:
  fleet: turbines
  model: shuttle
  version: 1
"""


FLEET = """\
apiVersion: edgeward.dev/v1alpha1
kind: Fleet
metadata: {name: f1}
spec:
  matchLabels: {line: press}
"""
BOMB = "status:\n  a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)


def parse(text: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    read_resources([file])


def test_a_rollout_gets_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(ROLLOUT)
    (resource,) = read_resources([file])
    assert isinstance(resource.spec, RolloutSpec)
    assert [(wave.count, wave.share) for wave in resource.spec.waves] == [(1, None), (None, 1.0)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", r"r\.yaml:\d+:\d+: not valid YAML"),
        ("", "holds no document"),
        ("- 1", "expected a mapping"),
        (ROLLOUT.replace("fleet: turbines", "flet: turbines"), r"r\.yaml: spec: .*(fleet|flet)"),
        (ROLLOUT + "  colour: red\n", r"r\.yaml: spec: .*unknown field `colour`"),
        (ROLLOUT.replace("version: 1", "version: one"), r"r\.yaml: spec\.version: Expected `int`, got `str`"),
        (ROLLOUT.replace("version: 1", "version: 0"), r"spec\.version: Expected `int` >= 1"),
        (ROLLOUT.replace("kind: Rollout", "kind: Rolout"), r"kind: unknown kind 'Rolout'.*one of"),
        (ROLLOUT.replace("v1alpha1", "v2"), "apiVersion: expected edgeward.dev/v1alpha1"),
        (ROLLOUT.replace("name: r1", "name: R_1"), r"metadata\.name: 'R_1' is not a valid name"),
        (ROLLOUT + "  waves: [{count: 1}]\n", r"spec\.waves\[0\]: the last wave must reach"),
        (ROLLOUT + "  waves: [{count: 1, share: 1.0}]\n", r"spec\.waves\[0\]: expected exactly one"),
        (ROLLOUT + "  waves: [{count: a}]\n", r"spec\.waves\[0\]\.count: Expected"),
        (ROLLOUT.replace("kind: Rollout", "kind: ModelVersion"), "r.yaml"),
        (ROLLOUT + "---" + ROLLOUT, r"document 2.*stands in"),
        (
            ROLLOUT + "  colour: red\n",
            r"unknown field `colour`, expected one of activateAt, deadline, fleet, gate",
        ),
        (
            ROLLOUT + "  gate: {minSucces: 1}\n",
            r"spec\.gate: unknown field `minSucces`, expected one of maxPsi",
        ),
        (
            ROLLOUT + "  waves: [{size: 1}]\n",
            r"spec\.waves\[0\]: unknown field `size`, expected one of count",
        ),
        (
            FLEET + "  slots: {default: {isolation: in-process, memoryBytes: 1048576}}\n",
            r"spec\.slots\.default\.memoryBytes: in-process .*isolation: process",
        ),
        (ROLLOUT + "colour: red\n", r"unknown field `colour`, expected one of apiVersion, kind"),
        (
            ROLLOUT.replace("{name: r1}", "{name: r1, lables: {}}"),
            r"metadata: unknown field .*, labels, name",
        ),
        (ROLLOUT + "  deadline: .inf\n", r"r\.yaml: spec\.deadline: expected a finite number, got inf"),
        (ROLLOUT + "  waves: [{count: 1}, {share: .nan}]\n", r"spec\.waves\[1\]\.share: expected a finite"),
        (ROLLOUT + "spec: {}\n", r"r\.yaml:9:1: not valid YAML: the key 'spec' stands twice"),
        (ROLLOUT + "when: 2024-13-45\n", r"r\.yaml: not valid YAML: month must be in 1\.\.12"),
        ("a: \x00", r"r\.yaml: not valid YAML: unacceptable character #x0000[^\n]*$"),
        ("[" * 5000, r"r\.yaml: not valid YAML: nested too deeply"),
        ("&a {status: *a}", r"r\.yaml: .*nested too deeply"),
        (ROLLOUT + BOMB, r"r\.yaml: status.*holds more than 1000000 values"),
    ],
)
def test_bad_documents_name_file_and_field(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match=says):
        parse(text, tmp_path)


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match="cannot read it"):
        read_resources([tmp_path / "none.yaml"])
    with pytest.raises(InvalidDocument, match="holds no"):
        read_resources([tmp_path])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    )
)
def test_no_document_crashes_the_parser(document: object) -> None:
    with pytest.raises(InvalidDocument):
        parse_resource(document, source="x")
