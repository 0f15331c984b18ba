"""Floating-point operations of a request, from shapes alone. Standard library only.

Convention: matrix products only, 1 multiply-add = 2 FLOPs (the paper's 10.2 TFLOPs for LLaVA-1.5-7B follow from 2, not
from 1); element-wise work, norms and softmax are left out. Attention is counted unmasked, rows x columns, as eager
attention runs it. The language-model head runs on one row per token that is sampled, as the exported graphs do.
Every function counts one sequence; a batch multiplies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from lightkv_export.recipe import ModelShape, TextShape, VisionShape

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class Flops:
    """FLOPs by part of the model; `total` is their sum."""

    vision: int  # patch embedding and encoder layers
    projector: int
    prefill: int  # decoder layers over the prompt
    stages: int
    decode: int  # decoder layers, one row per generated token
    lm_head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))

    def times(self, count: int) -> Flops:
        return Flops(*(count * getattr(self, item.name) for item in fields(self)))


def vision_flops(vision: VisionShape) -> int:
    """FLOPs of the vision encoder for one image (all its tiles)."""
    embedding = vision.patches * vision.patch_channels * vision.patch_size**2 * vision.hidden
    mlp_matrices = 3 if vision.gated_mlp else 2
    weights = 4 * vision.hidden**2 + mlp_matrices * vision.hidden * vision.intermediate
    global_layers = vision.global_layers if vision.attention_window else vision.layers
    columns = global_layers * vision.encoder_tokens + (vision.layers - global_layers) * vision.attention_window
    attention = 2 * vision.encoder_tokens * columns * vision.hidden
    layers = vision.layers * vision.encoder_tokens * weights + attention
    return FLOPS_PER_MAC * vision.tiles * (embedding + layers)


def projector_flops(shape: ModelShape) -> int:
    """FLOPs of the projector for one image: it sees every patch of every tile, before any are cropped."""
    rows = shape.vision.tiles * shape.vision.patches // shape.vision.spatial_merge**2
    return FLOPS_PER_MAC * rows * shape.projector_weights


def prefill_layer_flops(text: TextShape, rows: int) -> int:
    """FLOPs of one decoder layer over `rows` tokens that attend to each other."""
    return FLOPS_PER_MAC * (rows * _layer_weights(text) + _attention_macs(text, rows * rows))


def decode_layer_flops(text: TextShape, cached: int, steps: int) -> int:
    """FLOPs of one decoder layer for `steps` single-token passes, the first of which finds `cached` cached tokens."""
    columns = steps * cached + steps * (steps + 1) // 2  # step t attends to cached + t tokens, itself included
    return FLOPS_PER_MAC * (steps * _layer_weights(text) + _attention_macs(text, columns))


def lm_head_flops(text: TextShape, rows: int) -> int:
    return FLOPS_PER_MAC * rows * text.hidden * text.vocab


def importance_flops(text: TextShape, rows: int, text_tokens: int) -> int:
    """FLOPs of a stage's importance scores: all `rows` queries against the keys of the text tokens alone."""
    return FLOPS_PER_MAC * rows * text_tokens * text.heads * text.head_dim


def merge_flops(text: TextShape, window_sizes: Iterable[int]) -> int:
    """FLOPs of merging one image: per window the similarity of A and B, and the 0/1 assignment times A's tokens."""
    pairs = sum((size - size // 2) * (size // 2) for size in window_sizes)
    return FLOPS_PER_MAC * 2 * pairs * text.hidden


def _layer_weights(text: TextShape) -> int:
    attention = 2 * text.hidden * text.head_dim * (text.heads + text.kv_heads)  # q, o and k, v
    return attention + 3 * text.hidden * text.intermediate


def _attention_macs(text: TextShape, scores: int) -> int:
    return 2 * scores * text.heads * text.head_dim  # scores, then their product with the values
