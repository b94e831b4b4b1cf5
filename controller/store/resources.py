"""Resources in the database. Every function works inside the caller's transaction."""

from __future__ import annotations

from typing import Any

from sqlmodel import Session, col, delete, select, update

from controller.store.tables import ResourceRow
from edgeward.errors import Conflict, NotFound
from edgeward.wire import API_VERSION


def document(row: ResourceRow) -> dict[str, Any]:
    """A row as people read it."""
    metadata: dict[str, Any] = {
        "name": row.name,
        "labels": row.labels,
        "generation": row.generation,
        "resourceVersion": str(row.resource_version),
        "creationTimestamp": row.created_at,
    }
    if row.annotations:
        metadata["annotations"] = row.annotations
    return {
        "apiVersion": API_VERSION,
        "kind": row.kind,
        "metadata": metadata,
        "spec": row.spec,
        "status": row.status,
    }


def find(session: Session, kind: str, selector: dict[str, str] | None = None) -> list[ResourceRow]:
    """All resources of a kind by name; those whose labels hold every pair of `selector`."""
    rows = session.exec(select(ResourceRow).where(ResourceRow.kind == kind).order_by(col(ResourceRow.name)))
    wanted = (selector or {}).items()
    return [row for row in rows if wanted <= row.labels.items()]


def get(session: Session, kind: str, name: str, *, lock: bool = False) -> ResourceRow | None:
    """One resource; with `lock`, nobody else changes it until the transaction ends."""
    query = select(ResourceRow).where(ResourceRow.kind == kind, ResourceRow.name == name)
    return session.exec(query.with_for_update() if lock else query).one_or_none()


def need(session: Session, kind: str, name: str, *, lock: bool = False) -> ResourceRow:
    """Like `get`. Raises NotFound."""
    row = get(session, kind, name, lock=lock)
    if row is None:
        raise NotFound(f"there is no {kind} {name!r}", hint=f"`edgeward get {kind.lower()}s` lists them")
    return row


def insert(
    session: Session,
    kind: str,
    name: str,
    spec: dict[str, Any],
    now: float,
    *,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    status: dict[str, Any] | None = None,
) -> ResourceRow:
    row = ResourceRow(
        kind=kind,
        name=name,
        spec=spec,
        labels=labels or {},
        annotations=annotations or {},
        status=status or {},
        created_at=now,
    )
    session.add(row)
    session.flush()
    return row


def change(
    session: Session,
    row: ResourceRow,
    *,
    expected_version: str = "",
    spec: dict[str, Any],
    labels: dict[str, str],
    annotations: dict[str, str],
) -> bool:
    """Write what a person wants, if it differs; whether it did.

    Raises Conflict when `expected_version` is given and not the current one.
    """
    if expected_version and expected_version != str(row.resource_version):
        raise Conflict(
            f"{row.kind} {row.name!r} was changed meanwhile: resourceVersion {expected_version} is stale, "
            f"now {row.resource_version}",
            hint="read it again and repeat the change",
        )
    if (spec, labels, annotations) == (row.spec, row.labels, row.annotations):
        return False
    done = session.exec(
        update(ResourceRow)
        .where(col(ResourceRow.id) == row.id, col(ResourceRow.resource_version) == row.resource_version)
        .values(
            spec=spec,
            labels=labels,
            annotations=annotations,
            generation=row.generation + (spec != row.spec),
            resource_version=row.resource_version + 1,
        )
    )
    if done.rowcount != 1:
        raise Conflict(f"{row.kind} {row.name!r} was changed at the same time", hint="try again")
    session.expire(row)
    return True


def set_status(session: Session, row: ResourceRow, status: dict[str, Any]) -> bool:
    """Write a status, if it differs. Its writers are the controller's own; spec and labels stay as they are."""
    if status == row.status:
        return False
    session.exec(
        update(ResourceRow)
        .where(col(ResourceRow.id) == row.id)
        .values(status=status, resource_version=col(ResourceRow.resource_version) + 1)
    )
    session.expire(row)
    return True


def remove(session: Session, row: ResourceRow) -> None:
    session.exec(delete(ResourceRow).where(col(ResourceRow.id) == row.id))
    session.expunge(row)
