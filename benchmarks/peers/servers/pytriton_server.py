import os

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from session import open_session

session = open_session()
(entry,) = session.get_inputs()
(exit_,) = session.get_outputs()


@batch
def infer(**inputs):
    return session.run(None, {entry.name: inputs[entry.name]})


def shape(item):
    return tuple(size if isinstance(size, int) else -1 for size in item.shape[1:])


port = int(os.environ["PORT"])
config = TritonConfig(
    http_address="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_port=port + 2, log_verbose=0
)
with Triton(config=config) as triton:
    triton.bind(
        model_name="m",
        infer_func=infer,
        inputs=[Tensor(name=entry.name, dtype=np.float32, shape=shape(entry))],
        outputs=[Tensor(name=exit_.name, dtype=np.float32, shape=shape(exit_))],
        config=ModelConfig(max_batch_size=16, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
    )
    triton.serve()
