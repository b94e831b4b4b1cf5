"""What is written down of a slot, and which blobs that keeps on the disk. Pure."""

from __future__ import annotations

from collections.abc import Collection

from agent.slots.activation import Opened
from agent.slots.active import ActiveModel
from agent.state import SlotRecord
from agent.verify import VerifiedPackage
from edgeward.wire.desired import ModelRef
from edgeward.wire.slots import SlotPolicy


def recorded(before: SlotRecord, opened: Opened, policy: SlotPolicy) -> SlotRecord:
    """The durable record after an activation; the same model under another policy keeps its predecessor."""
    package = opened.package
    again = before.running == package.ref
    return SlotRecord(
        running=package.ref,
        previous=before.previous if again else before.running,
        policy=policy,
        variant=package.variant.name,
        batchable=opened.batchable,
        blob=package.variant.blob.digest,
        previous_blob=before.previous_blob if again else before.blob,
        previous_variant=before.previous_variant if again else before.variant,
        previous_batchable=before.previous_batchable if again else before.batchable,
        variants=list(opened.table),
    )


def fallback(record: SlotRecord) -> SlotRecord | None:
    """The record after going back to the predecessor, run as it ran; None without one."""
    if record.previous is None:
        return None
    return SlotRecord(
        running=record.previous,
        policy=record.policy,
        variant=record.previous_variant,
        batchable=record.previous_batchable,
        blob=record.previous_blob,
    )


def needed(
    records: Collection[SlotRecord], targets: Collection[ModelRef], condemned: Collection[str]
) -> set[ModelRef]:
    """The models whose blobs stay: what slots run, may go back to, and want, unless its digest is refused for good."""
    wanted = {ref for record in records for ref in (record.running, record.previous) if ref is not None}
    return wanted | {ref for ref in targets if ref.digest not in condemned}


def kept_blobs(records: Collection[SlotRecord], active: Collection[ActiveModel]) -> set[str]:
    """The variants' blobs that a slot runs or may go back to."""
    kept = {blob for record in records for blob in (record.blob, record.previous_blob)}
    # Not what is written down where that variant's runtime was taken away, or an older agent wrote.
    return kept | {model.package.variant.blob.digest for model in active}


def kept_beside(
    package: VerifiedPackage, records: Collection[SlotRecord], active: Collection[ActiveModel]
) -> set[str] | None:
    """What must stay when the other variants of `package` go: what no slot runs or may go back to, and what
    none needs to start again. None when that is not known."""
    keep = kept_blobs(records, active)
    for record in records:
        keep |= {ref.digest for ref in (record.running, record.previous) if ref is not None}
        for ref, blob in ((record.running, record.blob), (record.previous, record.previous_blob)):
            if ref == package.ref and not blob:
                return None  # an older agent did not write down which of its variants that is
    return keep | {model.package.manifest.golden.blob.digest for model in active}
