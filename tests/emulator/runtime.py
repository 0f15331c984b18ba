"""Behaviour of TensorRT's runtime: engines whose arithmetic is ONNX Runtime on the same graph, on emulated device
memory."""

from __future__ import annotations

import json
import struct
import weakref
from math import prod
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime as ort

from emulator.builder import DTYPES, MAGIC, NetworkTensor
from emulator.machine import ALIGNMENT, Machine, poison
from emulator.surface import Misuse, Surface

ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "BOOL": 1}


class Runtime:
    def __init__(self, surface: Surface, logger: Any) -> None:
        self.surface, self.logger = surface, logger

    def deserialize_cuda_engine(self, serialized: Any) -> Any:
        blob = bytes(serialized)
        if blob[: len(MAGIC)] != MAGIC:
            return self._refuse("Serialization assertion failed: the engine is damaged")
        size = struct.unpack_from("<I", blob, len(MAGIC))[0]
        start = len(MAGIC) + 4 + size
        head = json.loads(blob[start - size : start])
        machine: Machine = self.surface.machine
        if head["version"] != self.surface.dump["version"]:
            return self._refuse(f"the engine plan is of version {head['version']}")
        if tuple(head["capability"]) != machine.capability:
            return self._refuse("the engine plan is for another compute capability")
        if machine.used_bytes + len(blob) > machine.memory_bytes:
            return self._refuse("OutOfMemory: requested size exceeds the free device memory")
        engine = Engine(self.surface, self.logger, onnx.load_model_from_string(blob[start:]), head["profiles"])
        thing = self.surface.make("ICudaEngine", engine)
        machine.engine_bytes += len(blob)
        weakref.finalize(engine, _release_engine, machine, len(blob))
        return thing

    def _refuse(self, text: str) -> None:
        self.logger.log(self.surface.severity.ERROR, text)


def _release_engine(machine: Machine, size: int) -> None:
    machine.engine_bytes -= size
    machine.released.append("engine")


class Engine:
    def __init__(self, surface: Surface, logger: Any, model: onnx.ModelProto, profiles: list[dict]) -> None:
        self.surface, self.logger, self.model, self.profiles = surface, logger, model, profiles
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        scatters = [node for node in model.graph.node if node.op_type == "TensorScatter"]
        self.aliases = {node.output[0]: node.input[0] for node in scatters}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.profiles_in_use: set[int] = set()

    def inferred(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, onnx.ValueInfoProto]:
        """The outputs as they follow from the inputs' shapes: for axes that no input has."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for value in model.graph.input:
            for axis, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
                axis.dim_value = size
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        return {value.name: value for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output}

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.surface.module.DataType[self.kind(name)]

    def get_tensor_location(self, name: str) -> Any:
        return self.surface.module.TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str:
        return self.aliases.get(name, "")

    def create_execution_context(self, strategy: Any) -> Any:
        if strategy is None or strategy.name != "USER_MANAGED":
            raise NotImplementedError("the emulator only has contexts whose memory the user manages")
        return self.surface.make("IExecutionContext", ExecutionContext(self.surface, self))

    def value(self, name: str) -> onnx.ValueInfoProto:
        return self.inputs.get(name) or self.outputs[name]

    def kind(self, name: str) -> str:
        return DTYPES[onnx.TensorProto.DataType.Name(self.value(name).type.tensor_type.elem_type)]


class ExecutionContext:
    """Shapes, addresses and device memory as last set; a run takes what holds when it is queued."""

    def __init__(self, surface: Surface, engine: Engine) -> None:
        self.surface, self.engine = surface, engine
        self.machine: Machine = surface.machine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.state = 0  # changes with shapes and memory: a captured graph is good for one state
        self.sized = False
        self.runs = SimpleNamespace(since_change=0)
        for name, value in engine.inputs.items():
            shape = NetworkTensor(surface, value).shape
            if -1 not in shape:
                self.shapes[name] = shape
        weakref.finalize(self, _release_context, self.machine, engine, self.__dict__)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.machine.stream(stream)
        if index in self.engine.profiles_in_use or not 0 <= index < len(self.engine.profiles):
            return self._refuse(f"profile {index} does not exist or is in use by another context")
        self.engine.profiles_in_use.add(index)
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        shape = tuple(shape)
        if name not in self.engine.inputs:
            return self._refuse(f"{name} is no input")
        if self.profile is None:
            raise Misuse("a shape is set before a profile is chosen")
        declared = NetworkTensor(self.surface, self.engine.inputs[name]).shape
        ranges = self.engine.profiles[self.profile].get(name, [declared] * 3)
        if len(shape) != len(declared) or not all(
            a <= n <= c for a, n, c in zip(ranges[0], shape, ranges[2], strict=True)
        ):
            return self._refuse(f"shape {shape} of {name} is not in [{ranges[0]}, {ranges[2]}]")
        if self.shapes.get(name) != shape:
            self.shapes[name] = shape
            self._changed()
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.engine.inputs:
            return self.shapes.get(name, (-1,))
        sizes = self._symbols()
        axes = self.engine.outputs[name].type.tensor_type.shape.dim
        if any(axis.dim_param and axis.dim_param not in sizes for axis in axes) and not self.infer_shapes():
            axes = self.engine.inferred(self.shapes)[name].type.tensor_type.shape.dim
        return tuple(axis.dim_value if axis.HasField("dim_value") else sizes.get(axis.dim_param, -1) for axis in axes)

    def update_device_memory_size_for_shapes(self) -> int:
        if missing := self.infer_shapes():
            raise Misuse(f"memory is asked for before the shapes of {missing} are known")
        self.sized = True
        return self._needed()

    def set_device_memory(self, ptr: int, size: int) -> None:
        if ptr % ALIGNMENT:
            raise Misuse("device memory of a context must be aligned to 256 bytes")
        if (ptr, size) != self.memory:
            self.memory = (ptr, size)
            self._changed()

    def set_tensor_address(self, name: str, ptr: int) -> bool:
        if name not in self.engine.inputs and name not in self.engine.outputs:
            return self._refuse(f"{name} is no tensor of this engine")
        if ptr % ALIGNMENT:
            raise Misuse(f"the address {ptr:#x} of {name} is not aligned to 256 bytes")
        self.addresses[name] = ptr
        return True

    def get_tensor_address(self, name: str) -> int:
        return self.addresses.get(name, 0)

    def execute_async_v3(self, handle: int) -> bool:
        stream = self.machine.stream(handle)
        if missing := [name for name in (*self.engine.inputs, *self.engine.outputs) if not self.addresses.get(name)]:
            return self._refuse(f"no address is set for {missing}")
        if missing := self.infer_shapes():
            return self._refuse(f"no shape is set for {missing}")
        if self.memory[1] < self._needed():
            raise Misuse(f"the context has {self.memory[1]} bytes of device memory and needs {self._needed()}")
        if stream.capturing is not None and not self.runs.since_change:
            raise Misuse("a run is captured before one was queued with these shapes and this memory")
        self.runs.since_change += stream.capturing is None
        run = _Run(self)
        run.check()
        stream.add(run)
        return True

    def _needed(self) -> int:
        """An invented activation size, different for every shape."""
        sizes = [prod(self.get_tensor_shape(name)) for name in self.engine.outputs if name not in self.engine.aliases]
        return 512 + 3 * sum(sizes)

    def _symbols(self) -> dict[str, int]:
        found = {}
        for name, shape in self.shapes.items():
            axes = self.engine.inputs[name].type.tensor_type.shape.dim
            found |= {axis.dim_param: n for axis, n in zip(axes, shape, strict=True) if axis.dim_param}
        return found

    def _changed(self) -> None:
        self.state += 1
        self.runs.since_change = 0

    def _refuse(self, text: str) -> bool:
        self.engine.logger.log(self.surface.severity.ERROR, text)
        return False


def _release_context(machine: Machine, engine: Engine, state: dict) -> None:
    engine.profiles_in_use.discard(state["profile"])
    machine.released.append("context")


class _Run:
    """One queued run: what was bound when it was queued."""

    def __init__(self, context: ExecutionContext) -> None:
        self.context, self.engine, self.machine = context, context.engine, context.machine
        self.state, self.memory, self.needed = context.state, context.memory, context._needed()
        self.bound = {
            name: (context.addresses[name], context.get_tensor_shape(name))
            for name in (*self.engine.inputs, *self.engine.outputs)
        }

    def check(self) -> None:
        """Every tensor lies in live device memory, and nothing overlaps but caches and their updates."""
        spans = {}
        for name, (ptr, shape) in self.bound.items():
            size = prod(shape) * ITEM_BYTES[self.engine.kind(name)]
            self.machine.check(ptr, size, "device", name)
            spans[name] = (ptr, ptr + size)
        self.machine.check(*self.memory, "device", "activations")
        spans["activations"] = (self.memory[0], self.memory[0] + self.needed)
        for output in (*self.engine.outputs, "activations"):
            for name, (start, end) in spans.items():
                overlaps = start < spans[output][1] and spans[output][0] < end
                if self.engine.aliases.get(output) == name:
                    if start != spans[output][0]:
                        raise Misuse(f"{output} must be at the address of {name}: it is updated in place")
                elif overlaps and name != output:
                    raise Misuse(f"{output} and {name} overlap")

    def check_launch(self) -> None:
        """A captured run is replayed: its context must be as it was."""
        if self.context.state != self.state:
            raise Misuse("a graph is replayed after its context got other shapes or memory")

    def __call__(self) -> None:
        self.check()
        poison(self.memory[0], self.needed)
        binding = self.engine.session.io_binding()
        for name, (ptr, shape) in self.bound.items():
            bind = binding.bind_input if name in self.engine.inputs else binding.bind_output
            bind(name, "cpu", 0, self.engine.value(name).type.tensor_type.elem_type, shape, ptr)
        self.engine.session.run_with_iobinding(binding)
