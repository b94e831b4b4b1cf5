"""The Open Inference Protocol v2 over requests and answers, whatever carries them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from importlib import resources
from typing import NamedTuple, TypeVar
from urllib.parse import unquote

import msgspec
from msgspec import Struct

from agent.runtime.port import Tensor
from agent.serving import compression, describe, encode, metrics
from agent.serving.catalog import Catalog
from agent.serving.decode import parse
from agent.serving.inference import Inference, Models
from agent.serving.messages import JSON, Handler, Request, Respond, Response, answer, refuse
from agent.serving.refusal import Refusal, bad
from agent.serving.settings import Settings
from agent.serving.signature import Signature
from agent.serving.statistics import Statistics
from edgeward.clock import Clock

log = logging.getLogger(__name__)

T = TypeVar("T")

_REMEMBERED_TARGETS = 512
_UNSUPPORTED = ("systemsharedmemory", "cudasharedmemory", "trace", "logging")


class _Index(Struct):
    ready: bool = False


class _Target(NamedTuple):
    """What a path means: the answering function by method, and the model it is about."""

    methods: dict[bytes, Callable[[Request, Respond, str, str], None]]
    name: str = ""
    version: str = ""


class Api:
    """`handle` answers one request; call it on the engine's loop."""

    def __init__(
        self,
        catalog: Catalog,
        settings: Settings,
        clock: Clock,
        routes: Mapping[str, Handler] | None = None,
    ) -> None:
        """`routes`: path prefix (`/v1/streams`) -> what answers everything below it."""
        self.statistics = Statistics()
        self.models = Models(catalog, self.statistics)
        self.draining = False
        self.clock = clock
        self.settings = settings
        self._catalog = catalog
        self._routes = sorted((routes or {}).items(), key=lambda item: -len(item[0]))
        self._targets: dict[bytes, _Target] = {}

    def handle(self, request: Request, respond: Respond) -> None:
        """Never raises. `respond` is called once, now or later."""
        try:
            target = self._targets.get(request.target) or self._resolve(request.target)
            method = target.methods.get(request.method)
            if method is None:
                allow = ", ".join(name.decode() for name in target.methods)
                raise Refusal(405, f"this path answers {allow}", allow=allow)
            if request.method != b"GET" and b"origin" in request.headers:
                # A page in a browser on this device must not reach models and streams behind its user's back.
                raise Refusal(403, "requests from web pages (with an Origin) are not answered")
            method(request, respond, target.name, target.version)
        except Refusal as refusal:
            respond(refuse(refusal))
        except Exception:
            log.exception("answering %r", request.target[:200])
            respond(refuse(Refusal(500, "internal error, see the agent's log")))

    def ready(self) -> bool:
        settled = self._catalog.settled
        return settled and not self.draining and all(served.ready for served in self._catalog.all())

    # which path

    def _resolve(self, target: bytes) -> _Target:
        """Raises Refusal (404)."""
        text = target.partition(b"?")[0].decode("latin-1")
        if not text.startswith("/"):
            text = "/" + text.partition("://")[2].partition("/")[2]
        found = self._find(text)
        if len(self._targets) >= _REMEMBERED_TARGETS:
            self._targets.clear()
        self._targets[target] = found
        return found

    def _find(self, path: str) -> _Target:
        for prefix, handler in self._routes:
            if path == prefix or path.startswith(prefix.rstrip("/") + "/"):
                return _Target(dict.fromkeys((b"GET", b"POST", b"PUT", b"DELETE"), _mounted(handler)))
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match parts:
            case ["metrics"]:
                return _Target({b"GET": self._metrics})
            case ["openapi.json"]:
                return _Target({b"GET": _openapi})
            case ["v2"]:
                return _Target({b"GET": lambda _, respond, *__: respond(answer(describe.server()))})
            case ["v2", "health", "live"]:
                return _Target({b"GET": lambda _, respond, *__: respond(answer({"live": True}))})
            case ["v2", "health", "ready"]:
                return _Target({b"GET": self._server_ready})
            case ["v2", "models", "stats"]:
                return _Target({b"GET": self._all_statistics})
            case ["v2", "repository", "index"]:
                return _Target({b"POST": self._index})
            case ["v2", "repository", "models", name, "load" | "unload"]:
                return _Target({b"POST": _read_only}, name)
            case ["v2", "models", name, "versions", version, *rest]:
                return self._about_model(path, name, version, rest)
            case ["v2", "models", name, *rest]:
                return self._about_model(path, name, "", rest)
            case ["v2", first, *_] if first in _UNSUPPORTED:
                raise Refusal(404, f"{first} is not supported, GET /v2 names the extensions that are")
        raise Refusal(404, f"no such path: {path[:200]}")

    def _about_model(self, path: str, name: str, version: str, rest: list[str]) -> _Target:
        match rest:
            case []:
                return _Target({b"GET": self._metadata}, name, version)
            case ["infer"]:
                return _Target({b"POST": self._infer}, name, version)
            case ["ready"]:
                return _Target({b"GET": self._model_ready}, name, version)
            case ["config"]:
                return _Target({b"GET": self._config}, name, version)
            case ["stats"]:
                return _Target({b"GET": self._model_statistics}, name, version)
        raise Refusal(404, f"no such path: {path[:200]}")

    # inference

    def _infer(self, request: Request, respond: Respond, name: str, version: str) -> None:
        headers = request.headers
        if b"content-encoding" in headers or b"accept-encoding" in headers:
            self._infer_compressed(request, respond, name, version)
        else:
            self._infer_plain(request, respond, name, version)

    def _infer_plain(self, request: Request, respond: Respond, name: str, version: str) -> None:
        began = self.clock.monotonic()
        signature = self.models.ready(name, version)
        body = request.body

        def finish(answering: Signature, outputs: dict[str, Tensor]) -> None:
            respond(encode.response(answering, outputs, parsed.wanted, parsed.id))

        def fail(refusal: Refusal) -> None:
            respond(refuse(refusal))

        inference = Inference(self.models, signature, version, self.clock, began, finish, fail)
        try:
            length = request.headers.get(b"inference-header-content-length")
            parsed = parse(
                signature, body, None if length is None else _length(length), self.settings.max_json_bytes
            )
        except Refusal as refusal:
            inference.refuse(refusal)
            return
        inference.submit(parsed.tensors, len(body))

    def _infer_compressed(self, request: Request, respond: Respond, name: str, version: str) -> None:
        encoding = request.headers.get(b"content-encoding", b"identity").lower()
        wanted = compression.accepted(request.headers.get(b"accept-encoding", b""))

        def pack(response: Response) -> None:
            if not wanted or sum(map(len, response.body)) < self.settings.compress_from_bytes:
                respond(response)
            else:
                _off_loop(lambda: compression.compress(wanted, response), respond, respond)

        if encoding == b"identity":
            self._infer_plain(request, pack, name, version)
            return
        self.models.ready(name, version)

        def unpacked(body: bytes) -> None:
            request.body = body
            try:
                self._infer_plain(request, pack, name, version)
            except Refusal as refusal:
                respond(refuse(refusal))

        limit = self.settings.max_body_bytes
        _off_loop(lambda: compression.decompress(encoding, request.body, limit), unpacked, respond)

    # everything else

    def _metadata(self, request: Request, respond: Respond, name: str, version: str) -> None:
        respond(answer(describe.model(self.models.find(name, version))))

    def _config(self, request: Request, respond: Respond, name: str, version: str) -> None:
        respond(answer(describe.config(self.models.find(name, version))))

    def _model_ready(self, request: Request, respond: Respond, name: str, version: str) -> None:
        served = self.models.find(name, version)
        content: dict[str, object] = {"name": served.name, "ready": served.ready}
        if not served.ready:
            content["error"] = served.reason or f"model '{name}' is not ready"
        respond(answer(content, 200 if served.ready else 503))

    def _server_ready(self, request: Request, respond: Respond, name: str, version: str) -> None:
        ready = self.ready()
        content: dict[str, object] = {"ready": ready}
        if not ready:
            waiting = ", ".join(served.name for served in self._catalog.all() if not served.ready)
            if self.draining:
                content["error"] = "the server is stopping"
            else:
                content["error"] = f"not ready: {waiting}" if waiting else "models are being loaded"
        respond(answer(content, 200 if ready else 503))

    def _model_statistics(self, request: Request, respond: Respond, name: str, version: str) -> None:
        served = self.models.find(name, version)
        respond(answer({"model_stats": self.statistics_of(served.name, served.version)}))

    def _all_statistics(self, request: Request, respond: Respond, name: str, version: str) -> None:
        respond(answer({"model_stats": self.statistics_of()}))

    def statistics_of(self, name: str = "", version: str = "") -> list[dict[str, object]]:
        """Of the models in the catalog; of one model, or all."""
        return [
            describe.statistics(
                item.name, item.version, self.statistics.of(item.name, item.version), self.clock
            )
            for item in self._catalog.all()
            if name in ("", item.name) and version in ("", item.version)
        ]

    def _index(self, request: Request, respond: Respond, name: str, version: str) -> None:
        try:
            wish = msgspec.json.decode(request.body or b"{}", type=_Index)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise bad(f"not a repository index request: {error}") from None
        respond(answer(describe.index(self._catalog.all(), ready_only=wish.ready)))

    def _metrics(self, request: Request, respond: Respond, name: str, version: str) -> None:
        respond(Response(200, [metrics.exposition(self.statistics, self._catalog)], metrics.CONTENT_TYPE))


def _off_loop(work: Callable[[], T], then: Callable[[T], None], respond: Respond) -> None:
    """Do work in a thread and go on with its result on this loop."""

    def done(future: asyncio.Future[T]) -> None:
        error = future.exception()
        if error is None:
            then(future.result())
        elif isinstance(error, Refusal):
            respond(refuse(error))
        else:
            log.error("compression failed", exc_info=error)
            respond(refuse(Refusal(500, "internal error, see the agent's log")))

    asyncio.get_running_loop().run_in_executor(None, work).add_done_callback(done)


def _mounted(handler: Handler) -> Callable[[Request, Respond, str, str], None]:
    return lambda request, respond, name, version: handler(request, respond)


def _read_only(request: Request, respond: Respond, name: str, version: str) -> None:
    raise Refusal(403, f"model '{name[:100]}': {describe.READ_ONLY}")


def _openapi(request: Request, respond: Respond, name: str, version: str) -> None:
    document = resources.files("agent.serving").joinpath("openapi.json").read_bytes()
    respond(Response(200, [document], JSON))


def _length(header: bytes) -> int:
    if not header.isdigit() or len(header) > 12:
        raise bad(
            f"Inference-Header-Content-Length must be an integer, got {header[:40].decode('latin-1')!r}"
        )
    return int(header)
