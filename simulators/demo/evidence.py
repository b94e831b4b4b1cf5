"""What the demo finds afterwards: asked from the store and the controller, as a user would."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from edgeward.errors import EdgewardError
from edgeward.mqtt import Broker, Link, Message
from edgeward.storage import sha256_file
from simulators.demo import detection
from simulators.demo.hostile import MARK
from simulators.demo.place import Place, answer_json
from simulators.demo.plan import DEVICES, ROLLOUTS, TINY_V1, V1, V2, split
from simulators.demo.releases import manifest
from simulators.demo.summary import rollout_summary, version_summary


class AlarmListener:
    """Hears the alarms on the plant's local topics, as an operator's panel would."""

    def __init__(self, broker: str) -> None:
        self.by_device: Counter[str] = Counter()
        self._link = Link(
            Broker(broker),
            "alarm-panel",
            subscriptions=("alarms/+/+",),
            on_message=self._hear,
            max_reconnect_delay=1.0,
        )

    def _hear(self, message: Message) -> None:
        self.by_device[message.topic.rsplit("/", 1)[1]] += 1

    def start(self) -> None:
        self._link.start()

    def stop(self) -> None:
        self._link.stop()


def verify(place: Place) -> dict[str, int]:
    """`trends verify` over what all sensors produced."""
    produced = place.folder / "produced.jsonl"
    produced.write_text("".join(place.produced(device.name).read_text() for device in DEVICES))
    done = place.attempt("trends", "verify", "--dir", place.store, "--produced", produced, "--json")
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise EdgewardError(f"`edgeward trends verify` failed: {done.stderr.strip()[-500:]}")
    verdict: dict[str, int] = answer_json(done.stdout, "edgeward trends verify")
    return verdict


def sql(place: Place, query: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = answer_json(
        place.run("trends", "query", "--dir", place.store, "--sql", query, "-o", "json"),
        "edgeward trends query",
    )
    return rows


def counts(place: Place) -> dict[str, int]:
    """Rows that name the hostile client's mark, and stored alarms; one query for both."""
    (row,) = sql(
        place,
        f"SELECT (SELECT count(*) FROM results WHERE stream = '{MARK}' OR source_epoch = '{MARK}') AS forged,"  # noqa: S608
        " (SELECT count(*) FROM alarms) AS alarms",
    )
    return row


def detected(place: Place, held_out: Path) -> dict[str, Any]:
    """Precision, recall and AUC of what is stored, against the labels that no sensor ever sent."""
    labels = detection.read_labels(held_out)
    models = {}
    for training in (V1, V2, TINY_V1):
        package = place.package(training.package)
        decision = manifest(package)["decision"]
        models[sha256_file(package / "manifest.json")] = (f"{training.model}:{training.version}", decision)
    rows = sql(
        place,
        "SELECT device, source_seq, digest, alarm, outputs FROM results WHERE source_seq >= 0 ORDER BY device, source_seq",
    )
    starts = {device: begin for device, (begin, _) in split(labels.size).items()}
    return detection.detection(detection.join(rows, labels, starts, models))


def trend_query(place: Place) -> dict[str, Any]:
    """The score of the turbines over time: merged trend buckets, not raw rows."""
    series = f"output:{manifest(place.package(V1.package))['decision']['output']}"
    arguments = [
        "trends",
        "query",
        "--dir",
        str(place.store),
        "--series",
        series,
        "--rollup",
        "30m",
        "--group-by",
        "device",
    ]
    answer = answer_json(place.run(*arguments, "-o", "json"), "edgeward trends query")
    return {"command": shlex.join(arguments), "args": arguments, "answer": answer}


def fleet_state(place: Place) -> dict[str, Any]:
    """Versions per device and the rollouts, from the controller."""
    with place.client() as client:
        devices = client.find("Device")
        rollouts = {item["metadata"]["name"]: item for item in client.find("Rollout")}
    return {
        "versions": {item["metadata"]["name"]: version_summary(item) for item in devices},
        "rollouts": [rollout_summary(rollouts[name]) for name in ROLLOUTS if name in rollouts],
    }
