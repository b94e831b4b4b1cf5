"""Artifacts and TUF metadata: what devices download and releasers upload."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from controller.api.access import Fetcher, Releaser, Service, answer
from controller.api.download import Download
from controller.api.redirect import Redirect
from controller.store import records
from edgeward.errors import NotFound
from edgeward.identifiers import check_digest

router = APIRouter()

MAX_BASES = 8
MAX_WAIT = 30.0
#: As the next request may wait again, and gets its answer at once when the delta is there.
RETRY_AFTER = 1
_POLL = 0.2
_CACHING = "private, max-age=31536000, immutable"


def _download(
    request: Request, controller: Service, who: Fetcher, path: Path, digest: str, headers: dict[str, str]
) -> Download:
    state = request.app.state
    return Download(
        path,
        f'"{digest}"',
        who,
        state.downloads,
        state.download_threads,
        controller.clock,
        {"Cache-Control": _CACHING, **headers},
    )


@router.api_route("/artifacts/{digest}", methods=["GET", "HEAD"])
def fetch(request: Request, digest: str, controller: Service, who: Fetcher) -> Response:
    """The file, or for GET the address where it is (307) when artifacts are kept elsewhere."""
    source = controller.artifacts.source(check_digest(digest))
    if isinstance(source, Path):
        return _download(request, controller, who, source, digest, {})
    if request.method == "HEAD":
        if not controller.artifacts.has(digest):  # what is remembered does not count: an upload depends on it
            raise NotFound(f"there is no artifact {digest}")
        return Response(
            headers={
                "Content-Length": str(source.size),
                "Content-Type": "application/octet-stream",
                "ETag": f'"{digest}"',
                "Cache-Control": "no-store",
            }
        )
    return Redirect(source, who, request.app.state.downloads)


@router.get("/artifacts/{digest}/delta")
async def delta(
    request: Request,
    digest: str,
    controller: Service,
    who: Fetcher,
    base: Annotated[list[str], Query(max_length=MAX_BASES)],
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT)] = 0.0,
) -> Response:
    """The smallest delta that makes the artifact of one of the bases, which `Edgeward-Delta-Base` names.

    404 when none is worthwhile. 503 with Retry-After when it is still being made after `wait` seconds.
    """
    deltas, clock = controller.deltas, controller.clock
    until = clock.monotonic() + wait
    while True:
        seen = deltas.revision
        found = await run_in_threadpool(deltas.find, digest, base)
        if found is not None:
            break
        while deltas.revision == seen:
            over = clock.monotonic() >= until or controller.stopping.is_set()
            if over or await request.is_disconnected():
                return _being_made(digest)
            await asyncio.sleep(_POLL)
    headers = {
        "Edgeward-Delta-Base": found.base,
        "Edgeward-Delta-Codec": await run_in_threadpool(found.codec),
    }
    return _download(request, controller, who, found.path, found.sha256, headers)


def _being_made(digest: str) -> Response:
    message = f"the delta for {digest[:16]} is being made"
    hint = "ask again, or fetch the whole artifact"
    busy = answer({"error": {"message": message, "hint": hint, "source": "", "field": ""}}, 503)
    busy.headers["Retry-After"] = str(RETRY_AFTER)
    return busy


@router.put("/artifacts/{digest}")
async def store(digest: str, request: Request, controller: Service, person: Releaser) -> Response:
    upload = await run_in_threadpool(controller.artifacts.receive, digest)
    try:
        async for chunk in request.stream():
            upload.write(chunk)
        size = await run_in_threadpool(upload.finish)
    finally:
        upload.abandon()

    def record() -> None:
        with controller.store.writing() as session:
            now = controller.clock.now()
            records.audit(session, now, person.name, "upload", "Artifact", digest, f"{size} bytes")

    await run_in_threadpool(record)
    return answer({"digest": digest, "size": size}, 201)


@router.get("/tuf/{name}")
def metadata(name: str, controller: Service) -> Response:
    data = controller.releases.file(name)
    caching = "no-cache" if name == "timestamp.json" else "public, max-age=31536000, immutable"
    return Response(data, media_type="application/json", headers={"Cache-Control": caching})
