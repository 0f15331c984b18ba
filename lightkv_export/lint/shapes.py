"""Rules about types and shapes of the whole graph: strong typing, dynamic axes, sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx

from lightkv_export.lint.engine import WARNING, Case, graph_rule, node_rule

# new tokens, cache capacity, past rows, tokens that a stage leaves alone, its units, and the rows that leave it
PROFILE_AXES = frozenset("SCPTIR")
PIXELS = "pixel_values"  # the input that makes a graph a vision graph
MAX_VOLUME = 2**31 - 1
MAX_FILE_BYTES = 2**31 - 1  # of a protobuf message


@node_rule("mixed-types", runtime=True)
def mixed_types(case: Case) -> Iterator[str]:
    """Operands that ONNX wants of one type: a strongly typed network rejects a mixture while parsing."""
    if case.node.domain not in ("", "ai.onnx") or not onnx.defs.has(case.node.op, max(case.view.opset, 1)):
        return
    schema = onnx.defs.get_schema(case.node.op, max(case.view.opset, 1))
    groups: dict[str, dict[str, str]] = {}
    for index, value in enumerate(case.node.inputs):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)] if schema.inputs else None
        if formal is None or (found := case.view.dtype(value)) == "":
            continue
        same = formal.is_homogeneous or index < len(schema.inputs) - 1
        if same and formal.type_str in {item.type_param_str for item in schema.type_constraints}:
            groups.setdefault(formal.type_str, {})[value] = found
    for group in groups.values():
        if len(set(group.values())) > 1:
            yield "operands of different types: " + ", ".join(f"{name} {kind}" for name, kind in group.items())


@graph_rule("dynamic-axis")
def dynamic_axis(case: Case) -> Iterator[tuple[str, str]]:
    """A dynamic axis of an input needs a range in an optimization profile. The builder knows the contract's axes, and
    those of a vision graph, whatever they are called: the sizes of the bundle say what it is given."""
    is_vision = PIXELS in case.view.inputs
    for name in case.view.inputs:
        if name not in case.view.shapes:
            yield name, f"input {name} has no shape"
        for place, dim in enumerate(case.view.shapes.get(name, ())):
            if not isinstance(dim, int) and dim not in PROFILE_AXES and not (dim and is_vision):
                known = ", ".join(sorted(PROFILE_AXES))
                yield name, f"input {name}: axis {place} is {dim or 'unnamed'}, and profiles exist for {known} alone"


@graph_rule("cache-capacity")
def cache_capacity(case: Case) -> Iterator[tuple[str, str]]:
    """All layers of a segment see the same tokens, so their caches have one capacity, of at least one row."""
    caches = {
        name: case.view.shapes.get(name, ())
        for name in case.view.inputs
        if name.startswith(("key_cache_", "value_cache_"))
    }
    sizes = {shape[-2] for shape in caches.values() if len(shape) > 1}
    if len(sizes) > 1:
        yield next(iter(caches)), f"caches of one segment have different capacities: {sorted(map(str, sizes))}"
    if any(isinstance(size, int) and size < 1 for size in sizes):
        yield next(iter(caches)), f"a cache capacity of {min(s for s in sizes if isinstance(s, int))} rows"


@graph_rule("tensor-volume")
def tensor_volume(case: Case) -> Iterator[tuple[str, str]]:
    """A tensor has at most 2^31 - 1 elements."""
    for name, shape in case.view.shapes.items():
        if all(isinstance(dim, int) for dim in shape) and math.prod(shape) > MAX_VOLUME:
            yield name, f"{name} has {math.prod(shape):,} elements, more than {MAX_VOLUME:,}"


@graph_rule("file-size", severity=WARNING, runtime=True)
def file_size(case: Case) -> Iterator[tuple[str, str]]:
    """A protobuf message ends at 2 GiB; weights belong into external data."""
    if case.view.path is not None and case.view.path.stat().st_size > MAX_FILE_BYTES // 2:
        yield (
            "",
            f"{case.view.path.name} is {case.view.path.stat().st_size / 2**30:.1f} GiB: keep weights in external data",
        )
