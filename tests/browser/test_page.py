"""The fleet's page in a real browser, against a server that speaks the controller's API.

The browser is driven over the WebDriver protocol (W3C) that chromedriver serves; no library in between.
"""

import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import httpx
import pytest

from edgeward.broker import EmbeddedBroker, free_port

STATIC = Path(__file__).parents[2] / "controller" / "web" / "static"
EVIL = "<img src=x onerror=\"document.title='broken in'\">"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="chromium and chromedriver are not installed (apt-get install chromium chromium-driver)",
    ),
]


def model(version):
    return {"model": "shuttle-anomaly", "version": version, "digest": f"{version}" * 64}


def device(name, site, version, **status):
    slot = {
        "phase": "Active",
        "reason": "",
        "message": "",
        "running": model(version),
        "target": model(version),
    }
    base = {"connection": "Online", "state": "UpToDate", "lastSeen": time.time(), "slots": {"default": slot}}
    return {"kind": "Device", "metadata": {"name": name}, "spec": {"site": site}, "status": base | status}


def report(at, alarms, psi):
    stream = {"stream": "vibration", "digest": "1" * 64, "rows": 100, "alarms": alarms, "rejected": 0}
    return {"at": at, "streams": [stream | {"score_mean": 0.1 * psi, "psi": {"f1": psi, "f2": psi / 3}}]}


def fleet():
    now = time.time()
    halted = {
        "phase": "Halted",
        "reason": "SelfTestFailed",
        "message": f"golden vectors differ {EVIL}",
        "devices": 4,
        "updated": 0,
        "waves": [{"devices": ["turbine-1"], "startedAt": now - 30, "succeeded": 0, "failed": 1}],
        "timeline": [
            {
                "at": now - 20,
                "reason": "SelfTestFailed",
                "message": "off by 0.31",
                "wave": 0,
                "device": "turbine-1",
                "measured": 0.31,
                "limit": 0.001,
            }
        ],
    }
    spec = {"fleet": "turbines", "model": "shuttle-anomaly", "version": 3}
    version = {
        "model": "shuttle-anomaly",
        "version": 2,
        "digest": "2" * 64,
        "manifest": {"metrics": {"auc": 0.987}, "lineage": {"recipe": "anomaly-detection"}},
    }
    return {
        "devices": [device(f"turbine-{n}", "north", 2) for n in (1, 2, 3)]
        + [device("pump-1", EVIL, 1, connection="Offline", state="Error")],
        "rollouts": [{"metadata": {"name": "shuttle-v3"}, "spec": spec, "status": halted}],
        "modelversions": [{"metadata": {"name": "shuttle-anomaly-v2"}, "spec": version}],
        "reports": [report(now - 300 + 10 * i, (7 * i) % 23, 0.02 * i) for i in range(30)],
    }


class FakeController:
    """Serves the page with the controller's security header, the API from `content`, and events."""

    def __init__(self):
        self.content = fleet()
        self.changed = threading.Condition()
        self.asked = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status, body, kind, headers=()):
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Security-Policy", "default-src 'self'")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                path = urllib.parse.urlsplit(self.path).path
                outer.asked.append(self.path)
                file = STATIC / (path.strip("/") or "index.html")
                if not path.startswith("/api/"):
                    if file.is_file():
                        self.reply(200, file.read_bytes(), TYPES[file.suffix])
                    else:
                        self.reply(404, b"", "text/plain")
                elif "session=good" not in self.headers.get("Cookie", ""):
                    self.refuse()
                elif path == "/api/v1/events":
                    self.events()
                elif path == "/api/v1/overview":
                    keys = {"devices": "devices", "rollouts": "rollouts", "modelversions": "modelVersions"}
                    body = {name: outer.content[kind] for kind, name in keys.items()}
                    body["modelVersions"] = [
                        {"name": item["metadata"]["name"]} for item in outer.content["modelversions"]
                    ]
                    self.reply(200, json.dumps(body).encode(), "application/json")
                else:
                    kind = path.rsplit("/", 1)[1]
                    items = outer.content[kind]
                    self.reply(200, json.dumps({"items": items}).encode(), "application/json")

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/api/v1/session" and body == {"token": "right"}:
                    self.reply(
                        200, b"{}", "application/json", {"Set-Cookie": "session=good; HttpOnly; Path=/"}
                    )
                else:
                    self.refuse()

            def do_DELETE(self):
                self.reply(204, b"", "text/plain", {"Set-Cookie": "session=; Max-Age=0; Path=/"})

            def refuse(self):
                error = {"error": {"message": "unknown token", "hint": "", "source": "", "field": ""}}
                self.reply(401, json.dumps(error).encode(), "application/json")

            def events(self):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    while not outer.closing:
                        with outer.changed:
                            outer.changed.wait(0.2)
                        self.wfile.write(b'event: changed\ndata: {"kind":"Device"}\n\n')
                        self.wfile.flush()
                except OSError:
                    pass

        self.closing = False
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.closing = True
        self.server.shutdown()
        self.server.server_close()


class Browser:
    """As much of WebDriver as these tests need."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        wait(lambda: self.ready())
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        arguments += [f"--user-data-dir={folder}", "--window-size=1200,1400", "--no-first-run"]
        arguments += ["--disable-background-networking", "--disable-component-update"]
        capabilities = {
            "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        body = {"capabilities": {"alwaysMatch": capabilities}}
        self.session = self.http.post("/session", json=body).json()["value"]["sessionId"]

    def ready(self):
        try:
            return self.http.get("/status").json()["value"]["ready"]
        except httpx.HTTPError:
            return False

    def command(self, method, path, **body):
        answer = self.http.request(
            method, f"/session/{self.session}{path}", json=body if method == "POST" else None
        )
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url):
        self.command("POST", "/url", url=url)

    def run(self, script, *arguments):
        return self.command("POST", "/execute/sync", script=script, args=list(arguments))

    def text(self, selector):
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join('\\n')", selector
        )

    def logs(self):
        return [
            entry
            for entry in self.command("POST", "/se/log", type="browser")
            if "favicon" not in entry["message"]
        ]

    def sign_in(self, url, token="right"):
        self.open(url)
        self.logs()  # what another test left behind
        self.command("DELETE", "/cookie")
        self.open(url)
        wait(lambda: not self.run("return document.getElementById('login').hidden"))
        self.run(
            "document.getElementById('token').value = arguments[0];"
            "document.getElementById('login').requestSubmit()",
            token,
        )

    def close(self):
        try:
            self.command("DELETE", "")
        finally:
            self.http.close()
            self.driver.terminate()
            self.driver.wait(10)


def wait(condition, timeout=15.0):
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def controller():
    found = FakeController()
    yield found
    found.close()


def test_shows_the_fleet_and_what_comes_from_outside_stays_text(browser, controller):
    browser.sign_in(controller.url)
    wait(lambda: "turbine-3" in browser.text("#devices"))
    rows = browser.text("#devices tr").splitlines()
    assert any("turbine-1" in row and "shuttle-anomaly:2" in row and "222222222222" in row for row in rows)
    assert "0.580" in browser.text("#devices")
    assert EVIL in browser.text("#devices")
    assert EVIL in browser.text("#rollouts")
    assert browser.run("return document.querySelectorAll('main img').length") == 0
    assert browser.run("return document.title") == "Edgeward"
    assert "measured 0.31, limit 0.001" in browser.text(".timeline")
    assert "auc 0.987" in browser.text("#versions")
    assert browser.run("return document.querySelectorAll('#plot path.series').length") == 4
    wait(lambda: browser.text("#link") == "live")
    outside = "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(arguments[0]))"
    assert browser.run(outside, controller.url) == []
    # The first question, without a session, is refused: that is how the page finds out.
    severe = [entry["message"] for entry in browser.logs() if entry["level"] == "SEVERE"]
    assert [message for message in severe if "401" not in message] == []
    assert (
        browser.run("return document.cookie + JSON.stringify({...sessionStorage, ...localStorage})") == "{}"
    )
    assert not any("right" in path for path in controller.asked), "the token must not stand in a URL"


def test_a_condition_stands_beside_the_state_with_its_message(browser, controller):
    blocked = {"type": "StreamsRunning", "status": "False", "message": f"stream s: {EVIL}"}
    controller.content["devices"][0] = device("turbine-1", "north", 2, conditions=[blocked])
    browser.sign_in(controller.url)
    wait(lambda: "StreamsRunning=False" in browser.text("#devices .pill.warn"))
    title = "return document.querySelector('#devices .pill.warn').title"
    assert browser.run(title) == f"stream s: {EVIL}"
    assert browser.run("return document.title") == "Edgeward"


def test_a_hold_says_who_set_it_and_why(browser, controller):
    hold = {"slot": "press", "by": EVIL, "reason": f"audit {EVIL}", "since": 1.0, "until": 1e10}
    controller.content["devices"][0] = device("turbine-1", "north", 2, holds=[hold])
    browser.sign_in(controller.url)
    wait(lambda: f"press: held by {EVIL}" in browser.text("#devices .pill.warn"))
    title = browser.run("return document.querySelector('#devices .pill.warn').title")
    assert title.startswith(f"audit {EVIL} (since ") and ", until " in title
    assert browser.run("return document.title") == "Edgeward"


def test_follows_changes_live_under_a_steady_stream_of_events(browser, controller):
    browser.sign_in(controller.url)
    wait(lambda: "turbine-3" in browser.text("#devices"))
    controller.content["devices"][0] = device("turbine-1", "north", 9)
    with controller.changed:
        controller.changed.notify_all()
    wait(lambda: "shuttle-anomaly:9" in browser.text("#devices"), timeout=4)


def test_the_plot_can_be_chosen(browser, controller):
    browser.sign_in(controller.url)
    wait(lambda: "turbine-3" in browser.text("#legend"))
    choose = (
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('change'))"
    )
    browser.run(choose, "metric", "psi")
    assert "stability index" in browser.text("#plot-caption")
    browser.run(choose, "plot-device", "turbine-2")
    wait(lambda: browser.run("return document.querySelectorAll('#plot path.series').length") == 1)
    assert browser.text("#legend").startswith("turbine-2")


def test_an_empty_fleet_says_how_to_begin(browser, controller):
    controller.content = {"devices": [], "rollouts": [], "modelversions": [], "reports": []}
    browser.sign_in(controller.url)
    wait(lambda: "No device has enrolled yet" in browser.text("#devices-empty"))
    assert "Nothing published yet" in browser.text("#versions-empty")
    assert "No rollout yet" in browser.text("#rollouts-empty")


def test_a_wrong_token_is_refused_with_the_reason(browser, controller):
    browser.sign_in(controller.url, token="wrong")
    wait(lambda: "unknown token" in browser.text("#login-error"))
    assert browser.run("return document.getElementById('fleet').hidden")


def test_a_session_outlives_a_reload_and_ends_on_request(browser, controller):
    browser.sign_in(controller.url)
    wait(lambda: browser.text("#link") == "live")
    browser.open(controller.url)
    wait(lambda: "turbine-1" in browser.text("#devices"))
    browser.run("document.getElementById('logout').click()")
    wait(lambda: browser.text("#link") == "not signed in")
    browser.open(controller.url)
    wait(lambda: not browser.run("return document.getElementById('login').hidden"))
    assert "turbine-1" not in browser.text("main")


def test_a_lost_controller_is_shown_with_the_last_known_state(browser):
    controller = FakeController()
    browser.sign_in(controller.url)
    wait(lambda: browser.text("#link") == "live")
    controller.close()
    wait(lambda: browser.text("#link") == "disconnected")
    assert "last known state" in browser.text("#notice")
    assert "turbine-1" in browser.text("#devices")


def test_the_real_controller_serves_the_page(browser, tmp_path):
    """The same page, its real server: paths, headers, session cookie, events, empty fleet, first resources."""
    port, data = free_port(), tmp_path / "data"
    edgeward = [sys.executable, "-m", "edgeward.cli.main"]
    with EmbeddedBroker(tmp_path / "broker") as broker, (tmp_path / "log").open("wb") as log:
        up = [*edgeward, "up", "--data", str(data), "--port", str(port), "--broker", broker.url]
        process = subprocess.Popen(up, stdout=log, stderr=log)
        try:
            wait(lambda: b"ready at" in (tmp_path / "log").read_bytes(), timeout=30)
            url = f"http://127.0.0.1:{port}/"
            browser.sign_in(url, token=(data / "admin.token").read_text().strip())
            wait(lambda: browser.text("#link") == "live")
            assert "No device has enrolled yet" in browser.text("#devices-empty")
            severe = [entry["message"] for entry in browser.logs() if entry["level"] == "SEVERE"]
            assert [message for message in severe if "401" not in message] == []
            browser.run("document.getElementById('logout').click()")
            wait(lambda: browser.text("#link") == "not signed in")
        finally:
            process.terminate()
            process.wait(20)
