"""TensorRT and TensorRT-RTX backend: engines on one stream, caches updated in place, decoding replayed as CUDA graphs.

* Device memory is allocated once: caches with the session, activations in one arena that all engines share, since
  they run one after the other.
* scatter engines write new rows into the caches themselves; append engines hand them out, and they are written where
  they belong, directly where the address is aligned as TensorRT wants it, else by one strided copy per segment.
* A step whose shapes and addresses are those of the step before is captured as a CUDA graph and replayed from then on.
* Token embeddings are looked up on the host and travel through pinned memory.

An engine is loaded only with a receipt that matches (see `engines.receipt`). What only hardware can show is listed in
docs/tensorrt.md.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lightkv_export.engines.library import Library, logger
from lightkv_export.errors import BackendError, UserError
from lightkv_export.manifest import Graph
from lightkv_export.runtime.backend import ITEM_BYTES, Buffer, check_binding, host_dtype
from lightkv_export.runtime.device import Block, Device
from lightkv_export.runtime.engines import open_engines
from lightkv_export.runtime.execution import Context, TrtExecutable

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
"""TensorRT's names of data types -> the manifest's."""


class TrtBackend:
    """The engines of the bundle in `root` on GPU 0.

    Raises:
        BackendError: no engines that may be loaded here, or the library, cuda-python, the driver or the GPU is missing.
    """

    name = "trt"

    def __init__(self, root: Path, device: str = "cuda") -> None:
        if device != "cuda":
            raise UserError(f"device {device!r} with the backend trt", expected="cuda", fix="leave --device out")
        self._engines = open_engines(root)
        library = self._engines.library
        self.device = library.gpu().name
        self.max_tokens, self.chunk_tokens = self._engines.receipt.max_tokens, self._engines.receipt.chunk_tokens
        self._log = logger(library.api)
        self._runtime = library.api.Runtime(self._log)
        self._memory = Device(library.cuda)
        self._loaded: list[TrtExecutable] = []
        self.close = weakref.finalize(self, _close, self._loaded, self._memory)

    def load(self, graph: Graph) -> TrtExecutable:
        """The engine of one graph, checked against its receipt.

        Raises:
            BundleError: the engine or its graph is not what the receipt says. BackendError: TensorRT refuses it.
        """
        library, path = self._engines.library, self._engines.path(graph)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
            engine = self._runtime.deserialize_cuda_engine(blob)
        if engine is None:
            raise BackendError(
                f"{library.name} {library.version} cannot load {path}: {'; '.join(self._log.errors[-3:])}",
                expected="an engine of this library, and GPU memory for it",
                fix="free GPU memory, use a lower keep, or run `lightkv build BUNDLE --rebuild`",
            )
        _check_interface(library, engine, graph)
        contexts = tuple(self._contexts(engine, graph))
        executable = TrtExecutable(graph, engine, contexts, self._memory, self._log)
        self._loaded.append(executable)
        return executable

    def fixed_rows(self, graph: Graph) -> int | None:
        """Rows of a segment's caches, where they are written into its engine; None: any number."""
        return self._engines.engine(graph).capacity

    def empty(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Scratch memory, contents undefined."""
        block = Block(self._memory.cuda, prod(shape) * ITEM_BYTES[dtype], "buffers")
        return Buffer(dtype, shape, block.ptr, block)

    def zeros(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Memory that reads as zero."""
        block = Block(self._memory.cuda, prod(shape) * ITEM_BYTES[dtype], "caches")
        self._memory.fill_zero(block.ptr, block.nbytes)
        return Buffer(dtype, shape, block.ptr, block)

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy a host array into a buffer; the array may be changed at once."""
        self._memory.upload(buffer.ptr, check_binding(buffer, array))

    def read(self, buffer: Buffer) -> np.ndarray:
        """Copy a buffer to a new host array, when all work is done."""
        array = np.empty(buffer.shape, host_dtype(buffer.dtype))
        self._memory.download(buffer.ptr, array)
        return array

    def _contexts(self, engine: Any, graph: Graph) -> list[Context]:
        """One execution context per profile; their activations lie in the shared arena."""
        library, contexts = self._engines.library, []
        strategy = library.member("ExecutionContextAllocationStrategy", "USER_MANAGED")
        profiles = self._engines.engine(graph).profiles
        for index in range(engine.num_optimization_profiles):
            context = engine.create_execution_context(strategy)
            if context is None:
                raise BackendError(
                    f"no execution context for {graph.name}: {'; '.join(self._log.errors[-3:])}",
                    fix="free GPU memory, or use a lower keep",
                )
            if not context.set_optimization_profile_async(index, self._memory.handle):
                raise BackendError(f"TensorRT refuses profile {index} of {graph.name}")
            contexts.append(Context(context, profiles[index] if profiles else {}, self._memory))
        return contexts


def _check_interface(library: Library, engine: Any, graph: Graph) -> None:
    """Names, data types and places of an engine's inputs and outputs are those of the graph; caches are updated in
    place."""
    wanted = {tensor.name: tensor.dtype for tensor in (*graph.inputs, *graph.outputs)}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: DTYPES.get(engine.get_tensor_dtype(name).name, "another") for name in names}
    if found != wanted:
        wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise BackendError(
            f"the engine of {graph.name} has other inputs or outputs than its graph: {', '.join(wrong)}",
            fix="run `lightkv build BUNDLE --rebuild`",
        )
    host = library.member("TensorLocation", "HOST")
    if on_host := [name for name in names if engine.get_tensor_location(name) == host]:
        raise BackendError(
            f"the engine of {graph.name} wants {', '.join(on_host)} in host memory", expected="the GPU's"
        )
    if hasattr(engine, "get_aliased_input_tensor"):
        for tensor in graph.outputs:
            source = tensor.name.removesuffix("_out")
            if "_cache_" in tensor.name and engine.get_aliased_input_tensor(tensor.name) != source:
                raise BackendError(f"the engine of {graph.name} does not update {source} in place")


def _close(loaded: list[TrtExecutable], memory: Device) -> None:
    """Releases everything in reverse order of creation."""
    with contextlib.suppress(BackendError):  # work that failed has been reported already
        memory.synchronize()
    while loaded:
        loaded.pop().close()
    memory.close()
