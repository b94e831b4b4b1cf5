"""The camera source over a real video file, and over captures that break."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.streams.sources.camera import CameraSampleSource
from edgeward.clock import ManualClock, SystemClock
from edgeward.wire.streams import CameraSource

Until = Callable[..., None]
Start = Callable[..., None]


class RunningClock(SystemClock):
    """A hundred times as fast as the machine's."""

    def monotonic(self) -> float:
        return super().monotonic() * 100


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """30 frames at 10 per second, 64 x 48, red growing from 0 by 8 each."""
    path = tmp_path / "video.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (64, 48))
    assert writer.isOpened()
    for index in range(30):
        frame = np.zeros((48, 64, 3), dtype=np.uint8)
        frame[:, :, 2] = index * 8
        writer.write(frame)
    writer.release()
    return path


def test_a_video_file_plays_once_at_the_rate_asked_for(video: Path, sink: Any, start: Start) -> None:
    source = CameraSampleSource(CameraSource(url=str(video), rate=5, width=32, height=16), RunningClock())
    start(source, sink)
    assert source.finished.wait(20)
    assert len(sink.parts) == 15 and sink.counts == {"dropped": 15}
    for index, part in enumerate(sink.parts):
        assert part.values.shape == (1, 16, 32, 3) and part.values.dtype == np.uint8
        red, green, blue = part.values[0].reshape(-1, 3).mean(axis=0)
        assert abs(red - index * 16) < 6 and green < 6 and blue < 6, "red first, every second frame"
        assert part.event_time[0] > 1_600_000_000_000_000 and part.seq is None


def test_frames_keep_their_size_unless_told_and_without_room_they_drop(
    video: Path, new_sink: Any, start: Start
) -> None:
    sink = new_sink(room=1)
    source = CameraSampleSource(CameraSource(url=str(video), rate=1000), RunningClock())
    start(source, sink)
    assert source.finished.wait(20)
    assert sink.parts[0].values.shape == (1, 48, 64, 3)
    assert sink.counts == {"dropped": 29}


def test_it_stops_in_the_middle(video: Path, sink: Any, until: Until, start: Start) -> None:
    source = CameraSampleSource(CameraSource(url=str(video)), ManualClock())
    start(source, sink)
    until(lambda: sink.parts)
    source.stop()
    assert len(sink.parts) == 1, "the clock stands, so the next frame is not due"
    assert not any(thread.name == "camera" for thread in threading.enumerate())


def test_what_cannot_be_opened_is_tried_again(tmp_path: Path, sink: Any, until: Until, start: Start) -> None:
    broken = tmp_path / "broken.avi"
    broken.write_bytes(b"no video")
    source = CameraSampleSource(CameraSource(url=str(broken)), SystemClock())
    start(source, sink)
    until(lambda: sink.counts["errors"] >= 2)
    source.stop()
    assert not sink.parts


def test_a_live_camera_gives_its_newest_frame_and_comes_back(
    sink: Any, until: Until, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[PlayedCapture] = []
    clock = ManualClock()

    class PlayedCapture:
        """Ten frames a second of the manual clock, each filled with its number; then it is unplugged."""

        def __init__(self, *address: Any) -> None:
            opened.append(self)
            self.frame = -1
            self.released = False

        def isOpened(self) -> bool:
            return len(opened) != 2

        def get(self, what: int) -> float:
            return 0.0

        def grab(self) -> bool:
            clock.advance(0.1)
            self.frame += 1
            return self.frame < 20

        def retrieve(self) -> tuple[bool, Any]:
            return self.frame != 10, np.full((2, 2, 3), self.frame, dtype=np.uint8)

        def release(self) -> None:
            self.released = True

    monkeypatch.setattr("agent.streams.sources.camera.cv2.VideoCapture", PlayedCapture)
    source = CameraSampleSource(CameraSource(url="0", rate=2), clock)
    start(source, sink)
    until(lambda: sink.counts["reconnects"] and len(sink.parts) >= 8)
    source.stop()
    first = [int(part.values[0, 0, 0, 0]) for part in sink.parts[:4]]
    assert first == [0, 5, 11, 16], "one in half a second, the broken one left out for the next"
    assert sink.counts["errors"] >= 2 and sink.counts["dropped"] >= 16
    assert all(capture.released for capture in opened)
