"""Admission: what people write is checked against what exists, and written all or none."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlmodel import Session

from controller import approval
from controller.identity import check_labels
from controller.store import records, resources
from controller.store.tables import ResourceRow
from edgeward.errors import Conflict, InvalidDocument
from edgeward.wire.resources import (
    APPLICABLE,
    FleetSpec,
    Resource,
    RolloutSpec,
    RolloutStatus,
    model_version_name,
    parse_resource,
)

#: A rollout says what goes where in which order; changing that midway would make its history a lie.
FIXED = {"Rollout": ("fleet", "model", "version", "slot", "waves"), "Device": ("site",)}


def parse_all(documents: Any) -> list[Resource]:
    """The resources of an `apply`, what is referred to first. Raises InvalidDocument."""
    if not isinstance(documents, list):
        raise InvalidDocument("expected a list of resources", field="resources")
    parsed = []
    for index, one in enumerate(documents):
        resource = parse_resource(one, source=_label(one) or f"resources[{index}]")
        if resource.kind not in APPLICABLE:
            raise InvalidDocument(
                f"a {resource.kind} cannot be applied",
                source=_label(one),
                field="kind",
                hint="publish a signed package instead: `edgeward publish`",
            )
        parsed.append(resource)
    names = [(resource.kind, resource.metadata.name) for resource in parsed]
    for name in names:
        if names.count(name) > 1:
            raise InvalidDocument("given more than once", source="/".join(name))
    return sorted(parsed, key=lambda resource: APPLICABLE.index(resource.kind))


def _label(document: Any) -> str:
    """`Kind/name` of an unchecked document, as far as it has them."""
    metadata = document.get("metadata") if isinstance(document, dict) else None
    if not isinstance(metadata, dict):
        return ""
    return f"{document.get('kind', '?')}/{metadata.get('name', '?')}"[:140]


def apply(session: Session, wanted: list[Resource], who: str, now: float) -> list[dict[str, str]]:
    """Write each resource. Raises Conflict for a stale resourceVersion, InvalidDocument for a bad reference."""
    return [
        {"kind": one.kind, "name": one.metadata.name, "result": _write(session, one, who, now)}
        for one in wanted
    ]


def _write(session: Session, wanted: Resource, who: str, now: float) -> str:
    metadata = wanted.metadata
    source = f"{wanted.kind}/{metadata.name}"
    try:
        check_labels(metadata.labels, "metadata.labels")
    except InvalidDocument as error:
        raise InvalidDocument(error.problem, source=source, field=error.field) from None
    spec: dict[str, Any] = msgspec.to_builtins(wanted.spec)
    row = resources.get(session, wanted.kind, metadata.name, lock=True)
    if row is not None:
        for field in FIXED.get(wanted.kind, ()):
            if spec[field] != row.spec[field]:
                raise InvalidDocument(
                    "cannot change once it exists",
                    source=source,
                    field=f"spec.{field}",
                    hint="make a new one under another name",
                )
    _check_references(session, wanted.kind, spec, source)
    labels = dict(metadata.labels)
    if wanted.kind == "Device":
        if row is None:
            raise InvalidDocument(
                "a device comes into being by enrolment only",
                source=source,
                hint="edgeward token create --site SITE, then edgeward agent enroll on the device",
            )
        labels |= {"site": spec["site"], "device": metadata.name}
    if row is None:
        if metadata.resource_version:
            raise Conflict(f"{source} does not exist any more")
        status = msgspec.to_builtins(RolloutStatus()) if wanted.kind == "Rollout" else {}
        resources.insert(
            session, wanted.kind, metadata.name, spec, now,
            labels=labels, annotations=metadata.annotations, status=status,
        )  # fmt: skip
        records.audit(session, now, who, "create", wanted.kind, metadata.name)
        return "created"
    before = row.spec
    changed = resources.change(
        session,
        row,
        expected_version=metadata.resource_version,
        spec=spec,
        labels=labels,
        annotations=metadata.annotations,
    )
    if not changed:
        return "unchanged"
    fields = ", ".join(sorted(key for key in spec if spec[key] != before.get(key))) or "labels"
    records.audit(session, now, who, "change", wanted.kind, metadata.name, fields)
    return "configured"


def _check_references(session: Session, kind: str, spec: dict[str, Any], source: str) -> None:
    references: list[tuple[str, str, str]] = []
    match kind:
        case "Device":
            references = [("Site", spec["site"], "spec.site")]
        case "Fleet":
            references = [
                ("Stream", stream, f"spec.streams[{index}]") for index, stream in enumerate(spec["streams"])
            ]
            fleet = msgspec.convert(spec, FleetSpec)
            references += [
                (
                    "ModelVersion",
                    model_version_name(shadow.model, shadow.version),
                    f"spec.shadows.{slot}.version",
                )
                for slot, shadow in fleet.shadows.items()
            ]
        case "Rollout":
            rollout = msgspec.convert(spec, RolloutSpec)
            references = [
                ("Fleet", rollout.fleet, "spec.fleet"),
                ("ModelVersion", model_version_name(rollout.model, rollout.version), "spec.version"),
            ]
    for target, name, field in references:
        if resources.get(session, target, name) is None:
            raise InvalidDocument(f"there is no {target} {name!r}", source=source, field=field)


def delete(session: Session, row: ResourceRow, who: str, now: float) -> None:
    """Raises Conflict while something refers to it."""
    users = _users(session, row)
    if users:
        raise Conflict(
            f"{row.kind} {row.name!r} is used by {', '.join(users[:5])}", hint="delete those first"
        )
    if row.kind in ("ModelVersion", "Model"):
        raise Conflict(f"{row.kind} {row.name!r} is part of a signed release", hint="releases only grow")
    if row.kind == "Device":
        records.revoke_certificates(session, row.name)
        records.forget_device(session, row.name)
        approval.forget(session, row.name)
    resources.remove(session, row)
    records.audit(session, now, who, "delete", row.kind, row.name)


def _users(session: Session, row: ResourceRow) -> list[str]:
    def those(kind: str, field: str) -> list[str]:
        return [f"{kind}/{one.name}" for one in resources.find(session, kind) if one.spec[field] == row.name]

    match row.kind:
        case "Site":
            return those("Device", "site")
        case "Fleet":
            return those("Rollout", "fleet")
        case "Stream":
            fleets = resources.find(session, "Fleet")
            return [f"Fleet/{one.name}" for one in fleets if row.name in one.spec["streams"]]
    return []
