"""The ASGI application: routes, error answers and security headers."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

import edgeward
from controller.api import artifacts, connection, device, enrollment, people, releases
from controller.api.access import Service, Throttle, TooManyAttempts, Unauthenticated, answer
from controller.downloads import Downloads
from controller.service import Controller
from edgeward.errors import (
    Conflict,
    DigestMismatch,
    EdgewardError,
    Forbidden,
    InvalidDocument,
    NotFound,
    PackageError,
    TrustError,
    Unavailable,
    UsageError,
)

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent.parent / "web" / "static"

#: The first class that fits decides.
STATUS: tuple[tuple[type[EdgewardError], int], ...] = (
    (Unauthenticated, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (TooManyAttempts, 429),
    (Unavailable, 503),
    (UsageError, 400),
    (PackageError, 400),
    (DigestMismatch, 400),
    (TrustError, 403),
)

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class SecurityHeaders:
    """Plain ASGI, so that streams stay streams."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if scope.get("path", "").startswith(("/api/", "/device/", "/enroll/")):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, sending if scope["type"] == "http" else send)


class _Application(FastAPI):
    """Looks for the connection below each request while `send` is still the server's own."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        connection.offer(scope, send)
        await super().__call__(scope, receive, send)


def build(controller: Controller, *, static: Path = STATIC) -> FastAPI:
    app = _Application(title="Edgeward controller", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.controller = controller
    app.state.throttle = Throttle()
    limits = controller.settings.downloads
    app.state.downloads = Downloads(limits, controller.clock)
    app.state.download_threads = ThreadPoolExecutor(limits.downloads, thread_name_prefix="download")
    app.add_middleware(SecurityHeaders)
    app.add_exception_handler(EdgewardError, _edgeward_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)

    @app.get("/healthz")
    def health(controller: Service) -> Response:
        return answer(
            {"status": "ok", "version": edgeward.__version__, "brokerConnected": controller.link.connected}
        )

    for router in (releases.router, artifacts.router, device.router, enrollment.router, people.router):
        app.include_router(router)
    if (static / "index.html").is_file():
        app.mount("/", StaticFiles(directory=static, html=True))
    else:

        @app.get("/")
        def nothing() -> Response:
            return PlainTextResponse("Edgeward controller. The web page is not part of this installation.\n")

    return app


def _error(status: int, message: str, *, hint: str = "", source: str = "", field: str = "") -> Response:
    return answer({"error": {"message": message, "hint": hint, "source": source, "field": field}}, status)


async def _edgeward_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EdgewardError)
    status = next((code for type_, code in STATUS if isinstance(error, type_)), 500)
    if isinstance(error, InvalidDocument):
        return _error(status, error.problem, hint=error.hint, source=error.source, field=error.field)
    response = _error(status, error.message, hint=error.hint)
    if isinstance(error, Unavailable) and error.retry_after is not None:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after))
    return response


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first.get("loc", ())[1:])
    return _error(400, str(first.get("msg", "invalid request")), source="request", field=field)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, str(error.detail))


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error(500, "the controller failed on this request", hint="its log says why")
