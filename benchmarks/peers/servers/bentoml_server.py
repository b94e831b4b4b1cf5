import os
import sys
from pathlib import Path

if __name__ == "__main__":
    command = [
        "bentoml",
        "serve",
        "bentoml_server:Served",
        "--host",
        "127.0.0.1",
        "--port",
        os.environ["PORT"],
    ]
    folder = str(Path(__file__).parent)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = folder
    os.execvp(str(Path(sys.executable).with_name("bentoml")), command)

import bentoml
import numpy as np
from session import open_session


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Served:
    def __init__(self):
        self.session = open_session()
        self.input = self.session.get_inputs()[0].name

    @bentoml.api
    def predict(self, rows: list) -> list:
        return self.session.run(None, {self.input: np.array(rows, dtype=np.float32)})[0].tolist()
