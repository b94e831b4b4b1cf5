"""What goes up from a device to the trend store, and the ack that comes back.

A batch covers the sequence numbers `first_seq .. first_seq + count - 1` of one (device, epoch, lane): each
of them is a row in it or lost. Batches may arrive in any order; what is known already is dropped by number.
Device and lane stand in the topic, which the envelope signs; they are not repeated in the body.
All times are integers, microseconds since 1970-01-01T00:00Z.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import zstandard
from msgspec import Struct

from edgeward.errors import InvalidDocument
from edgeward.wire.topics import Lane

MAX_BATCH_ROWS = 10_000
MAX_BATCH_BYTES = 16 << 20
MAX_BATCH_LOST = 20_000
MAX_ACK_RANGES = 256
#: Event times that a trend store takes: from the year 2000 on, and at most a day ahead of its clock.
EARLIEST_US = 946_684_800_000_000
AHEAD_US = 86_400_000_000


# Rows hold nothing that could refer back to them, and there are many: the cycle collector need not look.


class ResultRow(Struct, frozen=True, array_like=True, gc=False):
    """One prediction with its lineage. `source_seq` is the sensor sample's own sequence number, -1 without one."""

    event_time: int
    stream: str
    revision: int
    key: str
    source_epoch: str
    source_seq: int
    digest: str
    variant: str
    provider: str
    outputs: dict[str, float]
    alarm: bool


class AlarmRow(Struct, frozen=True, array_like=True, gc=False):
    """A decision threshold was passed and the stream's actions ran."""

    event_time: int
    stream: str
    revision: int
    key: str
    source_epoch: str
    source_seq: int
    digest: str
    variant: str
    provider: str
    value: float
    threshold: float


class TrendRow(Struct, frozen=True, array_like=True, gc=False):
    """Mergeable statistics of one series over one event-time bucket.

    `series` is `feature:NAME` or `output:NAME`; `m2` is the sum of squared deviations from the mean
    (Chan, Golub, LeVeque 1979); `histogram` counts values per bin of the package's baseline edges
    (`edges`, n-1 inner edges for n bins), empty when the model has no baseline for the series. `sketch` is
    a KLL sketch of 32-bit floats in the binary form of Apache DataSketches, for quantiles; empty without
    values, and from an older agent.
    """

    bucket: int
    width: int
    stream: str
    revision: int
    digest: str
    variant: str
    provider: str
    series: str
    count: int
    missing: int
    mean: float
    m2: float
    minimum: float
    maximum: float
    edges: list[float]
    histogram: list[int]
    sketch: bytes = b""


class SampleRow(Struct, frozen=True, array_like=True, gc=False):
    """A raw input sample, where the residency policy lets it leave the device."""

    event_time: int
    stream: str
    revision: int
    key: str
    source_epoch: str
    source_seq: int
    values: dict[str, float]


Row = ResultRow | AlarmRow | TrendRow | SampleRow

ROW_TYPES: dict[Lane, type[Row]] = {
    "result": ResultRow,
    "alarm": AlarmRow,
    "trend": TrendRow,
    "sample": SampleRow,
}


class Gap(Struct, frozen=True):
    """The whole of this batch's sequence range is lost, as an agent before contract no. 10 says it."""

    reason: str
    first_event_time: int
    last_event_time: int


class Lost(Struct, frozen=True, array_like=True):
    """Rows `first_seq .. last_seq` that no longer exist: `reasons` says how many for which reason.

    The counts add up to the length of the range. The times are the lowest and highest event time of what was
    lost, 0 where they are not known.
    """

    first_seq: int
    last_seq: int
    first_event_time: int
    last_event_time: int
    reasons: dict[str, int]


class Batch(Struct, frozen=True):
    """`floor` is the lowest sequence number that the outbox still answers for in this lane: all below is acked.

    A store that has no memory of the epoch starts there. `rows` is zstd-compressed MessagePack, an array of
    the lane's row type, for all numbers of the range that are not in `lost` (ascending, disjoint); with `gap`
    set it is empty and the whole range is lost.
    """

    epoch: str
    first_seq: int
    count: int
    floor: int
    rows: bytes
    gap: Gap | None = None
    lost: list[Lost] = []


class Ack(Struct, frozen=True):
    """Everything up to and including `seq` is committed by the trend store, -1: nothing yet; so are `ranges`.

    `ranges` (first, last) lie above `seq`, ascending, at most MAX_ACK_RANGES of them; more may be stored.
    """

    epoch: str
    seq: int
    ranges: list[tuple[int, int]] = []


_encoder = msgspec.msgpack.Encoder()
_decoders = {lane: msgspec.msgpack.Decoder(list[row]) for lane, row in ROW_TYPES.items()}  # type: ignore[valid-type]  # a list of a type chosen at run time
_raw_rows = msgspec.msgpack.Decoder(list[msgspec.Raw])


def encode_rows(rows: list[Row], *, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(_encoder.encode(rows))


def join_rows(encoded: list[bytes], *, level: int = 3) -> bytes:
    """Like encode_rows for rows that are MessagePack already (as an outbox keeps them)."""
    return zstandard.ZstdCompressor(level=level).compress(
        _encoder.encode([msgspec.Raw(row) for row in encoded])
    )


def _unpack(data: bytes) -> bytes:
    try:
        unpacked = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data)
        raw = unpacked.read(MAX_BATCH_BYTES + 1)
    except zstandard.ZstdError as error:
        raise InvalidDocument(f"not a zstd frame: {error}", field="rows") from None
    if len(raw) > MAX_BATCH_BYTES:
        raise InvalidDocument(f"unpacks to more than {MAX_BATCH_BYTES} bytes", field="rows")
    return raw


def decode_rows(lane: Lane, data: bytes) -> list[Row]:
    """The rows of a batch. Raises InvalidDocument; never allocates more than MAX_BATCH_BYTES for them."""
    try:
        rows: list[Row] = _decoders[lane].decode(_unpack(data))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidDocument(f"not {lane} rows: {error}", field="rows") from None
    return rows


def split_rows(data: bytes) -> list[bytes]:
    """The rows of a batch as separate MessagePack values, unchecked: to find the bad one."""
    try:
        return [bytes(raw) for raw in _raw_rows.decode(_unpack(data))]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidDocument(f"not an array of rows: {error}", field="rows") from None


#: Why a row is lost: `thinned` (every n-th was kept) and `merged` (its numbers are in a coarser trend row) under
#: pressure, `budget` when that was not enough, `disk-full` when it could not be written, `residency` (it stays
#: at its site) in a central store only.
GapReason = Literal[
    "budget", "corruption", "disk-full", "merged", "residency", "store-lost", "thinned", "time-to-live"
]
