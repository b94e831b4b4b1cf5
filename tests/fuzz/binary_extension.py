"""Coverage-guided fuzzing of the inference request parser, JSON and binary tensor extension.

    python tests/fuzz/binary_extension.py [-max_total_time=SECONDS] [CORPUS]

Needs atheris. `check` is the property alone; without atheris hypothesis drives it.
"""

from __future__ import annotations

import sys
from math import prod

from agent.serving.catalog import Served
from agent.serving.datatypes import BY_DTYPE
from agent.serving.decode import parse
from agent.serving.refusal import Refusal
from agent.serving.signature import Signature
from agent.serving.statistics import ModelStatistics
from edgeward.wire.package import TensorSpec
from edgeward.wire.tensors import unpack_elements

SIGNATURES = [
    Signature(Served("m", "1", "onnx", "sha256:0", inputs, outputs, None), ModelStatistics())
    for inputs, outputs in (
        ([TensorSpec("a", "float32", [-1, 2])], [TensorSpec("o", "float32", [-1])]),
        ([TensorSpec("a", "bytes", [-1])], [TensorSpec("o", "bytes", [-1])]),
        (
            [TensorSpec("a", "bool", [-1]), TensorSpec("b", "float16", [2]), TensorSpec("c", "int64", [])],
            [TensorSpec("o", "bfloat16", [-1])],
        ),
    )
]


def check(data: bytes) -> bool:
    """Whatever comes is refused, or made into tensors that are exactly what they say; True: the latter.

    The first byte chooses the model, the next two the length of the JSON part; 65535: no such header.
    """
    if len(data) < 3:
        return False
    signature = SIGNATURES[data[0] % len(SIGNATURES)]
    stated = int.from_bytes(data[1:3], "little")
    try:
        parsed = parse(signature, data[3:], None if stated == 65535 else stated, 1 << 20)
    except Refusal as refusal:
        assert refusal.status in (400, 413)
        assert str(refusal)
        return False
    assert [tensor.name for tensor in parsed.tensors] == list(signature.inputs)
    for tensor in parsed.tensors:
        field = signature.inputs[tensor.name]
        assert tensor.dtype == field.datatype.dtype
        assert len(tensor.shape) == len(field.shape)
        count = prod(tensor.shape)
        size = BY_DTYPE[tensor.dtype].size
        if size:
            assert len(tensor.data) == count * size
        else:
            assert len(unpack_elements(tensor.data)) == count
    return True


def main() -> None:
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, lambda data: check(data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
