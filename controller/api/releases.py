"""Trust and releases: what a releaser's tool asks and sends."""

from __future__ import annotations

from fastapi import APIRouter, Response
from msgspec import Struct

from controller.api.access import Reader, ReleaseBody, Releaser, Service, answer, decode
from controller.store import records
from edgeward.wire.resources import model_version_name

router = APIRouter(prefix="/api/v1")


class _Root(Struct, forbid_unknown_fields=True):
    root: str
    targets: str


class _Release(Struct, forbid_unknown_fields=True):
    targets: str
    manifest: str


@router.get("/trust")
def trust(controller: Service, person: Reader) -> Response:
    return answer(
        {
            "ca": controller.authority.ca_pem,
            "desiredKeys": controller.desired_keys,
            "onlineKeys": controller.releases.online_keys(),
            "tufRoot": controller.releases.root_text(),
        }
    )


@router.post("/releases/root")
def install_root(controller: Service, person: Releaser, body: ReleaseBody) -> Response:
    given = decode(body, _Root)
    controller.releases.install_root(given.root.encode(), given.targets.encode())
    with controller.store.writing() as session:
        records.audit(session, controller.clock.now(), person.name, "install", "TUFRoot", "root")
    controller.changes.bump()
    return answer({"version": 1}, 201)


@router.post("/releases")
def publish(controller: Service, person: Releaser, body: ReleaseBody) -> Response:
    given = decode(body, _Release)
    manifest, digest = controller.publish_release(
        given.targets.encode(), given.manifest.encode(), person.name
    )
    name = model_version_name(manifest.model, manifest.version)
    return answer({"name": name, "model": manifest.model, "version": manifest.version, "digest": digest}, 201)
