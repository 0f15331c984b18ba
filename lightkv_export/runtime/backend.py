"""What a backend is: memory (`Buffer`), graphs that run on it (`Executable`), and the table of known backends.

The session speaks this protocol only. Caches, hidden states and logits live in backend memory (host arrays for ONNX
Runtime on a CPU, device memory for a GPU); the host sees them through `write` and `read` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from lightkv_export.errors import BackendError, UserError
from lightkv_export.manifest import Graph

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "bool": 1}
BACKENDS = ("ort", "trt")


@dataclass(frozen=True)
class Buffer:
    """A typed piece of backend memory: all that a binding needs is `ptr`, `dtype` and `shape`.

    `dtype` is a name of the manifest; the host form of "bfloat16" is uint16 words. `owner` keeps the memory alive, so a
    view (`rows`) may outlive the buffer it was taken from.
    """

    dtype: str
    shape: tuple[int, ...]
    ptr: int
    owner: object = field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes that the shape spans."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def rows(self, start: int, stop: int) -> Buffer:
        """Rows [start, stop) of a token-major cache [1, 1, C, row] as a contiguous view; nothing is copied."""
        row = self.shape[-1]
        return Buffer(
            self.dtype, (1, 1, stop - start, row), self.ptr + start * row * ITEM_BYTES[self.dtype], self.owner
        )


class Executable(Protocol):
    """One loaded graph. Not safe for two threads at once."""

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run on bound buffers. An output left out is not fetched; an output bound to an input's memory is updated in
        place.

        Raises:
            BackendError: the backend failed (memory, driver, shapes).
        """


class Backend(Protocol):
    """Memory and graphs on one device.

    `max_tokens` is the longest sequence and `chunk_tokens` the most tokens of one step that engines take; None: any.
    """

    name: str
    device: str
    max_tokens: int | None
    chunk_tokens: int | None

    def load(self, graph: Graph) -> Executable:
        """Load one graph of the bundle."""

    def fixed_rows(self, graph: Graph) -> int | None:
        """Rows of a segment's caches, where the graph or its engine fixes them; None: any number."""

    def empty(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Scratch memory, contents undefined."""

    def zeros(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Memory that reads as zero: caches, whose unused columns are masked but must be finite (0 * NaN is NaN).
        On a host, pages are committed when they are first written."""

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy a host array of the buffer's shape and host dtype into it."""

    def read(self, buffer: Buffer) -> np.ndarray:
        """Copy a buffer to a new host array."""


def open_backend(name: str, root: Path, device: str | None, threads: int | None, lowering: str = "modern") -> Backend:
    """The backend called `name` for the bundle in `root`, lowered as `lowering`; device None: the backend's choice.

    Raises:
        UserError: no such backend. BackendError: it is not installed, or too old.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads is {threads}", expected="at least 1, or leave it out for all cores")
    if name == "ort":
        from lightkv_export.runtime.ort import OrtBackend

        return OrtBackend(root, device or "cpu", threads, lowering)
    if name == "trt":
        from lightkv_export.runtime.trt import TrtBackend

        return TrtBackend(root, device or "cuda")
    raise UserError(f"unknown backend {name!r}", expected=f"one of: {', '.join(BACKENDS)}")


def host_dtype(dtype: str) -> np.dtype:
    """The numpy dtype that holds a manifest dtype on the host (bfloat16: its 16-bit words)."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Host array of a float dtype -> float32, exactly."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def from_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> host array of a float dtype, rounded to nearest, ties to even."""
    if dtype != "bfloat16":
        return array.astype(host_dtype(dtype), copy=False)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def cast(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """Host array of one float dtype -> host array of another."""
    return array if source == target else from_float32(to_float32(array, source), target)


def check_binding(buffer: Buffer, array: np.ndarray) -> np.ndarray:
    """The array, contiguous, after a check that it fits the buffer exactly."""
    if array.shape != buffer.shape or array.dtype != host_dtype(buffer.dtype):
        raise BackendError(f"array {array.dtype} {array.shape} does not fit a buffer {buffer.dtype} {buffer.shape}")
    return np.ascontiguousarray(array)
