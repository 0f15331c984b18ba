"""Rules about operators as such: domain, operator table, types, versions, inputs that must be constant."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from lightkv_export.lint.engine import WARNING, Case, Context, first_version_with, graph_rule, node_rule
from lightkv_export.targets import parse_version

STANDARD = ("", "ai.onnx")
# Operators whose documented types are not those of input 0. OUTPUT: the type is made, not taken.
OUTPUT = -1
TYPED_INPUT = {"Where": 1, "OneHot": 2, "Constant": OUTPUT, "ConstantOfShape": OUTPUT, "EyeLike": OUTPUT}
CONTROL_FLOW = ("If", "Loop", "Scan")
HINTS = {
    ("ReduceMax", "BOOL"): "cast to int32 or float first",
    ("ReduceMin", "BOOL"): "cast to int32 or float first",
    ("Pad", "BOOL"): "cast to int32 first",
    ("CumSum", "INT64"): "cast to float first",
    ("DequantizeLinear", "UINT4"): "store signed, symmetric INT4",
    ("DequantizeLinear", "UINT8"): "store signed, symmetric INT8",
}
REDUCTIONS = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare"


@node_rule("domain", runtime=True)
def vendor_domain(case: Case) -> Iterator[str]:
    """Vendor domains: bundles hold standard operators alone."""
    domain, for_ort = case.node.domain, case.node.domain == "com.microsoft"
    if domain in STANDARD or _is_local(case) or (for_ort and case.context.version is None):
        return
    only = "ONNX Runtime alone knows it" if for_ort else "no runtime is known to have it"
    yield f"operator of domain {domain!r}: {only}; use standard operators"


@graph_rule("local-function", severity=WARNING)
def local_function(case: Case) -> Iterator[tuple[str, str]]:
    """Model-local functions: the parser inlines them, but nothing else of ours looks inside."""
    for function in case.view.model.functions:
        yield function.name, f"model-local function {function.domain}::{function.name}: inline it before the export"


@node_rule("operator")
def operator(case: Case) -> Iterator[str]:
    """Operators that the version's table lacks."""
    op, context = case.node.op, case.context
    if case.node.domain not in STANDARD or op in context.table.types or _is_local(case):
        return
    text = f"{context.label} has no {op}"
    if (since := first_version_with(op)) and context.version < parse_version(since):
        text += f" (first in {since})"
    if onnx.defs.has(op) and _is_function(onnx.defs.get_schema(op)):
        text += "; ONNX defines it as a function, and the parser does not inline such functions: export its parts"
    yield text


@node_rule("dtype")
def dtype(case: Case) -> Iterator[str]:
    """Types that the table does not list for the operator."""
    node, context = case.node, case.context
    listed = context.table.types.get(node.op)
    if listed is None or node.op in CONTROL_FLOW or node.domain not in STANDARD:
        return
    place = TYPED_INPUT.get(node.op, 0)
    values = [node.outputs[0] if place == OUTPUT else node.input(place)]
    if node.op == "Cast":
        values.append(node.outputs[0])
    for value in values:
        found = _stored_as(case.view.dtype(value), context)
        if found and found not in listed:
            hint = HINTS.get((node.op, found))
            text = f"{node.op} of {found} ({value}): {context.label} takes {', '.join(listed)}"
            yield f"{text}; {hint}" if hint else text


@graph_rule("opset", severity=WARNING)
def opset(case: Case) -> Iterator[tuple[str, str]]:
    """The parser enforces no upper bound, but what is documented ends there."""
    most = case.context.table.max_opset
    if most is not None and case.view.opset > most:
        yield "", f"opset {case.view.opset}: {case.context.label} documents opsets up to {most}"


@graph_rule("opset-too-old")
def opset_too_old(case: Case) -> Iterator[tuple[str, str]]:
    """Below the oldest opset that is parsed."""
    if case.view.opset < case.context.table.min_opset:
        yield "", f"opset {case.view.opset}: {case.context.label} takes opset {case.context.table.min_opset} or newer"


@node_rule("reduce-axes-input", REDUCTIONS, until=(10, 0))
def reduce_axes_input(case: Case) -> Iterator[str]:
    """Since opset 18 the axes are an input; TensorRT 8 knows opset 17, where they are an attribute."""
    if case.node.input(1):
        yield f"axes as an input (opset 18): {case.context.label} documents opset 17 and reads the attribute"


@node_rule("constant-input")
def constant_input(case: Case) -> Iterator[str]:
    """Inputs that must be known when the engine is built."""
    for index in case.context.table.constant_inputs.get(case.node.op, ()):
        if (value := case.node.input(index)) and not case.is_constant(index):
            yield f"input {index} ({value}) is computed; {case.context.label} needs an initializer there"


@node_rule("extra-output", "LayerNormalization MaxPool")
def extra_output(case: Case) -> Iterator[str]:
    """Second outputs that are not supported."""
    if any(case.node.outputs[1:]):
        yield f"outputs {', '.join(case.node.outputs[1:])}: only the first output of {case.node.op} is supported"


@graph_rule("int64-input", severity=WARNING, until=(9, 0))
def int64_input(case: Case) -> Iterator[tuple[str, str]]:
    """INT64 inputs are native from 9.0."""
    for name in case.view.inputs:
        if case.view.dtype(name) == "INT64":
            yield name, f"input {name} is INT64: {case.context.label} makes it INT32, and so must whoever binds it"


def _stored_as(name: str, context: Context) -> str:
    """TensorRT 8 turns INT64 into INT32 while parsing."""
    return "INT32" if name == "INT64" and context.version < (9, 0) else name


def _is_local(case: Case) -> bool:
    """Whether the node calls a function of the model itself."""
    return any((item.domain, item.name) == (case.node.domain, case.node.op) for item in case.view.model.functions)


def _is_function(schema: onnx.defs.OpSchema) -> bool:
    return schema.has_function or schema.has_context_dependent_function
