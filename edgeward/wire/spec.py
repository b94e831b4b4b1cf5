"""The base of every spec and the value types that specs share."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
TopicText = Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^+#\x00]+$")]


class SpecStruct(Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """Base of every spec: camelCase on the wire, unknown fields refused."""
