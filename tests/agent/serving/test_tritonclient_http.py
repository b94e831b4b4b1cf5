"""NVIDIA's own client, unchanged, against the REST server."""

from __future__ import annotations

import gevent
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from onnx import TensorProto
from tritonclient.utils import InferenceServerException

DTYPES = {
    "BOOL": (TensorProto.BOOL, np.bool_),
    "UINT8": (TensorProto.UINT8, np.uint8),
    "UINT16": (TensorProto.UINT16, np.uint16),
    "UINT32": (TensorProto.UINT32, np.uint32),
    "UINT64": (TensorProto.UINT64, np.uint64),
    "INT8": (TensorProto.INT8, np.int8),
    "INT16": (TensorProto.INT16, np.int16),
    "INT32": (TensorProto.INT32, np.int32),
    "INT64": (TensorProto.INT64, np.int64),
    "FP16": (TensorProto.FLOAT16, np.float16),
    "FP32": (TensorProto.FLOAT, np.float32),
    "FP64": (TensorProto.DOUBLE, np.float64),
    "BYTES": (TensorProto.STRING, np.object_),
}


def extremes(name):
    kind = DTYPES[name][1]
    if name == "BYTES":
        return np.array([["", "naïve"], ["温度\x00 °C", "x" * 300]], object)
    if name == "BOOL":
        return np.array([[True, False], [False, True]])
    info = np.finfo(kind) if name.startswith("FP") else np.iinfo(kind)
    return np.array([[info.min, info.max], [0, 1]], kind)


@pytest.fixture
def client(serve):
    made = []

    def connect(running, **options):
        client = triton.InferenceServerClient(running.address, **options)
        made.append(client)
        return client

    yield connect
    for client in made:
        client.close()


def asked(array, name, *, binary):
    item = triton.InferInput("in", array.shape, name)
    item.set_data_from_numpy(array, binary_data=binary)
    return item


#: FP16 has no JSON form, in Triton neither.
WAYS = [
    (name, binary_in, binary_out)
    for name in DTYPES
    for binary_in in (True, False)
    for binary_out in (True, False)
    if name != "FP16" or (binary_in and binary_out)
]


@pytest.mark.parametrize(("name", "binary_in", "binary_out"), WAYS)
def test_every_datatype_comes_back_as_it_went(
    models, serve, client, onnx_identity, name, binary_in, binary_out
):
    models.onnx("identity", onnx_identity(DTYPES[name][0], ["n", 2]))
    array = extremes(name)

    result = client(serve()).infer(
        "identity",
        [asked(array, name, binary=binary_in)],
        outputs=[triton.InferRequestedOutput("out", binary_data=binary_out)],
        request_id="r-1",
    )

    got = result.as_numpy("out")

    if name == "BYTES":
        got = np.array([v.decode() if isinstance(v, bytes) else v for v in got.flat], object).reshape(
            got.shape
        )
    assert got.shape == array.shape
    assert (got == array).all()
    assert result.get_response()["id"] == "r-1"
    assert result.get_output("out")["datatype"] == name


def test_bfloat16_travels_as_binary_data(models, serve, client):
    models.echo("brain", "bfloat16", [-1])
    array = np.array([1.5, -2.0], ml_dtypes.bfloat16)

    result = client(serve()).infer("brain", [asked(array, "BF16", binary=True)])

    assert result.as_numpy("out").tolist() == [1.5, -2.0]


def test_binary_and_json_inputs_mix_and_a_subset_of_outputs_comes_back(models, serve, client, onnx_sum):
    models.onnx("sum", onnx_sum)
    a, b = np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)
    inputs = [triton.InferInput("b", b.shape, "FP32"), triton.InferInput("a", a.shape, "FP32")]
    inputs[0].set_data_from_numpy(b, binary_data=True)
    inputs[1].set_data_from_numpy(a, binary_data=False)
    connected = client(serve())

    result = connected.infer("sum", inputs, outputs=[triton.InferRequestedOutput("difference")])
    assert result.as_numpy("difference").tolist() == [[-9, -18]]
    assert result.as_numpy("sum") is None

    both = connected.infer("sum", inputs, model_version="3")
    assert both.as_numpy("sum").tolist() == [[11, 22]]
    assert both.get_response()["model_version"] == "3"


@pytest.mark.parametrize("way", ["gzip", "deflate"])
def test_compressed_requests_and_answers(models, serve, client, onnx_identity, way):
    models.onnx("identity", onnx_identity(TensorProto.FLOAT, ["n", 4096]))
    array = np.arange(4096, dtype=np.float32).reshape(1, -1)

    result = client(serve()).infer(
        "identity",
        [asked(array, "FP32", binary=True)],
        request_compression_algorithm=way,
        response_compression_algorithm=way,
    )

    assert (result.as_numpy("out") == array).all()


def test_health_metadata_configuration_and_repository(models, serve, client):
    models.echo("m", "float32", [-1, 9])
    models.echo("broken", "float32", [-1])
    models.change("broken", runner=None, reason="worker crashes in a loop")
    connected = client(serve())

    assert connected.is_server_live()
    assert not connected.is_server_ready()
    assert connected.is_model_ready("m") and connected.is_model_ready("m", "3")
    assert not connected.is_model_ready("broken")
    assert not connected.is_model_ready("nothing")
    assert "binary_tensor_data" in connected.get_server_metadata()["extensions"]
    assert connected.get_model_metadata("m") == {
        "name": "m",
        "versions": ["3"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "in", "datatype": "FP32", "shape": [-1, 9]}],
        "outputs": [{"name": "out", "datatype": "FP32", "shape": [-1, 9]}],
    }
    assert connected.get_model_config("m")["input"][0]["data_type"] == "TYPE_FP32"
    index = {item["name"]: item for item in connected.get_model_repository_index()}
    assert index["m"]["state"] == "READY"
    assert index["broken"] == {
        "name": "broken", "version": "3", "state": "UNAVAILABLE", "reason": "worker crashes in a loop",
    }  # fmt: skip
    for refused in (connected.load_model, connected.unload_model):
        with pytest.raises(InferenceServerException, match="signed rollouts only"):
            refused("m")


def test_statistics_count_requests_and_rows(models, serve, client):
    models.echo("m", "float32", [-1, 2], max_batch=8)
    connected = client(serve())
    connected.infer("m", [asked(np.zeros((3, 2), np.float32), "FP32", binary=True)])
    with pytest.raises(InferenceServerException):
        connected.infer("m", [asked(np.zeros((3, 1), np.float32), "FP32", binary=True)])

    (stats,) = connected.get_inference_statistics("m")["model_stats"]

    assert stats["inference_count"] == 3
    assert stats["execution_count"] == 1
    assert stats["inference_stats"]["success"]["count"] == 1
    assert stats["inference_stats"]["fail"]["count"] == 1
    assert stats["inference_stats"]["compute_infer"] == {"count": 1, "ns": 2000}
    assert connected.get_inference_statistics()["model_stats"] == [stats]


def test_many_requests_at_once_get_their_own_answers(models, serve, client):
    models.echo("m", "int64", [-1])
    connected = client(serve(), concurrency=8)
    waiting = [
        connected.async_infer("m", [asked(np.array([n], np.int64), "INT64", binary=bool(n % 2))])
        for n in range(64)
    ]
    gevent.idle()
    assert [item.get_result().as_numpy("out").tolist() for item in waiting] == [[n] for n in range(64)]


def test_shared_memory_is_refused_by_name(serve, client):
    with pytest.raises(InferenceServerException, match="systemsharedmemory is not supported"):
        client(serve()).get_system_shared_memory_status()
