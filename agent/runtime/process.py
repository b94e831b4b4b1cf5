"""The worker's process: started with its model, watched, killed. Knows nothing of requests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from agent.runtime.channel import Channel, Kind
from agent.runtime.child import Load

_PAGE = os.sysconf("SC_PAGE_SIZE")


class ChildProcess:
    """One process and the agent's end of its channel."""

    def __init__(self, content: bytes, load: Load, threads: int) -> None:
        """Start it; it answers with a LOADED or FAULT frame when it has loaded the model."""
        ours, theirs = socket.socketpair()
        # The model travels in memory: no other process can change it between the check and the load.
        memory = os.memfd_create("edgeward-model", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(memory), "wb") as file:
                file.write(content)
            os.lseek(memory, 0, os.SEEK_SET)
            numbers = (theirs.fileno(), memory)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "agent.runtime.child", *map(str, numbers)],
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": str(threads)},
            )
        finally:
            theirs.close()
            os.close(memory)
        ours.setblocking(False)
        self.channel = Channel(ours)
        self.channel.send(Kind.LOAD, 0, msgspec.msgpack.encode(load))

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self.channel.socket.fileno()

    def death(self) -> str:
        """The signal that ended the process, if one did, for the log."""
        code = self._process.poll()
        return signal.Signals(-code).name if code is not None and code < 0 else ""

    def end(self) -> None:
        """Kill it and wait for the kernel to say that it is gone."""
        self.channel.close()
        self._process.kill()
        self._process.wait()

    def resident_bytes(self) -> int:
        """Its resident memory; 0 when it is gone."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_bytes().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):
            return 0
