"""Whatever is wrong with a request or a result: a protocol-conform error that names the tensor."""

from __future__ import annotations

import http.client
import json
import struct
from math import inf, nan

import pytest

from agent.runtime.port import BadInput, Overloaded, Tensor
from agent.runtime.worker import DeadlineExceeded, WorkerStopped
from agent.slots.drift import ScoreBins
from edgeward.errors import RuntimeFault
from edgeward.wire.package import TensorSpec

TWO = (
    [TensorSpec("a", "float32", [-1, 2]), TensorSpec("b", "int8", [-1])],
    [TensorSpec("s", "float32", [-1])],
)


@pytest.fixture
def ask(models, serve):
    """POST an inference: (status, headers, body as JSON)."""
    models.echo("m", "float32", [-1, 3])
    models.echo("flag", "bool", [-1])
    models.echo("byte", "uint8", [-1])
    models.echo("half", "float16", [-1])
    models.echo("text", "bytes", [-1])
    models.add("two", lambda inputs: [Tensor("s", "float32", (1,), bytes(4))], *TWO)
    connections = []

    def post(model, body, *, headers=None, path="infer", method="POST", **settings):
        if not connections:
            running = serve(**settings)
            connections.append(http.client.HTTPConnection(running.address, timeout=20))
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connections[0].request(method, f"/v2/models/{model}/{path}", content, headers or {})
        answer = connections[0].getresponse()
        return answer.status, answer.headers, json.loads(answer.read())

    yield post
    for connection in connections:
        connection.close()


def tensor(name="in", shape=(1, 3), datatype="FP32", data=(1, 2, 3), **more):
    made = {"name": name, "shape": list(shape), "datatype": datatype, **more}
    return made if data is None else {**made, "data": data}


A, B = tensor("a", [1, 2], data=[1, 2]), tensor("b", [1], "INT8", [1])

REFUSED = [
    ("m", [tensor(shape=[1, 4])], "input 'in': expected shape [-1, 3], got [1, 4]"),
    ("m", [tensor(shape=[3])], "input 'in': expected shape [-1, 3], got [3]"),
    ("m", [tensor(shape=[0, 3], data=[])], "input 'in': expected shape [-1, 3], got [0, 3]"),
    ("m", [tensor(shape=[-1, 3])], "input 'in': expected shape [-1, 3], got [-1, 3]"),
    ("m", [tensor(datatype="FP64")], "input 'in': expected datatype FP32, got 'FP64'"),
    ("m", [tensor(datatype="fp32")], "input 'in': expected datatype FP32, got 'fp32'"),
    ("m", [tensor(data=[1, 2])], "input 'in': shape [1, 3] has 3 elements, got 2"),
    ("m", [tensor(data=[[1, 2], [3, 4]])], "input 'in': expected data of shape [1, 3], got [2, 2]"),
    ("m", [tensor(shape=[2, 3], data=[[1, 2], [3, 4], [5, 6]])], "input 'in': expected data of shape [2, 3], got [3, 2]"),
    ("m", [tensor(shape=[2, 3], data=[[1, 2, 3], [4], [5, 6]])], "input 'in': expected data of shape [2, 3], got [3, 1 to"),
    ("m", [tensor(shape=[2, 3], data=[[1, 2], [3, 4, 5, 6]])], "input 'in': expected data of shape [2, 3], got [2, 2 to 4]"),
    ("m", [tensor(data=[[[1, 2, 3]]])], "input 'in': expected data of shape [1, 3], got [1, 1, 3]"),
    ("m", [tensor(shape=[1, 4], data=[[1, 2, 3, 4]])], "input 'in': expected shape [-1, 3], got [1, 4]"),
    ("text", [tensor(shape=[2], datatype="BYTES", data=[["a", "b"]])], "input 'in': expected data of shape [2], got [1, 2]"),
    (
        "m",
        [tensor(shape=[10**30, 3], data=[1, 2, 3])],
        f"input 'in': shape [{10**30}, 3] has more elements than any request",
    ),
    ("m", [tensor(data=[[1, 2], 3])], "input 'in': Expected `float`, got `array` - at `$[0]`"),
    ("m", [tensor(data=[1, "2", 3])], "input 'in': Expected `float`, got `str` - at `$[1]`"),
    ("m", [tensor(data=[1, True, 3])], "input 'in': Expected `float`, got `bool` - at `$[1]`"),
    ("m", [tensor(data=[1, None, 3])], "input 'in': Expected `float`, got `null` - at `$[1]`"),
    ("m", [tensor(data="abc")], "input 'in': Expected `array`, got `str`"),
    ("m", [tensor(data=[1, 1e39, 3])], "input 'in': element 1 is out of the range of FP32"),
    ("m", [tensor(data=None)], "input 'in': it has neither 'data' nor 'binary_data_size'"),
    ("m", [tensor("other")], "unexpected input 'other': model 'm' takes 'in'"),
    ("m", [], "missing input 'in': model 'm' takes 'in'"),
    ("m", [tensor(), tensor()], "input 'in' is given more than once"),
    ("two", [A], "missing input 'b': model 'two' takes 'a', 'b'"),
    ("two", [A, A, B], "input 'a' is given more than once"),
    ("two", [A, B, tensor("c")], "unexpected input 'c': model 'two' takes 'a', 'b'"),
    ("two", [A, tensor("b", [1], "INT8", [300])], "input 'b': element 0 is out of the range of INT8"),
    ("two", [A, tensor("b", [1], "INT8", [1.5])], "input 'b': Expected `int`, got `float` - at `$[0]`"),
    ("byte", [tensor(shape=[2], datatype="UINT8", data=[0, -1])], "input 'in': element 1 is out of the range"),
    ("flag", [tensor(shape=[1], datatype="BOOL", data=[1])], "input 'in': Expected `bool`, got `int`"),
    ("half", [tensor(shape=[1], datatype="FP16", data=[1])], "input 'in': FP16 has no JSON form, send it as binary"),
    ("text", [tensor(shape=[2], datatype="BYTES", data=["a"])], "input 'in': shape [2] has 2 elements, got 1"),
    ("text", [tensor(shape=[1], datatype="BYTES", data=[1])], "input 'in': Expected `str`, got `int`"),
    ("m", [tensor(parameters={"shared_memory_region": "r"})], "input 'in': shared memory is not supported"),
    ("m", [{"name": "in"}], "Object missing required field `shape` - at `$.inputs[0]`"),
    ("m", [tensor(shape=["1", 3])], "Expected `int`, got `str` - at `$.inputs[0].shape[0]`"),
    ("m", "x", "Expected `array`, got `str` - at `$.inputs`"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "inputs", "message"), REFUSED)
def test_wrong_json_inputs(ask, model, inputs, message):
    status, _, body = ask(model, {"inputs": inputs})
    assert (status, body.keys()) == (400, {"error"})
    assert message in body["error"]
    good = tensor()
    assert ask("m", {"inputs": [good]})[0] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Input data was truncated"),
        (b"{", "Input data was truncated"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"inputs":[{"name":"in","shape":[1,3],"datatype":"FP32","data":[1,NaN,3]}]}', "JSON has no NaN"),
        (b'{"inputs":[{"name":"in","shape":[1,3],"datatype":"FP32","data":[1,1e999,3]}]}', "input 'in': Number out"),
        (b'{"inputs":[{"name":"\xff"}]}', "not an inference request"),
        (b'{"other":' + b"[" * 100_000, "nested too deep"),
        (
            b'{"inputs":[{"name":"in","shape":[1,3],"datatype":"FP32","data":'
            + b"[" * 500 + b"]" * 500 + b"}]}",
            "input 'in'",
        ),
    ],
)  # fmt: skip
def test_what_is_no_request(ask, body, message):
    status, _, answer = ask("m", body)
    assert status == 400
    assert message in answer["error"]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"outputs": [{"name": "nothing"}]}, "unexpected output 'nothing': model 'm' has 'out'"),
        ({"outputs": [{"name": "out"}, {"name": "out"}]}, "output 'out' is asked for more than once"),
        (
            {"outputs": [{"name": "out", "parameters": {"classification": 3}}]},
            "output 'out': the classification",
        ),
        (
            {"outputs": [{"name": "out", "parameters": {"binary_data": 1}}]},
            "output 'out': binary_data must be",
        ),
        (
            {"outputs": [{"name": "out", "parameters": {"shared_memory_region": "r"}}]},
            "output 'out': shared memory is not supported",
        ),
        ({"parameters": {"binary_data_output": "yes"}}, "the request: binary_data_output must be"),
        ({"parameters": {"x": [1]}}, "$.parameters"),
    ],
)
def test_wrong_wishes_are_refused_before_the_model_runs(ask, models, wish, message):
    status, _, body = ask("m", {"inputs": [tensor()], **wish})
    assert status == 400
    assert message in body["error"]
    assert models.served["m"].runner.seen == []


def test_a_half_output_as_json_is_refused_before_the_model_runs(ask, models):
    parameters = {"binary_data_size": 2}
    head = json.dumps(
        {"inputs": [tensor(shape=[1], datatype="FP16", data=None, parameters=parameters)]}
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    status, _, body = ask("half", head + b"\0\0", headers=headers)
    assert status == 400
    assert "output 'out': FP16 has no JSON form, ask for it as binary data" in body["error"]
    assert models.served["half"].runner.seen == []


def binary(model, inputs, tail, length=None):
    head = json.dumps({"inputs": inputs}).encode()
    return (
        model,
        head + tail,
        {"Inference-Header-Content-Length": str(len(head) if length is None else length)},
    )


def sized(size, **more):
    return tensor(data=None, parameters={"binary_data_size": size}, **more)


BINARY = [
    (binary("m", [sized(12)], bytes(8)), "input 'in': binary_data_size is 12, but 8 bytes are left"),
    (binary("m", [sized(8)], bytes(8)), "input 'in': FP32 of shape [1, 3] takes 12 bytes, got 8"),
    (binary("m", [sized(12)], bytes(13)), "1 bytes of binary data belong to no input"),
    (binary("m", [sized(-1)], b""), "input 'in': binary_data_size must be an integer >= 0, got -1"),
    (binary("m", [sized(True)], b"1"), "input 'in': binary_data_size must be an integer >= 0, got True"),
    (binary("m", [{**sized(12), "data": [1, 2, 3]}], bytes(12)), "input 'in': 'data' and 'binary_data_size'"),
    (binary("m", [sized(12)], bytes(12), 10_000), "Inference-Header-Content-Length is 10000, the body has"),
    (binary("m", [sized(12)], bytes(12), -1), "Inference-Header-Content-Length must be an integer"),
    (binary("m", [sized(12)], bytes(12), "9" * 5000), "Inference-Header-Content-Length must be an integer"),
    (binary("m", [sized(12)], struct.pack("<3f", 1, nan, 2)), "input 'in': element 1 is NaN or infinite"),
    (binary("m", [sized(12)], struct.pack("<3f", 1, 2, -inf)), "input 'in': element 2 is NaN or infinite"),
    (binary("half", [sized(2, shape=[1], datatype="FP16")], b"\x00\x7c"), "input 'in': element 0 is NaN"),
    (binary("flag", [sized(2, shape=[2], datatype="BOOL")], b"\1\2"), "input 'in': a BOOL element is neither"),
    (
        binary("text", [sized(6, shape=[1], datatype="BYTES")], b"\x05\0\0\0ab"),
        "input 'in': shape [1] has 1 elements, element 0 of 5 bytes reaches 3 bytes beyond the end",
    ),
    (
        binary("text", [sized(7, shape=[2], datatype="BYTES")], b"\1\0\0\0a\1\0"),
        "input 'in': shape [2] has 2 elements, the length of element 1 is cut off",
    ),
    (binary("text", [sized(4, shape=[2], datatype="BYTES")], bytes(4)), "input 'in': shape [2] has 2 elements, got 1"),
    (("m", bytes(13), {"Inference-Header-Content-Length": "0"}), "input 'in': 13 bytes do not determine a shape"),
    (("two", bytes(8), {"Inference-Header-Content-Length": "0"}), "needs a model with one input, 'two' has 2"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "message"), BINARY)
def test_wrong_binary_inputs(ask, request_, message):
    model, body, headers = request_
    status, _, answer = ask(model, body, headers=headers)
    assert status == 400
    assert message in answer["error"]


def test_unknown_models_versions_and_paths(ask):
    for path, message in (
        ("nothing", "unknown model 'nothing'"),
        ("m/versions/9", "model 'm' has no version '9' here, but 3"),
    ):
        status, _, body = ask(path, {"inputs": [tensor()]})
        assert status == 404
        assert message in body["error"]
    assert ask("m", b"", path="nonsense")[0] == 404
    status, headers, body = ask("m", b"", method="GET")
    assert (status, headers["allow"]) == (405, "POST")
    assert body["error"] == "this path answers POST"


def test_a_model_that_is_not_ready_says_why(ask, models):
    models.change("m", runner=None, reason="its worker crashes in a loop")
    status, headers, body = ask("m", {"inputs": [tensor()]})
    assert (status, headers["retry-after"]) == (503, "1")
    assert body["error"] == "model 'm' version 3 is not ready: its worker crashes in a loop"


def test_a_model_that_may_still_be_loaded_is_not_called_unknown(ask, models):
    models.settled = False
    assert ask("m", {"inputs": [tensor()]})[0] == 200
    status, headers, body = ask("late", {"inputs": [tensor()]})
    assert (status, headers["retry-after"]) == (503, "1")
    assert body["error"] == "models are being loaded, 'late' may be one of them"
    models.settled = True
    assert ask("late", {"inputs": [tensor()]})[0] == 404


@pytest.mark.parametrize(
    ("fault", "status", "retry"),
    [
        (Overloaded("256 requests wait already", 2.3), 429, "3"),
        (WorkerStopped("has been replaced"), 503, "1"),
        (DeadlineExceeded("did not answer within 10 s"), 504, None),
        (RuntimeFault("onnxruntime: bad node"), 500, None),
        (BadInput("input in: element 0 is not UTF-8"), 400, None),
    ],
)
def test_errors_of_the_engine(ask, models, runner, fault, status, retry):
    models.echo("broken", "float32", [-1, 3], runner=runner(lambda inputs: fault))
    got, headers, body = ask("broken", {"inputs": [tensor()]})
    assert (got, headers["retry-after"], body["error"]) == (status, retry, str(fault))
    assert ask("m", {"inputs": [tensor()]})[0] == 200


@pytest.mark.parametrize(
    ("given", "counted"),
    [
        ([Tensor("out", "float32", (1,), b"\0\0\0\0")], (1, 0, 0)),
        ([Tensor("out", "float32", (1,), b"\0\0\xc0\x7f")], (1, 0, 1)),
        ([Tensor("other", "float32", (1,), b"\0\0\0\0")], (0, 1, 0)),
        (RuntimeFault("bad node"), (0, 1, 0)),
        (DeadlineExceeded("too slow"), (0, 1, 0)),
        (WorkerStopped("has been replaced"), (0, 0, 0)),
        (Overloaded("256 wait", 1.0), (0, 0, 0)),
        (BadInput("input 'in'"), (0, 0, 0)),
    ],
)
def test_what_the_model_did_counts_towards_its_health_and_nothing_else(ask, models, runner, given, counted):
    served = models.echo("watched", "float32", [-1], runner=runner(lambda inputs: given))
    ask("watched", {"inputs": [tensor(shape=[1], data=[1.0])]})
    ask("watched", {"inputs": [tensor(shape=[2], data=[1.0])]})
    health = served.health
    assert (health.answered, health.failed, health.not_finite) == counted


def test_what_was_answered_is_offered_to_a_shadow_and_its_scores_are_counted(ask, models, runner):
    offered = []

    class Observer:
        def chosen(self, number):
            return list(range(number))

        def offer(self, inputs, outputs, disagreed=None):
            offered.append((inputs["in"].tolist(), outputs["out"].tolist()))

    def work(inputs):
        (item,) = inputs
        return (
            [Tensor("out", "float32", item.shape, item.data)] if item.shape == (2,) else RuntimeFault("bad")
        )

    served = models.echo("watched", "float32", [-1], runner=runner(work), score="out")
    served.health.scores = ScoreBins()
    ask("watched", {"inputs": [tensor(shape=[2], data=[1.0, 2.0])]})
    assert offered == [] and served.health.scores._first == [1.0, 2.0]
    served.tap.observer = Observer()
    assert ask("watched", {"inputs": [tensor(shape=[2], data=[3.0, 4.0])]})[0] == 200
    assert ask("watched", {"inputs": [tensor(shape=[1], data=[5.0])]})[0] == 500
    assert offered == [([3.0, 4.0], [3.0, 4.0])], "what was not answered is nothing to compare"


def test_a_full_queue_is_refused_at_once_with_when_to_come_back(ask, models, runner):
    class Full(runner):
        def submit(self, inputs, done):
            raise Overloaded("256 requests wait already", 0.004)

    models.echo("full", "float32", [-1, 3], runner=Full(lambda inputs: inputs))
    status, headers, _ = ask("full", {"inputs": [tensor()]})
    assert (status, headers["retry-after"]) == (429, "1")


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "model 'm' returned 0 outputs (none), expected 'out'"),
        ([Tensor("out", "float32", (1,), floats(1))] * 2, "model 'm' returned 2 outputs ('out', 'out'), expected"),
        ([Tensor("else", "float32", (1,), floats(1))], "model 'm' returned 1 outputs ('else'), expected 'out'"),
        ([Tensor("out", "int64", (1,), bytes(8))], "output 'out': expected FP32, the model gave INT64"),
        ([Tensor("out", "int32", (1,), bytes(4))], "output 'out': expected FP32, the model gave INT32"),
        ([Tensor("out", "float32", (2,), floats(1))], "output 'out': FP32 of shape [2] takes 8 bytes, the model gave"),
        ([Tensor("out", "float32", (2,), floats(1, nan))], "output 'out': element 1 is nan: the model's result is"),
        ([Tensor("out", "float32", (2,), floats(inf, 1))], "output 'out': element 0 is inf: the model's result is"),
    ],
)  # fmt: skip
def test_wrong_results(ask, models, runner, outputs, message):
    models.echo("m", "float32", [-1, 3], runner=runner(lambda inputs: outputs))
    status, _, body = ask("m", {"inputs": [tensor()]})
    assert status == 500
    assert message in body["error"]


def test_a_result_that_is_not_finite_is_refused_as_binary_data_too(ask, models, runner):
    wrong = [Tensor("out", "float32", (2,), floats(1, nan))]
    models.echo("m", "float32", [-1, 3], runner=runner(lambda inputs: wrong))
    status, _, body = ask("m", {"inputs": [tensor()], "parameters": {"binary_data_output": True}})
    assert status == 500
    assert "output 'out': element 1 is NaN or infinite" in body["error"]


def test_text_that_is_no_unicode_is_refused_as_json(ask, models, runner):
    wrong = [Tensor("out", "bytes", (1,), b"\1\0\0\0\xff")]
    models.echo("text", "bytes", [-1], runner=runner(lambda inputs: wrong))
    status, _, body = ask("text", {"inputs": [tensor(shape=[1], datatype="BYTES", data=["a"])]})
    assert status == 400
    assert "output 'out': it is not UTF-8, ask for it as binary data" in body["error"]


def test_where_nan_is_allowed_it_travels_as_binary_data_but_not_as_json(ask, models):
    models.echo("m", "float32", [-1, 3], nan="allow")
    model, content, headers = binary("m", [sized(12)], floats(1, nan, inf))
    status, _, body = ask(model, content, headers=headers)
    assert status == 400
    assert "output 'out': element 1 is nan, which JSON cannot carry" in body["error"]
    assert len(models.served["m"].runner.seen) == 1


def test_sums_that_overflow_are_no_infinity(ask, models):
    models.echo("big", "float64", [-1])
    data = [1.7e308, 1.7e308]
    status, _, body = ask("big", {"inputs": [tensor(shape=[2], datatype="FP64", data=data)]})
    assert (status, body["outputs"][0]["data"]) == (200, data)


def test_the_json_part_is_bounded_but_not_the_binary_part(ask):
    status, _, body = ask("m", {"inputs": [tensor(shape=[100, 3], data=[1.0] * 300)]}, max_json_bytes=500)
    assert status == 413
    assert "send tensors as binary data" in body["error"]
    model, content, headers = binary("byte", [sized(5000, shape=[5000], datatype="UINT8")], bytes(5000))
    assert ask(model, content, headers=headers)[0] == 200


def test_a_bomb_is_not_unpacked(ask):
    import gzip

    headers = {"Content-Encoding": "gzip"}
    status, _, body = ask("m", gzip.compress(bytes(10_000_000)), headers=headers, max_body_bytes=100_000)
    assert (status, body["error"]) == (413, "the decompressed body is larger than 100000 bytes")
    status, _, body = ask("m", gzip.compress(b"{}")[:-4], headers=headers)
    assert (status, body["error"]) == (400, "the gzip body is cut off or has bytes behind its end")
    assert ask("m", b"plain", headers=headers)[0] == 400
    assert ask("m", b"x", headers={"Content-Encoding": "br"})[0] == 415


def test_web_pages_cannot_reach_models(ask):
    headers = {"Origin": "https://example.org", "Content-Type": "text/plain"}
    status, _, body = ask("m", {"inputs": [tensor()]}, headers=headers)
    assert status == 403
    assert "Origin" in body["error"]


def test_a_type_the_protocol_does_not_know_is_named(ask, models):
    models.add("odd", lambda inputs: [], [TensorSpec("z", "complex64", [1])], [])
    status, _, body = ask("odd", {"inputs": []})
    assert status == 500
    assert "input 'z' is of type complex64" in body["error"]


def test_a_bug_is_an_internal_error_and_the_connection_stays(ask, models, runner, caplog):
    def bug(inputs):
        raise ZeroDivisionError

    models.echo("bug", "float32", [-1, 3], runner=runner(bug))
    status, _, body = ask("bug", {"inputs": [tensor()]})
    assert (status, body) == (500, {"error": "internal error, see the agent's log"})
    assert ask("m", {"inputs": [tensor()]})[0] == 200
    assert "ZeroDivisionError" in caplog.text
