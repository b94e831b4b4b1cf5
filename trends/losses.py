"""What a batch says is lost: checked, and cut to what the store does not have. Pure."""

from __future__ import annotations

from edgeward.errors import InvalidDocument
from edgeward.intervals import missing, size
from edgeward.wire.rows import MAX_BATCH_LOST, MAX_BATCH_ROWS, Batch, Lost

MAX_REASONS = 16
MAX_REASON = 256


def losses(batch: Batch) -> list[Lost]:
    """The lost ranges of a batch, ascending and disjoint. Raises InvalidDocument when they are impossible."""
    end = batch.first_seq + batch.count - 1
    if batch.gap is not None:
        gap = batch.gap
        reasons = {gap.reason[:MAX_REASON]: batch.count}
        return [Lost(batch.first_seq, end, gap.first_event_time, gap.last_event_time, reasons)]
    if len(batch.lost) > MAX_BATCH_LOST:
        raise InvalidDocument(f"more than {MAX_BATCH_LOST} lost ranges", field="lost")
    before = batch.first_seq - 1
    for item in batch.lost:
        if not before < item.first_seq <= item.last_seq <= end:
            raise InvalidDocument("lost ranges overlap or lie outside of the batch", field="lost")
        before = item.last_seq
        if not 1 <= len(item.reasons) <= MAX_REASONS or any(len(name) > MAX_REASON for name in item.reasons):
            raise InvalidDocument(f"expected 1 to {MAX_REASONS} short reasons", field="lost")
        if min(item.reasons.values()) < 1 or sum(item.reasons.values()) != item.last_seq - item.first_seq + 1:
            raise InvalidDocument("the counts do not add up to the lost range", field="lost")
    lost = [(item.first_seq, item.last_seq) for item in batch.lost]
    if size(missing(lost, batch.first_seq, end)) > MAX_BATCH_ROWS:
        raise InvalidDocument(f"a batch of {batch.count} rows", field="count")
    return batch.lost


def share(reasons: dict[str, int], count: int) -> dict[str, int]:
    """The counts of a lost range of which only `count` rows are news here: in proportion, exact in sum.

    Which of the rows were lost for which reason is not told when a range has several.
    """
    total = sum(reasons.values())
    if count == total:
        return reasons
    shares = {reason: number * count // total for reason, number in reasons.items()}
    left = count - sum(shares.values())
    for reason in sorted(reasons, key=lambda name: (-(reasons[name] * count % total), name))[:left]:
        shares[reason] += 1
    return {reason: number for reason, number in shares.items() if number}
