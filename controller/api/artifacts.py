"""Artifacts and TUF metadata: what devices download and releasers upload."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from controller.api.access import Fetcher, Releaser, Service, answer
from controller.api.download import Download
from controller.store import records
from edgeward.identifiers import check_digest

router = APIRouter()


@router.api_route("/artifacts/{digest}", methods=["GET", "HEAD"])
def fetch(request: Request, digest: str, controller: Service, who: Fetcher) -> Response:
    state = request.app.state
    return Download(
        controller.artifacts.path(check_digest(digest)),
        f'"{digest}"',
        who,
        state.downloads,
        state.download_threads,
        controller.clock,
        {"Cache-Control": "private, max-age=31536000, immutable"},
    )


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
