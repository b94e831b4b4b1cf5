"""One suite for every artifact store, and what only S3 can get wrong. The S3 server is a real one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest

from controller.artifacts import Artifacts, FolderArtifacts, Remote, need, read
from controller.artifacts import s3 as s3_module
from controller.artifacts.s3 import S3Artifacts
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import Conflict, DigestMismatch, InvalidDocument, NotFound, Unavailable
from edgeward.object_store import settings_from
from edgeward.storage import sha256_hex
from tests.servers.s3 import SECRET_KEY, S3Server

SMALL = bytes(range(256)) * 40
LARGE = random.Random(3).randbytes(1 << 20) * 20
Open = Callable[..., S3Artifacts]


@pytest.fixture
def in_s3(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> Open:
    def make(folder: str = "s3", **options: Any) -> S3Artifacts:
        settings = settings_from(f"s3://{s3_bucket}/models/line", s3_server.environment)
        clock = options.pop("clock", SystemClock())
        return S3Artifacts(settings, tmp_path / folder, clock, **options)

    return make


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    if request.param == "folder":
        return FolderArtifacts(tmp_path / "artifacts", limit=32 << 20)
    made: S3Artifacts = request.getfixturevalue("in_s3")(limit=32 << 20)
    return made


def upload(store: Artifacts, data: bytes, digest: str = "") -> int:
    way_in = store.receive(digest or sha256_hex(data))
    try:
        for at in range(0, len(data), 1 << 20):
            way_in.write(data[at : at + (1 << 20)])
        return way_in.finish()
    finally:
        way_in.abandon()


# every store


@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "small", "in parts"])
def test_what_was_uploaded_is_there_under_its_digest(store: Artifacts, data: bytes) -> None:
    digest = sha256_hex(data)
    assert not store.has(digest)
    with pytest.raises(Conflict, match="has not been uploaded"):
        need(store, digest, len(data), "model")
    for _ in range(2):  # again changes nothing
        assert upload(store, data) == len(data)
    assert store.has(digest) and store.size(digest) == len(data) and read(store, digest) == data
    need(store, digest, len(data), "model")
    with pytest.raises(Conflict, match="the manifest says"):
        need(store, digest, len(data) + 1, "model")
    source = store.source(digest)
    assert source.size == len(data) if isinstance(source, Remote) else source.read_bytes() == data


def test_what_hashes_to_something_else_or_is_too_long_is_not_stored(store: Artifacts) -> None:
    digest = sha256_hex(SMALL)
    with pytest.raises(DigestMismatch):
        upload(store, SMALL[:-1], digest)
    with pytest.raises(InvalidDocument, match="larger than"):
        upload(store, bytes(33 << 20), digest)
    assert not store.has(digest)


def test_what_is_not_there_is_not_found(store: Artifacts) -> None:
    digest = sha256_hex(b"nothing")
    for ask in (store.size, store.source, lambda digest: read(store, digest)):
        with pytest.raises(NotFound):
            ask(digest)
        with pytest.raises(InvalidDocument):
            ask("../../etc/passwd")
    with pytest.raises(InvalidDocument):
        store.has("x")
    assert store.add(SMALL) == store.add(SMALL) == sha256_hex(SMALL)


# S3


def names(server: S3Server, bucket: str) -> list[str]:
    return sorted(found["path"] for page in obstore.list(server.store(bucket)) for found in page)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "in parts"])
def test_an_object_is_never_overwritten(
    in_s3: Open, s3_server: S3Server, s3_bucket: str, data: bytes
) -> None:
    store, digest = in_s3(), sha256_hex(data)
    key = f"models/line/{digest[:2]}/{digest}"
    strange = b"somebody else was here"
    obstore.put(s3_server.store(s3_bucket), key, strange)
    with pytest.raises(Conflict, match="other bytes than its name says"):
        upload(store, data)
    assert bytes(obstore.get(s3_server.store(s3_bucket), key).bytes()) == strange
    with pytest.raises(DigestMismatch, match="other bytes"):
        read(store, digest)
    assert names(s3_server, s3_bucket) == [key], "no parts are left"
    obstore.delete(s3_server.store(s3_bucket), key)
    upload(store, data)
    assert names(s3_server, s3_bucket) == [key]
    assert bytes(obstore.get(s3_server.store(s3_bucket), key).bytes()) == data


def test_copies_are_bounded_and_the_longest_unused_goes_but_not_one_in_use(
    in_s3: Open, tmp_path: Path
) -> None:
    store = in_s3(cache_bytes=3 * len(SMALL))
    contents = [bytes([number]) * len(SMALL) for number in range(6)]
    digests = [store.add(content) for content in contents[:3]]
    held = tmp_path / "s3" / "copies"
    with store.local(digests[0]) as first:
        digests += [store.add(content) for content in contents[3:]]
        assert first.read_bytes() == contents[0], "it is in use"
        assert {path.name for path in held.iterdir()} == {digests[0], digests[4], digests[5]}
    assert [read(store, digest) for digest in digests] == contents
    again = in_s3(cache_bytes=3 * len(SMALL))
    assert len(list(held.iterdir())) == 3
    again.bucket = None  # type: ignore[assignment]  # copies of an earlier run are read without S3
    assert read(again, digests[5]) == contents[5]


def test_what_the_controller_knew_is_looked_up_again_before_an_upload_is_skipped(
    in_s3: Open, s3_server: S3Server, s3_bucket: str
) -> None:
    store = in_s3()
    digest = store.add(SMALL)
    obstore.delete(s3_server.store(s3_bucket), f"models/line/{digest[:2]}/{digest}")
    assert not store.has(digest)
    with pytest.raises(NotFound):
        store.source(digest)


def test_parts_of_an_upload_that_broke_off_are_deleted_after_a_day(
    in_s3: Open, s3_server: S3Server, s3_bucket: str
) -> None:
    key = "models/line/incoming/0123"
    obstore.put(s3_server.store(s3_bucket), key, b"half")
    assert in_s3().remove_left() == 0
    tomorrow = ManualClock(SystemClock().now() + s3_module.LEFT_AFTER + 60)
    assert in_s3(clock=tomorrow).remove_left() == 1
    assert names(s3_server, s3_bucket) == []


def test_a_store_that_is_away_is_unavailable_and_no_key_is_told(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    environment = s3_server.environment | {"AWS_SECRET_ACCESS_KEY": "not-the-key"}
    refused = S3Artifacts(settings_from(f"s3://{s3_bucket}", environment), tmp_path / "a", SystemClock())
    with pytest.raises(Unavailable, match="SignatureDoesNotMatch") as problem:
        read(refused, sha256_hex(SMALL))
    for unwanted in ("not-the-key", "X-Amz", "RequestId", "Debug source"):
        assert unwanted not in str(problem.value)
    with pytest.raises(Unavailable):
        refused.add(SMALL)
    nowhere = s3_server.environment | {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    away = S3Artifacts(settings_from(f"s3://{s3_bucket}", nowhere), tmp_path / "b", SystemClock())
    with pytest.raises(Unavailable, match="Connection refused") as problem:
        away.has(sha256_hex(SMALL))
    assert SECRET_KEY not in str(problem.value)
    assert list((tmp_path / "a").glob("*/*")) == []


# where and with which keys


def test_variables_and_the_file_say_where_and_with_which_keys(tmp_path: Path) -> None:
    environment = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hidden", "AWS_DEFAULT_REGION": "r1"}
    found = settings_from("s3://models/a/b/", environment | {"AWS_ENDPOINT_URL": "https://s3.plant:9000/"})
    assert (found.bucket, found.prefix, found.region) == ("models", "a/b/", "r1")
    assert (found.endpoint, found.access_key, found.secret_key) == ("https://s3.plant:9000", "id", "hidden")
    assert "hidden" not in repr(found) and "hidden" not in found.shown
    assert settings_from("s3://models", {}).access_key == ""
    file = tmp_path / "keys"
    file.write_text("[default]\naws_access_key_id = other\naws_secret_access_key = deep\n[ci]\nregion = r2\n")
    file.chmod(0o600)
    assert settings_from("s3://models", environment, file).secret_key == "deep"
    assert settings_from("s3://models", environment | {"AWS_PROFILE": "ci"}, file).region == "r2"


@pytest.mark.parametrize(
    "address",
    ["s3://", "https://models", "s3://A_B", "s3://models/../x", "s3://models?k=v", "s3://id:hidden@models"],
)
def test_an_address_that_is_none_or_holds_keys_is_refused(address: str) -> None:
    with pytest.raises(InvalidDocument) as problem:
        settings_from(address, {})
    assert "hidden" not in str(problem.value)


def test_keys_that_others_may_read_or_that_are_half_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = hidden\n")
    file.chmod(0o640)
    with pytest.raises(Exception, match="others may read"):
        settings_from("s3://models", {}, file)
    file.chmod(0o600)
    file.write_text("aws_secret_access_key hidden")
    for profile in ({}, {"AWS_PROFILE": "none"}):
        with pytest.raises(InvalidDocument) as problem:
            settings_from("s3://models", profile, file)
        assert "hidden" not in str(problem.value)
    with pytest.raises(NotFound):
        settings_from("s3://models", {}, tmp_path / "missing")
    with pytest.raises(InvalidDocument, match="AWS_SECRET_ACCESS_KEY is missing"):
        settings_from("s3://models", {"AWS_ACCESS_KEY_ID": "a"})
    with pytest.raises(InvalidDocument) as problem:
        settings_from("s3://models", {"AWS_ENDPOINT_URL_S3": "http://id:hidden@host"})
    assert "hidden" not in str(problem.value)
