"""Children end with their parent's context, whatever happens."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgeward.errors import EdgewardError
from simulators.processes import Processes

READY = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    "print('worker', worker.pid, flush=True); print('ready', flush=True); time.sleep(60)",
]


def gone(pid):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_all_end_when_the_context_is_left_by_an_error(tmp_path):
    with pytest.raises(RuntimeError), Processes(tmp_path) as processes:
        child = processes.start("sleeper", READY)
        child.wait_ready("ready", 10)
        raise RuntimeError
    assert gone(child.pid)


def test_a_child_that_ignores_sigterm_ends_with_its_workers(tmp_path):
    with Processes(tmp_path) as processes:
        child = processes.start("stubborn", STUBBORN)
        child.wait_ready("ready", 10)
        worker = int(child.said().split()[1])
        os.kill(worker, 0)
        child.stop(timeout=0.2)
        assert gone(child.pid)
        assert gone(worker)


def test_ready_counts_from_the_last_start(tmp_path):
    with Processes(tmp_path) as processes:
        child = processes.start("sleeper", READY)
        child.wait_ready("ready", 10)
        child.kill()
        assert not child.running
        child.start()
        assert "ready" not in child.said() or child.running
        child.wait_ready("ready", 10)


def test_an_early_end_is_told_with_the_log(tmp_path):
    with Processes(tmp_path) as processes:
        child = processes.start("failing", [sys.executable, "-c", "raise SystemExit('no such port')"])
        with pytest.raises(EdgewardError, match="no such port"):
            child.wait_ready("ready", 10)


def test_a_deadline_says_what_was_waited_for(tmp_path):
    with Processes(tmp_path) as processes:
        child = processes.start("sleeper", READY)
        with pytest.raises(EdgewardError, match="sleeper to say 'never'"):
            child.wait_ready("never", 0.3)


def test_a_failed_command_carries_its_error_text(tmp_path):
    with Processes(tmp_path) as processes, pytest.raises(EdgewardError, match="field x is wrong"):
        processes.run("check", [sys.executable, "-c", "import sys; sys.exit('field x is wrong')"], 10)


def test_a_command_in_another_thread_ends_with_the_context(tmp_path):
    failed = []

    def command():
        try:
            processes.run("sleep", [sys.executable, "-c", f"import os, time; {note}; time.sleep(60)"], 60)
        except EdgewardError as error:
            failed.append(error)

    pid_file = tmp_path / "pid"
    note = f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))"
    with Processes(tmp_path / "logs") as processes:
        thread = threading.Thread(target=command)
        thread.start()
        deadline = time.monotonic() + 10
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    thread.join(10)
    assert gone(int(pid_file.read_text()))
    assert failed


PARENT = """
import sys, time
from pathlib import Path
from simulators.processes import Processes

with Processes(Path(sys.argv[1])) as processes:
    child = processes.start("stubborn", [sys.executable, "-c", sys.argv[2]])
    child.wait_ready("ready", 10)
    print(child.pid, child.said().split()[1], flush=True)
    time.sleep(60)
"""


def test_a_killed_parent_leaves_nobody(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), STUBBORN[2]], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child, worker = map(int, parent.stdout.readline().split())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    assert gone(child)
    assert gone(worker)
