"""`edgeward trends query`, `models` and `readers` as a person types them."""

from __future__ import annotations

import csv
import http.server
import io
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edgeward.cli.main import main
from edgeward.storage import sha256_hex
from edgeward.wire.enrollment import EnrollResponse, TrustBundle

Run = Callable[..., tuple[int, str, str]]

MANIFEST = {
    "api_version": "edgeward.dev/v1alpha1", "model": "pump", "version": 4, "created_at": "2026-02-01T00:00:00Z",
    "features": ["speed"], "golden": {"blob": {"digest": "0" * 64, "size": 1}, "atol": 0.0, "rtol": 0.0},
    "variants": [{"name": "fp32", "runtime": "onnx", "blob": {"digest": "1" * 64, "size": 1}, "inputs": [],
                  "outputs": [], "providers": ["CPU"]}],
    "lineage": {"recipe": "anomaly-detection", "parameters": {"trees": 5}, "dataset": "pumps.csv",
                "dataset_digest": "sha256:77", "rows": 1000, "split": "by time", "libraries": {"numpy": "2"}},
    "metrics": {"auc": 0.9},
}  # fmt: skip


@pytest.fixture
def run(plant: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    enrolled = EnrollResponse("plant", "store", ["north", "south"], "", TrustBundle("", []), "", 0.0)
    (plant.folder / "enrollment.json").write_bytes(msgspec.json.encode(enrolled))
    for name in ("EDGEWARD_TOKEN", "EDGEWARD_TOKEN_FILE", "EDGEWARD_URL"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgeward", "trends", *words, "--dir", str(plant.folder)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def rows_of(run: Run, *words: str) -> list[dict[str, Any]]:
    code, said, error = run("query", *words, "-o", "json")
    assert code == 0, error
    rows: list[dict[str, Any]] = json.loads(said)
    return rows


def test_a_trend_in_every_form(plant: Any, run: Run, tmp_path: Path) -> None:
    plant.put(plant.trend(0, [1.0, 2.0]), plant.trend(60, [4.0]))
    words = ("--series", "output:score", "--measures", "count,mean", "--quantiles", "0.5")
    want = [
        {"start": "2026-03-02T00:00:00Z", "count": 2, "mean": 1.5, "p50": 1.0},
        {"start": "2026-03-02T01:00:00Z", "count": 1, "mean": 4.0, "p50": 4.0},
    ]
    assert rows_of(run, *words) == want
    _, said, _ = run("query", *words, "-o", "jsonl")
    assert [json.loads(line) for line in said.splitlines()] == want
    _, said, _ = run("query", *words, "-o", "csv")
    assert list(csv.DictReader(io.StringIO(said)))[1]["start"] == "2026-03-02T01:00:00Z"
    assert "1.5" in run("query", *words)[1]
    for name, read in (
        ("a.parquet", pq.read_table),
        ("a.arrow", lambda path: pa.ipc.open_stream(path).read_all()),
    ):
        code, said, _ = run("query", *words, "--out", str(tmp_path / name))
        assert code == 0 and "2 rows written" in said
        assert read(str(tmp_path / name)).column("mean").to_pylist() == [1.5, 4.0]
    assert not list(tmp_path.glob("*.part"))


def test_a_digest_alone_gives_what_it_decided_and_what_is_known_of_it(
    plant: Any, run: Run, tmp_path: Path
) -> None:
    plant.put(
        *(plant.result(minute, float(minute)) for minute in range(8)), plant.result(9, 1.0, digest=plant.new)
    )
    run("models", "--refresh")
    code, said, told = run("query", "--digest", plant.old[:8], "-o", "jsonl")
    assert code == 0 and "nothing is known of it" in told
    found = [json.loads(line) for line in said.splitlines()]
    assert [row["source_seq"] for row in found] == list(range(8)) and found[7]["outputs"] == {"score": 7.0}
    code, said, _ = run("query", "--digest", "ffffff", "--out", str(tmp_path / "none.csv"))
    assert code == 0 and "0 rows" in said and (tmp_path / "none.csv").read_text().startswith("event_time,")


def test_top_movers_are_by_size_of_effect(plant: Any, run: Run) -> None:
    day = 1440
    for stream, after in (("press", 1.0), ("oven", 9.0), ("saw", 3.0)):
        plant.put(
            plant.trend(0, [1.0, 2.0, 0.0], stream=stream),
            plant.trend(day, [after, after + 1, after - 1], stream=stream),
        )
    plant.put(plant.trend(day, [1.0], stream="new"))
    words = ("--series", "output:score", "--group-by", "stream", "--top-movers", "2026-03-02", "--since", "2026-03-03",
             "--until", "2026-03-04")  # fmt: skip
    found = rows_of(run, *words)
    assert [row["stream"] for row in found] == ["oven", "saw", "press", "new"]
    assert found[0]["change"] == 8.0 and found[0]["effect"] == pytest.approx(8 / (2 / 3) ** 0.5)
    assert found[0]["count_before"] == found[0]["count_after"] == 3 and found[3]["effect"] is None
    assert rows_of(run, *words, "--by", "p95")[0]["before"] == 2.0
    plant.put(plant.alarm(day + 1, stream="saw"), plant.alarm(day + 2, stream="saw"))
    rates = rows_of(run, *words, "--by", "alarm-rate")
    assert (
        rates[0]["stream"] == "saw" and rates[0]["after"] == pytest.approx(2 / 3) and rates[0]["before"] == 0
    )


def test_before_and_after_a_version_took_over_at_each_site(plant: Any, run: Run) -> None:
    for site, takes_over in (("north", 100), ("south", 2000)):
        plant.put(
            *(plant.trend(minute, [1.0, 3.0]) for minute in range(takes_over - 50, takes_over + 50, 10)),
            site=site,
        )
        plant.put(
            *(
                plant.trend(minute, [6.0, 8.0], digest=plant.new)
                for minute in range(takes_over, takes_over + 50, 10)
            ),
            site=site,
        )
    plant.put(plant.alarm(101, digest=plant.new))
    assert run("query", "--series", "output:score", "--before-after", plant.new)[0] == 1, "not known yet"
    run("models", "--refresh")
    found = rows_of(run, "--series", "output:score", "--before-after", plant.new[:8], "--days", "1")
    assert [(row["site"], row["period"], row["count"], row["mean"]) for row in found] == [
        ("north", "before", 10, 2.0), ("north", "after", 10, 7.0), ("south", "before", 10, 2.0), ("south", "after", 10, 7.0),
    ]  # fmt: skip
    assert found[0]["took_over"] == "2026-03-02T01:40:00Z" and found[1]["effect"] == 5.0
    assert (found[1]["alarms"], found[1]["alarm_rate"], found[3]["alarms"]) == (1, 0.1, 0)


def test_a_trend_that_follows_another_is_found_at_its_lag(plant: Any, run: Run) -> None:
    import random

    draw = random.Random(3)
    values = [draw.gauss(0, 1) for _ in range(80)]
    plant.put(*(plant.trend(at, [value], stream="press") for at, value in enumerate(values)))
    plant.put(
        *(
            plant.trend(at + 3, [2 * value + draw.gauss(0, 0.1)], stream="oven")
            for at, value in enumerate(values)
        )
    )
    first, second, *_ = rows_of(
        run, "--series", "output:score", "--rollup", "1m", "--correlate", "press", "oven"
    )
    assert (first["lag"], first["lag_seconds"], first["n"]) == (3, 180.0, 80) and first["pearson"] > 0.98
    assert (
        first["low"] < first["pearson"] < first["high"]
        and first["p_value"] < 1e-6
        and first["spearman"] > 0.95
    )
    assert second["p_value"] > 0.05
    code, _, told = run("query", "--series", "output:score", "--correlate", "press", "none")
    assert code == 2 and "hint where to look" in told and "buckets in common" in told


class Artifacts(http.server.BaseHTTPRequestHandler):
    held: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        body = self.held.get(self.path.rpartition("/")[2])
        self.send_response(200 if body is not None else 404)
        self.send_header("Content-Length", str(len(body or b"{}")))
        self.end_headers()
        self.wfile.write(body or b"{}")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def controller() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Artifacts)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_models_learn_their_lineage_from_the_manifest_whose_hash_they_are(
    plant: Any, run: Run, controller: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = msgspec.json.encode(MANIFEST)
    digest = sha256_hex(manifest)
    plant.put(plant.trend(0, [1.0], digest=digest), plant.result(5, 2.0, digest=digest), plant.result(6, 2.0))
    (tmp_path / "token").write_text("secret")
    ask = ("models", "--refresh", "--url", controller, "--token-file", str(tmp_path / "token"), "-o", "json")
    monkeypatch.setattr(Artifacts, "held", {digest: manifest + b" "})
    code, _, told = run(*ask)
    assert code == 1 and "is not that one" in told
    assert plant.engine.models.table().num_rows == 0, "nothing was stored"
    monkeypatch.setattr(Artifacts, "held", {digest: manifest})
    code, said, told = run(*ask)
    known = {row["digest"]: row for row in json.loads(said)}
    assert code == 0 and f"{plant.old[:12]}: the controller does not have it" in told
    row = known[digest]
    assert (row["model"], row["version"], row["recipe"], row["dataset_rows"]) == (
        "pump",
        4,
        "anomaly-detection",
        1000,
    )
    assert (row["first_seen"], row["last_seen"]) == ("2026-03-02T00:00:00Z", "2026-03-02T00:05:00Z")
    assert (
        row["seen"][0]["rows"] == 2 and row["metrics"] == {"auc": 0.9} and known[plant.old]["model"] is None
    )
    plant.put(plant.result(9, 1.0, digest=digest), site="south")
    code, said, _ = run("models", "--refresh", "-o", "json")
    again = {row["digest"]: row for row in json.loads(said)}[digest]
    assert again["model"] == "pump" and [place["site"] for place in again["seen"]] == ["north", "south"]
    assert (
        rows_of(run, "--series", "output:score", "--where", "model=pump", "--rollup", "all")[0]["count"] == 1
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "expected --series"),
        (["--series", "output:x", "--sql", "select 1"], "either --sql or a question"),
        (["--series", "output:x", "--group-by", "colour"], "colour"),
        (["--series", "output:x", "--where", "site"], "COLUMN=VALUE"),
        (["--series", "output:x", "--where", "colour=red"], "filters"),
        (["--series", "output:x", "--quantiles", "median"], "--quantiles"),
        (["--series", "output:x", "--out", "a.xlsx"], "cannot tell the format"),
        (["--series", "output:x", "-o", "xml"], "unknown output"),
        (["--series", "output:x", "--top-movers", "2026-03-01"], "--since and --until"),
        (["--series", "output:x", "--rollup", "all", "--correlate", "a", "b"], "needs buckets"),
        (["--correlate", "a", "b"], "of which series"),
        (["--series", "output:x", "--before-after", "pump@9"], "no version that was seen here"),
        (["--series", "output:x", "--before-after", "b", "--correlate", "a", "b"], "expected one of"),
        (["--digest", "xyz"], "is not a digest"),
    ],
)  # fmt: skip
def test_what_is_typed_wrongly_is_named(run: Run, words: list[str], says: str) -> None:
    code, _, told = run("query", *words)
    assert code in (1, 2) and says in " ".join(told.split()), told


def test_readers_are_added_listed_and_removed(run: Run) -> None:
    code, token, _ = run("readers", "add", "grafana", "--site", "north")
    assert code == 0 and len(token.strip()) == 43
    assert "grafana: north, until" in run("readers", "list")[1]
    assert "not for site" in run("readers", "add", "x", "--site", "east")[2]
    assert run("readers", "remove", "grafana")[0] == 0 and run("readers", "list")[1] == ""
