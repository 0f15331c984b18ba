"""Rules about scattering: TensorScatter as the cache update, and the reductions of ScatterND and ScatterElements."""

from __future__ import annotations

from collections.abc import Iterator

from lightkv_export.lint.engine import WARNING, Case, node_rule
from lightkv_export.lint.view import Node

CACHE_TYPES = ("FP16", "BF16", "FP32")
CACHE_RANK = 4


@node_rule("tensor-scatter", "TensorScatter")
def tensor_scatter(case: Case) -> Iterator[str]:
    """In-place update of a cache: from a graph input to a graph output at the same address, of fixed capacity."""
    cache, shape = case.node.input(0), case.shape(0)
    if cache not in case.view.inputs:
        yield f"the cache {cache} is no graph input; TensorRT updates caches in place, from an input to an output"
    if case.node.outputs[0] not in case.view.outputs:
        yield f"the updated cache {case.node.outputs[0]} is no graph output"
    if shape and len(shape) != CACHE_RANK:
        yield f"the cache has {len(shape)} dimensions, not {CACHE_RANK}"
    elif shape and not isinstance(shape[-2], int):
        yield f"the cache's capacity is {shape[-2] or 'unknown'}, not a number: export or build with a fixed capacity"
    if case.node.get("axis", -2) not in (-2, CACHE_RANK - 2):
        yield f"axis is {case.node.attributes['axis']}, not -2"
    if case.node.get("mode", b"linear") != b"linear":
        yield f"mode is {case.node.attributes['mode'].decode()}, not linear"
    if (found := case.view.dtype(cache)) and found not in CACHE_TYPES:
        yield f"the cache is {found}: {', '.join(CACHE_TYPES)} are taken"


@node_rule("tensor-scatter-length", "TensorScatter", severity=WARNING)
def scatter_length(case: Case) -> Iterator[str]:
    """Writes beyond the capacity are dropped without a word; a fixed update that is too long always is."""
    rows, new = ((*case.shape(index), None, None, None)[CACHE_RANK - 2] for index in (0, 1))
    if isinstance(rows, int) and isinstance(new, int) and new > rows:
        yield f"{new} new rows for a capacity of {rows}: the rest is silently dropped"


@node_rule("scatternd-reduction", "ScatterND")
def scatter_nd(case: Case) -> Iterator[str]:
    """Any `reduction` is rejected before 10.9, "none" included; later, others than "none"; up to 8.6 it is ignored."""
    reduction = case.node.get("reduction")
    if reduction is None:
        return
    word = reduction.decode()
    if case.context.version < (9, 0):
        if word != "none":
            yield f"reduction {word!r} is silently ignored by {case.context.label}: wrong where indices repeat"
    elif case.context.version < (10, 9):
        yield f'reduction {word!r}: {case.context.label} rejects the attribute, even "none"; leave it out'
    elif word != "none":
        yield f"reduction {word!r} is rejected; merge by a matrix product with a 0/1 matrix"


@node_rule("scatterelements-ignored", "ScatterElements", until=(10, 0))
def scatter_elements_ignored(case: Case) -> Iterator[str]:
    """Up to 8.6 the reduction is ignored."""
    if (word := _reduction(case.node)) != "none":
        yield f"reduction {word!r} is silently ignored by {case.context.label}: wrong where indices repeat"


@node_rule("scatterelements-plugin", "ScatterElements", severity=WARNING, since=(10, 0))
def scatter_elements_plugin(case: Case) -> Iterator[str]:
    """From 10.0 it becomes a plugin with atomics; TensorRT-RTX has none and refuses."""
    if (word := _reduction(case.node)) != "none":
        yield f"reduction {word!r} becomes a plugin: order not deterministic, and TensorRT-RTX refuses it"


@node_rule("scatterelements-fp16", "ScatterElements", runtime=True)
def scatter_fp16_on_cpu(case: Case) -> Iterator[str]:
    """ONNX Runtime's CPU has no FP16 kernel for ScatterElements with a reduction."""
    if case.context.version is None and _reduction(case.node) != "none" and case.dtype(0) == "FP16":
        yield "FP16 with a reduction: ONNX Runtime has no CPU kernel"


def _reduction(node: Node) -> str:
    return node.get("reduction", b"none").decode()
