"""Where peers may be, and where this agent serves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from edgeward.errors import UsageError

#: Peers that are taken from one source; what is beyond that is left out.
MOST = 64


class Address(NamedTuple):
    """A host, by name or number, and its TCP port. No more than a hint: who is there, TLS says."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, option: str) -> Address:
    """HOST:PORT, an IPv6 host in brackets. Raises UsageError."""
    host, colon, digits = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    plain = digits.isascii() and digits.isdigit()
    if not colon or not host or not plain or not 0 < int(digits[:6]) < 65536 or "/" in host:
        raise UsageError(
            f"{option}: {text!r} is no address", hint="expected HOST:PORT, as 10.0.0.7:8472 or [fd00::7]:8472"
        )
    return Address(host, int(digits))


@dataclass(frozen=True)
class Settings:
    """`listen`: where to serve peers, None for nowhere. `dns`: a name each of whose addresses is a peer."""

    listen: Address | None = None
    static: tuple[Address, ...] = ()
    dns: Address | None = None
    mdns: bool = False
