# ruff: noqa: N802 - methods have the names of CUDA's functions
"""Behaviour of the CUDA runtime on an emulated machine. Every function returns a tuple that starts with the error."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from emulator.machine import Graph, Machine, Stream, copy_bytes, poison, run_queue
from emulator.surface import EnumBase, Misuse, cuda_module

DATA = Path(__file__).resolve().parent.parent / "data" / "cuda_api"


def cuda_runtime(machine: Machine, version: str = "13.0.3") -> ModuleType:
    """`cuda.bindings.runtime` in this version of cuda-bindings, on `machine`."""
    dump = json.loads((DATA / f"cuda-bindings-{version}.json").read_text())
    behaviour = CudaRuntime(machine)
    names = [name for name in dir(behaviour) if name.startswith("cuda")]
    module = cuda_module("cuda.bindings.runtime", dump, {name: getattr(behaviour, name) for name in names})
    behaviour.api = module
    return module


class Handle:
    """A cudaStream_t or cudaGraphExec_t: an object that int() turns into a number."""

    def __init__(self, value: int, thing: object) -> None:
        self.value, self.thing = value, thing

    def __int__(self) -> int:
        return self.value


class CudaRuntime:
    """Functions by the names of the API."""

    api: Any

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._next = 1000
        self._last: Any = None

    def cudaGetDeviceCount(self) -> tuple:
        if not self.machine.driver:
            return self._error("cudaErrorInsufficientDriver"), None
        return self._ok(), 1

    def cudaGetErrorString(self, error: EnumBase) -> tuple:
        return self._ok(), error.name.encode()

    def cudaGetLastError(self) -> tuple:
        last, self._last = self._last, None
        return (last or self._ok(),)

    def cudaDeviceGetAttribute(self, attribute: EnumBase, device: int) -> tuple:
        major, minor = self.machine.capability
        known = {"cudaDevAttrComputeCapabilityMajor": major, "cudaDevAttrComputeCapabilityMinor": minor}
        return self._ok(), known[attribute.name]

    def cudaGetDeviceProperties(self, device: int) -> tuple:
        return self._ok(), SimpleNamespace(name=b"Emulated GPU")

    def cudaMemGetInfo(self) -> tuple:
        total = self.machine.memory_bytes
        return self._ok(), total - self.machine.used_bytes, total

    def cudaMalloc(self, size: int) -> tuple:
        if self.machine.strict_capture:
            return self._break_captures(), None
        block = self.machine.allocate("device", size)
        return (self._error("cudaErrorMemoryAllocation"), None) if block is None else (self._ok(), block.ptr)

    def cudaFree(self, ptr: int) -> tuple:
        if self.machine.strict_capture:
            return (self._break_captures(),)
        self.machine.free("device", int(ptr))
        return (self._ok(),)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple:
        return self._ok(), self.machine.allocate("pinned", size).ptr

    def cudaFreeHost(self, ptr: int) -> tuple:
        self.machine.free("pinned", int(ptr))
        return (self._ok(),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple:
        self._next += 1
        self.machine.streams[self._next] = Stream(self._next)
        return self._ok(), Handle(self._next, self.machine.streams[self._next])

    def cudaStreamDestroy(self, stream: Handle) -> tuple:
        found = self.machine.stream(stream)
        if found.capturing is not None:
            raise Misuse("a stream is destroyed while it captures")
        run_queue(found)
        found.destroyed = True
        self.machine.released.append("stream")
        return (self._ok(),)

    def cudaStreamSynchronize(self, stream: Handle) -> tuple:
        found = self.machine.stream(stream)
        if found.capturing is not None:
            return (self._break_captures(),)
        run_queue(found)
        return (self._ok(),)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: EnumBase, stream: Handle) -> tuple:
        return self.cudaMemcpy2DAsync(target, size, source, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(  # noqa: PLR0917
        self,
        target: int,
        dpitch: int,
        source: int,
        spitch: int,
        width: int,
        height: int,
        kind: EnumBase,
        stream: Handle,
    ) -> tuple:
        if width > min(dpitch, spitch):
            return (self._error("cudaErrorInvalidPitchValue"),)
        spans = {
            "target": (int(target), dpitch * (height - 1) + width),
            "source": (int(source), spitch * (height - 1) + width),
        }
        direction = kind.name.removeprefix("cudaMemcpy")
        snapshot = None
        for side, word in (("source", direction.split("To")[0]), ("target", direction.split("To")[1])):
            if word == "Device":
                self.machine.check(*spans[side], "device", f"{direction} copy, {side}")
            elif not self.machine.is_pinned(*spans[side]) and side == "source":
                snapshot = ctypes.string_at(*spans[side])  # pageable memory is read at once
        if direction == "DeviceToHost":
            if not self.machine.is_pinned(*spans["target"]):
                raise Misuse("an asynchronous copy into pageable memory")
            poison(*spans["target"])

        def work() -> None:
            for side, word in (("source", direction.split("To")[0]), ("target", direction.split("To")[1])):
                if word == "Device":
                    self.machine.check(*spans[side], "device", f"{direction} copy, {side}, when it ran")
            kept = ctypes.create_string_buffer(snapshot, len(snapshot)) if snapshot is not None else None
            start = ctypes.addressof(kept) if kept is not None else int(source)
            for row in range(height):
                copy_bytes(int(target) + row * dpitch, start + row * spitch, width)

        self.machine.stream(stream).add(work)
        return (self._ok(),)

    def cudaMemsetAsync(self, ptr: int, value: int, size: int, stream: Handle) -> tuple:
        self.machine.check(int(ptr), size, "device", "memset")
        self.machine.stream(stream).add(lambda: ctypes.memset(int(ptr), value, size))
        return (self._ok(),)

    def cudaStreamBeginCapture(self, stream: Handle, mode: EnumBase) -> tuple:
        found = self.machine.stream(stream)
        if found.capturing is not None:
            return (self._error("cudaErrorIllegalState"),)
        found.capturing, found.relaxed, found.broken = [], mode.name.endswith("Relaxed"), False
        return (self._ok(),)

    def cudaStreamEndCapture(self, stream: Handle) -> tuple:
        found = self.machine.stream(stream)
        work, found.capturing = found.capturing, None
        if work is None:
            return self._error("cudaErrorIllegalState"), None
        if found.broken or not self.machine.capturable:
            return self._error("cudaErrorStreamCaptureInvalidated"), None
        self.machine.captures += 1
        return self._ok(), self._graph(work)

    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> tuple:
        return self._ok(), self._graph(list(self._alive(graph).work))

    def cudaGraphLaunch(self, graph: Handle, stream: Handle) -> tuple:
        work = self._alive(graph).work
        self.machine.launches += 1
        for step in work:
            getattr(step, "check_launch", lambda: None)()
            self.machine.stream(stream).add(step)
        return (self._ok(),)

    def cudaGraphDestroy(self, graph: Handle) -> tuple:
        self._alive(graph).destroy()
        return (self._ok(),)

    def cudaGraphExecDestroy(self, graph: Handle) -> tuple:
        self._alive(graph).destroy()
        self.machine.released.append("graph")
        return (self._ok(),)

    def _graph(self, work: list) -> Handle:
        self.machine.graphs.append(Graph(work))
        self._next += 1
        return Handle(self._next, self.machine.graphs[-1])

    def _alive(self, handle: Handle) -> Graph:
        if not handle.thing.alive:
            raise Misuse("a destroyed graph is used")
        return handle.thing

    def _break_captures(self) -> EnumBase:
        for stream in self.machine.streams.values():
            stream.broken = stream.capturing is not None
        return self._error("cudaErrorStreamCaptureUnsupported")

    def _ok(self) -> EnumBase:
        return self.api.cudaError_t.cudaSuccess

    def _error(self, name: str) -> EnumBase:
        self._last = getattr(self.api.cudaError_t, name)
        return self._last


def install_cuda(module: ModuleType) -> dict[str, ModuleType]:
    """Entries for sys.modules that make `cuda.bindings.runtime` importable."""
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    package.bindings, bindings.runtime = bindings, module
    package.__path__, bindings.__path__ = [], []
    return {"cuda": package, "cuda.bindings": bindings, "cuda.bindings.runtime": module}


assert sys.byteorder == "little"
