"""What people decide on devices that wait for approval."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from msgspec import Struct

from controller import approval
from controller.api.access import Admin, Reader, Service, SmallBody, answer, decode

router = APIRouter(prefix="/api/v1")

_STATES = {"approve": approval.APPROVED, "deny": approval.DENIED}


class _Decision(Struct, forbid_unknown_fields=True):
    """`fingerprint` is the SHA-256 of the public key that the person saw, lower-case hex."""

    fingerprint: str


@router.get("/enrollmentrequests")
def waiting(controller: Service, person: Reader) -> Response:
    with controller.store.reading() as session:
        return answer({"items": approval.waiting(session, controller.clock.now())})


@router.post("/enrollmentrequests/{name}/{decision}")
def decide(
    name: str, decision: Literal["approve", "deny"], controller: Service, person: Admin, body: SmallBody
) -> Response:
    fingerprint = decode(body, _Decision).fingerprint
    with controller.store.writing() as session:
        now = controller.clock.now()
        approval.decide(session, name, _STATES[decision], fingerprint, person.name, now)
    return Response(status_code=204)
