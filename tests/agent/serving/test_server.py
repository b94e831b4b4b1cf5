"""The listeners, their start and end, what else is mounted, and the numbers they give."""

from __future__ import annotations

import builtins
import http.client
import json
import os
import re
import socket
import stat
import sys
import threading
from pathlib import Path

import pytest

from agent.serving.messages import Response
from agent.serving.server import Server, open_unix_socket
from agent.serving.settings import Settings
from edgeward.clock import ManualClock
from edgeward.errors import Conflict, MissingDependency, Unavailable

BODY = json.dumps({"inputs": [{"name": "in", "shape": [2], "datatype": "FP32", "data": [1, 2]}]}).encode()


def ask(address, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def over_unix(path, request):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(request)
        received = b""
        while part := client.recv(65536):
            received += part
    return received


LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


def test_a_unix_socket_serves_its_group_only_and_goes_away(serve, socket_path):
    running = serve(port=None, unix_socket=socket_path)
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o660
    assert over_unix(socket_path, LIVE).endswith(b'{"live":true}')
    running.call(running.server.stop())
    assert not socket_path.exists()


def test_a_server_whose_models_are_still_being_loaded_is_live_but_not_ready(serve, models):
    models.settled = False
    address = serve().address
    status, _, body = ask(address, "GET", "/v2/health/ready")
    assert (status, json.loads(body)["error"]) == (503, "models are being loaded")
    assert ask(address, "GET", "/v2/health/live")[0] == 200
    models.settled = True
    assert ask(address, "GET", "/v2/health/ready")[0] == 200


@pytest.mark.parametrize("umask", [0, 0o077])
def test_the_socket_is_never_wider_than_its_group(socket_path, monkeypatch, umask):
    seen = []
    chmod = Path.chmod

    def watched(path, mode):
        seen.append(stat.S_IMODE(path.stat().st_mode))
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", watched)
    before = os.umask(umask)
    try:
        open_unix_socket(socket_path).close()
    finally:
        os.umask(before)
    assert seen[0] & 0o007 == 0
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o660


def test_a_socket_that_nobody_serves_is_replaced(serve, socket_path):
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(str(socket_path))
    left.close()
    serve(port=None, unix_socket=socket_path)
    assert over_unix(socket_path, LIVE).endswith(b'{"live":true}')


def test_a_served_socket_and_a_file_are_left_alone(serve, socket_path):
    serve(port=None, unix_socket=socket_path)
    with pytest.raises(Conflict, match="another server answers"):
        open_unix_socket(socket_path)
    file = socket_path.with_name("file")
    file.write_text("mine")
    with pytest.raises(Conflict, match="is not a socket"):
        open_unix_socket(file)
    assert file.read_text() == "mine"
    with pytest.raises(Unavailable, match="cannot make the socket"):
        open_unix_socket(socket_path.with_name("nowhere") / "s")


def test_a_socket_put_there_by_another_server_is_not_removed(serve, socket_path):
    running = serve(port=None, unix_socket=socket_path)
    socket_path.rename(socket_path.with_name("old"))
    successor = open_unix_socket(socket_path)
    running.call(running.server.stop())
    assert socket_path.exists()
    successor.close()


def test_a_taken_port_is_a_conflict(serve):
    running = serve()
    with pytest.raises(Conflict, match=f"127.0.0.1:{running.server.port} is taken"):
        serve(port=running.server.port)


def test_the_default_is_loopback():
    assert Settings().host == "127.0.0.1"
    assert Settings().unix_socket is None and Settings().grpc_port is None


def test_stopping_waits_for_the_answers_that_are_due(models, serve, held):
    models.echo("m", "float32", [-1], runner=held)
    running = serve()
    client = http.client.HTTPConnection(running.address, timeout=20)
    client.request("POST", "/v2/models/m/infer", BODY)
    assert held.arrived.acquire(timeout=20)

    order = []

    def stop():
        running.call(running.server.stop())
        order.append("stopped")

    stopped = threading.Thread(target=stop)
    stopped.start()
    while not running.on_loop(lambda: running.server.api.draining):
        pass
    with pytest.raises(OSError):
        ask(running.address, "GET", "/v2/health/live")
    order.append("answered")
    running.on_loop(lambda: held.release(0))
    answer = client.getresponse()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert json.loads(answer.read())["outputs"][0]["data"] == [1.0, 2.0]
    client.close()
    stopped.join(20)
    assert order == ["answered", "stopped"]


def test_stopping_does_not_wait_forever(models, serve, held):
    models.echo("m", "float32", [-1], runner=held)
    running = serve(drain_seconds=0.0)
    client = http.client.HTTPConnection(running.address, timeout=20)
    client.request("POST", "/v2/models/m/infer", BODY)
    assert held.arrived.acquire(timeout=20)
    running.call(running.server.stop())
    with pytest.raises(OSError):
        client.getresponse()
    client.close()


def test_large_answers_reach_a_client_that_reads_slowly(models, serve):
    models.echo("big", "uint8", [-1])
    size = 20 << 20
    head = json.dumps(
        {
            "inputs": [
                {"name": "in", "shape": [size], "datatype": "UINT8", "parameters": {"binary_data_size": size}}
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    running = serve()
    data = os.urandom(size)
    headers = {"Inference-Header-Content-Length": str(len(head))}
    status, answer_headers, body = ask(running.address, "POST", "/v2/models/big/infer", head + data, headers)
    assert status == 200
    assert body[int(answer_headers["inference-header-content-length"]) :] == data


def test_pipelined_inferences_finish_in_any_order_and_are_answered_in_theirs(models, serve, held):
    models.echo("m", "float32", [-1], runner=held)
    running = serve()
    with socket.create_connection(("127.0.0.1", running.server.port), timeout=20) as client:
        for value in (1, 2, 3):
            body = BODY.replace(b"[1, 2]", b"[%d, 0]" % value)
            client.sendall(
                b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body)
                + body
            )
            assert held.arrived.acquire(timeout=20)
        for index in (2, 0, 1):
            running.on_loop(lambda index=index: held.release(index))
        received = b""
        while received.count(b'"data"') < 3:
            received += client.recv(65536)
    assert re.findall(rb'"data":\[(\d)', received) == [b"1", b"2", b"3"]


def test_other_paths_can_be_mounted(models, serve):
    seen = []

    def samples(request, respond):
        seen.append((request.method, request.target, request.body, request.headers[b"content-type"]))
        respond(Response(202, [b'{"taken":1}']))

    running = serve(routes={"/v1/streams": samples}, max_body_bytes=100)
    headers = {"Content-Type": "application/json"}
    path = "/v1/streams/line%201/samples?x=1"
    assert ask(running.address, "POST", path, b"[1]", headers)[::2] == (202, b'{"taken":1}')
    assert seen == [(b"POST", path.encode(), b"[1]", b"application/json")]
    assert ask(running.address, "POST", path, b"x" * 101, headers)[0] == 413
    assert ask(running.address, "POST", path, b"[1]", {"Origin": "https://example.org"})[0] == 403
    assert ask(running.address, "GET", "/v1/streamsandmore")[0] == 404


def test_grpc_without_its_packages_says_what_to_install(models, call, monkeypatch):
    monkeypatch.delitem(sys.modules, "agent.serving.grpc_server", raising=False)
    real = builtins.__import__

    def without(name, *rest):
        if name == "grpc":
            raise ImportError(name="grpc")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    server = Server(models, Settings(port=0, grpc_port=0), ManualClock())
    with pytest.raises(MissingDependency, match=r"edgeward\[agent,agent-grpc\]"):
        call(server.start())


def test_a_taken_grpc_port_is_said(serve):
    running = serve(grpc_port=0)
    with pytest.raises(Unavailable, match="for gRPC"):
        serve(grpc_port=running.server.grpc_port)
    with pytest.raises(Unavailable, match="not enabled"):
        _ = serve().server.grpc_port


def test_metrics_are_well_formed_and_count(models, serve):
    models.echo("m", "float32", [-1], max_batch=8)
    models.add('odd"name\\', None, [], [])
    running = serve()
    for _ in range(3):
        assert ask(running.address, "POST", "/v2/models/m/infer", BODY)[0] == 200
    assert ask(running.address, "POST", "/v2/models/m/infer", b"{}")[0] == 400

    status, headers, text = ask(running.address, "GET", "/metrics")

    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    families, samples = {}, {}
    for line in text.decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in families
            families[name] = kind
        elif not line.startswith("#"):
            match = re.fullmatch(r'([a-z_]+)(\{(?:[a-z]+="(?:[^"\\]|\\.)*",?)*\})? (\S+)', line)
            assert match, line
            family = match[1] if match[1] in families else re.sub(r"_(bucket|sum|count)$", "", match[1])
            assert family in families, line
            samples[match[1] + (match[2] or "")] = float(match[3])
    m = '{model="m",version="3"}'
    assert samples["nv_inference_request_success" + m] == 3
    assert samples["nv_inference_count" + m] == 6
    assert samples["nv_inference_exec_count" + m] == 3
    assert samples["nv_inference_compute_infer_duration_us" + m] == pytest.approx(6)
    assert samples['nv_inference_request_failure{model="m",version="3",reason="OTHER"}'] == 1
    assert samples["nv_inference_pending_request_count" + m] == 0
    assert samples['edgeward_inference_request_seconds_bucket{model="m",version="3",le="+Inf"}'] == 3
    assert samples["edgeward_inference_request_seconds_count" + m] == 3
    assert samples["edgeward_inference_request_bytes_sum" + m] == 3 * len(BODY)
    assert samples['edgeward_inference_batch_rows_bucket{model="m",version="3",le="1"}'] == 0
    assert samples["edgeward_inference_batch_rows_sum" + m] == 6
    assert samples["edgeward_model_ready" + m] == 1
    assert samples['edgeward_model_ready{model="odd\\"name\\\\",version="3"}'] == 0
    assert samples['edgeward_http_responses_total{code="200"}'] == 3
    assert samples["edgeward_http_connections"] == 1


def test_a_new_version_is_served_from_the_next_request_on(models, serve):
    models.echo("m", "float32", [-1])
    running = serve()
    assert json.loads(ask(running.address, "POST", "/v2/models/m/infer", BODY)[2])["model_version"] == "3"
    models.change("m", version="4")
    assert json.loads(ask(running.address, "POST", "/v2/models/m/infer", BODY)[2])["model_version"] == "4"
    models.echo("m", "float64", [-1])
    status, _, body = ask(running.address, "POST", "/v2/models/m/infer", BODY)
    assert status == 400 and b"expected datatype FP64" in body


def test_a_raw_body_is_the_only_inputs_data(models, serve):
    models.echo("m", "float32", [-1, 2])
    models.echo("text", "bytes", [-1])
    running = serve()
    headers = {"Inference-Header-Content-Length": "0"}
    for name, body, want in (("m", bytes(16), bytes(16)), ("text", b"hello", b"\5\0\0\0hello")):
        status, answer, content = ask(running.address, "POST", f"/v2/models/{name}/infer", body, headers)
        assert status == 200
        assert content[int(answer["inference-header-content-length"]) :] == want


def test_the_openapi_document_is_served(serve):
    status, _, body = ask(serve().address, "GET", "/openapi.json")
    assert status == 200 and json.loads(body)["openapi"] == "3.1.0"
