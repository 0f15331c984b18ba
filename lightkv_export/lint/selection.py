"""Rules about choosing: TopK, OneHot, and operators whose output shape depends on the data."""

from __future__ import annotations

from collections.abc import Iterator

from lightkv_export.lint.engine import WARNING, Case, node_rule

MAX_K = 3840
LAST_AXES = 4


@node_rule("topk-limit", "TopK")
def topk_limit(case: Case) -> Iterator[str]:
    """K ends at 3840, which the builder says, or the runtime, never the parser."""
    count = case.view.constant(case.node.input(1))
    if count is not None and count.size and int(count.max()) > MAX_K:
        yield f"K is {int(count.max())}; TensorRT takes at most {MAX_K}: use more windows, or ranks by comparison"


@node_rule("topk-dynamic", "TopK", severity=WARNING)
def topk_dynamic(case: Case) -> Iterator[str]:
    """With a computed K, the limit shows at run time only."""
    if not case.is_constant(1):
        yield f"K ({case.node.input(1)}) is computed: more than {MAX_K} fails at run time only"


@node_rule("topk-axis", "TopK")
def topk_axis(case: Case) -> Iterator[str]:
    """The axis must be one of the last four."""
    shape, axis = case.shape(0), case.node.get("axis", -1)
    if shape and (axis if axis < 0 else axis - len(shape)) < -LAST_AXES:
        yield f"axis {axis} of {len(shape)} is not among the last {LAST_AXES}"


@node_rule("topk-sorted", "TopK", severity=WARNING)
def topk_sorted(case: Case) -> Iterator[str]:
    """`sorted` is not read: the output always is sorted."""
    if case.node.get("sorted", 1) != 1:
        yield "sorted=0 is not read: TensorRT's output is always sorted, ONNX Runtime's is not"


@node_rule("data-dependent-shape", "NonZero Compress Unique NonMaxSuppression")
def data_dependent_shape(case: Case) -> Iterator[str]:
    """Such shapes need an output allocator, prevent CUDA graphs, and TensorRT-RTX refuses NonZero."""
    yield f"{case.node.op}'s output shape depends on the data; use a Gather with computed indices of a fixed number"
