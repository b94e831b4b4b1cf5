"""What the HTTP client takes from a server that means it no good."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from edgeward.client.transport import _beginning


@pytest.mark.parametrize("piece", [b"x", bytes(1 << 20)])
def test_an_error_is_read_to_an_honest_length_only(piece: bytes) -> None:
    taken = 0

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal taken
            while taken < 10_000:
                taken += 1
                yield piece

    body = _beginning(httpx.Response(503, stream=Endless()))
    assert len(body) <= 64 << 10 and taken < 100
