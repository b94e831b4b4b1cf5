import os

from kserve import InferOutput, InferResponse, Model, ModelServer
from session import open_session


class Served(Model):
    def __init__(self):
        super().__init__("m")
        self.session = open_session()
        self.input = self.session.get_inputs()[0].name
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        (scores,) = self.session.run(None, {self.input: payload.inputs[0].as_numpy()})
        output = InferOutput("out", list(scores.shape), "FP32")
        output.set_data_from_numpy(scores, binary_data=False)
        return InferResponse(payload.id or "", "m", [output])


ModelServer(http_port=int(os.environ["PORT"]), enable_grpc=False, workers=1, access_log_format=None).start(
    [Served()]
)
