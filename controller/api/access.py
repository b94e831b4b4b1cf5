"""Who asks, what they may do, and how much they may send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import jwt
import msgspec
from fastapi import Depends, Request, Response

from controller.identity import AuthenticatedDevice
from controller.service import Controller
from controller.store import records
from edgeward.errors import Forbidden, InvalidDocument, TrustError, Unavailable
from edgeward.fields import explain, split_error
from edgeward.storage import sha256_hex

T = TypeVar("T")

COOKIE = "edgeward_session"
SESSION_LIFETIME = 12 * 3600.0

PERMISSIONS: dict[str, frozenset[str]] = {
    "viewer": frozenset({"read"}),
    "operator": frozenset({"read", "operate"}),
    "releaser": frozenset({"read", "release"}),
    "admin": frozenset({"read", "operate", "release", "administer"}),
}

SMALL = 64 << 10
DOCUMENTS = 8 << 20
RELEASE = 64 << 20


class Unauthenticated(Forbidden):
    """No credential, or one that is not known: 401."""


class TooManyAttempts(Unavailable):
    """429: one address failed too often."""


@dataclass(frozen=True)
class Person:
    name: str
    role: str


def controller_of(request: Request) -> Controller:
    controller: Controller = request.app.state.controller
    return controller


Service = Annotated[Controller, Depends(controller_of)]


def answer(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def body_of(limit: int) -> Callable[[Request], Any]:
    """A dependency: the request's body, at most `limit` bytes. Raises InvalidDocument above that."""

    async def read(request: Request) -> bytes:
        chunks = bytearray()
        async for chunk in request.stream():
            chunks += chunk
            if len(chunks) > limit:
                raise InvalidDocument(f"the request's body is larger than {limit} bytes")
        return bytes(chunks)

    return read


SmallBody = Annotated[bytes, Depends(body_of(SMALL))]
Documents = Annotated[bytes, Depends(body_of(DOCUMENTS))]
ReleaseBody = Annotated[bytes, Depends(body_of(RELEASE))]


def decode(data: bytes, type_: type[T]) -> T:
    """The body as `type_`. Raises InvalidDocument naming the field."""
    try:
        return msgspec.json.decode(data, type=type_)
    except msgspec.ValidationError as error:
        text, field = split_error(error)
        raise InvalidDocument(explain(text, type_, field), source="request", field=field) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidDocument(f"not valid JSON: {error}", source="request") from None


# credentials


def bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def person_of(controller: Controller, token: str) -> Person | None:
    return _by_digest(controller, sha256_hex(token.encode()))


def _by_digest(controller: Controller, digest: str) -> Person | None:
    with controller.store.reading() as session:
        row = records.api_token(session, digest)
        return Person(row.name, row.role) if row else None


def make_session(controller: Controller, token: str) -> str:
    """A cookie's value that stands for an API token without holding it; it ends with the token."""
    claims = {"sub": sha256_hex(token.encode()), "exp": int(controller.clock.now() + SESSION_LIFETIME)}
    return jwt.encode(claims, controller.session_secret, algorithm="HS256")


def _session_person(controller: Controller, cookie: str) -> Person | None:
    try:
        claims = jwt.decode(
            cookie,
            controller.session_secret,
            algorithms=["HS256"],
            options={"require": ["exp", "sub"], "verify_exp": False},
        )
    except jwt.InvalidTokenError:
        return None
    if claims["exp"] < controller.clock.now():
        return None
    return _by_digest(controller, claims["sub"])


def authenticate(request: Request, controller: Service) -> Person:
    """The person asking. A session cookie counts for reading only, so that no other site can use it to write."""
    token, cookie = bearer(request), request.cookies.get(COOKIE, "")
    person = None
    if token:
        person = person_of(controller, token)
    elif cookie and request.method in ("GET", "HEAD"):
        person = _session_person(controller, cookie)
    if person is None:
        raise Unauthenticated(
            "no valid API token was given" if not token else "the API token is not known",
            hint="pass --token-file; `edgeward up` writes admin.token into its data folder",
        )
    return person


def needs(permission: str) -> Callable[..., Person]:
    """A dependency: the person asking, who must hold `permission`. Raises Forbidden."""

    def check(person: Annotated[Person, Depends(authenticate)]) -> Person:
        if permission not in PERMISSIONS.get(person.role, frozenset()):
            roles = [role for role, held in PERMISSIONS.items() if permission in held]
            raise Forbidden(f"{person.name} is a {person.role}; this needs one of {', '.join(roles)}")
        return person

    return check


Reader = Annotated[Person, Depends(needs("read"))]
Operator = Annotated[Person, Depends(needs("operate"))]
Releaser = Annotated[Person, Depends(needs("release"))]
Admin = Annotated[Person, Depends(needs("administer"))]


def _sender(request: Request, authenticate: Callable[[str], AuthenticatedDevice]) -> AuthenticatedDevice:
    token = bearer(request)
    if not token:
        raise Unauthenticated("no device token was given")
    try:
        return authenticate(token)
    except TrustError as error:
        raise Unauthenticated(error.message) from None


def device_of(request: Request, controller: Service) -> AuthenticatedDevice:
    """The device or trend store asking. Raises Unauthenticated, Forbidden when revoked."""
    return _sender(request, controller.authority.authenticate)


def renewing_device(request: Request, controller: Service) -> AuthenticatedDevice:
    """The same, whose certificate may have ended not too long ago."""
    return _sender(request, controller.authority.authenticate_renewal)


Device = Annotated[AuthenticatedDevice, Depends(device_of)]
RenewingDevice = Annotated[AuthenticatedDevice, Depends(renewing_device)]


def device_or_reader(request: Request, controller: Service) -> str:
    """Either a device or a person may fetch artifacts; who it is, as a name for counting."""
    if bearer(request).count(".") == 2:
        return str(device_of(request, controller).identity)
    return f"person {needs('read')(authenticate(request, controller)).name}"


Fetcher = Annotated[str, Depends(device_or_reader)]


class Throttle:
    """At most `limit` failed attempts per address and minute."""

    def __init__(self, limit: int = 30) -> None:
        self._limit = limit
        self._failed: dict[str, list[float]] = {}

    def check(self, address: str, now: float) -> None:
        """Raises TooManyAttempts."""
        recent = [at for at in self._failed.get(address, []) if now - at < 60.0]
        if recent:
            self._failed[address] = recent
        else:
            self._failed.pop(address, None)
        if len(recent) >= self._limit:
            raise TooManyAttempts(
                "too many failed attempts from this address", hint="wait a minute", retry_after=60.0
            )

    def failed(self, address: str, now: float) -> None:
        if len(self._failed) > 10_000:
            self._failed.clear()
        self._failed.setdefault(address, []).append(now)
