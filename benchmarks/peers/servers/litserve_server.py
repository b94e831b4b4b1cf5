import os

import litserve
import numpy as np
from session import open_session


class Served(litserve.LitAPI):
    def setup(self, device):
        self.session = open_session()
        self.input = self.session.get_inputs()[0].name

    def decode_request(self, request):
        return np.array(request["rows"], dtype=np.float32)

    def predict(self, rows):
        return self.session.run(None, {self.input: rows})[0]

    def encode_response(self, scores):
        return {"scores": scores.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Served(), accelerator="cpu", workers_per_device=1, track_requests=False)
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        generate_client_file=False,
        num_api_servers=1,
        log_level="warning",
    )
