"""The servers people would otherwise put on the device, each in an environment of its own.

Every peer serves the same file with the same onnxruntime session options: one thread per operator.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import psutil

from benchmarks.load import Request

SERVERS = Path(__file__).parent / "servers"


@dataclass(frozen=True)
class Peer:
    """`packages` go into its environment; `python` is the interpreter it needs ("" for ours)."""

    name: str
    packages: tuple[str, ...]
    path: str
    ready: str
    body: Callable[[str, np.ndarray], tuple[bytes, dict[str, str]]]
    binary: bool = False
    python: str = ""


def v2_json(name: str, array: np.ndarray) -> tuple[bytes, dict[str, str]]:
    tensor = {
        "name": name,
        "shape": list(array.shape),
        "datatype": "FP32",
        "data": array.reshape(-1).tolist(),
    }
    return msgspec.json.encode({"inputs": [tensor]}), {"Content-Type": "application/json"}


def v2_binary(name: str, array: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """The binary tensor extension, in and out."""
    data = array.astype("<f4").tobytes()
    tensor = {
        "name": name,
        "shape": list(array.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(data)},
    }
    head = msgspec.json.encode({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    return head + data, {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def _plain(name: str, array: np.ndarray) -> tuple[bytes, dict[str, str]]:
    return msgspec.json.encode({"rows": array.tolist()}), {"Content-Type": "application/json"}


PEERS = (
    Peer("mlserver", ("mlserver==1.7.*", "uvloop<0.22"), "/v2/models/m/infer", "/v2/models/m/ready", v2_json),
    Peer("kserve", ("kserve==0.21.*",), "/v2/models/m/infer", "/v2/models/m/ready", v2_json),
    Peer("litserve", ("litserve==0.2.*",), "/predict", "/health", _plain),
    Peer("bentoml", ("bentoml==1.4.*",), "/predict", "/readyz", _plain),
    Peer(
        "pytriton",
        ("nvidia-pytriton==0.7.*", "numpy<2"),
        "/v2/models/m/infer",
        "/v2/models/m/ready",
        v2_json,
        binary=True,
        python="/usr/bin/python3.11",
    ),
)


def install(peer: Peer, folder: Path) -> Path | str:
    """The interpreter of the peer's environment, made when it is missing; or why there is none."""
    home = folder / peer.name
    python = home / "bin" / "python"
    if (home / ".ready").exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    if peer.python and not Path(peer.python).exists():
        return f"{peer.name} needs {peer.python}"
    uv = Path(sys.executable).with_name("uv")
    environment = os.environ | {"VIRTUAL_ENV": str(home)}
    index = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
    ).stdout.strip()
    if index:
        environment.setdefault("UV_DEFAULT_INDEX", index)
    for command in (
        [str(uv), "venv", "-q", "--python", peer.python or sys.executable, str(home)],
        [str(uv), "pip", "install", "-q", *peer.packages, "onnxruntime"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"{peer.name} cannot be installed: {done.stderr.strip().splitlines()[-1]}"
    (home / ".ready").touch()
    return python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Running:
    """A started server: its address, all its processes, and how long it took to be ready, in seconds."""

    url: str
    process: subprocess.Popen[bytes]
    ready_seconds: float

    def pss_bytes(self) -> int:
        """Proportional set size of the process and all its descendants."""
        root = psutil.Process(self.process.pid)
        total = 0
        for process in (root, *root.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 90.0) -> None:
    """Raises RuntimeError with the log's end."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"not ready at {url}: {log.read_text(errors='replace')[-800:]}")
        time.sleep(0.02)


@contextmanager
def running(peer: Peer, python: Path, model: Path, folder: Path) -> Iterator[Running]:
    """Serve `model` until the block ends."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{peer.name}.log"
    environment = os.environ | {
        "MODEL": str(model),
        "PORT": str(port),
        "HOME": str(folder),
        "BENTOML_HOME": str(folder / "bento"),
        "BENTOML_DO_NOT_TRACK": "true",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), str(SERVERS / f"{peer.name}_server.py")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    try:
        wait_ready(f"http://127.0.0.1:{port}{peer.ready}", process, log)
        yield Running(f"http://127.0.0.1:{port}", process, time.monotonic() - began)
    finally:
        end_tree(process)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants, each by its own id."""
    try:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        tree = []
    for member in reversed(tree):
        try:
            member.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(tree, timeout=8)
    for member in alive:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def request(peer: Peer, url: str, name: str, array: np.ndarray, *, binary: bool) -> Request:
    body, headers = (v2_binary if binary and peer.binary else peer.body)(name, array)
    return Request(url + peer.path, body, headers)
