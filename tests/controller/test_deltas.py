"""Deltas on the real controller: which one is answered, to whom, what is kept and for how long."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent.fetch import BlobStore
from agent.state import State
from agent.trusted_clock import TrustedClock
from agent.verify import Verifier
from controller.artifacts import FolderArtifacts
from controller.deltas import QUEUE, Deltas, Kept
from edgeward import delta as codecs
from edgeward.client.transport import Transport
from edgeward.errors import NotFound
from edgeward.storage import sha256_hex
from edgeward.trust import tokens
from edgeward.wire.desired import ModelRef


def version(number: int, size: int = 40_000) -> bytes:
    """A file of which 1,000 bytes change from version to version."""
    content = bytearray(random.Random(0).randbytes(size))
    for step in range(1, number + 1):
        content[step * 1000 : step * 1000 + 1000] = random.Random(step).randbytes(1000)
    return bytes(content)


def get(plant: Any, digest: str, bases: list[str], **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {plant.token}", **more.pop("headers", {})}
    params = {"base": bases, "wait": more.pop("wait", 30)}
    return httpx.get(
        f"{plant.url}/artifacts/{digest}/delta", params=params, headers=headers, trust_env=False, timeout=40
    )


def test_the_smallest_delta_of_the_bases_is_answered(plant: Any) -> None:
    first, second, third = (plant.controller.artifacts.add(version(number)) for number in (1, 2, 5))
    stranger = plant.controller.artifacts.add(random.Random(9).randbytes(40_000))
    answer = get(plant, third, [first, stranger, "0" * 64, second])
    assert answer.status_code == 200
    assert answer.headers["edgeward-delta-base"] == second
    assert answer.headers["edgeward-delta-codec"] == "patch-from"
    assert answer.headers["etag"] == f'"{sha256_hex(answer.content)}"'
    assert len(answer.content) < 3500
    assert codecs.apply(answer.content, version(2), size=40_000) == version(5)
    # a device that was cut off goes on
    headers = {"Range": "bytes=1000-", "If-Range": answer.headers["etag"]}
    rest = get(plant, third, [first, second], headers=headers)
    assert rest.status_code == 206 and rest.content == answer.content[1000:]


def test_none_is_answered_where_none_is_of_use(plant: Any) -> None:
    artifacts = plant.controller.artifacts
    model, other = artifacts.add(version(1)), artifacts.add(random.Random(9).randbytes(40_000))
    for digest, bases in [(model, [other]), (model, ["0" * 64]), (model, [model]), ("0" * 64, [model])]:
        answer = get(plant, digest, bases)
        assert answer.status_code == 404, (digest, bases)
        assert answer.json()["error"]["message"]


def test_bad_questions(plant: Any) -> None:
    model, base = (plant.controller.artifacts.add(version(number)) for number in (1, 2))
    for digest, bases, wait in [
        ("x", [base], 0),
        (model, ["../../etc/passwd"], 0),
        (model, [base.upper()], 0),
        (model, [], 0),
        (model, [base] * 9, 0),
        (model, [base], -1),
        (model, [base], 31),
        (model, [base], "nan"),
    ]:
        assert get(plant, digest, bases, wait=wait).status_code in (400, 404), (digest, bases, wait)


def test_who_may_fetch_the_artifact_may_fetch_its_delta(plant: Any) -> None:
    plant.begin()
    device = plant.enroll("d1")
    first, second = (plant.controller.artifacts.add(version(number)) for number in (1, 2))
    token = tokens.mint(device.identity, plant.controller.clock.now())
    assert get(plant, second, [first], headers={"Authorization": f"Bearer {token}"}).status_code == 200
    for wrong in ("", "Bearer wrong", f"Bearer {token[:-4]}AAAA"):
        assert get(plant, second, [first], headers={"Authorization": wrong}).status_code == 401
    plant.client.delete("Device", "d1")
    assert get(plant, second, [first], headers={"Authorization": f"Bearer {token}"}).status_code == 403


def test_an_agent_makes_the_next_version_of_the_last_one(plant: Any, package: Any, tmp_path: Path) -> None:
    plant.begin()
    device = plant.enroll("d1")
    refs = []
    for number in (1, 2):
        content = b"\x08\x08\x12\x04test" + version(number)
        manifest, paths = package(tmp_path, "m", number, onnx=content)
        for path in paths:
            plant.client.upload_artifact(path)
        answer = plant.client.publish_release(plant.releases.add(manifest, "m", number), manifest)
        refs.append(ModelRef("m", number, answer["digest"]))
    paths_asked = []

    class Counted(Transport):
        @contextmanager
        def stream(self, path: str, **more: Any) -> Iterator[httpx.Response]:
            with super().stream(path, **more) as response:
                paths_asked.append(path.partition("?")[0])
                yield response

    clock = plant.controller.clock
    transport = Counted(plant.url, credential=lambda: tokens.mint(device.identity, clock.now()))
    blobs = BlobStore(tmp_path / "agent" / "blobs")
    root = plant.client.trust()["tufRoot"].encode()
    verifier = Verifier(
        tmp_path / "agent" / "tuf", root, blobs, transport, TrustedClock(clock, State(tmp_path / "state.db"))
    )
    for index, ref in enumerate(refs):
        manifest = verifier.fetch_manifest(ref)
        verifier.fetch_blobs(manifest, manifest.variants[0], earlier=refs[:index])
        opened = verifier.open(ref, manifest, manifest.variants[0])
        assert opened.content == b"\x08\x08\x12\x04test" + version(index + 1) + bytes([index + 1])
    first, second = (verifier.reopen_manifest(ref).variants[0].blob.digest for ref in refs)
    assert f"/artifacts/{first}" in paths_asked and f"/artifacts/{second}/delta" in paths_asked
    assert f"/artifacts/{second}" not in paths_asked, "the whole was not needed"
    transport.close()


class Gate:
    """The real codecs, held at a gate."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.running = self.most = self.made = 0

    def make(self, base: bytes, new: bytes, **more: Any) -> codecs.Delta | None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.entered.release()
        while not self.open.wait(0.01):
            more["going_on"]()
        self.running -= 1
        self.made += 1
        return codecs.make(base, new, **more)


@contextmanager
def deltas(folder: Path, **options: Any) -> Iterator[Deltas]:
    made = Deltas(folder / "deltas", FolderArtifacts(folder / "artifacts"), **options)
    try:
        yield made
    finally:
        made.stop()


def found(made: Deltas, until: Any, digest: str, *bases: str) -> Kept:
    kept = until(lambda: made.find(digest, bases))
    assert isinstance(kept, Kept)
    return kept


def none(made: Deltas, until: Any, digest: str, *bases: str) -> bool:
    def refused() -> bool:
        try:
            assert made.find(digest, bases) is None, "there is one"
        except NotFound:
            return True
        return False

    return bool(until(refused))


def test_while_one_is_made_a_device_is_told_to_come_again(plant: Any, until: Any) -> None:
    gate = Gate()
    plant.controller.deltas.stop()
    controller = plant.controller
    controller.deltas = Deltas(plant.folder / "gated", controller.artifacts, make=gate.make)
    try:
        digests = [controller.artifacts.add(version(number)) for number in (1, 2, 3)]
        for _ in range(2):
            for base in digests[:2]:
                answer = get(plant, digests[2], [base], wait=0)
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
                assert "being made" in answer.json()["error"]["message"]
        gate.open.set()
        assert get(plant, digests[2], digests[:2]).status_code == 200
        assert gate.most == 1, "one at a time"
        assert gate.made == 2, "once each, however often it was asked for"
    finally:
        gate.open.set()
        controller.deltas.stop()


def test_each_is_made_once_and_outlives_a_restart(tmp_path: Path, until: Any) -> None:
    artifacts = FolderArtifacts(tmp_path / "artifacts")
    first, second = artifacts.add(version(1)), artifacts.add(version(2))
    other = artifacts.add(random.Random(9).randbytes(40_000))
    calls = []

    def counted(base: bytes, new: bytes, **more: Any) -> codecs.Delta | None:
        calls.append(1)
        return codecs.make(base, new, **more)

    with deltas(tmp_path, make=counted) as made:
        kept = found(made, until, second, first)
        assert none(made, until, other, first)
        assert found(made, until, second, first) == kept and len(calls) == 2
    (tmp_path / "deltas" / f".{kept.path.name}.12ab.tmp").write_bytes(b"half")
    with deltas(tmp_path, make=counted) as made:
        assert made.find(second, [first]) == kept
        with pytest.raises(NotFound):
            made.find(other, [first])
        assert len(calls) == 2
        assert {len(path.name.split(".")) for path in kept.path.parent.iterdir()} == {3}
        kept.path.unlink()
        assert found(made, until, second, first) == kept and len(calls) == 3


def test_the_cache_is_bounded_and_the_longest_unused_goes(tmp_path: Path, until: Any) -> None:
    artifacts = FolderArtifacts(tmp_path / "artifacts")
    digests = [artifacts.add(version(number)) for number in range(6)]
    folder = tmp_path / "deltas"

    def size() -> int:
        return sum(path.stat().st_size for path in folder.iterdir())

    with deltas(tmp_path) as made:
        one = found(made, until, digests[1], digests[0])
    limit = int(one.size * 3.5)
    with deltas(tmp_path, cache_bytes=limit) as made:
        kept = [one]
        for number in (2, 3):
            kept.append(found(made, until, digests[number], digests[number - 1]))
        made.find(digests[1], [digests[0]])
        found(made, until, digests[4], digests[3])
        assert size() <= limit
        assert one.path.exists() and not kept[1].path.exists()
    with deltas(tmp_path, cache_bytes=limit, cache_files=1) as made:
        assert len(list(folder.iterdir())) == 1
    with deltas(tmp_path, cache_bytes=100) as made:
        assert size() == 0
        assert none(made, until, digests[1], digests[0]), "larger than the whole cache"


def test_large_artifacts_are_left_out(tmp_path: Path, until: Any) -> None:
    artifacts = FolderArtifacts(tmp_path / "artifacts")
    small, large = artifacts.add(version(1)), artifacts.add(version(1) + b"x")
    for digest, base in [(small, large), (large, small)]:
        with deltas(tmp_path, artifact_bytes=40_000) as made, pytest.raises(NotFound):
            made.find(digest, [base])
    with deltas(tmp_path, artifact_bytes=40_001) as made:
        assert found(made, until, large, small).size


def test_what_waits_is_bounded_and_stopping_does_not_wait_for_it(tmp_path: Path, until: Any) -> None:
    artifacts = FolderArtifacts(tmp_path / "artifacts")
    digests = [artifacts.add(version(number, 2000) + bytes([number])) for number in range(QUEUE + 10)]
    gate = Gate()
    with deltas(tmp_path, make=gate.make) as made:
        for digest in digests[1:]:
            assert made.find(digest, [digests[0]]) is None
        assert gate.entered.acquire(timeout=30)
        assert len(made._wanted) <= QUEUE
    # The gate was never opened: `stop` has come back although a delta was being made.
    assert not gate.open.is_set()
    assert list((tmp_path / "deltas").iterdir()) == []


def test_a_failure_costs_one_delta_not_the_thread(tmp_path: Path, until: Any) -> None:
    artifacts = FolderArtifacts(tmp_path / "artifacts")
    first, second, third = (artifacts.add(version(number)) for number in (1, 2, 3))

    def failing(base: bytes, new: bytes, **more: Any) -> codecs.Delta | None:
        if new == version(2):
            raise MemoryError
        return codecs.make(base, new, **more)

    with deltas(tmp_path, make=failing) as made:
        assert none(made, until, second, first)
        assert found(made, until, third, first).size
    with deltas(tmp_path) as made:
        assert found(made, until, second, first).size
