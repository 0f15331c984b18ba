"""GPU memory of the trt backend: one stream, blocks that free themselves, pinned host memory, and the shared arena.

Everything is queued on one stream, so work runs in the order in which it was asked for; the host waits only in
`download`, when pinned memory is used up, and when the arena grows.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

from lightkv_export.engines.cuda import Cuda

ALIGNMENT = 256  # of every address that TensorRT takes
FIRST_RING_BYTES = 1 << 20


def aligned(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Block:
    """Device memory, given back when nobody holds it any more (CUDA waits for work that uses it)."""

    def __init__(self, cuda: Cuda, num_bytes: int, purpose: str) -> None:
        self.ptr, self.nbytes = cuda.allocate(num_bytes, purpose), num_bytes
        self.release = weakref.finalize(self, cuda.release, "cudaFree", self.ptr)


class Pinned:
    """Page-locked host memory, which the GPU copies from and to without a detour."""

    def __init__(self, cuda: Cuda, num_bytes: int) -> None:
        self.ptr, self.nbytes = int(cuda.call("cudaHostAlloc", num_bytes, 0)), num_bytes
        self.release = weakref.finalize(self, cuda.release, "cudaFreeHost", self.ptr)


class Arena:
    """Device memory that engines share because they run one after the other; grows to what is needed, never shrinks.

    `generation` changes with the address: whoever has noted the address must note it again.
    """

    def __init__(self, device: Device, purpose: str) -> None:
        self._device, self._purpose = weakref.proxy(device), purpose
        self._block: Block | None = None
        self.generation = 0

    @property
    def ptr(self) -> int:
        """Its address; 0 as long as nothing was needed."""
        return 0 if self._block is None else self._block.ptr

    @property
    def nbytes(self) -> int:
        """Its size."""
        return 0 if self._block is None else self._block.nbytes

    def reserve(self, num_bytes: int) -> None:
        """Make room for `num_bytes`; the contents are lost if it must grow."""
        if num_bytes > self.nbytes:
            self._device.synchronize()
            self.clear()  # first, so that old and new need not fit together
            self._block = Block(self._device.cuda, aligned(num_bytes), self._purpose)

    def clear(self) -> None:
        """Give the memory back."""
        if self._block is not None:
            self._block.release()
            self._block = None
        self.generation += 1


class Device:
    """The stream, copies between host and device, and the arenas that engines share.

    `activations` is their scratch memory, `unwanted` takes outputs that nobody fetches, `staged` new cache rows on
    their way to the cache.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.stream = cuda.call("cudaStreamCreateWithFlags", cuda.api.cudaStreamNonBlocking)
        self.activations = Arena(self, "activations")
        self.unwanted = Arena(self, "outputs that are not fetched")
        self.staged = Arena(self, "new cache rows")
        self._kinds = {
            kind: cuda.enum("cudaMemcpyKind", f"cudaMemcpy{kind}")
            for kind in ("HostToDevice", "DeviceToHost", "DeviceToDevice")
        }
        self._ring = Pinned(cuda, FIRST_RING_BYTES)
        self._landing = Pinned(cuda, FIRST_RING_BYTES)
        self._used = 0

    @property
    def handle(self) -> int:
        """The stream as TensorRT takes it."""
        return int(self.stream)

    @property
    def generations(self) -> tuple[int, ...]:
        """Changes whenever an arena moves."""
        return self.activations.generation, self.unwanted.generation, self.staged.generation

    def upload(self, ptr: int, array: np.ndarray) -> None:
        """Queue a copy of a contiguous host array to the device; the array may be changed at once."""
        if array.nbytes > self._ring.nbytes - self._used:
            self.synchronize()  # everything in the ring has been copied then
            self._used = 0
            if array.nbytes > self._ring.nbytes:
                self._ring.release()
                self._ring = Pinned(self.cuda, 1 << (array.nbytes - 1).bit_length())
        source = self._ring.ptr + self._used
        ctypes.memmove(source, array.ctypes.data, array.nbytes)
        self._used += aligned(array.nbytes)
        self._copy(ptr, source, array.nbytes, "HostToDevice")

    def download(self, ptr: int, array: np.ndarray) -> None:
        """Wait for all work, and copy device memory into a contiguous host array."""
        if array.nbytes > self._landing.nbytes:
            self._landing.release()
            self._landing = Pinned(self.cuda, 1 << (array.nbytes - 1).bit_length())
        self._copy(self._landing.ptr, ptr, array.nbytes, "DeviceToHost")
        self.synchronize()
        ctypes.memmove(array.ctypes.data, self._landing.ptr, array.nbytes)

    def copy_rows(self, target: tuple[int, int], source: tuple[int, int], width: int, height: int) -> None:
        """Queue a copy on the device: `height` rows of `width` bytes; target and source are (address, pitch)."""
        kind = self._kinds["DeviceToDevice"]
        self.cuda.call("cudaMemcpy2DAsync", *target, *source, width, height, kind, self.stream)

    def fill_zero(self, ptr: int, num_bytes: int) -> None:
        """Queue zeroing of device memory."""
        self.cuda.call("cudaMemsetAsync", ptr, 0, num_bytes, self.stream)

    def synchronize(self) -> None:
        """Wait for all work; errors of kernels show here."""
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Give everything back; blocks that somebody still holds follow when they are let go."""
        for arena in (self.staged, self.unwanted, self.activations):
            arena.clear()
        for pinned in (self._ring, self._landing):
            pinned.release()
        self.cuda.release("cudaStreamDestroy", self.stream)

    def _copy(self, target: int, source: int, num_bytes: int, kind: str) -> None:
        self.cuda.call("cudaMemcpyAsync", target, source, num_bytes, self._kinds[kind], self.stream)
