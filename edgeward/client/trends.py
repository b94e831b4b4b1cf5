"""A trend store's query API, for people and tools on premises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeward.client.transport import Transport
from edgeward.errors import MissingDependency
from edgeward.wire.trend_query import LineageQuery, Question, TrendQuery, check_lineage, check_query

if TYPE_CHECKING:
    import pyarrow as pa

_CHUNK = 1 << 20


class TrendClient:
    """Asks a store that runs `edgeward trends api`.

    `token` is a reader's, `ca_file` holds the only CAs to trust, `certificate` a PEM file with certificate and key
    where the store asks for one. Methods raise InvalidDocument, Forbidden, NotFound and Unavailable.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout: float = 90.0,
        ca_file: Path | None = None,
        certificate: Path | None = None,
    ) -> None:
        self._http = Transport(
            url, credential=lambda: token, timeout=timeout, ca_file=ca_file, certificate=certificate
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> TrendClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def query(self, question: TrendQuery | LineageQuery) -> pa.Table:
        """The whole answer in memory. Raises MissingDependency without pyarrow."""
        ipc = _ipc()
        with self.stream(question) as pieces:
            # An answer that was cut off is no table.
            return ipc.open_stream(b"".join(pieces)).read_all()

    @contextmanager
    def stream(self, question: TrendQuery | LineageQuery) -> Iterator[Iterator[bytes]]:
        """The answer's bytes as they come: an Arrow IPC stream."""
        if isinstance(question, TrendQuery):
            check_query(question)
            body = msgspec.json.encode(Question(trend=question))
        else:
            check_lineage(question)
            body = msgspec.json.encode(Question(lineage=question))
        headers = {"Content-Type": "application/json"}
        with self._http.stream("/v1/query", method="POST", content=body, headers=headers) as response:
            yield response.iter_bytes(_CHUNK)


def _ipc() -> Any:
    try:
        from pyarrow import ipc
    except ImportError:
        raise MissingDependency(
            "pyarrow is not installed", hint="pip install pyarrow, or use `stream`"
        ) from None
    return ipc
