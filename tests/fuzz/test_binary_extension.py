"""The request parser against arbitrary bytes and against requests with something changed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HARNESS = Path(__file__).parent / "binary_extension.py"
ROOT = HARNESS.parents[2]

_spec = importlib.util.spec_from_file_location("binary_extension", HARNESS)
assert _spec is not None and _spec.loader is not None
harness = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(harness)


def sized(name, shape, datatype, size):
    return {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}


def sample(model, request, tail=b"", *, header=True):
    head = json.dumps(request).encode()
    return bytes([model]) + (len(head) if header else 65535).to_bytes(2, "little") + head + tail


FLOATS = {"name": "a", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}
THREE = [sized("a", [1], "BOOL", 1), sized("b", [2], "FP16", 4), sized("c", [], "INT64", 8)]
SEEDS = [
    sample(0, {"inputs": [FLOATS]}, header=False),
    sample(0, {"id": "x", "inputs": [sized("a", [1, 2], "FP32", 8)], "outputs": [{"name": "o"}]}, bytes(8)),
    sample(1, {"inputs": [sized("a", [2], "BYTES", 9)]}, b"\1\0\0\0a\0\0\0\0"),
    sample(1, {"inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "data": ["é"]}]}, header=False),
    sample(2, {"inputs": THREE, "parameters": {"binary_data_output": True}}, b"\1" + bytes(12)),
    b"\0\0\0" + bytes(16),
]


def test_the_seeds_are_accepted():
    assert all(harness.check(seed) for seed in SEEDS)


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_arbitrary_bytes(data):
    harness.check(data)


@given(st.sampled_from(SEEDS), st.data())
@settings(max_examples=1500, deadline=None)
def test_requests_with_something_changed(seed, data):
    changed = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        length = data.draw(st.integers(0, 4))
        replacement = data.draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from([b"0", b"-1", b"9" * 30, b"1e400", b"NaN", b"null", b"["]),
            )
        )
        changed[at : at + length] = replacement
    harness.check(bytes(changed))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    ),
    st.sampled_from(["name", "shape", "datatype", "data", "parameters"]),
    st.integers(0, 2),
)
@settings(max_examples=500, deadline=None)
def test_any_json_in_the_place_of_any_field(value, field, model):
    request = {"inputs": [{**FLOATS, field: value}]}
    harness.check(sample(model, request, header=False))


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_atheris_finds_nothing(tmp_path):
    for index, seed in enumerate(SEEDS):
        (tmp_path / str(index)).write_bytes(seed)
    subprocess.run(
        [sys.executable, str(HARNESS), "-max_total_time=60", str(tmp_path)],
        check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, timeout=300,
    )  # fmt: skip
