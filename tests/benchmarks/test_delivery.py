"""The delivery benchmark's judgement, and its peer where nginx is installed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from benchmarks.delivery import measure, nginx
from benchmarks.swap import BATCH, judge


def test_lost_repeated_and_late_samples_are_seen() -> None:
    sent = [number * 0.01 for number in range(300)]
    scores = [(sample, sent[sample // BATCH] + 0.004, 1) for sample in range(3000)]
    scores[-1] = (2999, sent[-1] + 0.004, 2)
    calm = judge(sent, scores, 2.0, 2)
    assert (calm.lost, calm.repeated) == (0, 0)
    assert [calm.usual, calm.calm, calm.worst, calm.swap] == pytest.approx([4.0] * 4)
    scores[100:103] = []
    scores.append((2500, sent[250] + 0.06, 2))  # the first answer of version 2
    scores.append((2100, sent[210] + 0.09, 1))
    scores.append((1000, sent[100] + 0.03, 1))
    scores.append((10, sent[1] + 5.0, 1))  # while the stream begins: nobody's
    seen = judge(sent, scores, 2.0, 2)
    assert (seen.lost, seen.repeated) == (3, 4)
    assert [seen.usual, seen.calm, seen.worst, seen.swap] == pytest.approx([4.0, 30.0, 90.0, 60.0])


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_the_peer_serves_what_is_measured(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "blob").write_bytes(os.urandom(1 << 20))
    with nginx(tmp_path / "nginx", tmp_path / "root", "/blob") as server:
        assert server is not None
        assert measure(server, 1 << 20).bandwidth > 0
        with pytest.raises(RuntimeError, match="of 7 bytes"):
            measure(server, 7)
