"""An emulated GPU: memory blocks at real addresses, streams that run when somebody waits, CUDA graphs, and the rules.

Work is queued and done at the next synchronization, as late as a real GPU may do it: a host buffer that is reused too
early, or read without waiting, gives wrong numbers here too. Device memory starts as NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from emulator.surface import Misuse

ALIGNMENT, GUARD, GUARD_BYTE, POISON = 256, 256, 0xA5, 0xFF


class Block:
    """Memory of `kind` "device" or "pinned" between two guards."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size, self.freed = kind, size, False
        self._bytes = np.full(size + 2 * GUARD + ALIGNMENT, GUARD_BYTE, np.uint8)
        start = self._bytes.ctypes.data + GUARD
        self.ptr = -(-start // ALIGNMENT) * ALIGNMENT
        self._offset = self.ptr - self._bytes.ctypes.data
        self._bytes[self._offset : self._offset + size] = POISON

    def holds(self, ptr: int, size: int) -> bool:
        """Whether [ptr, ptr + size) lies inside."""
        return not self.freed and self.ptr <= ptr and ptr + size <= self.ptr + self.size

    def free(self) -> None:
        """Checks the guards; the memory stays mapped, so that late accesses are seen and not felt."""
        before, after = self._bytes[: self._offset], self._bytes[self._offset + self.size :]
        if (before != GUARD_BYTE).any() or (after != GUARD_BYTE).any():
            raise Misuse(f"something wrote outside a block of {self.size} bytes")
        self.freed = True


Work = Callable[[], None]


@dataclass
class Stream:
    """Queued work; while `capturing` is a list, work goes there instead and is not done."""

    handle: int
    queue: list[Work] = field(default_factory=list)
    capturing: list[Work] | None = None
    relaxed: bool = False
    broken: bool = False
    destroyed: bool = False

    def add(self, work: Work) -> None:
        """Queue or record work."""
        if self.destroyed:
            raise Misuse("work for a destroyed stream")
        (self.queue if self.capturing is None else self.capturing).append(work)


@dataclass
class Graph:
    """Recorded work, and later its executable form."""

    work: list[Work]
    alive: bool = True

    def destroy(self) -> None:
        """Let go of what was recorded."""
        self.work, self.alive = [], False


class Machine:
    """One emulated GPU with its driver.

    Args:
        memory_bytes: of the device.
        capability: (major, minor).

    `driver` and `capturable` may be set to False: no driver; every capture ends invalidated.
    """

    def __init__(self, memory_bytes: int = 4 << 30, capability: tuple[int, int] = (8, 7)) -> None:
        self.memory_bytes, self.capability = memory_bytes, capability
        self.driver = self.capturable = True
        self.blocks: list[Block] = []
        self.streams: dict[int, Stream] = {}
        self.graphs: list[Graph] = []
        self.engine_bytes = 0
        self.released: list[str] = []  # what was given back, in order
        self.launches = 0
        self.captures = 0

    @property
    def used_bytes(self) -> int:
        """Device memory in use, engines included."""
        return self.engine_bytes + sum(b.size for b in self.blocks if b.kind == "device" and not b.freed)

    def leaks(self) -> list[str]:
        """What is still allocated."""
        found = [f"{block.kind} memory of {block.size} bytes" for block in self.blocks if not block.freed]
        found += [f"stream {stream.handle}" for stream in self.streams.values() if not stream.destroyed]
        found += ["graph" for graph in self.graphs if graph.alive]
        return found + ([f"engines of {self.engine_bytes} bytes"] if self.engine_bytes else [])

    def allocate(self, kind: str, size: int) -> Block | None:
        """A new block, or None when the device is full."""
        if kind == "device" and self.used_bytes + size > self.memory_bytes:
            return None
        self.blocks.append(Block(kind, size))
        return self.blocks[-1]

    def free(self, kind: str, ptr: int) -> None:
        """Waits for all work first, as cudaFree does."""
        self.synchronize()
        for block in self.blocks:
            if block.ptr == ptr and block.kind == kind and not block.freed:
                block.free()
                self.released.append(f"{kind} memory")
                return
        raise Misuse(f"{kind} memory at {ptr:#x} is freed twice or was never allocated")

    def check(self, ptr: int, size: int, kind: str, what: str) -> None:
        """The range lies inside one live block of this kind."""
        if not any(block.kind == kind and block.holds(ptr, size) for block in self.blocks):
            raise Misuse(f"{what}: {size} bytes at {ptr:#x} are not inside live {kind} memory")

    def is_pinned(self, ptr: int, size: int) -> bool:
        """Whether a host range is page-locked."""
        return any(block.kind == "pinned" and block.holds(ptr, size) for block in self.blocks)

    def stream(self, handle: object) -> Stream:
        """The stream of a handle."""
        stream = self.streams.get(int(handle))
        if stream is None or stream.destroyed:
            raise Misuse(f"there is no stream {handle}")
        return stream

    def synchronize(self) -> None:
        """Do all queued work."""
        for stream in self.streams.values():
            run_queue(stream)

    @property
    def strict_capture(self) -> bool:
        """Whether some stream captures in a mode that forbids allocations."""
        return any(stream.capturing is not None and not stream.relaxed for stream in self.streams.values())


def run_queue(stream: Stream) -> None:
    """Do what is queued on one stream."""
    work, stream.queue = stream.queue, []
    for step in work:
        step()


def copy_bytes(target: int, source: int, size: int) -> None:
    """memcpy between real addresses."""
    ctypes.memmove(target, source, size)


def poison(ptr: int, size: int) -> None:
    """Fill with what nobody should read."""
    ctypes.memset(ptr, POISON, size)
