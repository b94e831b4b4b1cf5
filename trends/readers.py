"""Who may ask a trend store over HTTP: named tokens, each for some sites and until some day.

The store must answer with the controller out of reach, so they are its own. Only hashes are kept.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import msgspec
from msgspec import Struct

from edgeward.errors import Conflict, Forbidden, NotFound
from edgeward.identifiers import check_name
from edgeward.storage import write_atomic

_FILE = "readers.json"


class Reader(Struct, frozen=True):
    """`hashed` is the SHA-256 of the token, `expires_at` seconds since 1970; `sites` None for all of the store's."""

    name: str
    hashed: str
    expires_at: float
    sites: list[str] | None = None


class Readers:
    """The tokens of one store. Read anew for each request: one that is removed ends at once."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE

    def all(self) -> list[Reader]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=list[Reader])
        except FileNotFoundError:
            return []

    def add(self, name: str, sites: frozenset[str] | None, expires_at: float) -> str:
        """The token, which is shown this once. Raises Conflict, InvalidDocument."""
        check_name(name)
        held = self.all()
        if any(reader.name == name for reader in held):
            raise Conflict(f"there is a reader {name}", hint="remove it first, or choose another name")
        token = secrets.token_urlsafe(32)
        held.append(Reader(name, _hash(token), expires_at, None if sites is None else sorted(sites)))
        self._write(held)
        return token

    def remove(self, name: str) -> None:
        """Raises NotFound."""
        held = self.all()
        kept = [reader for reader in held if reader.name != name]
        if len(kept) == len(held):
            raise NotFound(f"there is no reader {name}", hint="`edgeward trends readers list`")
        self._write(kept)

    def check(self, token: str, now: float) -> Reader:
        """Whose token it is. Raises Forbidden."""
        given = _hash(token)
        for reader in self.all():
            # Hashes of 256 random bits: where the comparison ends tells nothing of use.
            if secrets.compare_digest(reader.hashed, given) and now < reader.expires_at:
                return reader
        raise Forbidden(
            "the token is not known here, or has ended", hint="`edgeward trends readers add NAME`"
        )

    def _write(self, readers: list[Reader]) -> None:
        write_atomic(self._file, msgspec.json.encode(readers), mode=0o600)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
