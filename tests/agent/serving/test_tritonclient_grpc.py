"""NVIDIA's own client, unchanged, against the gRPC server."""

from __future__ import annotations

import queue

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from agent.runtime.port import BadInput, Overloaded, Tensor
from agent.runtime.worker import DeadlineExceeded, WorkerStopped
from agent.serving.grpc_server import _CONTENTS
from agent.serving.proto import SERVICE, methods
from edgeward.errors import RuntimeFault

DTYPES = {
    "BOOL": (TensorProto.BOOL, np.array([[True], [False]])),
    "UINT8": (TensorProto.UINT8, np.array([[0], [255]], np.uint8)),
    "UINT16": (TensorProto.UINT16, np.array([[0], [65535]], np.uint16)),
    "UINT32": (TensorProto.UINT32, np.array([[0], [2**32 - 1]], np.uint32)),
    "UINT64": (TensorProto.UINT64, np.array([[0], [2**64 - 1]], np.uint64)),
    "INT8": (TensorProto.INT8, np.array([[-128], [127]], np.int8)),
    "INT16": (TensorProto.INT16, np.array([[-32768], [32767]], np.int16)),
    "INT32": (TensorProto.INT32, np.array([[-(2**31)], [2**31 - 1]], np.int32)),
    "INT64": (TensorProto.INT64, np.array([[-(2**63)], [2**63 - 1]], np.int64)),
    "FP16": (TensorProto.FLOAT16, np.array([[-65504], [0.5]], np.float16)),
    "FP32": (TensorProto.FLOAT, np.array([[-1e38], [0.5]], np.float32)),
    "FP64": (TensorProto.DOUBLE, np.array([[-1e300], [0.5]], np.float64)),
    "BYTES": (TensorProto.STRING, np.array([[""], ["温度 °C"]], object)),
}


@pytest.fixture
def client(serve):
    made = []

    def connect(**settings):
        running = serve(grpc_port=0, **settings)
        client = triton.InferenceServerClient(f"127.0.0.1:{running.server.grpc_port}")
        client.running = running
        made.append(client)
        return client

    yield connect
    for client in made:
        client.close()


def asked(array, name):
    item = triton.InferInput("in", array.shape, name)
    item.set_data_from_numpy(array)
    return item


def plain(array):
    return [item.decode() if isinstance(item, bytes) else item for item in array.reshape(-1).tolist()]


@pytest.mark.parametrize("name", DTYPES)
def test_every_datatype_comes_back_as_it_went(models, client, onnx_identity, name):
    element, array = DTYPES[name]
    models.onnx("identity", onnx_identity(element, ["n", 1]))
    result = client().infer("identity", [asked(array, name)], request_id="r-1")
    assert plain(result.as_numpy("out")) == plain(array)
    assert result.get_response().id == "r-1"
    assert result.get_response().model_version == "3"


def test_bfloat16(models, client):
    models.echo("brain", "bfloat16", [-1])
    array = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    assert client().infer("brain", [asked(array, "BF16")]).as_numpy("out").tolist() == [1.5, -2.0]


@pytest.mark.parametrize("name", _CONTENTS)
def test_typed_contents(models, client, name):
    array = DTYPES[name][1]
    models.echo("m", "bytes" if name == "BYTES" else array.dtype.name, [-1, 1])
    request = service_pb2.ModelInferRequest(model_name="m")
    item = request.inputs.add(name="in", datatype=name, shape=array.shape)
    values = [value.encode() if isinstance(value, str) else value for value in array.reshape(-1).tolist()]
    getattr(item.contents, _CONTENTS[name]).extend(values)

    response = client()._client_stub.ModelInfer(request)

    assert plain(triton.InferResult(response).as_numpy("out")) == plain(array)


def test_typed_contents_in_the_wrong_field_are_named(models, client):
    models.echo("m", "float32", [-1])
    request = service_pb2.ModelInferRequest(model_name="m")
    item = request.inputs.add(name="in", datatype="FP32", shape=[1])
    item.contents.fp64_contents.append(1.0)
    with pytest.raises(grpc.RpcError) as refused:
        client()._client_stub.ModelInfer(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "input 'in': FP32 is expected in fp32_contents, not in fp64_contents" in refused.value.details()


def test_raw_contents_are_one_for_each_input(models, client):
    models.echo("m", "float32", [-1])
    request = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[bytes(4), bytes(4)])
    request.inputs.add(name="in", datatype="FP32", shape=[1])
    with pytest.raises(grpc.RpcError) as refused:
        client()._client_stub.ModelInfer(request)
    assert refused.value.details() == "1 inputs, but 2 raw_input_contents"


def test_requested_outputs(models, client, onnx_sum):
    models.onnx("sum", onnx_sum)
    connected = client()
    inputs = []
    for name, values in (("b", [[10, 20]]), ("a", [[1, 2]])):
        inputs.append(triton.InferInput(name, [1, 2], "FP32"))
        inputs[-1].set_data_from_numpy(np.array(values, np.float32))
    result = connected.infer("sum", inputs, outputs=[triton.InferRequestedOutput("difference")])
    assert result.as_numpy("difference").tolist() == [[-9, -18]]
    assert result.as_numpy("sum") is None
    with pytest.raises(InferenceServerException, match="unexpected output 'product'"):
        connected.infer("sum", inputs, outputs=[triton.InferRequestedOutput("product")])


def test_a_stream_answers_in_order_and_survives_a_refused_request(models, client):
    models.echo("m", "int64", [-1])
    connected = client()
    answers: queue.Queue = queue.Queue()
    connected.start_stream(lambda result, error: answers.put((result, error)))
    connected.async_stream_infer("m", [asked(np.array([1], np.int64), "INT64")])
    connected.async_stream_infer("unknown", [asked(np.array([2], np.int64), "INT64")])
    connected.async_stream_infer("m", [asked(np.array([3], np.int64), "INT64")])
    got = [answers.get(timeout=20) for _ in range(3)]
    connected.stop_stream()
    assert got[0][0].as_numpy("out").tolist() == [1]
    assert "unknown model 'unknown'" in str(got[1][1])
    assert got[2][0].as_numpy("out").tolist() == [3]


def test_health_metadata_configuration_repository_and_statistics(models, client):
    models.echo("m", "bytes", [-1, 9])
    models.add("broken", None, [], [], reason="worker crashes in a loop")
    connected = client()
    assert connected.is_server_live() and not connected.is_server_ready()
    assert connected.is_model_ready("m", "3") and not connected.is_model_ready("broken")
    assert "statistics" in connected.get_server_metadata().extensions
    metadata = connected.get_model_metadata("m")
    assert (metadata.inputs[0].datatype, list(metadata.inputs[0].shape)) == ("BYTES", [-1, 9])
    assert connected.get_model_config("m").config.input[0].data_type == 13
    index = {item.name: item for item in connected.get_model_repository_index().models}
    assert (index["broken"].state, index["broken"].reason) == ("UNAVAILABLE", "worker crashes in a loop")
    assert connected.get_inference_statistics("m").model_stats[0].version == "3"
    for refused in (connected.load_model, connected.unload_model):
        with pytest.raises(InferenceServerException, match="signed rollouts only") as error:
            refused("m")
        assert error.value.status() == "StatusCode.PERMISSION_DENIED"
    with pytest.raises(InferenceServerException, match="has no version '4' here, but 3") as error:
        connected.get_model_metadata("m", "4")
    assert error.value.status() == "StatusCode.NOT_FOUND"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Overloaded("256 requests wait already", 0.2), "RESOURCE_EXHAUSTED"),
        (DeadlineExceeded("did not answer within 10 s"), "DEADLINE_EXCEEDED"),
        (WorkerStopped("has been replaced"), "UNAVAILABLE"),
        (RuntimeFault("onnxruntime: bad node"), "INTERNAL"),
        (BadInput("input in: element 0 is not UTF-8"), "INVALID_ARGUMENT"),
    ],
)
def test_engine_errors_have_their_code(models, client, runner, fault, code):
    models.echo("m", "float32", [-1], runner=runner(lambda inputs: fault))
    with pytest.raises(InferenceServerException, match=str(fault)) as error:
        client().infer("m", [asked(np.zeros(1, np.float32), "FP32")])
    assert error.value.status() == f"StatusCode.{code}"


def test_wrong_inputs_are_invalid_arguments_that_name_the_tensor(models, client):
    models.echo("m", "float32", [-1, 9])
    connected = client()
    for array, name, message in (
        (np.zeros((1, 8), np.float32), "FP32", r"input 'in': expected shape \[-1, 9\], got \[1, 8\]"),
        (np.zeros((1, 9), np.float64), "FP64", "input 'in': expected datatype FP32, got 'FP64'"),
        (np.full((1, 9), np.nan, np.float32), "FP32", "input 'in': element 0 is NaN"),
    ):
        with pytest.raises(InferenceServerException, match=message) as error:
            connected.infer("m", [asked(array, name)])
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_model_with_nan_or_the_wrong_outputs_is_an_internal_error(models, client, runner):
    nan = Tensor("out", "float32", (1,), np.array([np.nan], np.float32).tobytes())
    models.echo("nan", "float32", [-1], runner=runner(lambda inputs: [nan]))
    models.echo("none", "float32", [-1], runner=runner(lambda inputs: []))
    connected = client()
    for name, message in (("nan", "output 'out': element 0 is NaN"), ("none", "returned 0 outputs")):
        with pytest.raises(InferenceServerException, match=message) as error:
            connected.infer(name, [asked(np.zeros(1, np.float32), "FP32")])
        assert error.value.status() == "StatusCode.INTERNAL"


def test_a_message_over_the_body_limit_is_refused(models, client):
    models.echo("m", "uint8", [-1])
    with pytest.raises(InferenceServerException) as error:
        client(max_body_bytes=1000).infer("m", [asked(np.zeros(2000, np.uint8), "UINT8")])
    assert error.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_the_compiled_protocol_is_the_one_of_the_source_and_tritons():
    """Field by field what Triton's own client sends; more would never be sent, other would be misread."""
    ours = {}
    for _, _, request, response in methods():
        for kind in (request, response):
            ours[kind.DESCRIPTOR.name] = kind.DESCRIPTOR
    theirs = service_pb2.DESCRIPTOR.message_types_by_name
    assert service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name == SERVICE
    seen = set()

    def same(mine, other):
        if mine.full_name in seen:
            return
        seen.add(mine.full_name)
        for field in mine.fields:
            twin = other.fields_by_name[field.name]
            assert (field.number, field.type) == (twin.number, twin.type), field.full_name
            if field.message_type is not None:
                same(field.message_type, twin.message_type)

    for name, descriptor in ours.items():
        same(descriptor, theirs[name])
    assert len(seen) > 25


def test_bodies_of_all_requests_together_are_bounded(models, client, held):
    """Held until the model has answered, and given back then, on both kinds of call."""
    models.echo("slow", "uint8", [-1], runner=held)
    models.echo("m", "uint8", [-1])
    connected = client(max_body_bytes=1 << 20, max_held_bytes=2 << 20)
    large = np.zeros(900_000, np.uint8)
    answers: queue.Queue = queue.Queue()
    for _ in range(2):
        connected.async_infer(
            "slow", [asked(large, "UINT8")], lambda result, error: answers.put((result, error))
        )
        assert held.arrived.acquire(timeout=20)

    with pytest.raises(InferenceServerException, match="too many large requests at once") as error:
        connected.infer("m", [asked(large, "UINT8")])
    assert error.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    streamed: queue.Queue = queue.Queue()
    connected.start_stream(lambda result, error: streamed.put((result, error)))
    connected.async_stream_infer("m", [asked(large, "UINT8")])
    assert "too many large requests at once" in str(streamed.get(timeout=20)[1])
    assert connected.infer("m", [asked(large[:1000], "UINT8")]).as_numpy("out").size == 1000

    connected.running.on_loop(lambda: [held.release(index) for index in range(2)])
    assert [answers.get(timeout=20)[1] for _ in range(2)] == [None, None]
    for _ in range(3):
        assert connected.infer("m", [asked(large, "UINT8")]).as_numpy("out").size == large.size
        connected.async_stream_infer("m", [asked(large, "UINT8")])
        assert streamed.get(timeout=20)[0].as_numpy("out").size == large.size
        with pytest.raises(InferenceServerException, match="expected shape"):
            connected.infer("m", [asked(large.reshape(1, -1), "UINT8")])
        with pytest.raises(InferenceServerException, match="unknown model"):
            connected.infer("other", [asked(large, "UINT8")])
    connected.stop_stream()
    assert connected.running.server.api.statistics.held_bytes == 0


def test_a_request_whose_client_has_gone_counts_until_the_model_is_done(models, client, held):
    models.echo("slow", "uint8", [-1], runner=held)
    connected = client()
    statistics = connected.running.server.api.statistics
    call = connected.async_infer(
        "slow", [asked(np.zeros(5000, np.uint8), "UINT8")], lambda result, error: gone.put(error)
    )
    gone: queue.Queue = queue.Queue()
    assert held.arrived.acquire(timeout=20)
    call.cancel()
    gone.get(timeout=20)
    connected.is_server_live()  # a round trip later
    assert statistics.held_bytes >= 5000
    connected.running.on_loop(lambda: held.release(0))
    assert statistics.held_bytes == 0
