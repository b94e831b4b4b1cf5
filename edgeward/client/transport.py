"""HTTP as Edgeward uses it; the only module that imports httpx."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from edgeward.client import redirect
from edgeward.errors import (
    Conflict,
    EdgewardError,
    Forbidden,
    InvalidDocument,
    NotFound,
    Unavailable,
    UsageError,
)
from edgeward.trust.tls import PeerTime, client_context

_BY_STATUS: dict[int, type[EdgewardError]] = {
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}

_ERROR_BYTES = 64 << 10
_ERROR_PIECES = 32


def error_from(status: int, body: Any, url: str) -> EdgewardError:
    """The exception for an error answer `{"error": {"message", "hint", "source", "field"}}`."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        error = {"message": f"{url} answered {status}"}
    message, hint = str(error.get("message", "")), str(error.get("hint", ""))
    if status in (400, 422):
        return InvalidDocument(
            message, source=str(error.get("source", "")), field=str(error.get("field", "")), hint=hint
        )
    return _BY_STATUS.get(status, EdgewardError)(message, hint=hint)


class Transport:
    """A small HTTP client with a bearer credential made anew for every request.

    Credentials travel in headers only, never in a URL.
    """

    def __init__(
        self,
        base_url: str,
        *,
        credential: Callable[[], str] | None = None,
        timeout: float = 15.0,
        ca_file: Path | None = None,
        credential_source: str = "",
        peer_time: PeerTime | None = None,
        context: ssl.SSLContext | None = None,
        certificate: Path | None = None,
    ) -> None:
        """`ca_file` holds the only CAs to trust; `peer_time` is for a machine whose clock may be wrong;
        `certificate` holds the client's own, with its key, in PEM. `context` decides about TLS instead of all.
        """
        if not _is_address(base_url):
            raise InvalidDocument(
                f"{base_url!r} is not the address of a controller", hint="expected http(s)://host[:port]"
            )
        self.base_url = base_url.rstrip("/")
        self._credential = credential
        self._credential_source = credential_source
        self._timeout = _timeout(timeout)
        self._peer_time = peer_time
        self._verify = context or _context(self.base_url, ca_file, peer_time)
        if certificate is not None:
            _present(self._verify, certificate)
        self._client = self._new_client()

    def _new_client(self, **more: Any) -> httpx.Client:
        return httpx.Client(
            base_url=self.base_url, timeout=self._timeout, verify=self._verify, trust_env=False, **more
        )

    def close(self) -> None:
        self._client.close()

    def _headers(self, extra: dict[str, str] | None, anonymous: bool = False) -> dict[str, str]:
        headers = dict(extra or {})
        if self._credential is not None and not anonymous:
            headers["Authorization"] = f"Bearer {self._credential()}"
        return headers

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: bytes | Iterator[bytes] | None = None,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
        anonymous: bool = False,
    ) -> httpx.Response:
        """Send one request, `anonymous` without the credential.

        Raises the EdgewardError that the answer's status stands for, Unavailable when there is none.
        """
        with _translated(f"{self.base_url}{path}"):
            response = self._client.request(
                method,
                path,
                json=json,
                content=content,
                params=params,
                headers=self._headers(headers, anonymous),
                timeout=httpx.USE_CLIENT_DEFAULT if timeout is None else timeout,
            )
        if response.status_code >= 400:
            raise self._error(response, path)
        return response

    def _error(self, response: httpx.Response, path: str) -> EdgewardError:
        error = error_from(response.status_code, _json_or_none(response), f"{self.base_url}{path}")
        if isinstance(error, Unavailable):
            error.retry_after = retry_after(response.headers.get("retry-after"), response.headers.get("date"))
        if response.status_code == 401 and self._credential_source:
            return Forbidden(f"{self._credential_source}: {error.message}", hint=error.hint)
        return error

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        method: str = "GET",
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
        connected: Callable[[socket.socket], None] = lambda connection: None,
        elsewhere: bool = False,
    ) -> Iterator[httpx.Response]:
        """A request whose answer is read piece by piece by the caller, on a connection of its own.

        `connected` is given each connection as soon as there is one: a time-out is for one read each, so
        who wants to bound the whole must be able to end it. With `elsewhere` the answer may be at another
        server, to which the controller points by one redirect (see `edgeward.client.redirect`): that one
        never sees the credential, and may no longer like the address, which is then asked for once more.
        """
        for last in (False, True):
            with self._ask(method, path, content, headers, connected) as response:
                if not elsewhere or response.status_code not in redirect.STATUS:
                    yield response
                    return
                target = redirect.target(self.base_url, response.headers.get("location"))
            context = self._elsewhere_context(target)
            with signed_get(target, headers=headers, connected=connected, context=context) as response:
                if response.status_code in redirect.STALE and not last:
                    continue
                _check_elsewhere(response, target)
                yield response
                return

    @contextmanager
    def _ask(
        self,
        method: str,
        path: str,
        content: bytes | None,
        headers: dict[str, str] | None,
        connected: Callable[[socket.socket], None],
    ) -> Iterator[httpx.Response]:
        with (
            _translated(f"{self.base_url}{path}"),
            self._new_client(limits=httpx.Limits(max_keepalive_connections=0)) as client,
            client.stream(
                method, path, content=content, headers=self._headers(headers), extensions=_tracing(connected)
            ) as response,
        ):
            if response.status_code >= 400:
                raise self._error(_told(response), path)
            yield response

    def _elsewhere_context(self, url: str) -> ssl.SSLContext:
        # Not by `ca_file`: that one speaks for the controller alone.
        return _system_context(url, self._peer_time)


@contextmanager
def signed_get(
    url: str,
    *,
    headers: dict[str, str] | None = None,
    connected: Callable[[socket.socket], None] = lambda connection: None,
    context: ssl.SSLContext | None = None,
) -> Iterator[httpx.Response]:
    """GET a pre-signed address, without credential, cookies or any more redirects.

    Of `headers` only those go along that say which part is wanted. `context` trusts the system's CAs by
    default. The answer may be an error: the caller looks. Raises Unavailable without one.
    """
    with (
        _translated(redirect.shown(url)),
        httpx.Client(
            timeout=_timeout(15.0),
            verify=context or _system_context(url, None),
            trust_env=False,
            follow_redirects=False,
        ) as client,
        client.stream(
            "GET", url, headers=redirect.forwarded(headers or {}), extensions=_tracing(connected)
        ) as response,
    ):
        yield response


def _check_elsewhere(response: httpx.Response, url: str) -> None:
    """Raises Unavailable for every answer but the bytes: the controller's word was that they are there."""
    if response.status_code in (200, 206):
        return
    what = "points elsewhere once more" if response.is_redirect else f"answered {response.status_code}"
    raise Unavailable(
        f"{redirect.shown(url)} {what}",
        hint="the controller sent here: is its artifact store as it should be?",
        retry_after=retry_after(response.headers.get("retry-after"), response.headers.get("date")),
    )


@contextmanager
def _translated(where: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(
            f"cannot reach {where}: {redirect.without_queries(str(error)) or type(error).__name__}",
            hint="is it running, and is the address right?",
        ) from None


def _tracing(connected: Callable[[socket.socket], None]) -> dict[str, Any]:
    def trace(event: str, info: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            connected(info["return_value"].get_extra_info("socket"))

    return {"trace": trace}


def _told(response: httpx.Response) -> httpx.Response:
    """An error's answer with as much of its body as counts."""
    kept = {name: response.headers[name] for name in ("retry-after", "date") if name in response.headers}
    return httpx.Response(response.status_code, headers=kept, content=_beginning(response))


def _timeout(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=min(seconds, 10.0))


def retry_after(value: str | None, date: str | None) -> float | None:
    """Seconds of a `Retry-After` field (RFC 9110, 10.2.3), None when there is none that makes sense.

    A point in time counts from the answer's own `Date`: the clock here may be wrong.
    """
    if value is None:
        return None
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    try:
        gap = parsedate_to_datetime(value) - parsedate_to_datetime(date or "")
    except (ValueError, TypeError):
        return None
    return max(gap.total_seconds(), 0.0)


def _beginning(response: httpx.Response) -> bytes:
    """As much of an error's body as an honest one has: it may be endless, or come byte by byte."""
    body = bytearray()
    for count, chunk in enumerate(response.iter_raw()):
        body += chunk
        if len(body) > _ERROR_BYTES or count > _ERROR_PIECES:
            break
    return bytes(body[:_ERROR_BYTES])


def _context(url: str, ca_file: Path | None, peer_time: PeerTime | None) -> ssl.SSLContext:
    if url.startswith("http:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody; the usual roots are a megabyte
    usual = httpx.create_ssl_context(trust_env=False)
    if peer_time is not None:
        return client_context(peer_time, ca_file=ca_file, roots=usual.get_ca_certs(binary_form=True))
    return ssl.create_default_context(cafile=str(ca_file)) if ca_file else usual


def _system_context(url: str, peer_time: PeerTime | None) -> ssl.SSLContext:
    """Trusts the system's CAs; where the system has none, those that the HTTP library brings."""
    if url.startswith("http:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    paths = ssl.get_default_verify_paths()
    roots = None if paths.cafile or paths.capath else _roots()
    return client_context(peer_time or PeerTime(None, lambda: False), roots=roots)


def _roots() -> list[bytes]:
    return httpx.create_ssl_context(trust_env=False).get_ca_certs(binary_form=True)


def _present(context: ssl.SSLContext, certificate: Path) -> None:
    try:
        context.load_cert_chain(certificate)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{certificate}: holds no certificate with its key: {error}") from None


def _is_address(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host) and 0 < (url.port or 80) < 65536


def _json_or_none(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None
