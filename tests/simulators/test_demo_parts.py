"""The demo's pure parts: the split, the figures, the judgement; and its folder."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward.errors import Conflict, UsageError
from simulators.demo import detection
from simulators.demo.place import MARKER, find_configs, prepared
from simulators.demo.plan import DEVICES, EXPECTED, ROLLOUTS, split
from simulators.demo.summary import judge, rollout_summary, version_summary


@given(st.integers(100, 100_000))
def test_every_row_goes_to_one_device(total):
    parts = split(total)
    assert [parts[device.name][0] for device in DEVICES[1:]] == [parts[d.name][1] for d in DEVICES[:-1]]
    assert parts[DEVICES[0].name][0] == 0
    assert parts[DEVICES[-1].name][1] == total
    assert all(begin < end for begin, end in parts.values())


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=60))
def test_auc_is_the_share_of_pairs_in_the_right_order(pairs):
    scores = np.array([float(score) for score, _ in pairs])
    labels = np.array([label for _, label in pairs])
    found = detection.auc(scores, labels)
    wins = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert found is None if not wins else found == pytest.approx(sum(wins) / len(wins))


DECISION = {"output": "score", "threshold": -0.5, "direction": "below"}


def row(device, seq, score, alarm, digest="a"):
    return {
        "device": device,
        "source_seq": seq,
        "digest": digest,
        "alarm": alarm,
        "outputs": [("score", score)],
    }


def test_rows_meet_their_labels_by_device_and_number():
    labels = np.array([False, True, False, True])
    rows = [row("turbine-1", 0, 0.1, False), row("turbine-1", 1, -0.9, True), row("turbine-1", 1, -0.9, True)]
    rows += [
        row("turbine-2", 0, 0.2, True),
        row("turbine-2", 1, -0.8, True, digest="b"),
        row("other", 0, 0, True),
    ]
    models = {"a": ("m:1", DECISION), "b": ("m:2", DECISION)}
    scored = detection.join(rows, labels, {"turbine-1": 0, "turbine-2": 2}, models)
    found = detection.detection(scored)
    assert (found["rows"], found["alarms"], found["anomalies"]) == (4, 3, 2)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == 1.0
    assert found["auc"] == 1.0
    assert found["models"]["m:2"]["rows"] == 1
    assert found["models"]["m:2"]["auc"] is None


def good():
    rollouts = [
        {"name": name, "phase": phase, "reason": "SelfTestFailed", "measured": 0.3, "limit": 1e-3}
        for name, phase in ROLLOUTS.items()
    ]
    return {
        "produced": 10,
        "stored": 10,
        "lost": 0,
        "duplicated": 0,
        "versions": {name: {"model": m, "version": v, "digest": "0"} for name, (m, v) in EXPECTED.items()},
        "rollouts": rollouts,
        "hostile": {"sent": {"forged rows": 3}, "rows": 0},
        "faults": [{}, {}],
        "alarms": {"received": 3},
        "detection": {"auc": 0.9},
    }


def test_a_good_run_passes():
    assert judge(good()) == []


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("lost",), 1, "1 rows lost"),
        (("duplicated",), 2, "2 rows duplicated"),
        (("stored",), 9, "9 of 10"),
        (("produced",), 0, "no row was produced"),
        (("versions", "turbine-2", "version"), 3, "version 3 is active on turbine-2"),
        (("versions", "pump-1", "version"), None, "pump-1 runs"),
        (("versions", "extra"), {"model": "shuttle-anomaly", "version": 3}, "active on extra"),
        (("rollouts", 3, "phase"), "Complete", "shuttle-v3 is Complete, expected Halted"),
        (("rollouts", 3, "measured"), None, "without a reason and a measured value"),
        (("rollouts", 0, "phase"), "Progressing", "shuttle-v1 is Progressing"),
        (("hostile", "rows"), 1, "forged rows are stored"),
        (("hostile", "sent"), {}, "hostile client sent nothing"),
        (("faults",), [{}], "1 faults"),
        (("alarms", "received"), 0, "no alarm"),
        (("detection", "auc"), None, "no detection quality"),
    ],
)
def test_every_flaw_has_its_reason(path, value, reason):
    summary = copy.deepcopy(good())
    target = summary
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    assert any(reason in found for found in judge(summary)), judge(summary)


def test_a_rollout_that_never_was_is_missed():
    summary = good()
    summary["rollouts"].pop()
    assert any("shuttle-v3 is missing" in reason for reason in judge(summary))


def test_the_summary_takes_the_newest_measured_value():
    timeline = [{"measured": 0.1, "limit": 1.0}, {"measured": 0.4, "limit": 0.2}, {"measured": None}]
    resource = {
        "metadata": {"name": "r"},
        "spec": {"model": "m", "version": 3},
        "status": {"phase": "Halted", "reason": "X", "timeline": timeline},
    }
    found = rollout_summary(resource)
    assert (found["measured"], found["limit"], found["phase"]) == (0.4, 0.2, "Halted")
    assert version_summary({"status": {}}) == {"model": None, "version": None, "digest": None}


def test_only_a_demos_folder_is_replaced(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a demo's folder"), prepared(mine):
        pass
    assert (mine / "thesis.txt").exists()
    demo = tmp_path / "demo"
    with prepared(demo):
        (demo / "old").mkdir()
        (demo / "old.log").touch()
    with prepared(demo):
        assert [file.name for file in demo.iterdir()] == [MARKER]


def test_a_running_demos_folder_is_left_alone(tmp_path):
    with prepared(tmp_path):
        (tmp_path / "store").mkdir()
        with pytest.raises(Conflict, match="a demo runs in"), prepared(tmp_path):
            pass
        assert (tmp_path / "store").exists()


def test_the_demos_resources_are_found_or_named(tmp_path):
    assert (find_configs(None) / "demo" / "streams.yaml").is_file()
    with pytest.raises(UsageError, match="--configs"):
        find_configs(tmp_path)
