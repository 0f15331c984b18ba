"""Tracing: vision side, segments and stages as exported programs with fixed names, on fake tensors."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightkv_export.export_plan import stage_name
from lightkv_export.families.base import Family
from lightkv_export.manifest import Tensor as Spec
from lightkv_export.manifest import deepstack_name
from lightkv_export.recipe import TextShape
from lightkv_export.schedule import Stage
from lightkv_export.segment import Segment
from lightkv_export.skeleton import Skeleton
from lightkv_export.stages.lightkv import StageGraph

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int64: "int64"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_LENGTH = 1 << 20  # upper bound of every dynamic axis; the real limits are the bundle's
EXAMPLE_SIZES = {"N": 2, "G": 6, "S": 61, "C": 96, "T": 37, "I": 2, "R": 53}
SPARE_SIZES = (7, 11, 13, 17, 19, 23)  # for further symbols; all differ, so that no two axes are taken for one


@dataclass(frozen=True)
class Traced:
    """A graph before lowering: `inputs` and `outputs` in order, `weights` from initializer to the model's name."""

    name: str
    role: str
    program: ExportedProgram
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    weights: Mapping[str, str]
    layers: tuple[int, int] | None = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch says of missing torchvision and of its own deprecations: nothing there concerns the user."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@dataclass(frozen=True)
class _Axis:
    """A dynamic axis as specs write it: "S" or, for a multiple of a symbol, "4*G"."""

    symbol: str
    factor: int = 1

    @classmethod
    def parse(cls, text: str) -> _Axis:
        factor, _, symbol = text.rpartition("*")
        return cls(symbol, int(factor or 1))


class _Axes:
    """The dynamic axes of one program: an example size and a torch dimension for every symbol.

    They start at 2 because torch reasons about strides there and ONNX has no such bound: the graphs run at 1 too.
    """

    def __init__(self, specs: Sequence[Spec]) -> None:
        symbols = {_Axis.parse(size).symbol: None for spec in specs for size in spec.shape if isinstance(size, str)}
        spare = iter(SPARE_SIZES)
        self.sizes = {name: EXAMPLE_SIZES.get(name) or next(spare) for name in symbols}
        self.dims = {name: Dim(name, min=2, max=MAX_LENGTH) for name in symbols}

    def example(self, spec: Spec) -> Tensor:
        shape = [axis.factor * self.sizes[axis.symbol] if axis else spec.shape[at] for at, axis in self._of(spec)]
        return torch.zeros(shape, dtype=TORCH_DTYPES[spec.dtype])

    def dynamic(self, spec: Spec) -> dict[int, Any]:
        """Axis number -> dimension, as `torch.export` takes it."""
        found = {}
        for at, axis in self._of(spec):
            if axis is not None:
                dim = self.dims[axis.symbol]
                found[at] = dim if axis.factor == 1 else axis.factor * dim
        return found

    def _of(self, spec: Spec) -> Iterator[tuple[int, _Axis | None]]:
        for at, size in enumerate(spec.shape):
            yield at, _Axis.parse(size) if isinstance(size, str) else None


def _export(module: nn.Module, inputs: Sequence[Spec], nested: Sequence[slice] = ()) -> ExportedProgram:
    """Exports `module` for `inputs`, every named axis dynamic; the inputs in each slice of `nested` are one list."""
    axes = _Axes(inputs)
    args, dynamic = [axes.example(spec) for spec in inputs], [axes.dynamic(spec) for spec in inputs]
    for part in sorted(nested, key=lambda part: -part.start):  # from the end, so that the other slices stay right
        args, dynamic = ([*x[: part.start], list(x[part]), *x[part.stop :]] for x in (args, dynamic))
    with quiet(), torch.no_grad():
        return torch.export.export(module.eval(), tuple(args), dynamic_shapes=tuple(dynamic), strict=False)


class _Vision(nn.Module):
    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family, self.whole = family, model

    def forward(self, inputs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        return self.family.image_features(self.whole, *inputs)


def trace_vision(skeleton: Skeleton) -> Traced:
    """The family's inputs -> `image_features` [..., D] and a `deepstack_{l}` like it per DeepStack layer l."""
    family, config = skeleton.family, skeleton.model.config
    module, dtype = _Vision(family, skeleton.model), DTYPE_NAMES[skeleton.dtype]
    inputs = family.vision_inputs(config, dtype)
    names = ["image_features", *(deepstack_name(layer) for layer in family.deepstack_layers(config))]
    with skeleton.fake:
        program = _export(module, inputs, [slice(0, len(inputs))])
    outputs = tuple(Spec(name, dtype, shape) for name, shape in zip(names, _shapes(program, inputs), strict=True))
    return Traced("vision", "vision", program, inputs, outputs, skeleton.weights_of(module))


def _shapes(program: ExportedProgram, inputs: Sequence[Spec]) -> list[tuple[int | str, ...]]:
    """The outputs' shapes as the trace found them: an axis is a number, an input's axis by its name, or "F{axis}"."""
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    named: dict[str, str] = {}
    for name, spec in zip(program.graph_signature.user_inputs, inputs, strict=True):
        for found, size in zip(nodes[name].shape, spec.shape, strict=True):
            named[str(found)] = str(size)
    return [
        tuple(size if isinstance(size, int) else named.get(str(size), f"F{at}") for at, size in enumerate(value.shape))
        for value in (nodes[name] for name in program.graph_signature.user_outputs)
    ]


def trace_segment(
    skeleton: Skeleton, index: int, layers: tuple[int, int], protocol: str, *, emit_query: bool
) -> Traced:
    """Layers [first, last) as graph `segment_{index}`; the last segment carries the final norm and the head.

    Its inputs and outputs are those of `segment_specs`.
    """
    text, family = skeleton.text, skeleton.family
    last = layers[1] == len(text.layers)
    deepstack = [layer for layer in family.deepstack_layers(skeleton.model.config) if layer in range(*layers)]
    module = Segment(
        text.layers[slice(*layers)],
        layers[0],
        family.rotary(skeleton.model),
        protocol,
        tail=(text.norm, family.head(skeleton.model)) if last else None,
        emit_query=emit_query,
        deepstack=deepstack,
    )
    attention, config = module.layers[0].self_attn, text.config
    row = config.num_key_value_heads * attention.head_dim
    widths = (
        config.hidden_size,
        config.num_attention_heads * attention.head_dim,
        row,
        config.vocab_size if last else 0,
    )
    inputs, outputs = segment_specs(
        layers,
        widths,
        DTYPE_NAMES[skeleton.dtype],
        protocol,
        emit_query=emit_query,
        position_axes=3 if family.rope == "mrope" else 0,
        deepstack=deepstack,
    )
    caches = 3 + 2 * (layers[1] - layers[0])
    with skeleton.fake:
        program = _export(module, inputs, [slice(3, caches), slice(caches, caches + len(deepstack))])
    return Traced(f"segment_{index}", "segment", program, inputs, outputs, skeleton.weights_of(module), layers)


def segment_specs(
    layers: tuple[int, int],
    widths: tuple[int, int, int, int],
    dtype: str,
    protocol: str,
    *,
    emit_query: bool,
    position_axes: int = 0,
    deepstack: Sequence[int] = (),
) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    """Names, dtypes and shapes of a segment's inputs and outputs.

    Args:
        layers: [first, last).
        widths: (hidden, query, key, vocabulary or 0 if it is not the last segment).
        dtype, protocol: as in the manifest.
        emit_query: whether query and key of the last layer are outputs.
        position_axes: 3 for mRoPE, else 0.
        deepstack: its layers with DeepStack features.
    """
    hidden, query, row, vocab = widths
    slots = [f"{kind}_{{}}_{layer}" for layer in range(*layers) for kind in ("key", "value")]
    caches = tuple(Spec(slot.format("cache"), dtype, (1, 1, "C", row)) for slot in slots)
    inputs = (
        Spec("hidden", dtype, (1, "S", hidden)),
        Spec("position_ids", "int64", (position_axes, 1, "S") if position_axes else (1, "S")),
        Spec("past_len", "int64", (1,)),
        *caches,
        *(Spec(deepstack_name(layer), dtype, (1, "S", hidden)) for layer in deepstack),
    )
    inputs += (Spec("logits_index", "int64", (1,)),) if vocab else ()
    outputs = (Spec("logits", dtype, (1, vocab)) if vocab else Spec("hidden_out", dtype, (1, "S", hidden)),)
    if emit_query:
        outputs += (Spec("query", dtype, (1, "S", query)), Spec("key", dtype, (1, "S", row)))
    if protocol == "scatter":
        outputs += tuple(Spec(f"{cache.name}_out", dtype, cache.shape) for cache in caches)
    else:
        outputs += tuple(Spec(slot.format("new"), dtype, (1, 1, "S", row)) for slot in slots)
    return inputs, outputs


def trace_stage(text: TextShape, stage: Stage, dtype: torch.dtype) -> Traced:
    """One LightKV stage without weights: merges `tokens_in` vision tokens of every image into `tokens_out`."""
    module = StageGraph(
        stage.tokens_in, stage.windows_per_side, stage.discard_ratio, text.heads, text.kv_heads, text.head_dim
    )
    kind = DTYPE_NAMES[dtype]
    inputs = (
        Spec("hidden", kind, (1, "S", text.hidden)),
        Spec("query", kind, (1, "S", text.heads * text.head_dim)),
        Spec("key", kind, (1, "S", text.kv_heads * text.head_dim)),
        Spec("text_index", "int64", ("T",)),
        Spec("vision_index", "int64", ("I", stage.tokens_in)),
        Spec("order", "int64", ("R",)),
    )
    outputs = (
        Spec("merged", kind, (1, "R", text.hidden)),
        Spec("kept", "int64", (1, "I", stage.tokens_out)),
        Spec("target", "int64", (1, "I", stage.tokens_in)),
    )
    return Traced(stage_name(stage), "stage", _export(module, inputs), inputs, outputs, {})
