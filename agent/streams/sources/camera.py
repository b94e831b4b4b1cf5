"""Frames of a camera, a stream address or a video file. Needs the extra `agent-camera`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final

import numpy as np

from agent.streams.decode.columns import arrival
from agent.streams.samples import Samples
from agent.streams.sources.polling import Reported, start_thread
from agent.streams.sources.port import Sink
from agent.streams.sources.waiting import Backoff
from edgeward.clock import Clock
from edgeward.errors import MissingDependency
from edgeward.wire.streams import CameraSource

try:
    import cv2
except ImportError as error:
    raise MissingDependency(
        "camera sources need OpenCV", hint="pip install 'edgeward[agent-camera]'"
    ) from error

# Opening and reading give up then, and stopping waits for them.
TIMEOUT_S: Final = 3.0
_TICK_S: Final = 0.02
# Frame times are multiples of a rate, so they are compared with some room.
_SLACK_S: Final = 1e-6


class CameraSampleSource:
    """Takes the newest frame whenever one is due; a video file plays at its own rate and ends.

    Counts `dropped` frames (older than the newest when one was due, or without room in the stream),
    `reconnects`, and `errors` (attempts that failed).
    """

    def __init__(self, spec: CameraSource, clock: Clock) -> None:
        self._spec = spec
        self._clock = clock
        self._file = Path(spec.url).is_file()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # The address may hold a password.
        self._reported = Reported(f"camera {spec.url.rpartition('@')[2]}")
        self.finished = threading.Event()

    def start(self, sink: Sink) -> None:
        self._thread = start_thread("camera", lambda: self._work(sink))

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def committed(self, epoch: str, seq: int) -> None:
        """Frames are not numbered."""

    def _work(self, sink: Sink) -> None:
        backoff = Backoff()
        connected_before = False
        while not self._stop.is_set():
            capture: Any = None
            try:
                capture = self._open()
                if connected_before:
                    sink.count("reconnects")
                connected_before = True
                self._play(capture, sink, backoff)
                if self._file:
                    break
                raise OSError("no frame came any more")
            except (cv2.error, OSError) as error:
                if self._stop.is_set():
                    break
                sink.count("errors")
                self._reported.failed(str(error))
            finally:
                if capture is not None:
                    capture.release()
            self._stop.wait(backoff.delay())
        self.finished.set()

    def _open(self) -> Any:
        """Raises OSError when the device or address gives no pictures."""
        url = self._spec.url
        if url.isdecimal():
            capture = cv2.VideoCapture(int(url))
        elif url.startswith("/dev/"):
            capture = cv2.VideoCapture(url, cv2.CAP_V4L2)
        else:
            limit = int(TIMEOUT_S * 1000)
            capture = cv2.VideoCapture(
                url,
                cv2.CAP_FFMPEG,
                [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit],
            )
        if not capture.isOpened():
            capture.release()
            raise OSError("cannot be opened")
        return capture

    def _play(self, capture: Any, sink: Sink, backoff: Backoff) -> None:
        """Until the frames end. All are grabbed, so that what is taken is new, but only due ones decoded."""
        frames_per_second = capture.get(cv2.CAP_PROP_FPS) or 25.0
        began = self._clock.monotonic()
        due = 0.0
        index = 0
        while not self._stop.is_set() and capture.grab():
            backoff.reset()
            self._reported.works()
            if self._file:
                at = index / frames_per_second
                self._wait_until(began + at)
            else:
                at = self._clock.monotonic() - began
            index += 1
            if at + _SLACK_S < due:
                sink.count("dropped")
                continue
            good, frame = capture.retrieve()
            if not good:
                sink.count("dropped")
                continue
            due = at + 1 / self._spec.rate
            now = np.array([arrival(self._clock.now())])
            if self._stop.is_set() or not sink.take(Samples(now, self._picture(frame))):
                sink.count("dropped")

    def _wait_until(self, moment: float) -> None:
        while (left := moment - self._clock.monotonic()) > 0 and not self._stop.is_set():
            self._stop.wait(min(left, _TICK_S))

    def _picture(self, frame: Any) -> Any:
        """`[1, H, W, 3]` uint8, red first."""
        width = self._spec.width or frame.shape[1]
        height = self._spec.height or frame.shape[0]
        if frame.shape[:2] != (height, width):
            frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)[np.newaxis]
