"""`edgeward up` as a process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeward.broker import accepts, free_port
from edgeward.client import ControllerClient


def edgeward(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgeward.cli.main", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip


def test_up_serves_ends_cleanly_and_keeps_its_token(tmp_path: Path, until: Any, make: Any) -> None:
    data = tmp_path / "data"
    token = ""
    for again in (False, True):
        port, mqtt, old = free_port(), free_port(), free_port()
        process = edgeward(
            "up", "--data", str(data), "--port", str(port), "--broker-port", str(mqtt),
            "--broker-port-311", str(old),
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"edgeward controller ready at http://127.0.0.1:{port}\n"
            file = data / "admin.token"
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert token in ("", file.read_text())
            token = file.read_text()
            with ControllerClient(f"http://127.0.0.1:{port}", token.strip()) as client:
                until(lambda: client.health()["brokerConnected"], 60)
                assert accepts("127.0.0.1", old)
                client.apply([make("Site", "s")])
            if again:
                continue
            second = edgeward("up", "--data", str(tmp_path / "other"), "--port", str(port))
            third = edgeward("up", "--data", str(data), "--port", "0", "--broker-port", "0")
            assert second.wait(60) == 1
            assert second.stderr is not None and f"port {port}" in second.stderr.read()
            assert third.wait(60) == 1
            assert third.stderr is not None and "another controller runs" in third.stderr.read()
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Traceback" not in errors and token.strip() not in errors
        assert not accepts("127.0.0.1", mqtt) and not accepts("127.0.0.1", old)
