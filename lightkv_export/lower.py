"""Lowering: exported programs -> ONNX graphs that ONNX Runtime and TensorRT both take. Standard operators only.

A lowering is an opset, a cache protocol and a list of fusions. "portable" stays with primitive operators (TensorRT 10.0
to 10.13, so JetPack 6); "modern" uses TensorScatter, Attention, RMSNormalization and RotaryEmbedding (TensorRT 10.15,
ONNX Runtime 1.28).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_ruleset

from lightkv_export.errors import LightKVError
from lightkv_export.trace import TORCH_DTYPES, Traced, quiet
from lightkv_export.weights import TensorRef

IR_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
}
IR_FROM_NAME = {name: IR_DTYPES[dtype] for name, dtype in TORCH_DTYPES.items()}
IR_VERSION = 10  # the newest that TensorRT 10.3's parser reads without complaint


class RotaryFusion(pattern.RewriteRuleClassBase):
    """x * cos + rotate_half(x) * sin -> RotaryEmbedding (opset 23), as transformers' decoders write it.

    cos and sin [B, S, d] come from `cat(freqs, freqs)`, so their first halves say everything.
    """

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)  # query and key share cos and sin; unused nodes go with the cleanup

    def pattern(self, op, x, cos, sin, start1, end1, start2, end2):  # noqa: PLR0913, PLR0917 (a variable each)
        first, second = op.Slice(x, start1, end1, [3], [1]), op.Slice(x, start2, end2, [3], [1])
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return x * op.Unsqueeze(cos, [1]) + rotated * op.Unsqueeze(sin, [1])

    def check(self, _context, x, cos, sin, start2, **_):
        result = pattern.MatchResult()
        half = start2.const_value
        if x.shape is None or len(x.shape) != 4 or half is None or 2 * int(half.numpy().item()) != x.shape[3]:
            return result.fail("not a rotation by halves", x)
        if not (_has_equal_halves(cos) and _has_equal_halves(sin)):
            return result.fail("cos or sin is not cat(freqs, freqs)", cos)
        return result

    def rewrite(self, op, x, cos, sin, start2, **_):
        half = int(start2.const_value.numpy().item())
        begin, end, last = (op.Constant(value_ints=[n]) for n in (0, half, 2))
        return op.RotaryEmbedding(x, op.Slice(cos, begin, end, last), op.Slice(sin, begin, end, last))


def _has_equal_halves(value: ir.Value) -> bool:
    """Whether an elementwise chain leads back to Concat(a, a)."""
    node = value.producer()
    while node is not None and node.op_type in ("Cos", "Sin", "Cast", "Mul"):
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]


MODERN_RULES = [*rms_normalization_ruleset.rules, RotaryFusion.rule()]


@dataclass(frozen=True)
class Lowering:
    """How graphs are written: opset, cache protocol (see segment.py) and operator fusions."""

    name: str
    opset: int
    cache_protocol: str
    rules: tuple


LOWERINGS = {
    "portable": Lowering("portable", 20, "append", ()),
    "modern": Lowering("modern", 24, "scatter", tuple(MODERN_RULES)),
}


CLEANUP = (
    common.IdentityEliminationPass,
    common.CommonSubexpressionEliminationPass,
    common.RemoveUnusedNodesPass,
    common.LiftConstantsToInitializersPass,
    common.RemoveUnusedOpsetsPass,
    common.TopologicalSortPass,
    common.ClearMetadataAndDocStringPass,
)


def lower(traced: Traced, lowering: Lowering) -> ir.Model:
    """One traced graph as an ONNX model whose weights are still fake; contract names on inputs and outputs."""
    with quiet(), torch.no_grad():
        exported = torch.onnx.export(
            traced.program, dynamo=True, optimize=False, opset_version=lowering.opset, verbose=False
        )
    model = exported.model
    common.RemoveUnusedNodesPass()(model)

    def touches_weights(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in traced.weights for value in node.inputs) else None

    fold_constants(model, onnx_shape_inference=False, should_fold=touches_weights)
    if lowering.rules:
        rewrite(model, pattern_rewrite_rules=list(lowering.rules))
    for cleanup in CLEANUP:
        cleanup()(model)
    _name_interface(model, traced)
    model.ir_version = IR_VERSION
    model.graph.name = traced.name
    return model


def _name_interface(model: ir.Model, traced: Traced) -> None:
    """Gives inputs, outputs and dynamic axes the names of the contract; another number of them is a defect of ours."""
    axes: dict[str, str] = {}
    for values, specs in ((model.graph.inputs, traced.inputs), (model.graph.outputs, traced.outputs)):
        if len(values) != len(specs):
            names = [value.name for value in values]
            raise LightKVError(f"{traced.name}: traced {names}", expected=f"{[spec.name for spec in specs]}")
        for value, spec in zip(values, specs, strict=True):
            for found, wanted in zip(value.shape or (), spec.shape, strict=False):
                if isinstance(wanted, str) and isinstance(found, ir.SymbolicDim):
                    axes.setdefault(str(found.value), wanted)
            value.name, value.shape, value.dtype = spec.name, ir.Shape(spec.shape), IR_FROM_NAME[spec.dtype]
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape(
                    [
                        axes.get(str(dim.value), dim.value) if isinstance(dim, ir.SymbolicDim) else dim
                        for dim in value.shape
                    ]
                )


def attach_weights(model: ir.Model, traced: Traced, placed: Mapping[str, TensorRef], directory: Path) -> None:
    """Points every weight at its bytes: `placed` by the model's names, `directory` is where the graph will lie."""
    for name, initializer in model.graph.initializers.items():
        if name not in traced.weights:
            continue
        ref = placed[traced.weights[name]]
        initializer.const_value = ir.ExternalTensor(
            location=ref.file.relative_to(directory).as_posix(),
            offset=ref.offset,
            length=ref.length,
            dtype=IR_DTYPES[ref.dtype],
            shape=ir.Shape(ref.shape),
            name=name,
            base_dir=directory,
        )


def used_weights(model: ir.Model, traced: Traced) -> list[str]:
    """The model's names of the weights that the lowered graph still reads, in graph order."""
    return [traced.weights[name] for name in model.graph.initializers if name in traced.weights]


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes the graph; weights stay outside, in the files that `attach_weights` named."""
    ir.save(model, path)
