"""A controller whose bucket is not fit for artifacts does not start, and says what is missing."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from controller.artifacts.probe import probe
from controller.artifacts.s3 import S3Artifacts
from edgeward.broker import free_port
from edgeward.clock import SystemClock
from edgeward.errors import EdgewardError, Unavailable
from edgeward.object_store import settings_from
from tests.servers import lax_s3
from tests.servers.s3 import SECRET_KEY, S3Server

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


def store(endpoint: str, folder: Path, bucket: str = "models", **more: str) -> S3Artifacts:
    environment = KEYS | {"AWS_ENDPOINT_URL_S3": endpoint} | more
    return S3Artifacts(settings_from(f"s3://{bucket}/p", environment), folder, SystemClock())


def test_a_real_server_passes_and_nothing_is_left(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    probe(store(s3_server.endpoint, tmp_path, s3_bucket, **s3_server.environment))
    assert s3_server.store(s3_bucket).list().collect() == []
    assert (
        "conditional writes and signed URLs work" in caplog.text and "without a signature" not in caplog.text
    )


def test_a_server_that_can_all_of_it_passes(tmp_path: Path) -> None:
    with lax_s3.serving() as (endpoint, objects):
        probe(store(endpoint, tmp_path))
        assert objects == {}


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("conditional put", "ignores PUT with If-None-Match: released models could be overwritten"),
        ("conditional parts", "ignores CompleteMultipartUpload with If-None-Match"),
        ("signed", "does not give a part of an object by a pre-signed URL"),
        ("ranges", "does not give a part of an object by a pre-signed URL"),
    ],
)
def test_a_server_that_lacks_something_is_refused(tmp_path: Path, missing: str, says: str) -> None:
    with lax_s3.serving(lax_s3.ABILITIES - {missing}) as (endpoint, objects):
        with pytest.raises(EdgewardError, match=says) as problem:
            probe(store(endpoint, tmp_path))
        assert objects == {} and problem.value.hint
        assert "X-Amz" not in str(problem.value) and SECRET_KEY not in str(problem.value)


def test_a_bucket_that_anybody_can_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with lax_s3.serving(lax_s3.ABILITIES - {"private"}) as (endpoint, _):
        probe(store(endpoint, tmp_path))
    assert "gives objects to anybody" in caplog.text


def test_wrong_keys_and_a_server_that_is_away_are_refused(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    wrong = s3_server.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    with pytest.raises(Unavailable, match=r"cannot write to .*SignatureDoesNotMatch"):
        probe(store(s3_server.endpoint, tmp_path, s3_bucket, **wrong))
    with pytest.raises(Unavailable, match=r"cannot write to .*Connection refused"):
        probe(store("http://127.0.0.1:9", tmp_path))


def up(data: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.Popen(
        [
            sys.executable, "-m", "edgeward.cli.main", "up", "--data", str(data), "--port", str(free_port()),
            "--broker-port", str(free_port()), *arguments,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**kept, "NO_COLOR": "1", **environment},
    )  # fmt: skip


def refusal(process: subprocess.Popen[str]) -> str:
    """What it says when it ends without having served."""
    assert process.stdout is not None
    if served := process.stdout.readline():
        process.terminate()
    _, errors = process.communicate()
    assert (served, process.returncode) == ("", 1), errors
    return errors


def test_the_command_serves_from_s3_with_keys_in_a_private_file(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    lines = [f"{name.lower()} = {value}" for name, value in s3_server.environment.items() if "KEY" in name]
    file.write_text("\n".join(["[default]", *lines]))
    file.chmod(0o600)
    where = {"AWS_ENDPOINT_URL_S3": s3_server.endpoint}
    options = "--artifacts", f"s3://{s3_bucket}", "--artifacts-credentials", str(file)
    process = up(tmp_path / "data", *options, **where)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("edgeward controller ready"), process.communicate()[1]
        command_line = Path(f"/proc/{process.pid}/cmdline").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == 0 and SECRET_KEY not in errors and SECRET_KEY not in command_line
    file.chmod(0o644)
    refused = up(tmp_path / "data", *options, **where)
    assert "others may read these credentials" in refusal(refused)


def test_the_command_refuses_a_bucket_without_conditions(tmp_path: Path) -> None:
    with lax_s3.serving(frozenset({"signed", "ranges"})) as (endpoint, _):
        process = up(tmp_path / "data", "--artifacts", "s3://models", AWS_ENDPOINT_URL_S3=endpoint, **KEYS)
        errors = refusal(process)
    assert "released models could be overwritten" in errors and "leave --artifacts out" in errors
    assert "Traceback" not in errors and SECRET_KEY not in errors
