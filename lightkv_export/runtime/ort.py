"""ONNX Runtime backend. On a CPU, graphs are bound to raw host pointers: views of caches cost nothing and updates
happen in place. With device="cuda", memory is device OrtValues and the same bindings are made on the CUDA provider;
that path has not been verified on hardware.

All sessions share one arena, so segments that run one after the other reuse the same activation memory; weights are
external data that ONNX Runtime maps from the bundle's files.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightkv_export.errors import BackendError, UserError
from lightkv_export.manifest import Graph
from lightkv_export.runtime.backend import Buffer, check_binding, host_dtype

try:
    import onnxruntime as ort
except ImportError as error:
    raise BackendError(
        "onnxruntime is not installed", expected="onnxruntime >= 1.28", fix="pip install 'onnxruntime>=1.28'"
    ) from error

MINIMUM_VERSIONS = {"modern": (1, 28), "portable": (1, 20)}  # by lowering: opset 24 and opset 20
PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
ONNX_TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}  # onnx.TensorProto


class OrtBackend:
    """ONNX Runtime on `device` ("cpu" or "cuda"); `threads` is the number of intra-op threads (None: all cores).

    `lowering` says how the bundle's graphs are written, and so which versions of ONNX Runtime run them.
    """

    name = "ort"
    max_tokens = chunk_tokens = None

    def __init__(self, root: Path, device: str = "cpu", threads: int | None = None, lowering: str = "modern") -> None:
        if device not in PROVIDERS:
            raise UserError(f"unknown device {device!r}", expected=f"one of: {', '.join(PROVIDERS)}")
        _check_version(ort.__version__, lowering)
        if PROVIDERS[device][0] not in ort.get_available_providers():
            raise BackendError(
                f"this onnxruntime has no {PROVIDERS[device][0]}",
                expected=f"a build for {device}; it has {', '.join(ort.get_available_providers())}",
                fix="pip install onnxruntime-gpu, or use device='cpu'",
            )
        self.root, self.device, self.threads = root, device, threads

    def load(self, graph: Graph) -> OrtExecutable:
        """A session for one graph; raises BackendError if ONNX Runtime refuses it."""
        path = self.root / graph.file
        try:
            # Loaded from its path, so that external data resolves inside the bundle.
            session = ort.InferenceSession(str(path), self._options(), providers=PROVIDERS[self.device])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            found = f"ONNX Runtime {ort.__version__} cannot load {path}: {_first_line(error)}"
            if self.device == "cpu" and "NOT_IMPLEMENTED" in str(error) and _is_bfloat16(graph):
                raise BackendError(
                    found,
                    expected="a float32 or float16 bundle: on a CPU, ONNX Runtime does not compute in bfloat16",
                    fix="run it on TensorRT (`lightkv build`), or export it with --dtype fp32 or fp16 for a CPU",
                ) from error
            raise BackendError(
                found,
                expected="a graph of this bundle and enough memory",
                fix="run `lightkv inspect` on the bundle; export it again if a file is damaged",
            ) from error
        return OrtExecutable(graph.name, session, self.device)

    def fixed_rows(self, graph: Graph) -> int | None:
        """Rows of a segment's caches, where the graph has a number for them; None: any number."""
        rows = next(tensor.shape[2] for tensor in graph.inputs if tensor.name.startswith("key_cache_"))
        return rows if isinstance(rows, int) else None

    def empty(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Scratch memory, contents undefined."""
        if self.device == "cpu":
            array = np.empty(shape, host_dtype(dtype))
            return Buffer(dtype, shape, array.ctypes.data, array)
        value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), ONNX_TYPES[dtype], self.device, 0)
        return Buffer(dtype, shape, value.data_ptr(), value)

    def zeros(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Memory that reads as zero. On the CPU large arrays come as untouched pages, committed when first written."""
        if self.device == "cpu":
            array = np.zeros(shape, host_dtype(dtype))
            return Buffer(dtype, shape, array.ctypes.data, array)
        buffer = self.empty(dtype, shape)
        self.write(buffer, np.zeros(shape, host_dtype(dtype)))
        return buffer

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy a host array into a buffer."""
        array = check_binding(buffer, array)
        if self.device == "cpu":
            ctypes.memmove(buffer.ptr, array.ctypes.data, buffer.nbytes)
        else:
            buffer.owner.update_inplace(array)

    def read(self, buffer: Buffer) -> np.ndarray:
        """Copy a buffer to a new host array."""
        if self.device != "cpu":
            return buffer.owner.numpy()
        array = np.empty(buffer.shape, host_dtype(buffer.dtype))
        ctypes.memmove(array.ctypes.data, buffer.ptr, buffer.nbytes)
        return array

    def _options(self) -> ort.SessionOptions:
        _share_arena()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads or 0
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_env_allocators", "1")
        return options


class OrtExecutable:
    """A session with one lasting IOBinding: only names whose pointer or shape changed since the last run are bound
    anew."""

    def __init__(self, name: str, session: ort.InferenceSession, device: str) -> None:
        self.name, self._session, self._device = name, session, device
        self._binding = session.io_binding()
        self._bound_inputs: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._bound_outputs: dict[str, tuple[int, tuple[int, ...]]] = {}

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """See `backend.Executable.run`."""
        try:
            if self._bound_outputs.keys() - outputs.keys():  # an output bound earlier that nobody wants now
                self._binding.clear_binding_outputs()
                self._bound_outputs.clear()
            self._bind(self._binding.bind_input, self._bound_inputs, inputs)
            self._bind(self._binding.bind_output, self._bound_outputs, outputs)
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BackendError(
                f"ONNX Runtime failed in {self.name}: {_first_line(error)}",
                fix="if it ran out of memory, use a lower keep, a shorter prompt or fewer images",
            ) from error

    def _bind(self, bind: object, bound: dict, buffers: Mapping[str, Buffer]) -> None:
        for name, buffer in buffers.items():
            place = (buffer.ptr, buffer.shape)
            if bound.get(name) != place:
                bind(name, self._device, 0, ONNX_TYPES[buffer.dtype], buffer.shape, buffer.ptr)
                bound[name] = place


def _check_version(version: str, lowering: str) -> None:
    least = MINIMUM_VERSIONS[lowering]
    if tuple(int(part) for part in version.split(".")[:2]) < least:
        why = "opset-24 Attention gives wrong results in 1.24, zeros for masked rows come with 1.28"
        number = ".".join(str(part) for part in least)
        raise BackendError(
            f"onnxruntime {version} is too old for a bundle of the {lowering} lowering",
            expected=f">= {number}" + (f" ({why})" if lowering == "modern" else ""),
            fix=f"pip install -U 'onnxruntime>={number}'; Python 3.10 has no newer one than 1.23: there, export the "
            "bundle with --lowering portable",
        )


@functools.cache
def _share_arena() -> None:
    """One CPU arena for all sessions of this process."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # arena_extend_strategy 1: grow by what is asked for, not to the next power of two
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


def _is_bfloat16(graph: Graph) -> bool:
    return any(tensor.dtype == "bfloat16" for tensor in graph.outputs)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
