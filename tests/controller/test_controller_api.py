"""The API: roles, admission, enrolment, artifacts, sessions, events, and what bad input gets."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest

from edgeward.client import ControllerClient
from edgeward.errors import Conflict, Forbidden, InvalidDocument, NotFound
from edgeward.storage import sha256_hex
from edgeward.trust import certificates, keys
from edgeward.wire.enrollment import EnrollRequest, RenewRequest


def raw(plant: Any, method: str, path: str, **arguments: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {plant.token}", **arguments.pop("headers", {})}
    return httpx.request(method, plant.url + path, headers=headers, trust_env=False, **arguments)


# access


def test_without_a_known_token_nothing_is_told(plant: Any) -> None:
    for path in ("sites", "overview", "events", "audit", "trust", "devices/x/reports"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic YTpi"}):
            answer = httpx.get(f"{plant.url}/api/v1/{path}", headers=headers, trust_env=False)
            assert answer.status_code == 401, path
            assert set(answer.json()["error"]) == {"message", "hint", "source", "field"}
    assert httpx.get(f"{plant.url}/healthz", trust_env=False).json()["status"] == "ok"


@pytest.mark.parametrize(
    ("role", "may_operate", "may_release", "may_administer"),
    [("viewer", 0, 0, 0), ("operator", 1, 0, 0), ("releaser", 0, 1, 0), ("admin", 1, 1, 1)],
)
def test_roles(
    plant: Any, make: Any, role: str, may_operate: int, may_release: int, may_administer: int
) -> None:
    token = raw(plant, "POST", "/api/v1/apitokens", json={"name": "x", "role": role}).json()["token"]
    client = ControllerClient(plant.url, token)

    def allowed(call: Any) -> int:
        try:
            call()
        except Forbidden:
            return 0
        except InvalidDocument:
            return 1
        return 1

    assert client.find("Site") == []
    assert allowed(lambda: client.apply([make("Site", "s")])) == may_operate
    assert allowed(lambda: client.init_release_root(b"{}", b"{}")) == may_release
    answer = httpx.post(
        f"{plant.url}/api/v1/apitokens", json={"name": "y", "role": "viewer"},
        headers={"Authorization": f"Bearer {token}"}, trust_env=False,
    )  # fmt: skip
    assert (answer.status_code == 201) == bool(may_administer)
    assert raw(plant, "DELETE", "/api/v1/apitokens/x").status_code == 204
    with pytest.raises(Forbidden):
        client.find("Site")
    client.close()


def test_a_session_cookie_reads_but_never_writes(plant: Any) -> None:
    with httpx.Client(base_url=plant.url, trust_env=False) as browser:
        assert browser.post("/api/v1/session", json={"token": "wrong"}).status_code == 401
        answer = browser.post("/api/v1/session", json={"token": plant.token})
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and plant.token.lower() not in cookie
        assert browser.get("/api/v1/overview").status_code == 200
        assert browser.post("/api/v1/apply", json={"resources": []}).status_code == 401
        browser.cookies.set("edgeward_session", browser.cookies["edgeward_session"][:-2] + "xx")
        assert browser.get("/api/v1/overview").status_code == 401


def test_failed_logins_are_throttled(plant: Any) -> None:
    codes = [
        httpx.post(f"{plant.url}/api/v1/session", json={"token": "wrong"}, trust_env=False).status_code
        for _ in range(31)
    ]
    assert codes[0] == 401 and codes[-1] == 429


def test_the_page_is_served_under_a_strict_policy(plant: Any) -> None:
    answer = httpx.get(plant.url, trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")


def test_events_say_that_something_changed(plant: Any, make: Any) -> None:
    headers = {"Authorization": f"Bearer {plant.token}"}
    with httpx.stream(
        "GET", f"{plant.url}/api/v1/events", headers=headers, trust_env=False, timeout=10
    ) as got:
        lines = got.iter_lines()
        revisions = []
        plant_changed = False
        for line in lines:
            if line.startswith("data:"):
                revisions.append(json.loads(line[5:])["revision"])
                if len(revisions) == 1 and not plant_changed:
                    plant.client.apply([make("Site", "s")])
                    plant_changed = True
                if len(revisions) == 2:
                    break
    assert revisions[1] > revisions[0]


def test_the_overview_and_the_audit(plant: Any) -> None:
    plant.begin()
    plant.enroll("d1")
    plant.publish(1)
    seen = raw(plant, "GET", "/api/v1/overview").json()
    assert [device["metadata"]["name"] for device in seen["devices"]] == ["d1"]
    assert (seen["modelVersions"][0]["model"], seen["modelVersions"][0]["version"]) == ("m", 1)
    records = plant.client.audit()
    actions = {(record["action"], record["kind"]) for record in records}
    assert {
        ("create", "Site"),
        ("create", "EnrollmentToken"),
        ("enroll", "Device"),
        ("publish", "ModelVersion"),
    } <= actions
    assert all(record["who"] and record["at"] for record in records)
    assert "edgeward-enroll-" not in json.dumps(records) and plant.token not in json.dumps(records)


# admission


def test_apply_is_all_or_nothing(plant: Any, make: Any) -> None:
    with pytest.raises(InvalidDocument) as error:
        plant.client.apply([make("Site", "s"), make("Fleet", "f", matchLabels={"a": "b"}, streams=["none"])])
    assert error.value.field == "spec.streams[0]" and "Fleet/f" in error.value.source
    assert plant.client.find("Site") == []
    assert plant.client.apply([make("Site", "s")], dry_run=True)[0]["result"] == "created"
    assert plant.client.find("Site") == []
    assert plant.client.apply([make("Site", "s")])[0]["result"] == "created"
    assert plant.client.apply([make("Site", "s")])[0]["result"] == "unchanged"
    assert plant.client.apply([make("Site", "s", description="x")])[0]["result"] == "configured"


def test_what_an_apply_refers_to_may_come_with_it_in_any_order(plant: Any, make: Any) -> None:
    stream = make("Stream", "s1", source={"mqtt": {"topic": "t"}}, features=["a"])
    plant.client.apply([make("Fleet", "f", matchLabels={"a": "b"}, streams=["s1"]), stream])
    with pytest.raises(Conflict, match="Fleet/f"):
        plant.client.delete("Stream", "s1")
    plant.client.delete("Fleet", "f")
    plant.client.delete("Stream", "s1")


def test_a_stale_write_is_a_409(plant: Any, make: Any) -> None:
    plant.client.apply([make("Site", "s")])
    first, second = plant.client.get("Site", "s"), plant.client.get("Site", "s")
    first["spec"]["description"] = "one"
    plant.client.replace(first)
    second["spec"]["description"] = "two"
    with pytest.raises(Conflict, match="stale"):
        plant.client.replace(second)
    assert plant.client.get("Site", "s")["spec"]["description"] == "one"


def test_rollouts_refer_to_what_exists_and_keep_their_course(plant: Any, rollout: Any) -> None:
    plant.begin()
    with pytest.raises(InvalidDocument, match="ModelVersion 'm-v1'"):
        plant.client.apply([rollout("r", 1)])
    plant.publish(1)
    plant.publish(2)
    plant.client.apply([rollout("r", 1)])
    with pytest.raises(InvalidDocument) as error:
        plant.client.apply([rollout("r", 2)])
    assert error.value.field == "spec.version"
    assert plant.client.apply([rollout("r", 1, deadline=5.0)])[0]["result"] == "configured"
    with pytest.raises(Conflict, match="signed release"):
        plant.client.delete("ModelVersion", "m-v1")


def test_a_newer_rollout_supersedes_the_unfinished_one(plant: Any, rollout: Any, until: Any) -> None:
    plant.begin()
    plant.enroll("d1")
    plant.publish(1)
    plant.publish(2)
    plant.client.apply([rollout("r1", 1)])
    until(lambda: plant.client.get("Rollout", "r1")["status"]["phase"] == "Progressing")
    plant.client.apply([rollout("r2", 2)])
    until(lambda: plant.client.get("Rollout", "r1")["status"]["phase"] == "Superseded")
    until(lambda: plant.client.get("Rollout", "r2")["status"]["phase"] == "Progressing")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"resources": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"resources": 1}', "Expected `array`"),
        (b'{"resources": [], "x": 1}', "unknown field"),
        (b'{"resources": [1]}', "expected a mapping"),
        (b'{"resources": [{"kind": "Site"}]}', "missing required field"),
        (b'{"resources": [' + b" " * (9 << 20) + b"]}", "larger than"),
    ],
)
def test_bad_bodies_get_one_clear_line(plant: Any, body: bytes, expected: str) -> None:
    answer = raw(plant, "POST", "/api/v1/apply", content=body)
    assert answer.status_code == 400
    assert expected in answer.json()["error"]["message"]


def test_unknown_kinds_fields_and_paths(plant: Any, make: Any) -> None:
    for path in ("/api/v1/pods", "/api/v1/sites/none", "/nowhere", "/tuf/../keys", "/tuf/x.json"):
        answer = raw(plant, "GET", path)
        assert answer.status_code == 404 and answer.json()["error"]["message"], path
    assert raw(plant, "GET", "/api/v1/audit?limit=x").json()["error"]["field"] == "limit"
    assert raw(plant, "GET", "/api/v1/sites?selector=x").status_code == 400
    plant.client.apply([make("Site", "s")])
    site = plant.client.get("Site", "s")
    site["spec"]["colour"] = "red"
    with pytest.raises(InvalidDocument, match="colour"):
        plant.client.replace(site)
    with pytest.raises(InvalidDocument, match="enrolment"):
        plant.client.apply([make("Device", "d", site="s")])


# enrolment


def request(token: str, name: str, key: Any = None, **more: Any) -> EnrollRequest:
    return EnrollRequest(token, name, certificates.make_csr(key or keys.generate_key(), name), **more)


def test_a_device_needs_a_release_root_first(plant: Any, make: Any) -> None:
    plant.client.apply([make("Site", "north")])
    token = plant.client.create_enrollment_token(["north"])
    with pytest.raises(Conflict) as error:
        plant.client.enroll(request(token, "d1"))
    assert error.value.hint == "edgeward release init"
    plant.releases.init(plant.client)
    assert plant.client.enroll(request(token, "d1")).sites == ["north"]  # the token was not lost


def test_a_token_works_once_in_time_and_for_its_site_only(plant: Any) -> None:
    plant.begin()
    token = plant.client.create_enrollment_token(["north"], labels={"fleet": "a"})
    with pytest.raises(InvalidDocument):
        plant.client.enroll(request(token, "Bad_Name"))
    answer = plant.client.enroll(request(token, "d1", labels={"fleet": "mine", "row": "1", "site": "south"}))
    labels = plant.device("d1")["metadata"]["labels"]
    assert labels == {"fleet": "a", "row": "1", "site": "north", "device": "d1"}
    made = certificates.load_certificate_pem(answer.certificate)
    assert plant.controller.authority.anchor.verify(made, plant.controller.clock.now()).uris() == [
        "edgeward://device/north/d1"
    ]
    for bad in (token, "nonsense"):
        with pytest.raises(Forbidden):
            plant.client.enroll(request(bad, "d2"))
    with pytest.raises(NotFound):
        plant.client.create_enrollment_token(["south"])
    with pytest.raises(InvalidDocument):
        plant.client.create_enrollment_token(["north"], ttl=-1)
    with plant.controller.store.reading() as session:
        from controller.store.tables import EnrollmentTokenRow

        assert session.get(EnrollmentTokenRow, sha256_hex(token.encode())) is not None
        assert session.get(EnrollmentTokenRow, token) is None


def test_an_expired_token_is_refused(plant: Any, until: Any) -> None:
    plant.begin()
    token = plant.client.create_enrollment_token(["north"], ttl=0.001)
    with pytest.raises(Forbidden, match="expired"):
        plant.client.enroll(request(token, "d1"))


def test_a_taken_name_goes_to_its_own_key_only(plant: Any) -> None:
    plant.begin()
    first = plant.enroll("d1")
    token = plant.client.create_enrollment_token(["north"])
    with pytest.raises(Conflict, match="taken"):
        plant.client.enroll(request(token, "d1"))
    again = plant.client.enroll(request(token, "d1", first.key))  # and the token is still good
    assert again.name == "d1"
    store_token = plant.client.create_enrollment_token(["north"], role="store")
    with pytest.raises(Conflict):
        plant.client.enroll(request(store_token, "d1", first.key))
    store = plant.client.enroll(request(store_token, "trends"))
    assert (store.role, store.sites) == ("store", ["north"])


def test_renewal_needs_a_device_token_and_keeps_the_identity(plant: Any) -> None:
    plant.begin()
    device = plant.enroll("d1")
    answer = device.http.renew(RenewRequest(certificates.make_csr(keys.generate_key(), "someone-else")))
    made = certificates.load_certificate_pem(answer.certificate)
    assert str(certificates.identity_of(made)) == "device north/d1"
    now = plant.controller.clock.now()
    assert now + 19 * 86400 < answer.renew_after < now + 21 * 86400
    refused = httpx.post(f"{plant.url}/device/v1/renew", json={"csr": "x"}, trust_env=False)
    assert refused.status_code == 401
    assert raw(plant, "POST", "/device/v1/renew", json={"csr": "x"}).status_code == 401  # a person's token


def test_secrets_on_disk_are_private(plant: Any) -> None:
    data: Path = plant.controller.settings.data
    private = [*(data / "keys").iterdir(), data / "admin.token"]
    assert len(private) == 5
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


# artifacts


def test_artifacts_are_what_their_name_says(plant: Any, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    path = tmp_path / "blob"
    path.write_bytes(data)
    digest = plant.client.upload_artifact(path)
    got = raw(plant, "GET", f"/artifacts/{digest}", headers={"Range": "bytes=100-199"})
    assert (got.status_code, got.content) == (206, data[100:200])
    assert got.headers["etag"] == f'"{digest}"' and plant.client.has_artifact(digest)
    other = sha256_hex(b"other")
    assert raw(plant, "PUT", f"/artifacts/{other}", content=b"not other").status_code == 400
    assert not plant.client.has_artifact(other)
    assert raw(plant, "GET", "/artifacts/..%2fadmin.token").status_code in (400, 404)
    assert raw(plant, "PUT", "/artifacts/ABC", content=b"x").status_code == 400
    assert list((plant.controller.settings.data / "artifacts" / "incoming").iterdir()) == []
    assert httpx.get(f"{plant.url}/artifacts/{digest}", trust_env=False).status_code == 401
    plant.begin()
    device = plant.enroll("d1")
    assert device.http.http.request("GET", f"/artifacts/{digest}").content == data


def test_an_upload_above_the_limit_is_cut_off(tmp_path: Path) -> None:
    from controller.artifacts import FolderArtifacts

    artifacts = FolderArtifacts(tmp_path / "a", limit=10)
    upload = artifacts.receive("0" * 64)
    with pytest.raises(InvalidDocument, match="larger than 10"):
        upload.write(bytes(11))
    upload.abandon()
