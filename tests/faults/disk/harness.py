"""Record a process, cut its power everywhere, look at what is left: for anything that keeps files in one folder.

    recorder = compiled(tmp_path_factory.mktemp("recorder"))
    records = record(recorder, folder, [sys.executable, "-m", "tests.faults.disk.rollout", str(folder)], log)
    cuts = cut_everywhere(records, check, scratch, variants=8)

The command does its work in `folder` and calls `tests.faults.disk.device.mark` each time that it has told
somebody something that must hold from then on (an ack that was sent, for example). `check(number, marks, folder)`
gets a folder as a cut after that call may leave it, and the marks made until then; it opens the folder as the
program would and asserts. A control test passes a `forgets` to `cut_everywhere` that takes a defence away, and
expects that `check` fails.

For refused calls, a process runs with `environment(recorder, folder)` and arms them itself with `Faults`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.disk.replay import Disk, Record, crash_states, materialise, read_log

ROOT = Path(__file__).parents[3]

Check = Callable[[int, list[bytes], Path], None]


def compiled(folder: Path) -> Path:
    """The recorder, built by the system's C compiler; skips the test without one."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the disk's recorder: apt-get install gcc libc6-dev")
    made = folder / "recorder.so"
    built = subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", made, Path(__file__).with_name("recorder.c")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if built.returncode:
        pytest.skip(f"the disk's recorder cannot be built here: {built.stderr.strip()[-300:]}")
    return made


def environment(recorder: Path, folder: Path, log: Path | None = None) -> dict[str, str]:
    """For a process whose calls below `folder` are to be seen."""
    more = {"LD_PRELOAD": str(recorder), "DISK_WATCH": str(folder.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **more} | ({"DISK_LOG": str(log)} if log is not None else {})


def record(recorder: Path, folder: Path, command: Sequence[str], log: Path) -> list[Record]:
    """Run the command to its end; what it asked of the disk below `folder`."""
    folder.mkdir()
    done = subprocess.run(
        command, cwd=ROOT, env=environment(recorder, folder, log), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return read_log(log, folder.resolve())


@dataclass
class Cuts:
    """How many `points` and different `states` were looked at, and what was wrong, as (call, what)."""

    points: int = 0
    states: int = 0
    wrong: list[tuple[int, str]] = field(default_factory=list)


def cut_everywhere(
    records: list[Record],
    check: Check,
    scratch: Path,
    variants: int,
    *,
    forgets: Callable[[str, bool], bool] = lambda path, is_folder: False,
    enough: int = 20,
) -> Cuts:
    """Cut the power after each call and check what may be left; ends after `enough` wrong states.

    Begins at the first fsync that is forgotten, if there is one: before it, nothing differs.

    SQLite's -shm files never survive: they are memory that happens to have a name.
    """
    found, last, disk = Cuts(), -1, Disk(forgets)
    first = next(disk.forgotten(records), 0)
    for number, marks, left in crash_states(records, variants, disk):
        if number < first:
            continue
        found.points += number != last
        found.states += 1
        last = number
        materialise(left, scratch, lambda name: name.endswith("-shm"))
        try:
            check(number, marks, scratch)
        except Exception as error:  # whatever a start would die of is a finding
            found.wrong.append((number, f"{_call(records[number])}: {type(error).__name__}: {error}"))
            if len(found.wrong) >= enough:
                break
    return found


def _call(record: Record) -> str:
    return f"after {record.op} {record.path[-60:]} {record.more[-60:]}"


class Faults:
    """The recorder inside this process."""

    def __init__(self) -> None:
        self._recorder = ctypes.CDLL(None)
        self._recorder.disk_fault.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._recorder.disk_count.restype = ctypes.c_long

    def refuse(self, at: int, error: int, *, lasting: bool) -> None:
        """The `at`-th call from now on fails with errno `error`, and all after it if `lasting`; 0: none."""
        self._recorder.disk_fault(at, error, int(lasting))

    def count(self) -> int:
        """Calls since then that could have failed."""
        return int(self._recorder.disk_count())
