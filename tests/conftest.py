"""No test may fail because the machine is busy."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.servers.postgres", "tests.servers.s3"]

settings.register_profile("edgeward", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edgeward")
