"""What devices and trend stores call: enrolment, renewal, desired state, messages."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from controller import residency
from controller.api.access import (
    Device,
    Documents,
    RenewingDevice,
    Service,
    SmallBody,
    answer,
    body_of,
    decode,
)
from controller.ingest import MAX_MESSAGE_BYTES
from controller.service import Controller
from controller.store import records
from edgeward.errors import Forbidden, InvalidDocument, TrustError
from edgeward.wire import topics
from edgeward.wire.enrollment import EnrollPending, EnrollRequest, RenewRequest
from edgeward.wire.residency import MAX_DECISIONS, MAX_SPANS, Decisions

router = APIRouter()

MAX_WAIT = 60.0
_POLL = 0.2

MessageBody = Annotated[bytes, Depends(body_of(MAX_MESSAGE_BYTES))]


@router.post("/enroll/v1")
def enroll(request: Request, controller: Service, body: SmallBody) -> Response:
    address, now = (request.client.host if request.client else ""), controller.clock.monotonic()
    request.app.state.throttle.check(address, now)
    try:
        wish = decode(body, EnrollRequest)
        made = controller.authority.enroll(wish, controller.broker_for(request.url.hostname or ""))
    except (Forbidden, TrustError):
        request.app.state.throttle.failed(address, now)
        raise
    controller.changes.bump()
    return answer(made, 202 if isinstance(made, EnrollPending) else 201)


@router.post("/device/v1/renew")
def renew(request: Request, controller: Service, who: RenewingDevice, body: SmallBody) -> Response:
    """Also for a while after the certificate has ended: a device that was offline needs nobody on site."""
    wish = decode(body, RenewRequest)
    broker = controller.broker_for(request.url.hostname or "")
    return answer(controller.authority.renew(who, wish.csr, broker))


@router.get("/device/v1/desired")
async def desired(
    request: Request,
    controller: Service,
    who: Device,
    newer_than: Annotated[int, Query(alias="newerThan", ge=0)] = 0,
    wait: Annotated[float, Query(ge=0)] = 0.0,
) -> Response:
    """The signed desired state once its generation is above `newerThan`, else 204 after `wait` seconds."""
    if not math.isfinite(wait):
        raise InvalidDocument("expected a finite number", source="request", field="wait")
    name, clock = who.device.device, controller.clock
    until = clock.monotonic() + min(wait, MAX_WAIT)
    while True:
        seen = controller.changes.revision
        found = await run_in_threadpool(_newest, controller, name, newer_than)
        if found is not None:
            return Response(found, media_type="application/json")
        while controller.changes.revision == seen:
            if clock.monotonic() >= until or controller.stopping.is_set():
                return Response(status_code=204)
            await asyncio.sleep(_POLL)
            if await request.is_disconnected():
                return Response(status_code=204)


def _newest(controller: Controller, device: str, newer_than: int) -> bytes | None:
    with controller.store.reading() as session:
        row = records.desired(session, device)
        return row.envelope if row is not None and row.content and row.generation > newer_than else None


@router.get("/device/v1/time")
def signed_time(controller: Service, nonce: str = "") -> Response:
    """What time it is, signed over the caller's nonce. Open to all: a wrong clock mints no valid token."""
    return Response(controller.signed_time(nonce), media_type="application/json")


@router.get("/device/v1/denied")
def denied(controller: Service, who: Device) -> Response:
    """The signed deny-list: what a trend store must refuse, which gets its rows from a broker."""
    return Response(controller.signed_denied(), media_type="application/json")


@router.get("/device/v1/residency")
def residency_policy(controller: Service, who: Device) -> Response:
    """What may leave the asking trend store's sites, signed."""
    return Response(
        controller.signed_residency(residency.store_of(who.identity)), media_type="application/json"
    )


@router.post("/device/v1/residency/decisions")
def residency_decisions(controller: Service, who: Device, body: Documents) -> Response:
    """What a trend store decided by its policy: audit records."""
    store = residency.store_of(who.identity)
    decisions = decode(body, Decisions).decisions
    if len(decisions) > MAX_DECISIONS or any(len(each.spans) > MAX_SPANS for each in decisions):
        raise InvalidDocument(f"more than {MAX_DECISIONS} decisions", source="request", field="decisions")
    with controller.store.writing() as session:
        new = residency.accept(session, store, decisions, controller.clock.now())
    return answer({"new": new})


@router.post("/device/v1/messages")
def message(request: Request, controller: Service, who: Device, body: MessageBody) -> Response:
    """The same messages as over MQTT, for where it is blocked; a device speaks for itself only."""
    topic = request.headers.get("edgeward-topic", "")
    if topics.parse(topic).name != who.device:
        raise Forbidden(f"{who.identity} may not send on {topic[:200]}")
    try:
        controller.ingest.accept(topic, body)
    except TrustError as error:
        raise Forbidden(error.message) from None
    return Response(status_code=204)
