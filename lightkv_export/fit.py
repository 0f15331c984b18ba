"""Fit and speed: what a plan needs on a target, whether that fits, and what the roofline promises.

Standard library only; all of it follows from shapes, so nothing is built or downloaded. Bytes by part:

* weights: every matrix once. The decoder's layers in the chosen precision; head and vision side in the plan's dtype.
  The token embedding table stays on the disk (memory-mapped on the host) and is not counted; a tied head is.
* kv: the plan's cache rows, exactly.
* activations: of the widest graph alone, because graphs run one after the other in shared memory. Within a graph: its
  inputs and outputs plus the widest layer, nothing reused inside: an upper estimate (see `_segment_activations`).
* build_peak: `BUILD_COPIES` times the weights of the largest graph, its activations, and `BUILD_FIXED`. Measured with
  TensorRT-RTX 1.7.1 without a GPU (fp16 matrices of 128 and 384 MiB): 3.0 x the weights + 77 MiB, two copies and the
  mapped file. Assumed on a device: kernel timing adds a copy, the mapped file can be dropped. 0 on a CPU, which builds
  nothing.
* total: weights + kv + activations. What the OS takes is already off the target's memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from lightkv_export import flops
from lightkv_export.recipe import ModelShape, TextShape, VisionShape
from lightkv_export.schedule import Plan
from lightkv_export.targets import Target

BUILD_COPIES = 3
BUILD_FIXED = 512 << 20
GROUP = 128  # input channels that share an int4 or int8 scale
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
SCORE_BYTES = 8  # a float32 score and its softmax
VISION_HEAD_DIM = 64  # of every encoder so far; recipes do not say
# Bytes per weight, scales included: fp16 ones per group, for nvfp4 fp8 ones per 16.
WEIGHT_BYTES = {"int8": 1 + 2 / GROUP, "int4": 0.5 + 2 / GROUP, "fp8": 1, "nvfp4": 0.5 + 1 / 16}
# Arithmetic rate relative to dense FP16, from Ampere to Blackwell: TF32, and activations in fp8 or fp4. int8 and int4
# are weight-only, computed in the dtype.
RATES = {"fp32": 0.5, "fp8": 2, "nvfp4": 4}


@dataclass(frozen=True)
class Precision:
    """How numbers are stored: `weights` of the decoder's layers is "none" (as `dtype`) or a key of WEIGHT_BYTES."""

    dtype: str = "fp16"
    weights: str = "none"

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> float:
        """Bytes per weight of a decoder layer."""
        return WEIGHT_BYTES.get(self.weights, self.element_bytes)


@dataclass(frozen=True)
class Memory:
    """Bytes by part (see the module's docstring)."""

    weights: int
    kv: int
    activations: int
    build_peak: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations

    def fits(self, available: int) -> bool:
        """Whether both running and building stay within `available` bytes."""
        return max(self.total, self.build_peak) <= available


@dataclass(frozen=True)
class Prediction:
    """Roofline: time to the first token in milliseconds, and generated tokens per second of the whole batch."""

    ttft_ms: float
    tokens_per_s: float


def check_precision(target: Target, precision: Precision) -> None:
    """Refuse what the target lacks.

    Raises:
        UserError: names the reason and what the target has.
    """
    target.check_precision(precision.dtype)
    if precision.weights != "none":
        target.check_precision(precision.weights)


def memory(plan: Plan, target: Target, precision: Precision, layers_per_segment: int | None = None) -> Memory:
    """Bytes that `plan` needs on `target`.

    Args:
        layers_per_segment: cut segments to at most so many layers; None: at the plan's stages alone.
    """
    text = plan.recipe.shape.text
    layer, head = _layer_bytes(text, precision), _head_bytes(text, precision)
    vision = _vision_weights(plan.recipe.shape) * precision.element_bytes
    segments = [count * layer for count in segment_lengths(plan, layers_per_segment)]
    segments[-1] += head
    active = _activations(plan, target, precision.element_bytes)
    return Memory(
        weights=int(sum(segments) + vision),
        kv=plan.kv_bytes,
        activations=active,
        build_peak=int(BUILD_COPIES * max(vision, *segments)) + active + BUILD_FIXED if target.tensorrt else 0,
    )


def predict(plan: Plan, target: Target, precision: Precision) -> Prediction:
    """The roofline with the family's efficiencies: each phase takes the longer of its arithmetic and its traffic.

    TTFT: FLOPs of vision, projector, prefill, stages and one row of the head; traffic: every weight once and the
    prompt's cache rows. Decoding: per step, the decoder's weights and the filled cache, half-way through the steps.
    """
    shape, request, cost = plan.recipe.shape, plan.request, plan.flops
    device, efficiency = target.device, target.efficiency
    relative = RATES.get(precision.weights, RATES.get(precision.dtype, 1)) if device.sm else 1
    rate = device.fp16_tflops * 1e12 * efficiency.compute * relative
    traffic = device.bandwidth_gbps * 1e9 * efficiency.bandwidth
    decoder = shape.text.layers * _layer_bytes(shape.text, precision) + _head_bytes(shape.text, precision)
    vision = _vision_weights(shape) * precision.element_bytes if request.images else 0
    generated = request.batch * request.new_tokens * shape.text.layers * kv_row_bytes(plan)
    prompt = plan.kv_bytes - generated
    head = flops.lm_head_flops(shape.text, request.batch)
    ttft = max((cost.total - cost.decode - cost.lm_head + head) / rate, (decoder + vision + prompt) / traffic)
    step = (cost.decode + cost.lm_head - head) / max(request.new_tokens, 1)
    seconds = max(step / rate, (decoder + prompt + generated / 2) / traffic)
    return Prediction(ttft_ms=1e3 * ttft, tokens_per_s=request.batch / seconds)


def kv_row_bytes(plan: Plan) -> int:
    """Bytes of one token's key and value in one layer."""
    text = plan.recipe.shape.text
    return 2 * text.kv_heads * text.head_dim * plan.request.kv_bytes_per_element


def segment_lengths(plan: Plan, limit: int | None = None) -> list[int]:
    """Layers of each segment: cut after every stage, and again into equal parts of at most `limit` layers."""
    layers = plan.schedule.num_layers
    bounds = [0, *(stage.layer + 1 for stage in plan.schedule.stages), layers]
    lengths: list[int] = []
    for first, last in pairwise(bounds):
        parts = -(-(last - first) // (limit or layers))
        lengths += [(last - first + part) // parts for part in range(parts)]
    return lengths


def _layer_bytes(text: TextShape, precision: Precision) -> float:
    """One decoder layer: matrices in the chosen precision, norms (with those of query and key) in the dtype."""
    matrices = 2 * text.hidden * text.head_dim * (text.heads + text.kv_heads) + 3 * text.hidden * text.intermediate
    return matrices * precision.weight_bytes + 2 * (text.hidden + text.head_dim) * precision.element_bytes


def _head_bytes(text: TextShape, precision: Precision) -> int:
    return text.hidden * text.vocab * precision.element_bytes


def _vision_weights(shape: ModelShape) -> int:
    """Weights of encoder, patch and position embedding, and projector; biases and norms are too few to count."""
    vision = shape.vision
    mlp = (3 if vision.gated_mlp else 2) * vision.hidden * vision.intermediate
    embedding = (vision.patch_channels * vision.patch_size**2 + vision.encoder_tokens) * vision.hidden
    return vision.layers * (4 * vision.hidden**2 + mlp) + embedding + shape.projector_weights


def _activations(plan: Plan, target: Target, size: int) -> int:
    """Of the widest graph, in bytes; `size` is that of an element. One sequence at a time, whatever the batch."""
    shape, request = plan.recipe.shape, plan.request
    rows = request.images * shape.vision.units * plan.schedule.vision_tokens + request.text_tokens
    sizes = [_segment_activations(shape.text, rows, size, scores=target.lowering == "portable")]
    if request.images:
        sizes.append(_vision_activations(shape.vision, size))
        sizes += [_stage_activations(shape.text, stage.tokens_in, plan, size) for stage in plan.schedule.stages]
    return max(sizes)


def _segment_activations(text: TextShape, rows: int, size: int, *, scores: bool) -> int:
    """A prefill of `rows` tokens through one segment.

    Inputs and outputs: hidden twice, query, key. Then the larger of attention (residual, norm, q, k, v, output; all
    scores in float32 where `scores`, else one byte of mask per pair) and MLP (residual, norm, three intermediates).
    """
    query, key = text.heads * text.head_dim, text.kv_heads * text.head_dim
    attention = rows * (2 * text.hidden + 2 * query + 2 * key) * size
    attention += rows**2 * (text.heads * SCORE_BYTES if scores else 1)
    mlp = rows * (2 * text.hidden + 3 * text.intermediate) * size
    return rows * (2 * text.hidden + query + key) * size + max(attention, mlp) + text.vocab * size


def _vision_activations(vision: VisionShape, size: int) -> int:
    """All tiles of one image at once (images go through one after the other): pixels, then the larger of attention
    with all its scores and MLP."""
    tiles, rows = vision.tiles, vision.encoder_tokens
    pixels = tiles * vision.patches * vision.patch_channels * vision.patch_size**2 * size
    heads = math.ceil(vision.hidden / VISION_HEAD_DIM)
    attention = tiles * (6 * rows * vision.hidden * size + heads * rows**2 * SCORE_BYTES)
    mlp = tiles * rows * (2 * vision.hidden + (3 if vision.gated_mlp else 2) * vision.intermediate) * size
    return pixels + max(attention, mlp)


def _stage_activations(text: TextShape, tokens: int, plan: Plan, size: int) -> int:
    """Hidden, query and key come in, merged goes out; scores of the text columns and the windows' tokens in float32."""
    request = plan.request
    units = request.images * plan.recipe.shape.vision.units
    rows = units * tokens + request.text_tokens
    interface = rows * (2 * text.hidden + (text.heads + text.kv_heads) * text.head_dim) * size
    scores = text.heads * rows * request.text_tokens * SCORE_BYTES
    return interface + max(scores, 3 * units * tokens * text.hidden * 4)
