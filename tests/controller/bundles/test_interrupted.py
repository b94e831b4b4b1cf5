"""An import that is killed, or whose disk fails, at each of its steps: nothing of it stays, and the next one completes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from agent.bundle import import_bundle
from agent.fetch import BlobStore
from agent.identity import enroll
from agent.imports import Imports
from agent.state import State
from edgeward.client.bundle import export
from edgeward.clock import SystemClock
from edgeward.errors import Conflict
from edgeward.trust import dsse
from edgeward.wire.desired import PAYLOAD_TYPE, DesiredState

#: Forks a child per step, which stops at its n-th touch of a file: killed, or refused by the system. The parent
#: looks at what is left each time. One process, so that a step does not cost the start of an interpreter.
DRIVER = """
import errno, os, signal, sys
from pathlib import Path
from agent.bundle import import_bundle
from agent.imports import Imports
from edgeward.clock import SystemClock
from edgeward.errors import EdgewardError

bundle, folder, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree",
           "fcntl.flock", "shutil.copyfile", "os.symlink", "sqlite3.connect", "tempfile.mkstemp"}

def footprint():
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "imports" not in path.parts and not path.name.startswith("state.db-")
    }

def child(step):
    count = 0
    stopped = False

    def hook(event, arguments):
        nonlocal count, stopped
        if stopped or event not in TOUCHES or not any(str(folder) in str(item) for item in arguments):
            return
        count += 1
        if count == step:
            stopped = True
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(hook)
    try:
        import_bundle(bundle, folder, SystemClock())
    except (EdgewardError, OSError) as error:
        print(step, error, flush=True)
        os._exit(3)
    os._exit(0 if not stopped else 4)

before = footprint()
step = 0
while True:
    step += 1
    pid = os.fork()
    if pid == 0:
        try:
            child(step)
        except BaseException as error:
            print(step, repr(error), flush=True)
            os._exit(5)
    _, status = os.waitpid(pid, 0)
    assert footprint() == before, step
    found = Imports(folder).newest()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        break
    if how == "kill":
        assert os.WIFSIGNALED(status), (step, status)
    else:
        # 4: what failed did not matter, as when what is left of the trial cannot be removed.
        assert os.WEXITSTATUS(status) in (3, 4), (step, status)
        assert not list((folder / "imports").glob("part-*")) or os.WEXITSTATUS(status) == 3, step
    if found is not None:
        # Only by the very last steps, and then it is whole.
        assert len(list((found.folder / "blobs").iterdir())) == 3, step
        assert (found.folder / "desired.json").exists(), step
        assert len(list((found.folder / "tuf").iterdir())) == 3, step
        Imports(folder).drop(found.number)
print("steps", step - 1)
"""


@pytest.fixture
def carried(plant: Any, tmp_path: Path, make: Any, rollout: Any, until: Any) -> tuple[Path, Path]:
    """A bundle, and the folder of the device that it is for."""
    plant.begin()
    plant.publish(1)
    device = tmp_path / "d1"
    enroll(device, plant.url, plant.client.create_enrollment_token(["north"]), "d1", {})
    State(device / "state.db").close()
    plant.client.apply([rollout("r1", 1)])

    def wished() -> bool:
        raw = plant.client.desired("d1")
        return bool(dsse.verify(raw, PAYLOAD_TYPE, plant.controller.desired_keys, DesiredState).slots)

    until(lambda: plant.device("d1")["status"].get("desiredGeneration") and wished())
    path = tmp_path / "d1.edgeward-bundle"
    export(plant.client, ["d1"], path)
    return path, device


def driven(bundle: Path, device: Path, how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(bundle), str(device), how],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.rpartition("steps ")[2])


def completes(bundle: Path, device: Path) -> None:
    import_bundle(bundle, device, SystemClock())
    found = Imports(device).newest()
    assert found is not None and sorted(path.name for path in device.glob("imports/*")) == [
        found.folder.name,
        "lock",
    ]


@pytest.mark.parametrize("how", ["kill", "fail"])
def test_at_every_touch_of_a_file(carried: tuple[Path, Path], how: str) -> None:
    bundle, device = carried
    assert driven(bundle, device, how) > 30
    completes(bundle, device)


def test_a_write_that_the_disk_does_not_take_leaves_nothing(carried: tuple[Path, Path]) -> None:
    """A real failing write, in the middle of a file: the system refuses what lies beyond a limit."""
    bundle, device = carried
    (device / "state.db").unlink()  # SQLite would be the first to stumble
    code = (
        "import sys; from pathlib import Path; from agent.bundle import import_bundle;"
        "from edgeward.clock import SystemClock;"
        "import_bundle(Path(sys.argv[1]), Path(sys.argv[2]), SystemClock())"
    )
    for limit in (0, 20, 300, 900):

        def limited(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        done = subprocess.run(
            [sys.executable, "-B", "-c", code, str(bundle), str(device)],
            capture_output=True, text=True, check=False, preexec_fn=limited,
        )  # fmt: skip
        assert done.returncode == 1 and "Unavailable" in done.stderr, (limit, done.stderr)
        assert "File too large" in done.stderr and "import again" in done.stderr
        assert [path.name for path in device.glob("imports/*")] == ["lock"]
    completes(bundle, device)


def test_only_one_import_at_a_time(carried: tuple[Path, Path]) -> None:
    bundle, device = carried
    with Imports(device).receiving() as part:
        (part / "x").touch()
        with pytest.raises(Conflict, match="under way"):
            import_bundle(bundle, device, SystemClock())
        Imports(device).sweep()
        assert (part / "x").exists(), "what is under way is not swept"


def test_what_a_killed_import_left_is_swept(tmp_path: Path) -> None:
    imports = Imports(tmp_path)
    imports.sweep()
    (tmp_path / "imports" / "part-1" / "blobs").mkdir(parents=True)
    assert imports.newest() is None
    imports.sweep()
    assert [path.name for path in (tmp_path / "imports").iterdir()] == ["lock"]


def test_a_blob_that_was_damaged_meanwhile_does_not_enter_the_store(carried: tuple[Path, Path]) -> None:
    bundle, device = carried
    completes(bundle, device)
    found = Imports(device).newest()
    assert found is not None
    blobs = BlobStore(device / "blobs")
    first, second, *_ = sorted((found.folder / "blobs").iterdir())
    first.write_bytes(first.read_bytes()[:-1] + b"\xff")
    for path in (first, second):
        found.take(path.name, path.stat().st_size, blobs)
    assert [path.name for path in blobs.folder.iterdir()] == [second.name]
