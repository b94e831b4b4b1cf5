"""The controller's API, method by method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgeward.client.transport import Transport
from edgeward.errors import InvalidDocument, NotFound
from edgeward.storage import sha256_file
from edgeward.wire.enrollment import EnrollPending, EnrollRequest, EnrollResponse, RenewRequest
from edgeward.wire.residency import Decisions
from edgeward.wire.resources import Resource, kind_of

T = TypeVar("T")

_CHUNK = 1 << 20


def _plural(kind: str) -> str:
    return kind_of(kind).lower() + "s"


class ControllerClient:
    """Everything a person or a tool asks of the controller.

    `token` is a person's API token; without one only enrolment and health answer. `token_source` says
    where it came from, for the error when the controller does not know it.
    Every method raises Unavailable, Forbidden, NotFound, Conflict or InvalidDocument.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        timeout: float = 15.0,
        ca_file: Path | None = None,
        token_source: str = "",
    ) -> None:
        credential = (lambda: token) if token else None
        self._http = Transport(
            url, credential=credential, timeout=timeout, ca_file=ca_file, credential_source=token_source
        )

    @property
    def url(self) -> str:
        return self._http.base_url

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> ControllerClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def health(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._json("GET", "/healthz")
        return answer

    # resources

    def apply(self, resources: list[Resource], *, dry_run: bool = False) -> list[dict[str, str]]:
        """All or none. Answers `[{kind, name, result: created|configured|unchanged}]`."""
        body = {"resources": msgspec.to_builtins(resources), "dryRun": dry_run}
        answer: list[dict[str, str]] = self._json("POST", "/api/v1/apply", json=body)
        return answer

    def find(self, kind: str, *, selector: dict[str, str] | None = None) -> list[dict[str, Any]]:
        params = {"selector": ",".join(f"{k}={v}" for k, v in selector.items())} if selector else None
        answer = self._json("GET", f"/api/v1/{_plural(kind)}", params=params)
        items: list[dict[str, Any]] = answer["items"]
        return items

    def get(self, kind: str, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._json("GET", f"/api/v1/{_plural(kind)}/{name}")
        return answer

    def replace(self, resource: dict[str, Any]) -> dict[str, Any]:
        """Write back what `get` gave; Conflict when its resourceVersion is stale."""
        path = f"/api/v1/{_plural(resource['kind'])}/{resource['metadata']['name']}"
        answer: dict[str, Any] = self._json("PUT", path, json=resource)
        return answer

    def delete(self, kind: str, name: str) -> None:
        self._http.request("DELETE", f"/api/v1/{_plural(kind)}/{name}")

    def device_reports(self, name: str, *, limit: int = 200) -> list[dict[str, Any]]:
        """The newest `limit` health reports of a device, oldest first."""
        answer = self._json("GET", f"/api/v1/devices/{name}/reports", params={"limit": limit})
        items: list[dict[str, Any]] = answer["items"]
        return items

    def desired(self, name: str) -> bytes:
        """A device's desired state (DSSE), as it is delivered to it; Conflict when it gets none."""
        return self._http.request("GET", f"/api/v1/devices/{name}/desired").content

    def audit(self, *, limit: int = 200) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self._json("GET", "/api/v1/audit", params={"limit": limit})["items"]
        return items

    # enrolment

    def create_enrollment_token(
        self,
        sites: list[str],
        *,
        role: str = "device",
        ttl: float = 3600.0,
        labels: dict[str, str] | None = None,
        approval: bool = False,
    ) -> str:
        """A single-use secret; it is shown this once and kept only as a hash.

        With `approval` the device that uses it waits until a person approves it.
        """
        body = {"sites": sites, "role": role, "ttl": ttl, "labels": labels or {}}
        if approval:
            body["approval"] = "required"
        token: str = self._json("POST", "/api/v1/enrollmenttokens", json=body)["token"]
        return token

    def enroll(self, request: EnrollRequest) -> EnrollResponse | EnrollPending:
        """EnrollPending while a person must approve; then the same request is to be made again."""
        answer = self._http.request("POST", "/enroll/v1", json=msgspec.to_builtins(request))
        if answer.status_code == 202:
            return _decode(answer.content, EnrollPending)
        return _decode(answer.content, EnrollResponse)

    def enrollment_requests(self) -> list[dict[str, Any]]:
        """Devices that wait for approval: `[{name, site, fingerprint, labels, createdAt, expiresAt}]`."""
        items: list[dict[str, Any]] = self._json("GET", "/api/v1/enrollmentrequests")["items"]
        return items

    def decide_enrollment(self, name: str, decision: str, fingerprint: str) -> None:
        """`decision` is approve or deny; `fingerprint` that of the key which the person saw."""
        path = f"/api/v1/enrollmentrequests/{name}/{decision}"
        self._http.request("POST", path, json={"fingerprint": fingerprint})

    # releases

    def trust(self) -> dict[str, Any]:
        """`{ca, desiredKeys, onlineKeys: {keyid: TUF key}, tufRoot}`."""
        answer: dict[str, Any] = self._json("GET", "/api/v1/trust")
        return answer

    def init_release_root(self, root: bytes, targets: bytes) -> None:
        """Install the first TUF root and targets metadata; Conflict when there is one already."""
        body = {"root": root.decode(), "targets": targets.decode()}
        self._http.request("POST", "/api/v1/releases/root", json=body)

    def tuf_metadata(self, name: str) -> bytes | None:
        """A TUF metadata file (`timestamp.json`, `7.targets.json`), None when there is none."""
        try:
            return self._http.request("GET", f"/tuf/{name}").content
        except NotFound:
            return None

    def publish_release(self, targets: bytes, manifest: bytes) -> dict[str, Any]:
        """Announce a version: the newly signed targets metadata and the manifest it lists."""
        body = {"targets": targets.decode(), "manifest": manifest.decode()}
        answer: dict[str, Any] = self._json("POST", "/api/v1/releases", json=body)
        return answer

    def has_artifact(self, digest: str) -> bool:
        try:
            self._http.request("HEAD", f"/artifacts/{digest}")
        except NotFound:
            return False
        return True

    def artifact(self, digest: str) -> Iterator[bytes]:
        """An artifact's bytes, piece by piece and not checked."""
        with self._http.stream(f"/artifacts/{digest}", elsewhere=True) as response:
            yield from response.iter_bytes(_CHUNK)

    def upload_artifact(self, path: Path) -> str:
        """Store a file under its SHA-256 and return that digest; skips what is there already."""
        digest = sha256_file(path)
        if not self.has_artifact(digest):
            headers = {"Content-Length": str(path.stat().st_size), "Content-Type": "application/octet-stream"}
            self._http.request(
                "PUT", f"/artifacts/{digest}", content=_chunks(path), headers=headers, timeout=600.0
            )
        return digest

    def _json(self, method: str, path: str, **arguments: Any) -> Any:
        response = self._http.request(method, path, **arguments)
        try:
            return response.json()
        except ValueError:
            raise InvalidDocument("the answer is not JSON", source=f"{self.url}{path}") from None


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _decode(data: bytes, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=type_)
    except msgspec.DecodeError as error:
        raise InvalidDocument(str(error), source="the controller's answer") from None


class DeviceClient:
    """The controller's API as a device uses it: every request carries a fresh device token."""

    def __init__(self, transport: Transport) -> None:
        self.http = transport

    def desired(self, *, newer_than: int, wait: float) -> bytes | None:
        """The signed desired state (DSSE), long-polled for up to `wait` seconds; None when nothing is newer."""
        response = self.http.request(
            "GET",
            "/device/v1/desired",
            params={"newerThan": newer_than, "wait": wait},
            timeout=wait + 15.0,
        )
        return None if response.status_code == 204 else response.content

    def send(self, topic: str, envelope: bytes) -> None:
        """Hand a signed envelope to the controller where MQTT is blocked."""
        headers = {"Content-Type": "application/octet-stream", "Edgeward-Topic": topic}
        self.http.request("POST", "/device/v1/messages", content=envelope, headers=headers)

    def time(self, nonce: str) -> bytes:
        """The controller's signed time (DSSE over `edgeward.wire.signed_time.SignedTime`)."""
        return self.http.request("GET", "/device/v1/time", params={"nonce": nonce}, anonymous=True).content

    def denied(self) -> bytes:
        """The signed deny-list (DSSE)."""
        return self.http.request("GET", "/device/v1/denied").content

    def residency(self) -> bytes:
        """What may leave the sites of the trend store that asks (DSSE over ResidencyPolicy)."""
        return self.http.request("GET", "/device/v1/residency").content

    def report_decisions(self, decisions: Decisions) -> None:
        """A trend store's residency decisions, for the audit records; those reported before are known."""
        self.http.request("POST", "/device/v1/residency/decisions", json=msgspec.to_builtins(decisions))

    def renew(self, request: RenewRequest) -> EnrollResponse:
        answer = self.http.request("POST", "/device/v1/renew", json=msgspec.to_builtins(request))
        return _decode(answer.content, EnrollResponse)
