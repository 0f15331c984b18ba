"""Tracing: vision side, segments and stages as exported programs with fixed names, on fake tensors."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightkv_export.families.base import Family
from lightkv_export.manifest import Tensor as Spec
from lightkv_export.recipe import TextShape
from lightkv_export.schedule import Stage
from lightkv_export.segment import Segment
from lightkv_export.skeleton import Skeleton
from lightkv_export.stages.lightkv import StageGraph

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int64: "int64"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_LENGTH = 1 << 20  # upper bound of every dynamic axis; the real limits are the bundle's
EXAMPLE_SIZES = {
    "N": 2,
    "S": 61,
    "C": 96,
    "T": 37,
    "I": 2,
    "R": 53,
}  # pairwise different, so that no two axes are taken for one


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


def _example(spec: Spec) -> Tensor:
    return torch.zeros([EXAMPLE_SIZES.get(n, n) for n in spec.shape], dtype=TORCH_DTYPES[spec.dtype])


def _export(module: nn.Module, inputs: Sequence[Spec], nested: slice | None = None) -> ExportedProgram:
    """Exports `module` for `inputs`, every named axis dynamic; the inputs in `nested` go in as one list.

    The axes start at 2 because torch reasons about strides there and ONNX has no such bound: the graphs run at 1 too.
    """
    dims = {name: Dim(name, min=2, max=MAX_LENGTH) for spec in inputs for name in spec.shape if isinstance(name, str)}
    axes = [{axis: dims[n] for axis, n in enumerate(spec.shape) if n in dims} for spec in inputs]
    args = [_example(spec) for spec in inputs]
    if nested is not None:
        args, axes = ([*x[: nested.start], list(x[nested]), *x[nested.stop :]] for x in (args, axes))
    with quiet(), torch.no_grad():
        return torch.export.export(module.eval(), tuple(args), dynamic_shapes=tuple(axes), strict=False)


class _Vision(nn.Module):
    def __init__(self, family: Family, model: nn.Module) -> None:
        super().__init__()
        self.family, self.whole = family, model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.family.image_features(self.whole, pixel_values)


def trace_vision(skeleton: Skeleton, image_size: int, tokens: int) -> Traced:
    """`pixel_values` [N, 3, H, W] -> `image_features` [N, v, D]."""
    module, dtype = _Vision(skeleton.family, skeleton.model), DTYPE_NAMES[skeleton.dtype]
    inputs = (Spec("pixel_values", dtype, ("N", 3, image_size, image_size)),)
    outputs = (Spec("image_features", dtype, ("N", tokens, skeleton.text.config.hidden_size)),)
    with skeleton.fake:
        program = _export(module, inputs)
    return Traced("vision", "vision", program, inputs, outputs, skeleton.weights_of(module))


def trace_segment(
    skeleton: Skeleton, index: int, layers: tuple[int, int], protocol: str, *, emit_query: bool
) -> Traced:
    """Layers [first, last) as graph `segment_{index}`; the last segment carries the final norm and the head.

    Its inputs and outputs are those of `segment_specs`.
    """
    text = skeleton.text
    last = layers[1] == len(text.layers)
    module = Segment(
        text.layers[slice(*layers)],
        layers[0],
        text.rotary_emb,
        protocol,
        norm=text.norm if last else None,
        head=skeleton.family.head(skeleton.model) if last else None,
        emit_query=emit_query,
    )
    attention, config = module.layers[0].self_attn, text.config
    row = config.num_key_value_heads * attention.head_dim
    widths = (
        config.hidden_size,
        config.num_attention_heads * attention.head_dim,
        row,
        config.vocab_size if last else 0,
    )
    inputs, outputs = segment_specs(layers, widths, DTYPE_NAMES[skeleton.dtype], protocol, emit_query=emit_query)
    if skeleton.family.rope == "mrope":
        inputs = tuple(Spec(s.name, s.dtype, (3, 1, "S")) if s.name == "position_ids" else s for s in inputs)
    with skeleton.fake:
        program = _export(module, inputs, slice(3, 3 + 2 * (layers[1] - layers[0])))
    return Traced(f"segment_{index}", "segment", program, inputs, outputs, skeleton.weights_of(module), layers)


def segment_specs(
    layers: tuple[int, int], widths: tuple[int, int, int, int], dtype: str, protocol: str, *, emit_query: bool
) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    """Names, dtypes and shapes of a segment's inputs and outputs; widths = (hidden, query, key, vocabulary or 0)."""
    hidden, query, row, vocab = widths
    slots = [f"{kind}_{{}}_{layer}" for layer in range(*layers) for kind in ("key", "value")]
    caches = tuple(Spec(slot.format("cache"), dtype, (1, 1, "C", row)) for slot in slots)
    inputs = (
        Spec("hidden", dtype, (1, "S", hidden)),
        Spec("position_ids", "int64", (1, "S")),
        Spec("past_len", "int64", (1,)),
    )
    inputs += caches + ((Spec("logits_index", "int64", (1,)),) if vocab else ())
    outputs = (Spec("logits", dtype, (1, vocab)) if vocab else Spec("hidden_out", dtype, (1, "S", hidden)),)
    if emit_query:
        outputs += (Spec("query", dtype, (1, "S", query)), Spec("key", dtype, (1, "S", row)))
    if protocol == "scatter":
        outputs += tuple(Spec(f"{cache.name}_out", dtype, cache.shape) for cache in caches)
    else:
        outputs += tuple(Spec(slot.format("new"), dtype, (1, 1, "S", row)) for slot in slots)
    return inputs, outputs


def stage_name(stage: Stage) -> str:
    """Two keeps that merge alike share a graph: the name says all that its constants depend on."""
    return f"stage_v{stage.tokens_in}_w{stage.windows_per_side}_r{stage.discard_ratio:g}"


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
