"""CUDA runtime calls through cuda-python, with checked errors. Imported late: everything else works without a GPU."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lightkv_export.errors import BackendError

MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # cuda-python >= 12.6.1, and before
INSTALL = "pip install cuda-python, in the major.minor version of the installed CUDA (JetPack 6: 12.6, JetPack 7: 13)"
GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """The device that engines are built for or run on; `capability` as TensorRT-RTX writes it, e.g. "SM87"."""

    name: str
    capability: str


class Cuda:
    """CUDA runtime on device 0. `call` returns what a function gives back and raises BackendError for its errors."""

    def __init__(self, api: ModuleType) -> None:
        self.api = api

    def call(self, name: str, *args: object) -> Any:
        """Calls `api.name(*args)`; returns None, the value, or a tuple of values."""
        error, *values = getattr(self.api, name)(*args)
        if error != self.api.cudaError_t.cudaSuccess:
            raise self._failure(name, error)
        return values[0] if len(values) == 1 else tuple(values) or None

    def release(self, name: str, thing: object) -> None:
        """Gives something back. An error is not raised: it is that of earlier work, which has reported it."""
        getattr(self.api, name)(thing)

    def enum(self, kind: str, name: str) -> Any:
        """A member of one of CUDA's enumerations, by name."""
        return getattr(getattr(self.api, kind), name)

    def allocate(self, num_bytes: int, purpose: str) -> int:
        """Address of new device memory (at least 256-byte aligned).

        Raises:
            BackendError: out of memory; names the purpose, what is free and what would help.
        """
        error, address = self.api.cudaMalloc(max(num_bytes, 1))
        if error == self.api.cudaError_t.cudaSuccess:
            return int(address)
        if error != self.api.cudaError_t.cudaErrorMemoryAllocation:
            raise self._failure("cudaMalloc", error)
        self.api.cudaGetLastError()  # the error is not sticky: clear it, so that a later call does not report it again
        free, total = self.call("cudaMemGetInfo")
        raise BackendError(
            f"out of GPU memory: {num_bytes / GIB:.2f} GiB for {purpose}, "
            f"{free / GIB:.2f} of {total / GIB:.2f} GiB are free",
            expected="room for engines, caches and activations, as `lightkv plan MODEL --target NAME` lists them",
            fix="use a lower keep, fewer or shorter inputs, or stop what else uses the GPU",
        )

    def gpu(self) -> Gpu:
        """What device 0 is. Makes no CUDA context, which would take memory."""
        kind = "cudaDeviceAttr"
        parts = [
            self.call("cudaDeviceGetAttribute", self.enum(kind, f"cudaDevAttrComputeCapability{part}"), 0)
            for part in ("Major", "Minor")
        ]
        name = self.call("cudaGetDeviceProperties", 0).name
        text = name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)
        return Gpu(text, "SM" + "".join(map(str, parts)))

    def _failure(self, name: str, error: Any) -> BackendError:
        return BackendError(
            f"CUDA: {name} failed: {_words(self.api, error)} ({error.name})",
            fix="see `lightkv doctor`; the GPU's log (dmesg) may say more",
        )


def open_cuda() -> Cuda:
    """CUDA on device 0.

    Raises:
        BackendError: cuda-python is missing, or there is no driver or no GPU.
    """
    api = _import_api()
    error, count = api.cudaGetDeviceCount()
    if error != api.cudaError_t.cudaSuccess or not count:
        failed = error != api.cudaError_t.cudaSuccess
        raise BackendError(
            f"no usable NVIDIA GPU: {_words(api, error) if failed else 'CUDA counts 0 devices'}",
            expected="an NVIDIA driver as new as the CUDA version of cuda-python, and a GPU that this user may open",
            fix="see `lightkv doctor`; in a container, start it with --gpus all (--runtime nvidia on a Jetson)",
        )
    return Cuda(api)


def _words(api: ModuleType, error: Any) -> str:
    """What CUDA says of an error."""
    _, text = api.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)


def _import_api() -> ModuleType:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise BackendError("cuda-python is not installed", expected=" or ".join(MODULES), fix=INSTALL)
