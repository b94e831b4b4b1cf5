"""The demo's summary: judged purely, printed for people, written for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from simulators.demo.plan import ANOMALY, EXPECTED, ROLLOUTS


def judge(summary: dict[str, Any]) -> list[str]:
    """Why the demo did not show what it should; empty when it did."""
    reasons = []
    if not summary["produced"]:
        reasons.append("no row was produced")
    for key in ("lost", "duplicated"):
        if summary[key]:
            reasons.append(f"{summary[key]} rows {key}, expected 0")
    if summary["stored"] != summary["produced"]:
        reasons.append(f"{summary['stored']} of {summary['produced']} produced rows are stored")
    reasons += _judge_versions(summary["versions"])
    found = {rollout["name"]: rollout for rollout in summary["rollouts"]}
    for name, phase in ROLLOUTS.items():
        is_now = found.get(name, {}).get("phase", "missing")
        if is_now != phase:
            reasons.append(f"rollout {name} is {is_now}, expected {phase}")
    halted = found.get("shuttle-v3", {})
    if not halted.get("reason") or halted.get("measured") is None:
        reasons.append("rollout shuttle-v3 halted without a reason and a measured value")
    if summary["hostile"]["rows"]:
        reasons.append(f"{summary['hostile']['rows']} forged rows are stored, expected 0")
    if not sum(summary["hostile"]["sent"].values()):
        reasons.append("the hostile client sent nothing")
    if len(summary["faults"]) < 2:
        reasons.append(f"{len(summary['faults'])} faults were made, expected 2")
    if not summary["alarms"]["received"]:
        reasons.append("no alarm arrived on a local topic")
    if summary["detection"]["auc"] is None:
        reasons.append("no detection quality: no stored row has a label of each kind")
    return reasons


def _judge_versions(versions: dict[str, dict[str, Any]]) -> list[str]:
    reasons = []
    for device, (model, version) in EXPECTED.items():
        found = versions.get(device, {})
        if (found.get("model"), found.get("version")) != (model, version):
            reasons.append(
                f"{device} runs {found.get('model')}:{found.get('version')}, expected {model}:{version}"
            )
    broken = [
        device for device, found in versions.items() if (found["model"], found["version"]) == (ANOMALY, 3)
    ]
    if broken:
        reasons.append(f"the broken version 3 is active on {', '.join(broken)}")
    return reasons


def rollout_summary(rollout: dict[str, Any]) -> dict[str, Any]:
    """The part of a Rollout resource that the summary keeps; figures of the newest event that has one."""
    spec, status = rollout["spec"], rollout["status"]
    timeline = status.get("timeline", [])
    measured: dict[str, Any] = next(
        (event for event in reversed(timeline) if event.get("measured") is not None), {}
    )
    return {
        "name": rollout["metadata"]["name"],
        "model": spec["model"],
        "version": spec["version"],
        "phase": status.get("phase", ""),
        "reason": status.get("reason", ""),
        "message": status.get("message", ""),
        "measured": measured.get("measured"),
        "limit": measured.get("limit"),
        "updated": status.get("updated", 0),
        "devices": status.get("devices", 0),
        "timeline": timeline,
    }


def version_summary(device: dict[str, Any]) -> dict[str, Any]:
    """What a Device resource says it runs in its slot `default`."""
    running = device["status"].get("slots", {}).get("default", {}).get("running") or {}
    return {key: running.get(key) for key in ("model", "version", "digest")}


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _table(title: str, *columns: str) -> Table:
    view = Table(
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold"
    )
    for column in columns:
        view.add_column(column)
    return view


def show(console: Console, summary: dict[str, Any], reasons: list[str]) -> None:
    """Print everything a person needs to check."""
    console.rule("What happened")
    rows = _table("Rows, from the sensor to the trend store", "produced", "stored", "lost", "duplicated")
    rows.add_row(*(str(summary[key]) for key in ("produced", "stored", "lost", "duplicated")))
    console.print(rows, "")
    _show_detection(console, summary["detection"])
    devices = _table("Versions per device", "device", "model", "version", "digest")
    for name, found in sorted(summary["versions"].items()):
        devices.add_row(name, str(found["model"]), str(found["version"]), (found["digest"] or "")[:16])
    console.print(devices, "")
    _show_rollouts(console, summary["rollouts"])
    faults = _table("Faults made on purpose", "fault", "at (s)", "away (s)")
    for fault in summary["faults"]:
        faults.add_row(fault["fault"], str(fault["at"]), str(fault["seconds"]))
    console.print(faults, "")
    hostile = summary["hostile"]
    console.print("Hostile client", style="bold")
    sent = ", ".join(f"{count} {kind}" for kind, count in sorted(hostile["sent"].items()))
    console.print(f"sent {sent}; rows of it in the store: {hostile['rows']}\n", highlight=False)
    alarms = summary["alarms"]
    console.print(
        f"Alarms: {alarms['received']} received on alarms/SITE/DEVICE, {alarms['stored']} stored\n",
        highlight=False,
    )
    _show_query(console, summary["query"])
    console.rule()
    if reasons:
        console.print("The demo FAILED:", style="bold red")
        for reason in reasons:
            console.print(f"  - {reason}", style="red", markup=False, highlight=False)
    else:
        console.print(
            f"All as it should be, after {summary['seconds']:.0f} s: nothing lost, nothing twice, "
            "version 3 active on 0 devices.",
            style="bold green",
            highlight=False,
        )


def _show_detection(console: Console, detection: dict[str, Any]) -> None:
    view = _table(
        "Detection on the held-out part", "model", "rows", "anomalies", "alarms", "precision", "recall", "AUC"
    )
    for name, found in [("all", detection), *detection["models"].items()]:
        counts = (str(found[key]) for key in ("rows", "anomalies", "alarms"))
        view.add_row(name, *counts, *(_figure(found[key]) for key in ("precision", "recall", "auc")))
    console.print(view, "")


def _show_rollouts(console: Console, rollouts: list[dict[str, Any]]) -> None:
    view = _table("Rollouts", "name", "version", "phase", "updated", "reason", "measured", "limit")
    for found in rollouts:
        figures = ("—" if found[key] is None else f"{found[key]:.4g}" for key in ("measured", "limit"))
        updated = f"{found['updated']}/{found['devices']}"
        version = f"{found['model']}:{found['version']}"
        view.add_row(found["name"], version, found["phase"], updated, found["reason"], *figures)
    console.print(view, "")
    for found in rollouts:
        console.print(f"Timeline of {found['name']}", style="bold", highlight=False)
        first = found["timeline"][0]["at"] if found["timeline"] else 0.0
        for event in found["timeline"]:
            where = f"wave {event.get('wave', 0) + 1} {event.get('device', '')}".strip()
            line = f"  +{event['at'] - first:5.1f} s  {where}: {event['reason']}: {event['message']}"
            console.print(line, markup=False, highlight=False)
    console.print("")


def _show_query(console: Console, query: dict[str, Any]) -> None:
    console.print("The trend query and its answer", style="bold")
    console.print(f"  edgeward {query['command']}", markup=False, highlight=False, soft_wrap=True)
    answer = query["answer"]
    if answer:
        view = _table("", *answer[0])
        for row in answer[:40]:
            view.add_row(*(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(view)
    else:
        console.print("  (no rows)")


def write(summary: dict[str, Any], reasons: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary | {"passed": not reasons, "reasons": reasons}, indent=2) + "\n")
