"""Actions against a real loopback server, dead and hanging ones, and paths that try to leave."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agent.streams import execute
from agent.streams.execute import Executor
from edgeward.clock import ManualClock, SystemClock
from edgeward.errors import InvalidDocument
from edgeward.wire.streams import Action

WAIT = 20.0


class Site(ThreadingHTTPServer):
    """Answers 204; /fail 500; /away redirects to /; keeps what it got."""

    daemon_threads = True

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, object]]] = []
        self.arrived = threading.Semaphore(0)
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, json.loads(body)))
        self.send_response({"/fail": 500, "/away": 307}.get(self.path, 204))
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.server.arrived.release()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Counting(Executor):
    """Tells when an action has been counted."""

    def __init__(
        self, folder: Path, publish: Callable[[str, bytes], bool] = lambda topic, body: True
    ) -> None:
        self.counted = threading.Semaphore(0)
        super().__init__(publish, folder, SystemClock())

    def _count(self, action: Action, done: bool, received: float) -> None:
        super()._count(action, done, received)
        self.counted.release()

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.counted.acquire(timeout=WAIT)


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[Counting]:
    made = Counting(tmp_path)
    yield made
    made.stop()


@contextlib.contextmanager
def hanging(drip: bytes = b"") -> Iterator[str]:
    """A server that takes connections and never answers, or sends one byte now and then without an end."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            listener.settimeout(0.02)
            open_: list[socket.socket] = []
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    open_.append(listener.accept()[0])
                for one in open_:
                    with contextlib.suppress(OSError):
                        one.send(drip)
            for one in open_:
                one.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            over.set()
            thread.join()


def test_messages_go_out_inline_with_their_latency(tmp_path: Path) -> None:
    sent: list[tuple[str, bytes]] = []
    clock = ManualClock()

    def publish(topic: str, body: bytes) -> bool:
        clock.advance(0.25)
        sent.append((topic, body))
        return topic != "refused"

    executor = Executor(publish, tmp_path, clock)
    action = Action("a", publish="{site}/alarm")
    executor.run(action, "north/alarm", {"value": float("nan")}, 0.0)
    executor.run(action, "refused", {}, 0.0)
    assert sent == [("north/alarm", b'{"value":null}'), ("refused", b"{}")]
    assert executor.take() == {
        "run": {"a": 1},
        "failed": {"a": 1},
        "latency_ms": {"p50": 250.0, "p95": 250.0, "p99": 250.0},
    }
    assert executor.take() == {"run": {}, "failed": {}, "latency_ms": {}}


def test_webhooks_get_the_message_and_only_2xx_counts(executor: Counting, site: Site) -> None:
    for name, path in (("good", "/"), ("bad", "/fail"), ("moved", "/away")):
        executor.run(Action(name, webhook=site.url(path)), None, {"value": 1.5}, 0.0)
    executor.wait(3)
    figures = executor.take()
    assert (figures["run"], figures["failed"]) == ({"good": 1}, {"bad": 1, "moved": 1})
    assert sorted(path for path, _ in site.got) == ["/", "/away", "/fail"]
    assert all(message == {"value": 1.5} for _, message in site.got)


def test_a_dead_server_is_counted_and_the_next_call_goes_out(executor: Counting, site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    executor.run(Action("dead", webhook=f"http://127.0.0.1:{port}/"), None, {}, 0.0)
    for odd in ("http://a:b/", "http://xn--/", "http://127.0.0.1:99999/", "http://[/"):
        executor.run(Action("odd", webhook=odd), None, {}, 0.0)
    executor.run(Action("live", webhook=site.url()), None, {}, 0.0)
    executor.wait(6)
    figures = executor.take()
    assert (figures["run"], figures["failed"]) == ({"live": 1}, {"dead": 1, "odd": 4})


@pytest.mark.parametrize("drip", [b"", b"H"])
def test_a_hanging_server_gives_way(
    executor: Counting, site: Site, monkeypatch: pytest.MonkeyPatch, drip: bytes
) -> None:
    monkeypatch.setattr(execute, "CALL_SECONDS", 0.3)
    with hanging(drip and b"HTTP/1.1 200 OK\r\nX: " + b"y") as url:
        executor.run(Action("hangs", webhook=url), None, {}, 0.0)
        executor.run(Action("live", webhook=site.url()), None, {}, 0.0)
        executor.wait(2)
    figures = executor.take()
    assert (figures["run"], figures["failed"]) == ({"live": 1}, {"hangs": 1})


def test_a_hanging_server_holds_up_no_inline_action_and_a_full_queue_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "QUEUE_CALLS", 4)
    monkeypatch.setattr(execute, "CALL_SECONDS", 3600.0)
    sent: list[str] = []
    executor = Counting(tmp_path, lambda topic, body: sent.append(topic) is None)
    with hanging() as url:
        for _ in range(10):
            executor.run(Action("hangs", webhook=url), None, {}, 0.0)
            executor.run(Action("inline", publish="t"), "t", {}, 0.0)
        # The hanging call has an hour; all inline ones are done, and no more than 4 wait.
        figures = executor.take()
        assert len(sent) == 10 and figures["run"] == {"inline": 10}
        assert figures["failed"]["hangs"] in (5, 6)
    executor.stop()
    figures = executor.take()
    assert figures["failed"]["hangs"] in (4, 5) and figures["run"] == {}
    executor.run(Action("hangs", webhook="http://127.0.0.1:1/"), None, {}, 0.0)
    assert executor.take()["failed"] == {"hangs": 1}


def test_a_webhook_that_hangs_delays_no_other(
    executor: Counting, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "CALL_SECONDS", 3600.0)
    with hanging() as url:
        executor.run(Action("hangs", webhook=url), None, {}, 0.0)
        for _ in range(3):
            executor.run(Action("live", webhook=site.url()), None, {}, 0.0)
            assert site.arrived.acquire(timeout=WAIT)
        executor.wait(3)
        assert executor.take()["run"] == {"live": 3}
    executor.stop()


def test_a_proxy_of_the_environment_is_not_used(
    executor: Counting, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    monkeypatch.setenv("no_proxy", "")
    executor.run(Action("a", webhook=site.url()), None, {}, 0.0)
    executor.wait()
    assert executor.take()["run"] == {"a": 1}


def test_latencies_nobody_takes_are_bounded(executor: Counting) -> None:
    for _ in range(execute.LATENCIES + 10):
        executor.run(Action("a", publish="t"), "t", {}, 0.0)
    assert len(executor._latencies) == execute.LATENCIES
    assert executor.take()["run"] == {"a": execute.LATENCIES + 10}


def test_absolute_paths_are_refused_in_the_folder_too(tmp_path: Path) -> None:
    with pytest.raises(InvalidDocument, match="leaves the folder"):
        Executor(lambda topic, body: True, tmp_path, SystemClock(), [Action("a", file=f"{tmp_path}/x")])


def test_files_get_one_line_per_run(executor: Counting, tmp_path: Path) -> None:
    action = Action("log", file="deep/alarms.jsonl")
    for value in (1, 2):
        executor.run(action, None, {"value": value, "text": "a\nb"}, 0.0)
    lines = (tmp_path / "deep" / "alarms.jsonl").read_text().splitlines()
    assert [json.loads(line)["value"] for line in lines] == [1, 2]
    assert executor.take()["run"] == {"log": 2}


@pytest.mark.parametrize("file", ["/etc/passwd", "../out", "a/../../out", "a/..", "."])
def test_paths_out_of_the_folder_are_refused(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    actions = [Action("fine", file="a.jsonl"), Action("bad", file=file)]
    with pytest.raises(InvalidDocument, match=r"spec\.actions\[1\]\.file: .* leaves the folder"):
        Executor(lambda topic, body: True, folder, SystemClock(), actions)
    executor = Executor(lambda topic, body: True, folder, SystemClock())
    executor.run(actions[1], None, {}, 0.0)
    assert executor.take()["failed"] == {"bad": 1} and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["link/x", "file"])
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, file: str) -> None:
    folder, outside = tmp_path / "in", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "link").symlink_to(outside)
    (folder / "file").symlink_to(outside / "x")
    executor = Executor(lambda topic, body: True, folder, SystemClock())
    executor.run(Action("a", file=file), None, {}, 0.0)
    assert executor.take()["failed"] == {"a": 1} and not (outside / "x").exists()


def test_a_file_that_cannot_be_written_is_counted(executor: Counting, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    executor.run(Action("a", file="taken"), None, {}, 0.0)
    assert executor.take()["failed"] == {"a": 1}
