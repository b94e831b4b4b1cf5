"""What is written down of a slot, and which blobs that keeps on the disk. Pure."""

from __future__ import annotations

from collections.abc import Collection

from agent.slots.active import ActiveModel
from agent.slots.opened import Opened
from agent.state import SlotRecord
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


def kept(
    records: Collection[SlotRecord],
    active: Collection[ActiveModel],
    wanted: Collection[ModelRef],
    condemned: Collection[str],
) -> dict[ModelRef, set[str] | None]:
    """The models that stay on the disk, and the variants' blobs of each; None: all of them.

    That is what slots run and may go back to, as they run it, and the whole of what they want (which of its
    variants is not chosen yet), unless its digest is refused for good.
    """
    found: dict[ModelRef, set[str] | None] = {ref: None for ref in wanted if ref.digest not in condemned}
    pairs = [(record.running, record.blob) for record in records]
    pairs += [(record.previous, record.previous_blob) for record in records]
    # Not what is written down where that variant's runtime was taken away.
    pairs += [(model.ref, model.package.variant.blob.digest) for model in active]
    for ref, blob in pairs:
        if ref is None:
            continue
        if not blob:
            found[ref] = None  # an older agent did not write down which of its variants that is
        elif (blobs := found.setdefault(ref, set())) is not None:
            blobs.add(blob)
    return found


def kept_blobs(records: Collection[SlotRecord], active: Collection[ActiveModel]) -> set[str]:
    """The variants' blobs that a slot runs or may go back to."""
    kept = {blob for record in records for blob in (record.blob, record.previous_blob)}
    # Not what is written down where that variant's runtime was taken away, or an older agent wrote.
    return kept | {model.package.variant.blob.digest for model in active}
