"""One decoder per payload format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from agent.streams.decode.documents import DocumentDecoder
from agent.streams.decode.tables import CsvDecoder
from agent.streams.samples import Samples
from edgeward.wire.streams import Check, PayloadSource


class Decoder(Protocol):
    def decode(self, payload: bytes, arrived: float, topic: str = "") -> list[Samples]:
        """The samples of one message, in order. Raises InvalidDocument when it is none at all.

        `arrived` is in seconds since 1970 and the event time where the source gives none.
        """
        ...


def decoder_for(
    source: PayloadSource,
    features: Sequence[str],
    quality: Mapping[str, Check],
    count: Callable[[str, int], None],
) -> Decoder:
    """`count` gets what a decoder notices on its way, such as a gap between Sparkplug messages.

    Raises InvalidDocument for a spec that cannot be decoded by, MissingDependency without protobuf.
    """
    if source.format == "csv":
        return CsvDecoder(source, features)
    if source.format == "sparkplug":
        # An optional extra.
        from agent.streams.decode.sparkplug import SparkplugDecoder

        return SparkplugDecoder(source, features, quality, count)
    return DocumentDecoder(source, features, quality)
