"""Behaviour of TensorRT's parser and builder: what they refuse, and a serialized engine that holds the graph itself."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from emulator.surface import Misuse, Surface

OPERATORS = Path(__file__).resolve().parents[2] / "lightkv_export" / "data" / "trt_ops.json"
MAGIC = b"EMULATED"
DTYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT64": "INT64", "INT32": "INT32", "BOOL": "BOOL"}
FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")


def release(version: str) -> tuple[int, int]:
    """Major and minor."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def known_operators(version: str) -> set[str]:
    """Operators that a TensorRT release takes: those that some release up to it introduced."""
    table = json.loads(OPERATORS.read_text())["tensorrt"]
    fitting = [entry for name, entry in table.items() if release(name) <= release(version)]
    return {operator for entry in fitting for operators in entry["ops"].values() for operator in operators.split()}


class Builder:
    def __init__(self, surface: Surface, logger: Any) -> None:
        self.surface, self.logger = surface, logger

    def create_network(self, flags: int | None) -> Any:
        kinds = self.surface.module.NetworkDefinitionCreationFlag
        if (flags or 0) >> len(kinds):
            raise Misuse(f"flags {flags:#x} that this version does not have")
        named = {member.name for member in kinds if (flags or 0) >> int(member) & 1}
        if release(self.surface.dump["version"])[0] < 11 and "STRONGLY_TYPED" not in named:
            raise Misuse("the network is not strongly typed: precisions would be the library's choice")
        return self.surface.make("INetworkDefinition", Network(self.surface, self.logger))

    def create_builder_config(self) -> Any:
        return self.surface.make("IBuilderConfig", Config(self.surface, self.logger))

    def create_optimization_profile(self) -> Any:
        return self.surface.make("IOptimizationProfile", Profile())

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        network, config = network._impl, config._impl
        if network.model is None:
            raise Misuse("a network is built that nothing was parsed into")
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            for step in range(2):
                if not monitor.step_complete("Building engine", step):
                    return None
            monitor.phase_finish("Building engine")
        problems = network.problems(config.profiles)
        for problem in problems:
            self.logger.log(self.surface.severity.ERROR, problem)
        if problems:
            return None
        head = {
            "version": self.surface.dump["version"],
            "capability": self.surface.machine.capability,
            "profiles": config.profiles or [{}],
        }
        text, body = json.dumps(head).encode(), network.whole_model()
        return self.surface.make("IHostMemory", None, MAGIC + struct.pack("<I", len(text)) + text + body)


class HostMemory:
    """Serialized data: a bytes object, so that it has the buffer protocol."""

    BASE = bytes


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, least: Any, likely: Any, most: Any) -> None:
        self.shapes[name] = [list(least), list(likely), list(most)]


class TimingCache:
    def __init__(self, surface: Surface, stored: bytes) -> None:
        self.surface, self.stored = surface, stored

    def serialize(self) -> Any:
        return self.surface.make("IHostMemory", None, self.stored)


class Config:
    def __init__(self, surface: Surface, logger: Any) -> None:
        self.surface, self.logger = surface, logger
        self.profiles: list[dict] = []
        self.progress_monitor = None
        self.cache: Any = None

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def set_flag(self, flag: Any) -> None:
        """Accepted; the emulator has nothing to tune."""

    def clear_flag(self, flag: Any) -> None:
        """Accepted."""

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        if size < 0:
            raise Misuse("a negative memory limit")

    def add_optimization_profile(self, profile: Any) -> int:
        for least, likely, most in profile._impl.shapes.values():
            if not all(a <= b <= c for a, b, c in zip(least, likely, most, strict=True)):
                return -1
        self.profiles.append(profile._impl.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, stored: Any) -> Any:
        return self.surface.make("ITimingCache", TimingCache(self.surface, bytes(stored)))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        version = self.surface.dump["version"].encode()
        if cache._impl.stored not in (b"", version) and not ignore_mismatch:
            return False
        cache._impl.stored = version
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


class NetworkTensor:
    def __init__(self, surface: Surface, value: onnx.ValueInfoProto) -> None:
        kind = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        self.name, self.is_shape_tensor = value.name, False
        self.dtype = surface.module.DataType[DTYPES[kind]]
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


class Network:
    def __init__(self, surface: Surface, logger: Any) -> None:
        self.surface, self.logger = surface, logger
        self.model: onnx.ModelProto | None = None
        self.directory = Path()

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> Any:
        return self.surface.make("ITensor", NetworkTensor(self.surface, self.model.graph.input[index]))

    def problems(self, profiles: list[dict]) -> list[str]:
        """What a builder says of dynamic inputs without a range, and of ranges that contradict the graph."""
        found = []
        for index in range(self.num_inputs):
            tensor = self.get_input(index)
            shape = tensor.shape
            if -1 in shape and not profiles:
                found.append(
                    f"Network has dynamic inputs ({tensor.name}), but no optimization profile has been defined"
                )
            for profile in profiles if -1 in shape else ():
                ranges = profile.get(tensor.name)
                if ranges is None:
                    found.append(f"{tensor.name} has no range in a profile")
                elif any(
                    len(r) != len(shape) or any(d not in (-1, n) for d, n in zip(shape, r, strict=True)) for r in ranges
                ):
                    found.append(f"the range of {tensor.name} contradicts its shape {shape}")
        return found

    def whole_model(self) -> bytes:
        """The model with its weights inside: an engine needs no other file."""
        whole = onnx.ModelProto()
        whole.CopyFrom(self.model)
        for tensor in whole.graph.initializer:
            if uses_external_data(tensor):
                info = ExternalDataInfo(tensor)
                raw = np.fromfile(self.directory / info.location, np.uint8, info.length, offset=info.offset or 0)
                tensor.raw_data = raw.tobytes()
                tensor.ClearField("external_data")
                tensor.data_location = onnx.TensorProto.DEFAULT
        return whole.SerializeToString()


class ParserError:
    def __init__(self, node: onnx.NodeProto | None, index: int, text: str) -> None:
        self._node, self._index, self._text = node, index, text

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return "" if self._node is None else self._node.name

    def node_operator(self) -> str:
        return "" if self._node is None else self._node.op_type

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, surface: Surface, network: Any, logger: Any) -> None:
        self.surface, self.network = surface, network._impl
        self.errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Any:
        return self.surface.make("ParserError", self.errors[index])

    def parse(self, model: Any, path: str | None) -> bool:
        proto = onnx.load_model(io.BytesIO(bytes(model)), load_external_data=False)
        directory = Path(path).parent if path else Path()
        self._check_weights(proto, directory)
        self._check_nodes(proto)
        if not self.errors:
            try:  # operands of different types are an error in a strongly typed network
                onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
            except Exception as error:  # noqa: BLE001 - onnx raises several classes
                self.errors.append(ParserError(None, -1, str(error)))
        if not self.errors:
            self.network.model, self.network.directory = proto, directory
        return not self.errors

    def _check_weights(self, proto: onnx.ModelProto, directory: Path) -> None:
        for tensor in proto.graph.initializer:
            if uses_external_data(tensor):
                location = Path(ExternalDataInfo(tensor).location)
                file = directory / location
                if location.is_absolute() or ".." in location.parts or file.is_symlink() or not file.is_file():
                    self.errors.append(ParserError(None, -1, f"Failed to open file: {location}"))
                    return

    def _check_nodes(self, proto: onnx.ModelProto) -> None:
        known = known_operators(self.surface.dump["version"])
        shapes = {value.name: NetworkTensor(self.surface, value).shape for value in proto.graph.input}
        for index, node in enumerate(proto.graph.node):
            if node.domain not in ("", "ai.onnx") or node.op_type not in known:
                text = f"No importer registered for op: {node.op_type}"
                self.errors.append(ParserError(node, index, text))
            elif node.op_type == "TensorScatter" and shapes.get(node.input[0], (-1,))[-2:-1] == (-1,):
                text = "The KV cache tensor must be a network input with a static sequence length dimension"
                self.errors.append(ParserError(node, index, text))
