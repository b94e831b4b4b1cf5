"""What people and their tools call: resources, tokens, audit, the page's data and events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request, Response
from msgspec import Struct
from starlette.responses import StreamingResponse

from controller import apply as admission
from controller.api.access import (
    COOKIE,
    PERMISSIONS,
    SESSION_LIFETIME,
    Admin,
    Documents,
    Operator,
    Reader,
    Service,
    SmallBody,
    Unauthenticated,
    answer,
    decode,
    make_session,
    person_of,
)
from controller.service import Controller, new_api_token
from controller.store import records, resources
from controller.store.tables import ApiTokenRow
from edgeward.errors import Conflict, InvalidDocument, NotFound
from edgeward.identifiers import DeviceName, check_name
from edgeward.storage import sha256_hex
from edgeward.wire.enrollment import Role
from edgeward.wire.resources import PLURALS, parse_resource

router = APIRouter(prefix="/api/v1")

HEARTBEAT = 10.0
_POLL = 0.2

Limit = Annotated[int, Query(ge=1, le=1000)]


class _Apply(Struct, rename="camel", forbid_unknown_fields=True):
    resources: list[Any]
    dry_run: bool = False


class _TokenWish(Struct, forbid_unknown_fields=True):
    sites: list[str]
    role: Role = "device"
    ttl: float = 3600.0
    labels: dict[str, str] = {}
    approval: Literal["automatic", "required"] = "automatic"


class _ApiTokenWish(Struct, forbid_unknown_fields=True):
    name: str
    role: Literal["viewer", "operator", "releaser", "admin"]


class _Login(Struct, forbid_unknown_fields=True):
    token: str


class _DryRun(Exception):
    pass


# resources


@router.post("/apply")
def apply(controller: Service, person: Operator, body: Documents) -> Response:
    """All or none. With `dryRun` everything is checked and nothing kept."""
    wish = decode(body, _Apply)
    wanted = admission.parse_all(wish.resources)
    results: list[dict[str, str]] = []
    try:
        with controller.store.writing() as session:
            results = admission.apply(session, wanted, person.name, controller.clock.now())
            if wish.dry_run:
                raise _DryRun
    except _DryRun:
        return answer(results)
    controller.changes.bump()
    return answer(results)


@router.get("/overview")
def overview(controller: Service, person: Reader) -> Response:
    with controller.store.reading() as session:
        devices = [resources.document(row) for row in resources.find(session, "Device")]
        rollouts = [resources.document(row) for row in resources.find(session, "Rollout")]
        versions = [
            {
                "name": row.name,
                "model": row.spec["model"],
                "version": row.spec["version"],
                "digest": row.spec["digest"],
                "createdAt": row.created_at,
            }
            for row in resources.find(session, "ModelVersion")
        ]
    return answer(
        {
            "devices": devices,
            "rollouts": rollouts,
            "modelVersions": versions,
            "now": controller.clock.now(),
        }
    )


@router.get("/events")
async def events(request: Request, controller: Service, person: Reader) -> Response:
    """Server-Sent Events: `changed` with a growing revision; a comment every HEARTBEAT seconds."""

    async def stream() -> AsyncIterator[bytes]:
        clock, seen = controller.clock, -1
        beat = clock.monotonic()
        while not controller.stopping.is_set() and not await request.is_disconnected():
            revision = controller.changes.revision
            if revision != seen:
                seen = revision
                yield b"event: changed\nid: %d\ndata: %s\n\n" % (
                    seen,
                    msgspec.json.encode({"revision": seen}),
                )
            elif clock.monotonic() - beat >= HEARTBEAT:
                beat = clock.monotonic()
                yield b": heartbeat\n\n"
            await asyncio.sleep(_POLL)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


@router.get("/audit")
def audit(controller: Service, person: Reader, limit: Limit = 200) -> Response:
    with controller.store.reading() as session:
        return answer({"items": records.audit_records(session, limit)})


@router.get("/devices/{name}/reports")
def reports(name: str, controller: Service, person: Reader, limit: Limit = 200) -> Response:
    with controller.store.reading() as session:
        resources.need(session, "Device", name)
        return answer({"items": records.reports(session, name, limit)})


@router.get("/devices/{name}/desired")
def desired(name: str, controller: Service, person: Reader) -> Response:
    """The signed desired state as the device gets it, for who carries it there by hand."""
    with controller.store.reading() as session:
        device = resources.need(session, "Device", name)
        row = records.desired(session, name)
        if device.spec["revoked"] or row is None or not row.content:
            raise Conflict(
                f"device {name} has no desired state",
                hint="it is revoked"
                if device.spec["revoked"]
                else "wait a moment: it has just been enrolled",
            )
        return Response(row.envelope, media_type="application/json")


# tokens and sessions


@router.post("/enrollmenttokens")
def create_enrollment_token(controller: Service, person: Operator, body: SmallBody) -> Response:
    wish = decode(body, _TokenWish)
    with controller.store.writing() as session:
        token = controller.authority.create_token(
            session,
            sites=wish.sites,
            role=wish.role,
            labels=wish.labels,
            ttl=wish.ttl,
            who=person.name,
            needs_approval=wish.approval == "required",
        )
        detail = f"{wish.role} for {', '.join(wish.sites)}"
        records.audit(session, controller.clock.now(), person.name, "create", "EnrollmentToken", "", detail)
    return answer({"token": token}, 201)


@router.post("/apitokens")
def create_api_token(controller: Service, person: Admin, body: SmallBody) -> Response:
    """A token for a person or tool, shown this once."""
    wish = decode(body, _ApiTokenWish)
    check_name(wish.name)
    token, now = new_api_token(), controller.clock.now()
    with controller.store.writing() as session:
        digest = sha256_hex(token.encode())
        session.add(ApiTokenRow(digest=digest, name=wish.name, role=wish.role, created_at=now))
        records.audit(session, now, person.name, "create", "ApiToken", wish.name, wish.role)
    return answer({"token": token}, 201)


@router.delete("/apitokens/{name}")
def delete_api_token(name: str, controller: Service, person: Admin) -> Response:
    if name == "admin":
        raise Conflict("the admin token is admin.token in the data folder", hint="delete that file, restart")
    with controller.store.writing() as session:
        if not records.drop_api_token(session, name):
            raise NotFound(f"there is no API token {name[:80]!r}")
        records.audit(session, controller.clock.now(), person.name, "delete", "ApiToken", name)
    return Response(status_code=204)


@router.delete("/certificates/{name}")
def revoke(name: str, controller: Service, person: Admin) -> Response:
    """Put every certificate of a device or trend store on the deny-list."""
    with controller.store.writing() as session:
        count = records.revoke_certificates(session, name)
        if not count:
            raise NotFound(f"{name[:80]!r} holds no valid certificate")
        records.audit(session, controller.clock.now(), person.name, "revoke", "Certificate", name)
    return answer({"revoked": count})


@router.post("/session")
def log_in(request: Request, controller: Service, body: SmallBody) -> Response:
    """Exchange an API token for a cookie that can read."""
    address, now = (request.client.host if request.client else ""), controller.clock.monotonic()
    request.app.state.throttle.check(address, now)
    token = decode(body, _Login).token
    person = person_of(controller, token)
    if person is None:
        request.app.state.throttle.failed(address, now)
        raise Unauthenticated("the API token is not known")
    response = answer({"name": person.name, "role": person.role, "may": sorted(PERMISSIONS[person.role])})
    response.set_cookie(
        COOKIE,
        make_session(controller, token),
        max_age=int(SESSION_LIFETIME),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path="/",
    )
    return response


@router.delete("/session")
def log_out() -> Response:
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return response


# one kind; last, since these paths fit everything


def _kind(plural: str) -> str:
    kind = PLURALS.get(plural)
    if kind is None:
        raise NotFound(f"there is no kind {plural[:80]!r}", hint=f"one of {', '.join(PLURALS)}")
    return kind


def _selector(text: str) -> dict[str, str]:
    labels = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InvalidDocument("expected key=value,key=value", source="request", field="selector")
        labels[key] = value
    return labels


@router.get("/{plural}")
def find(plural: str, controller: Service, person: Reader, selector: str = "") -> Response:
    kind, labels = _kind(plural), _selector(selector)
    with controller.store.reading() as session:
        return answer({"items": [resources.document(row) for row in resources.find(session, kind, labels)]})


@router.get("/{plural}/{name}")
def get(plural: str, name: str, controller: Service, person: Reader) -> Response:
    kind = _kind(plural)
    with controller.store.reading() as session:
        return answer(resources.document(resources.need(session, kind, name)))


@router.put("/{plural}/{name}")
def replace(plural: str, name: str, controller: Service, person: Operator, body: Documents) -> Response:
    kind = _kind(plural)
    wanted = parse_resource(decode(body, Any), source=f"{kind}/{name}")
    if (wanted.kind, wanted.metadata.name) != (kind, name):
        raise InvalidDocument(f"is {wanted.kind}/{wanted.metadata.name}", source=f"{kind}/{name}")
    admission.parse_all([msgspec.to_builtins(wanted)])
    with controller.store.writing() as session:
        resources.need(session, kind, name)
        admission.apply(session, [wanted], person.name, controller.clock.now())
    controller.changes.bump()
    return get(plural, name, controller, person)


@router.delete("/{plural}/{name}")
def delete(plural: str, name: str, controller: Service, person: Operator) -> Response:
    kind = _kind(plural)
    with controller.store.writing() as session:
        row = resources.need(session, kind, name, lock=True)
        gone = DeviceName(row.spec["site"], name) if kind == "Device" else None
        admission.delete(session, row, person.name, controller.clock.now())
    _after_delete(controller, gone)
    return Response(status_code=204)


def _after_delete(controller: Controller, device: DeviceName | None) -> None:
    if device is not None:
        controller.forget(device)
    controller.changes.bump()
