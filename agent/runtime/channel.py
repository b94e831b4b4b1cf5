"""Frames between the agent and a worker: a Unix socket, and shared memory for large tensors.

A frame is `<IBI`: payload length, kind, slot; then the payload (MessagePack). A request and its answer
carry the same slot; a slot is used again only after its answer. Each end owns one memory file per slot
for the large tensors it sends, hands its descriptor over once (SCM_RIGHTS), and replaces it when a
larger one is needed.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import msgspec
from msgspec import Struct

from agent.runtime.port import Tensor

HEADER = struct.Struct("<IBI")
#: Tensors above this many bytes in one frame go through shared memory.
INLINE_BYTES = 32 << 10
_ALIGN = 64
_BUFFER = 4 << 20
_READ = 256 << 10
_RIGHTS = socket.CMSG_SPACE(16 * 4)


class Kind(IntEnum):
    LOAD = 1
    LOADED = 2
    REQUEST = 3
    RESULT = 4
    FAULT = 5
    MAP = 6
    BAD_INPUT = 7


class _Part(Struct, array_like=True):
    """A tensor on the wire: its bytes here (`data`), or `size` bytes at `offset` of the slot's memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview = memoryview(b"")
    offset: int = -1
    size: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Part]).decode


class Frame(NamedTuple):
    kind: Kind
    slot: int
    payload: bytes | memoryview


class _Memory:
    """One memory file, mapped."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.size = size
        self.map = mmap.mmap(descriptor, size)

    @classmethod
    def make(cls, size: int) -> _Memory:
        size = 1 << max(16, (size - 1).bit_length())
        descriptor = os.memfd_create("edgeward-tensor", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        return cls(descriptor, size)

    def close(self) -> None:
        # A view of a tensor may still be held; the mapping then goes with it.
        with contextlib.suppress(BufferError):
            self.map.close()
        os.close(self.descriptor)


class Channel:
    """One end. Not thread-safe. `receive` blocks unless the socket does not; `send` never blocks then.

    On a socket that does not block, `pending` says that `flush` must be called when it can be written.
    """

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()
        self._out: deque[tuple[bytes, int | None]] = deque()
        self._mine: dict[int, _Memory] = {}
        self._theirs: dict[int, _Memory] = {}

    def close(self) -> None:
        self.socket.close()
        for memory in (*self._mine.values(), *self._theirs.values()):
            memory.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._mine.clear()
        self._theirs.clear()
        self._descriptors.clear()

    # sending

    @property
    def pending(self) -> bool:
        return bool(self._out)

    def send(self, kind: Kind, slot: int, payload: bytes = b"") -> None:
        self._put(HEADER.pack(len(payload), kind, slot) + payload, None)

    def send_tensors(self, kind: Kind, slot: int, tensors: Sequence[Tensor]) -> None:
        total = sum([len(tensor.data) for tensor in tensors])
        # A tensor is the beginning of a _Part.
        payload = _encode(tensors) if total <= INLINE_BYTES else self._share(slot, tensors)
        self._put(HEADER.pack(len(payload), kind, slot) + payload, None)

    def _share(self, slot: int, tensors: Sequence[Tensor]) -> bytes:
        need = sum(len(tensor.data) + _ALIGN for tensor in tensors)
        memory = self._mine.get(slot)
        if memory is None or memory.size < need:
            if memory is not None:
                memory.close()
            memory = self._mine[slot] = _Memory.make(need)
            size = memory.size.to_bytes(8, "little")
            self._put(HEADER.pack(len(size), Kind.MAP, slot) + size, memory.descriptor)
        parts, at = [], 0
        for tensor in tensors:
            size_ = len(tensor.data)
            memory.map[at : at + size_] = tensor.data
            parts.append(_Part(tensor.name, tensor.dtype, tensor.shape, offset=at, size=size_))
            at += -(-size_ // _ALIGN) * _ALIGN
        return _encode(parts)

    def _put(self, data: bytes, descriptor: int | None) -> None:
        self._out.append((data, descriptor))
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as the socket takes it. Raises OSError when the other end is gone."""
        while self._out:
            data, descriptor = self._out[0]
            try:
                if descriptor is None:
                    sent = self.socket.send(data)
                else:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
                    sent = self.socket.sendmsg([data], rights)
            except BlockingIOError:
                return
            if sent == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[sent:], None)

    # receiving

    def readable(self) -> bool:
        """Whether `receive` would find something at once."""
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        return True

    def receive(self) -> list[Frame]:
        """What has arrived, in order; empty when nothing has. Raises EOFError at the end."""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(_READ, _RIGHTS)
        except BlockingIOError:
            return []
        except ConnectionError:
            raise EOFError from None
        for level, type_, rights in ancillary:
            if level == socket.SOL_SOCKET and type_ == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(rights[: len(rights) // 4 * 4])
                self._descriptors.extend(found)
        if not data:
            raise EOFError
        if not self._buffer and len(data) >= 9:
            length, kind, slot = HEADER.unpack_from(data)
            if len(data) == 9 + length and kind != Kind.MAP:
                return [Frame(Kind(kind), slot, memoryview(data)[9:])]
        self._buffer += data
        return self._frames()

    def _frames(self) -> list[Frame]:
        frames, at, buffer = [], 0, self._buffer
        while len(buffer) - at >= 9:
            length, number, slot = HEADER.unpack_from(buffer, at)
            if len(buffer) - at - 9 < length:
                break
            payload = bytes(buffer[at + 9 : at + 9 + length])
            at += 9 + length
            kind = Kind(number)
            if kind is Kind.MAP:
                old = self._theirs.pop(slot, None)
                if old is not None:
                    old.close()
                self._theirs[slot] = _Memory(self._descriptors.popleft(), int.from_bytes(payload, "little"))
            else:
                frames.append(Frame(kind, slot, payload))
        del buffer[:at]
        return frames

    def tensors(self, frame: Frame, *, copy: bool) -> list[Tensor]:
        """The tensors of a request or result. Without `copy` large ones are views of the slot's memory,
        which hold only until the slot is used again."""
        found = []
        for part in _decode(frame.payload):
            data: bytes | memoryview = part.data
            if part.offset >= 0:
                memory = self._theirs[frame.slot]
                if part.offset + part.size > memory.size:
                    raise EOFError
                view = memoryview(memory.map)[part.offset : part.offset + part.size]
                data = bytes(view) if copy else view
            found.append(Tensor(part.name, part.dtype, part.shape, data))
        return found
