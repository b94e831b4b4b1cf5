"""Prometheus text exposition: Triton's names, and Edgeward's own in seconds and bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from agent.serving.catalog import Catalog
from agent.serving.statistics import Histogram, ModelStatistics, Statistics

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

_REASONS = {429: "REJECTED", 503: "REJECTED", 504: "CANCELED", 500: "BACKEND"}

Value = Callable[[ModelStatistics], float]

_COUNTERS: tuple[tuple[str, str, Value], ...] = (
    ("nv_inference_request_success", "Successful inference requests", lambda s: s.succeeded),
    ("nv_inference_count", "Inferences: rows of requests that succeeded", lambda s: s.inferences),
    (
        "nv_inference_exec_count",
        "Executions of the model, whatever their batch",
        lambda s: round(s.executions),
    ),
    (
        "nv_inference_request_duration_us",
        "Whole requests, microseconds",
        lambda s: s.request.total * 1e6,
    ),
    ("nv_inference_queue_duration_us", "Waiting for the model, microseconds", lambda s: s.queue.total * 1e6),
    (
        "nv_inference_compute_input_duration_us",
        "Reading inputs, microseconds",
        lambda s: s.compute_input * 1e6,
    ),
    ("nv_inference_compute_infer_duration_us", "In the model, microseconds", lambda s: s.infer.total * 1e6),
    (
        "nv_inference_compute_output_duration_us",
        "Writing outputs, microseconds",
        lambda s: s.compute_output * 1e6,
    ),
)

_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelStatistics], Histogram]], ...] = (
    ("edgeward_inference_request_seconds", "Whole requests that succeeded", lambda s: s.request),
    ("edgeward_inference_queue_seconds", "Waiting for the model", lambda s: s.queue),
    ("edgeward_inference_compute_seconds", "In the model, with the batch", lambda s: s.infer),
    ("edgeward_inference_request_bytes", "Bodies of requests that reached the model", lambda s: s.body),
    ("edgeward_inference_batch_rows", "Rows of the batches that requests ran in", lambda s: s.batch),
)


def exposition(statistics: Statistics, catalog: Catalog) -> bytes:
    lines: list[str] = []
    models = [
        (_labels(model=name, version=version), stats) for (name, version), stats in statistics.models.items()
    ]
    for name, text, value in _COUNTERS:
        _family(lines, name, text, "counter", ((labels, value(stats)) for labels, stats in models))
    _family(
        lines,
        "nv_inference_request_failure",
        "Failed inference requests",
        "counter",
        (
            (f'{labels},reason="{reason}"', count)
            for labels, stats in models
            for reason, count in _by_reason(stats).items()
        ),
    )
    _family(
        lines,
        "nv_inference_pending_request_count",
        "Requests at the engine",
        "gauge",
        ((labels, stats.pending) for labels, stats in models),
    )
    for name, text, histogram in _HISTOGRAMS:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        for labels, stats in models:
            _histogram(lines, name, labels, histogram(stats))
    served = [(_labels(model=item.name, version=item.version), item) for item in catalog.all()]
    _family(
        lines,
        "edgeward_model_ready",
        "1 when the model serves",
        "gauge",
        ((labels, int(item.ready)) for labels, item in served),
    )
    _family(
        lines,
        "edgeward_model_worker_restarts_total",
        "Workers lost and started again",
        "counter",
        ((labels, item.runner.restarts) for labels, item in served if item.runner is not None),
    )
    _family(
        lines,
        "edgeward_http_responses_total",
        "Answers by status",
        "counter",
        ((_labels(code=str(code)), count) for code, count in sorted(statistics.answers.items())),
    )
    for name, text, kind, number in (
        ("edgeward_http_connections", "Open connections", "gauge", statistics.connections),
        (
            "edgeward_http_connections_refused_total",
            "Over the cap",
            "counter",
            statistics.refused_connections,
        ),
        (
            "edgeward_http_disconnects_total",
            "Clients gone before their answer",
            "counter",
            statistics.disconnects,
        ),
        ("edgeward_http_timeouts_total", "Connections ended for slowness", "counter", statistics.timeouts),
        (
            "edgeward_http_held_bytes",
            "Bodies being received or waiting for their answer",
            "gauge",
            statistics.held_bytes,
        ),
    ):
        _family(lines, name, text, kind, (("", number),))
    lines.append("")
    return "\n".join(lines).encode()


def _by_reason(stats: ModelStatistics) -> dict[str, int]:
    counts = dict.fromkeys(("REJECTED", "CANCELED", "BACKEND", "OTHER"), 0)
    for status, count in stats.failures.items():
        counts[_REASONS.get(status, "OTHER")] += count
    return counts


def _labels(**labels: str) -> str:
    return ",".join(
        '{}="{}"'.format(key, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
        for key, value in labels.items()
    )


def _family(lines: list[str], name: str, text: str, kind: str, samples: Iterable[tuple[str, float]]) -> None:
    lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    lines += [
        f"{name}{{{labels}}} {value:.17g}" if labels else f"{name} {value:.17g}" for labels, value in samples
    ]


def _histogram(lines: list[str], name: str, labels: str, histogram: Histogram) -> None:
    below = 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.buckets, strict=True):
        below += count
        limit = "+Inf" if bound == float("inf") else f"{bound:g}" if bound < 1e6 else str(int(bound))
        lines.append(f'{name}_bucket{{{labels},le="{limit}"}} {below}')
    lines.append(f"{name}_sum{{{labels}}} {histogram.total:.17g}")
    lines.append(f"{name}_count{{{labels}}} {histogram.count}")
