"""How fast does the agent serve local applications, against the servers people would put there instead?

python -m benchmarks.inference [--quick] [--json FILE] [--peers NAME,...] [--environments FOLDER]

The agent is the real one: enrolled, its models rolled out, each in a worker process. Peers are installed
into environments of their own (about 1.5 GB the first time). All servers get the same load in turn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks import load, models
from benchmarks.peers import PEERS, Peer, free_port, install, request, running, v2_binary, v2_json
from benchmarks.plant import SlotModel, plant, start_serving
from benchmarks.report import Row, arguments, finish, median, spread

TABULAR, CNN = "boosting", "cnn"
Figures = dict[str, dict[str, list[float]]]


def _session(content: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def raw(content: bytes, array: np.ndarray, seconds: float) -> tuple[float, float]:
    """Calls per second of onnxruntime in this process, and the median in milliseconds: the limit."""
    session = _session(content)
    feed = {session.get_inputs()[0].name: array}
    for _ in range(10):
        session.run(None, feed)
    spent: list[float] = []
    end = time.perf_counter() + seconds
    began = last = time.perf_counter()
    while last < end:
        session.run(None, feed)
        now = time.perf_counter()
        spent.append(now - last)
        last = now
    return len(spent) / (last - began), float(np.median(spent)) * 1e3


class Measurement:
    """One run of all works against one server; figures are kept by work and server."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.figures: Figures = defaultdict(lambda: defaultdict(list))

    def note(self, work: str, server: str, value: float) -> None:
        self.figures[work][server].append(value)

    def tabular(self, server: str, asked: load.Request) -> None:
        load.run(asked, 4, 1)
        many = self._checked(server, asked, 16)
        self.note("tabular-16", server, many.rate)
        self.note("tabular-16-p99", server, many.p99_ms)
        self.note("tabular-1-p50", server, self._checked(server, asked, 1).p50_ms)

    def cnn(self, server: str, asked: load.Request) -> None:
        load.run(asked, 4, 1)
        many = self._checked(server, asked, 16)
        self.note("cnn-16", server, many.rate)
        self.note("cnn-16-tail", server, many.p99_ms / many.p50_ms)

    def _checked(self, server: str, asked: load.Request, connections: int) -> load.Measured:
        measured = load.run(asked, connections, self.seconds)
        if measured.errors:
            raise RuntimeError(f"{server}: {measured.errors} requests failed at {asked.url}")
        return measured


def _measure_peer(
    measurement: Measurement, peer: Peer, python: Path, files: dict[str, Path], arrays: dict[str, np.ndarray],
    folder: Path,
) -> None:  # fmt: skip
    with running(peer, python, files[TABULAR], folder) as server:
        measurement.tabular(peer.name, request(peer, server.url, "input", arrays[TABULAR], binary=False))
        measurement.note("pss", peer.name, server.pss_bytes() / 1e6)
        measurement.note("ready", peer.name, server.ready_seconds)
    with running(peer, python, files[CNN], folder) as server:
        measurement.cnn(peer.name, request(peer, server.url, "image", arrays[CNN], binary=True))


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--peers", help="names, comma-separated; default: all")
    parser.add_argument("--rounds", type=int, help="interleaved runs (3, quick: 1)")
    parser.add_argument(
        "--environments", type=Path, default=Path(".edgeward/peers"), help="where the peers are installed"
    )
    options = parser.parse_args()
    rounds, seconds = options.rounds or (1 if options.quick else 3), 2.0 if options.quick else 5.0
    wanted = options.peers.split(",") if options.peers is not None else [peer.name for peer in PEERS]
    rng = np.random.default_rng(7)
    arrays = {
        TABULAR: rng.random((1, 9), np.float32),
        CNN: rng.random((1, 3, 80, 80), np.float32),
    }
    contents = {TABULAR: models.tabular(), CNN: models.cnn()}
    notes, peers = [f"load by {load.client()}; {rounds} interleaved runs of {seconds:.0f} s"], []
    for peer in PEERS:
        if peer.name in wanted:
            print(f"installing {peer.name}", file=sys.stderr)
            python = install(peer, options.environments.resolve())
            if isinstance(python, str):
                notes.append(f"left out: {python}")
            else:
                peers.append((peer, python))
    measurement = Measurement(seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {model: folder / f"{model}.onnx" for model in contents}
        for model, content in contents.items():
            files[model].write_bytes(content)
        slots = [
            SlotModel("default", TABULAR, contents[TABULAR], {"input": rng.random((20, 9), np.float32)}),
            SlotModel("vision", CNN, contents[CNN], {"image": rng.random((2, 3, 80, 80), np.float32)}),
        ]
        print("enrolling an agent and rolling the models out", file=sys.stderr)
        with plant(folder / "plant", slots) as agent, plant(folder / "small", slots[:1]) as small:
            agent.stop()
            small.stop()
            for number in range(rounds):
                print(f"run {number + 1} of {rounds}: edgeward", file=sys.stderr)
                _measure_ours(measurement, agent, contents, arrays)
                port = free_port()
                measurement.note("ready", "edgeward", start_serving(small, port))
                body, headers = v2_json("input", arrays[TABULAR])
                address = f"http://127.0.0.1:{port}/v2/models/{TABULAR}/infer"
                load.run(load.Request(address, body, headers), 16, 1)
                measurement.note("pss", "edgeward", small.pss_bytes() / 1e6)
                small.stop()
                for peer, python in peers:
                    print(f"run {number + 1} of {rounds}: {peer.name}", file=sys.stderr)
                    try:
                        _measure_peer(measurement, peer, python, files, arrays, folder / "peers")
                    except (RuntimeError, OSError) as error:
                        notes.append(f"{peer.name}: {error}")
    finish("Serving local applications", _rows(measurement.figures), options.json, notes)


def _measure_ours(
    measurement: Measurement, agent: Any, contents: dict[str, bytes], arrays: dict[str, np.ndarray]
) -> None:
    """The limit right before and right after ours: a shared machine is not the same for long."""
    port = free_port()
    base = f"http://127.0.0.1:{port}/v2/models"

    def limit(model: str, key: str) -> None:
        rate, p50 = raw(contents[model], arrays[model], measurement.seconds / 4)
        measurement.note(f"{key}-16", "raw", rate)
        measurement.note(f"{key}-1-p50", "raw", p50)

    start_serving(agent, port)
    limit(TABULAR, "tabular")
    body, headers = v2_json("input", arrays[TABULAR])
    measurement.tabular("edgeward", load.Request(f"{base}/{TABULAR}/infer", body, headers))
    limit(TABULAR, "tabular")
    limit(CNN, "cnn")
    body, headers = v2_binary("image", arrays[CNN])
    measurement.cnn("edgeward", load.Request(f"{base}/{CNN}/infer", body, headers))
    limit(CNN, "cnn")
    agent.stop()


def _rows(figures: Figures) -> list[Row]:
    def best(work: str, choose: Callable[..., float]) -> tuple[float | None, str]:
        medians = {
            name: median(values) for name, values in figures[work].items() if name not in ("edgeward", "raw")
        }
        if not medians:
            return None, ""
        value = choose(medians.values())
        return value, next(name for name, item in medians.items() if item == value)

    def row(
        work: str,
        text: str,
        unit: str,
        target: str,
        choose: Callable[..., float],
        holds: Callable[..., bool | None],
    ) -> Row:
        ours = figures[work]["edgeward"]
        limit = median(figures[work]["raw"]) if "raw" in figures[work] else None
        peer, name = best(work, choose)
        return Row(
            text,
            unit,
            median(ours),
            limit,
            peer,
            name,
            target,
            spread(ours),
            holds(median(ours), limit, peer),
        )

    return [
        row(
            "tabular-16", "boosting, REST v2, 16 connections", "requests/s", ">= 10 x the best peer", max,
            lambda ours, limit, peer: ours >= 10 * peer if peer else None,
        ),
        row(
            "tabular-1-p50", "the same, 1 connection, p50", "ms", "<= 0.20", min,
            lambda ours, limit, peer: ours <= 0.20,
        ),
        row(
            "cnn-16", "CNN, binary tensors, 16 connections", "requests/s", ">= 0.97 of the limit", max,
            lambda ours, limit, peer: ours >= 0.97 * limit,
        ),
        row(
            "cnn-16-tail", "the same, p99 / p50", "ratio", "<= 1.3", min,
            lambda ours, limit, peer: ours <= 1.3,
        ),
        row(
            "pss", "all processes, one small model loaded, after load", "MB PSS", "<= 120", min,
            lambda ours, limit, peer: ours <= 120,
        ),
        row(
            "ready", "process start until ready", "s", "<= 1", min,
            lambda ours, limit, peer: ours <= 1,
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
