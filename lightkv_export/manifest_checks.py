"""Contradictions inside a manifest, found before anything is run. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator

from lightkv_export.errors import BundleError
from lightkv_export.manifest import (
    FLOAT_DTYPES,
    MANIFEST_NAME,
    PROTOCOLS,
    ROLES,
    ROPES,
    TENSOR_DTYPES,
    KeepPlan,
    Manifest,
    Size,
    check_path,
    deepstack_name,
)


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself.

    Raises:
        BundleError: names the contradiction.
    """
    for problem in _problems(manifest):
        raise BundleError(f"{MANIFEST_NAME}: {problem}", fix="export the bundle again")


def _problems(m: Manifest) -> Iterator[str]:
    """Every contradiction, in words. A later check may rely on what an earlier one found to be right."""
    for name in m.files:
        check_path(name)
    if m.dtype not in FLOAT_DTYPES:
        yield f"dtype {m.dtype!r} is not one of {', '.join(FLOAT_DTYPES)}"
    if PROTOCOLS.get(m.lowering) != m.cache_protocol:
        yield f"lowering {m.lowering!r} with cache protocol {m.cache_protocol!r}; known pairs: {PROTOCOLS}"
    if m.rope not in ROPES:
        yield f"rope {m.rope!r} is not one of {', '.join(ROPES)}"
    if m.rope == "mrope" and m.positions != "original":
        yield f"rope 'mrope' with the position policy {m.positions!r}, which only 'original' serves"
    yield from _size_problems(m)
    yield from _keep_problems(m)
    yield from _graph_problems(m)
    yield from _deepstack_problems(m)
    files = [graph.file for graph in m.graphs] + [size.tables for size in m.sizes if size.tables]
    for file in (*files, m.embedding.file):
        if m.files and file not in m.files:
            yield f"{check_path(file)!r} is used but not listed in files"


def _size_problems(m: Manifest) -> Iterator[str]:
    if not m.sizes:
        yield "there is no image size"
    if len({size.name for size in m.sizes}) != len(m.sizes):
        yield "two image sizes are the same"
    for size in m.sizes:
        if min(size.width, size.height, size.tokens, size.units) < 1:
            yield f"size {size.name} has {size.units} units of {size.tokens} vision tokens"
        if not size.prompt:
            yield f"size {size.name} has an empty prompt"
        yield from _position_problems(m.rope, size)


def _position_problems(rope: str, size: Size) -> Iterator[str]:
    if rope == "mrope" and (size.tables is None or size.advance is None):
        yield f"size {size.name} lacks the tables or the advance that mRoPE positions need"
    if rope == "mrope" and size.units != 1:
        yield f"size {size.name} has {size.units} units; mRoPE positions are known for one"
    if rope == "1d" and size.advance is not None:
        yield f"size {size.name} has an advance, which only mRoPE positions have"


def _keep_problems(m: Manifest) -> Iterator[str]:
    for keep in m.keeps:
        planned = [plan.tokens for plan in keep.plans]
        if not planned or planned[0] != m.sizes[0].tokens:
            yield f"keep {keep.requested:g} does not begin with a plan for the default size"
        if len(set(planned)) != len(planned):
            yield f"keep {keep.requested:g} has two plans for units of one length"
        for size in m.sizes:
            if size.tokens not in planned:
                yield f"keep {keep.requested:g} has no plan for {size.tokens} vision tokens (size {size.name})"
        for plan in keep.plans:
            yield from _plan_problems(m, plan)
    if len({len(plan.vision_tokens_per_layer) for keep in m.keeps for plan in keep.plans}) != 1:
        yield "the keeps disagree about the number of layers"
    if not any(all(plan.keep == 1.0 and not plan.stages for plan in keep.plans) for keep in m.keeps):
        yield "keep 1.0 (the uncompressed model) is missing"
    if not any(m.default_keep in (keep.requested, keep.keep) for keep in m.keeps):
        yield f"default_keep {m.default_keep} is not among the keeps"


def _plan_problems(m: Manifest, plan: KeepPlan) -> Iterator[str]:
    names, left = {graph.name for graph in m.graphs}, plan.tokens
    for stage in plan.stages:
        if stage.graph not in names:
            yield f"a stage after layer {stage.layer} uses graph {stage.graph!r}, which does not exist"
        if stage.tokens_in != left:
            yield f"a stage after layer {stage.layer} takes {stage.tokens_in} vision tokens, where {left} are left"
        left = stage.tokens_out


def _graph_problems(m: Manifest) -> Iterator[str]:
    num_layers = {len(plan.vision_tokens_per_layer) for keep in m.keeps for plan in keep.plans}
    if len({graph.name for graph in m.graphs}) != len(m.graphs):
        yield "two graphs have the same name"
    end = 0
    for graph in m.graphs:
        if graph.role not in ROLES:
            yield f"graph {graph.name!r} has role {graph.role!r}, not one of {', '.join(ROLES)}"
        for tensor in graph.inputs + graph.outputs:
            if tensor.dtype not in TENSOR_DTYPES:
                yield f"graph {graph.name!r}: {tensor.name!r} has unknown dtype {tensor.dtype!r}"
        if graph.role == "segment":
            if graph.layers is None or graph.layers[0] != end:
                yield f"segment {graph.name!r} has layers {graph.layers}, expected them to start at {end}"
                return
            end = graph.layers[1]
    if {end} != num_layers:
        yield f"the segments end at layer {end}, the keeps have {num_layers} layers"


def _deepstack_problems(m: Manifest) -> Iterator[str]:
    """DeepStack features enter every vision token, so nothing may be merged before the last of them is added."""
    for layer in m.deepstack_layers:
        name = deepstack_name(layer)
        takes = any(
            tensor.name == name
            for graph in m.graphs
            if graph.layers and layer in range(*graph.layers)
            for tensor in graph.inputs
        )
        gives = any(tensor.name == name for graph in m.graphs if graph.role == "vision" for tensor in graph.outputs)
        if not (takes and gives):
            yield f"no vision graph gives {name!r}, or no segment with layer {layer} takes it"
    last = max(m.deepstack_layers, default=-1)
    for stage in (stage for keep in m.keeps for plan in keep.plans for stage in plan.stages):
        if stage.layer < last:
            yield f"a stage after layer {stage.layer} stands before the DeepStack features of layer {last}"
