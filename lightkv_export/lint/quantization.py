"""Rules about quantized weights: the form that every TensorRT takes and ONNX Runtime fuses, and what boards lack."""

from __future__ import annotations

from collections.abc import Iterator

from lightkv_export.lint.engine import WARNING, Case, graph_rule, node_rule

BLOCKS = (32, 64, 128)
NARROW = {"FP8": "fp8", "FP4": "nvfp4", "INT4": "int4", "BF16": "bf16"}  # types that a target may lack


@node_rule("zero-point", "DequantizeLinear QuantizeLinear")
def zero_point(case: Case) -> Iterator[str]:
    """Symmetric only: a zero point must be zero."""
    name = case.node.input(2)
    if not name:
        return
    if name not in case.view.constants:
        yield f"the zero point {name} is computed; quantize symmetrically"
    elif (value := case.view.constant(name)) is None:
        yield f"the zero point {name} lies in external data, so it cannot be checked; leave it out"
    elif value.astype("float32").any():
        yield "the zero point is not zero; quantize symmetrically"


@node_rule("quantize-uint8", "QuantizeLinear")
def quantize_uint8(case: Case) -> Iterator[str]:
    """Unsigned activations are rejected."""
    if "UINT8" in (case.dtype(2), case.view.dtype(case.node.outputs[0])):
        yield "UINT8 activations are rejected; use INT8"


@node_rule("int4-block", "DequantizeLinear", since=(10, 0))
def int4_block(case: Case) -> Iterator[str]:
    """INT4: blocks of 32, 64 or 128 along axis 0 or 1; up to 10.3 a constant 2-D weight."""
    if case.dtype(0) != "INT4":
        return
    block, axis = case.node.get("block_size", 0), case.node.get("axis", 1)
    if block not in BLOCKS:
        yield f"block size {block}: TensorRT takes {', '.join(map(str, BLOCKS))}"
    if axis not in (0, 1):
        yield f"axis {axis}: TensorRT takes 0, or 1 with a Transpose behind it"
    if case.context.version <= (10, 3):
        rank = len(case.view.shapes.get(case.node.input(0), (0, 0)))
        if rank != 2 or not case.is_constant(0):
            yield f"{case.context.label} takes INT4 as a 2-D constant weight only, found {rank} dimensions"
        if not case.is_constant(1):
            yield f"the scales {case.node.input(1)} are computed; {case.context.label} needs constants"


@node_rule("int4-axis", "DequantizeLinear", severity=WARNING, runtime=True)
def int4_axis(case: Case) -> Iterator[str]:
    """ONNX Runtime fuses axis 0 of a K x N weight to MatMulNBits; axis 1 with a Transpose stays slow."""
    if case.dtype(0) == "INT4" and case.node.get("axis", 1) != 0:
        yield "INT4 along axis 1 is not fused by ONNX Runtime; store K x N and quantize along axis 0"


@graph_rule("target-precision")
def target_precision(case: Case) -> Iterator[tuple[str, str]]:
    """Types that the device lacks, e.g. fp8 and fp4 on Orin."""
    if case.context.target is None:
        return
    for kind, precision in NARROW.items():
        if case.context.target.has(precision):
            continue
        if value := next((name for name, found in case.view.dtypes.items() if found == kind), ""):
            yield (
                value,
                f"{value} is {kind}: {case.context.target.device.title} with {case.context.label} has no {precision}",
            )
