import asyncio
import os

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
from session import open_session


class Served(MLModel):
    async def load(self):
        self.session = open_session()
        self.input = self.session.get_inputs()[0].name
        return True

    async def predict(self, payload):
        rows = NumpyCodec.decode_input(payload.inputs[0]).astype("float32")
        (scores,) = self.session.run(None, {self.input: rows})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("out", scores)])


async def main():
    port = int(os.environ["PORT"])
    settings = Settings(
        host="127.0.0.1",
        http_port=port,
        grpc_port=port + 1,
        metrics_port=port + 2,
        parallel_workers=0,
        debug=False,
    )
    await MLServer(settings).start([ModelSettings(name="m", implementation=Served)])


asyncio.run(main())
