"""Real brokers and links that come back at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeward.mqtt import Link
from tests.contracts.test_brokers import Mosquitto, needs_mosquitto
from tests.faults.pipeline.ends import Keyring, keyring

__all__ = ["needs_mosquitto"]


@pytest.fixture(scope="session")
def ring() -> Keyring:
    return keyring()


def _at_once(link: Link) -> None:
    link._client.reconnect_delay_set(min_delay=0.02, max_delay=0.1)  # type: ignore[arg-type]  # as in edgeward/mqtt.py


@pytest.fixture
def quick_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """How a fleet spreads its reconnects is tested elsewhere; here it would be most of the time."""
    monkeypatch.setattr(Link, "_spread_reconnects", _at_once)


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    server = Mosquitto(tmp_path)
    server.start()
    yield server
    server.stop()


Closing = Callable[..., None]


@pytest.fixture
def closing() -> Iterator[Closing]:
    """Close these at the end, the last first."""
    opened: list[object] = []

    def later(*ends: object) -> None:
        opened.extend(ends)

    yield later
    for end in reversed(opened):
        end.close()  # type: ignore[attr-defined]
