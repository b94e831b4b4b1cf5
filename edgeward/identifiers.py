"""Names that are safe in a topic, a path, a certificate and a Kubernetes object alike."""

from __future__ import annotations

import re
from typing import NamedTuple

from edgeward.errors import InvalidDocument

_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_name(name: str, field: str = "name", source: str = "") -> str:
    """Return `name` when it is an RFC 1123 label (1-63 of `a-z 0-9 -`).

    Raises InvalidDocument otherwise.
    """
    if not isinstance(name, str) or not _LABEL.fullmatch(name):
        raise InvalidDocument(
            f"{name!r} is not a valid name: expected 1-63 characters of a-z, 0-9 and '-', "
            "starting and ending with a letter or digit",
            source=source,
            field=field,
        )
    return name


def check_digest(digest: str, field: str = "digest") -> str:
    """Return `digest` when it is a lower-case hexadecimal SHA-256, else raise InvalidDocument."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InvalidDocument(f"{digest!r} is not a SHA-256 in lower-case hex", field=field)
    return digest


class DeviceName(NamedTuple):
    """A device at its site; device names are unique in the whole fleet."""

    site: str
    device: str

    def __str__(self) -> str:
        return f"{self.site}/{self.device}"
