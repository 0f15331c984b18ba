"""A graph as the rules see it: names, types, shapes and constants, without a single weight. Types are named as TensorRT
names them (FP16, INT64, BOOL, ...)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DTYPES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.DOUBLE: "FP64",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.FLOAT4E2M1: "FP4",
    TensorProto.INT4: "INT4",
    TensorProto.UINT4: "UINT4",
}
Dim = int | str | None  # a number, a symbol, or unknown


def dtype_name(code: int) -> str:
    """TensorRT's name of an ONNX element type; ONNX's where TensorRT has none. 0: ""."""
    return DTYPES.get(code, TensorProto.DataType.Name(code) if code else "")


@dataclass(frozen=True)
class Node:
    """A node, also of a subgraph or a model-local function. An input that is left out is ""."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def input(self, index: int) -> str:
        """Name of an input, "" if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def get(self, attribute: str, default: Any = None) -> Any:
        """Value of an attribute (text as bytes), `default` if it is not set."""
        return self.attributes.get(attribute, default)


@dataclass
class View:
    """One ONNX graph.

    Attributes:
        path: the file, or None for a model made in memory.
        dtypes, shapes: of every value that is known; a shape's dimension is a number, a symbol or None.
        constants: initializers and outputs of Constant nodes; the array where it is small and inside the file.
        inputs, outputs: of the graph; initializers are no inputs.
    """

    name: str
    model: onnx.ModelProto
    path: Path | None = None
    nodes: list[Node] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    constants: dict[str, np.ndarray | None] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def opset(self) -> int:
        """Of the standard domain; 0 if the model does not import it."""
        return next((item.version for item in self.model.opset_import if item.domain in ("", "ai.onnx")), 0)

    def dtype(self, value: str) -> str:
        """Type of a value, "" if it is unknown or left out."""
        return self.dtypes.get(value, "")

    def constant(self, value: str) -> np.ndarray | None:
        """The number behind a name, if it is constant and was read."""
        return self.constants.get(value)


def open_view(path: Path, name: str = "", fixed_axes: Mapping[str, int] | None = None) -> View:
    """Read the structure of an ONNX file; external data stays where it is.

    Args:
        name: of the graph in findings; default: the file's.
        fixed_axes: numbers for symbolic dimensions, as the builder fixes them before it parses.

    Raises:
        onnx's or protobuf's DecodeError: not an ONNX file.
    """
    return view_of(onnx.load(path, load_external_data=False), name or path.stem, path, fixed_axes)


def view_of(
    model: onnx.ModelProto, name: str, path: Path | None = None, fixed_axes: Mapping[str, int] | None = None
) -> View:
    """A model as a view; shapes and types are inferred from it. `model` is changed where `fixed_axes` says so."""
    fix_axes(model, fixed_axes or {})
    inferred = onnx.shape_inference.infer_shapes(model)
    view = View(name, model, path)
    graph = inferred.graph
    stored = {item.name for item in graph.initializer}
    view.inputs = tuple(item.name for item in graph.input if item.name not in stored)
    view.outputs = tuple(item.name for item in graph.output)
    _add_graph(view, graph)
    for function in model.functions:
        view.nodes += [_node(item) for item in function.node]
    return view


def fix_axes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Write numbers in place of symbolic dimensions, everywhere in the model."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info) if sizes else ():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _add_graph(view: View, graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        view.dtypes[value.name] = dtype_name(kind.elem_type)
        if kind.HasField("shape"):
            view.shapes[value.name] = tuple(_dims(kind.shape))
    for tensor in graph.initializer:
        _add_constant(view, tensor.name, tensor)
    for proto in graph.node:
        node = _node(proto)
        view.nodes.append(node)
        if node.op == "Constant" and node.outputs:
            _add_constant_node(view, node)
        for attribute in proto.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _add_graph(view, inner)


def _node(proto: onnx.NodeProto) -> Node:
    attributes = {
        item.name: None if item.ref_attr_name else helper.get_attribute_value(item) for item in proto.attribute
    }
    name = proto.name or next((output for output in proto.output if output), proto.op_type)
    return Node(name, proto.op_type, proto.domain, tuple(proto.input), tuple(proto.output), attributes)


def _add_constant(view: View, name: str, tensor: TensorProto) -> None:
    view.dtypes[name] = dtype_name(tensor.data_type)
    view.shapes[name] = tuple(tensor.dims)
    inside = tensor.data_location != TensorProto.EXTERNAL
    view.constants[name] = numpy_helper.to_array(tensor) if inside else None


def _add_constant_node(view: View, node: Node) -> None:
    value = next(iter(node.attributes.values()), None)
    if isinstance(value, TensorProto):
        _add_constant(view, node.outputs[0], value)
    else:
        view.constants[node.outputs[0]] = None if value is None else np.asarray(value)


def _dims(shape: onnx.TensorShapeProto) -> Iterator[Dim]:
    for dim in shape.dim:
        yield dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
