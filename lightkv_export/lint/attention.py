"""Rules about Attention (10.14 and newer): what the importer ignores, rejects, or cannot build."""

from __future__ import annotations

from collections.abc import Iterator

from lightkv_export.lint.engine import Case, node_rule

QUERY, KEY, VALUE, MASK, PAST_KEY, PAST_VALUE, KEY_LENGTHS = range(7)
MAX_HEAD_SIZE = 256
EXPLICIT = "write what is valid into a bool mask"


@node_rule("attention-nonpad", "Attention")
def nonpad(case: Case) -> Iterator[str]:
    """`nonpad_kv_seqlen` is silently ignored."""
    if case.node.input(KEY_LENGTHS):
        yield f"nonpad_kv_seqlen is silently ignored, so the results would be wrong; {EXPLICIT}"


@node_rule("attention-causal", "Attention", until=(11, 0))
def causal(case: Case) -> Iterator[str]:
    """`is_causal` aligns at the upper left: a decoding step would see the first column only."""
    if case.node.get("is_causal") and not case.node.input(MASK):
        yield f"is_causal is aligned at the upper left before TensorRT 11: wrong against a cache; {EXPLICIT}"


@node_rule("attention-mask-causal", "Attention")
def mask_and_causal(case: Case) -> Iterator[str]:
    """A mask together with `is_causal` is rejected."""
    if case.node.get("is_causal") and case.node.input(MASK):
        yield f"attn_mask together with is_causal is rejected; {EXPLICIT}"


@node_rule("attention-unsupported", "Attention")
def unsupported(case: Case) -> Iterator[str]:
    """Inputs, outputs and attributes that are rejected."""
    used = [name for index, name in ((PAST_KEY, "past_key"), (PAST_VALUE, "past_value")) if case.node.input(index)]
    names = ("present_key", "present_value", "qk_matmul_output")
    used += [name for name, value in zip(names, case.node.outputs[1:], strict=False) if value]
    used += [name for name in ("softcap", "softmax_precision", "qk_matmul_output_mode") if case.node.get(name)]
    if used:
        yield f"{', '.join(used)}: not supported; update the cache with TensorScatter and keep scores inside"


@node_rule("attention-type", "Attention")
def operand_types(case: Case) -> Iterator[str]:
    """No fused kernel for FP32, and Attention is not decomposed: the build fails. The mask is bool or as the query."""
    query, mask = case.dtype(QUERY), case.dtype(MASK)
    if query == "FP32":
        yield "FP32: no fused kernel, and the build fails; export with --dtype fp16 or bf16"
    for index, name in ((KEY, "key"), (VALUE, "value")):
        other = case.dtype(index)
        if query and other and other != query:
            yield f"{name} is {other}, the query {query}"
    if mask and query and mask not in ("BOOL", query):
        yield f"the mask is {mask}, the query {query}: the build fails; use a bool mask"


@node_rule("attention-head-size", "Attention")
def head_size(case: Case) -> Iterator[str]:
    """Fused kernels end at a head size of 256."""
    shape = case.shape(QUERY)
    size = shape[-1] if shape else None
    heads = case.node.get("q_num_heads")
    if len(shape) == 3 and isinstance(size, int) and heads:
        size //= heads
    if isinstance(size, int) and size > MAX_HEAD_SIZE:
        yield f"head size {size}: no fused kernel above {MAX_HEAD_SIZE}, and the build fails; use the portable lowering"
