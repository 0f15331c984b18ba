"""Segments: runs of Hugging Face decoder layers between two stages, as one traceable module.

A segment serves prefill and decode alike: S new tokens (many, or one) against a cache with `past_len` valid rows. The
layers are the model's own; only their attention is ours, registered by name with transformers' `AttentionInterface`,
so no modelling code is copied and nothing is patched.

The cache of a layer is token-major, `[1, 1, C, Hkv*d]`: its first n rows are contiguous, so a runtime can bind a view
of what is filled. Two protocols exist, one per lowering (see `ScatterAttention` and `AppendAttention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "lightkv_segment"


class CacheProtocol(Protocol):
    """How one segment's attention reads and writes its caches; one instance per forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [1,Hq,S,d], key and value [1,Hkv,S,d] (rotated) -> attention output [1,S,Hq,d]."""

    def outputs(self) -> list[Tensor]:
        """Key then value output of every layer, in layer order."""


def rows_from_heads(heads: Tensor) -> Tensor:
    """[1,H,S,d] -> token-major [1,1,S,H*d]."""
    batch, num_heads, length, size = heads.shape
    return heads.transpose(1, 2).reshape(batch, 1, length, num_heads * size)


class _Recorder:
    """What both protocols share: the caches of the segment, their outputs, and the last layer's query and key."""

    def __init__(self, past_len: Tensor, caches: Sequence[Tensor], first_layer: int, length: int) -> None:
        self.past_len, self.caches, self.first_layer = past_len, caches, first_layer
        self.written: list[Tensor] = []
        self.query = self.key = past_len
        self.valid = self._valid_columns(torch.arange(length), torch.arange(caches[0].shape[2]))

    def _begin(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        place = 2 * (layer - self.first_layer)
        self.query, self.key = rows_from_heads(query).squeeze(1), rows_from_heads(key).squeeze(1)
        return self.caches[place], self.caches[place + 1], rows_from_heads(key), rows_from_heads(value)

    def outputs(self) -> list[Tensor]:
        return self.written


class ScatterAttention(_Recorder):
    """Modern lowering (opset 24): TensorScatter writes the new rows in place, Attention reads the whole bound view.

    `nonpad_kv_seqlen` is not used: TensorRT ignores it silently. The bool mask says what is valid.
    """

    def _valid_columns(self, new: Tensor, columns: Tensor) -> Tensor:
        """[1, 1, S, C]: new row i sees every column up to its own."""
        return (columns[None] <= new[:, None] + self.past_len)[None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        key_cache, value_cache, key_rows, value_rows = self._begin(layer, query, key, value)
        caches = [
            torch.onnx.ops.symbolic(
                "TensorScatter",
                [cache, rows, self.past_len],
                {"axis": -2},
                dtype=cache.dtype,
                shape=cache.shape,
                version=24,
            )
            for cache, rows in ((key_cache, key_rows), (value_cache, value_rows))
        ]
        self.written += caches
        batch, num_heads, length, size = query.shape
        output = torch.onnx.ops.symbolic(
            "Attention",
            [rows_from_heads(query).squeeze(1), caches[0].squeeze(1), caches[1].squeeze(1), self.valid],
            {"q_num_heads": num_heads, "kv_num_heads": key.shape[1], "scale": scale},
            dtype=query.dtype,
            shape=(batch, length, num_heads * size),
            version=24,
        )
        return output.reshape(batch, length, num_heads, size)


class AppendAttention(_Recorder):
    """Portable lowering (opset 20): the past is read through a view, the new rows are outputs.

    The softmax runs over the scores of past and new columns side by side, so no cache is ever concatenated or copied;
    the runtime writes the new rows behind the past. Scores and softmax are float32.
    """

    def _valid_columns(self, new: Tensor, columns: Tensor) -> Tensor:
        """[S, P + S]: every valid row of the past, then the new rows up to each one's own."""
        past = (columns < self.past_len)[None].expand(new.shape[0], -1)
        return torch.cat([past, new[None] <= new[:, None]], dim=-1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        key_cache, value_cache, key_rows, value_rows = self._begin(layer, query, key, value)
        self.written += [key_rows, value_rows]
        _, num_heads, length, size = query.shape
        kv_heads, past = key.shape[1], key_cache.shape[2]
        by_group = (1, kv_heads, num_heads // kv_heads, length, size)
        # query heads of a group share a key head by broadcasting, so grouped keys are never repeated
        grouped = (query * scale).reshape(by_group)
        past_key = key_cache.reshape(1, past, kv_heads, size).permute(0, 2, 3, 1).unsqueeze(2)
        past_value = value_cache.reshape(1, past, kv_heads, size).transpose(1, 2).unsqueeze(2)
        new_key, new_value = key.transpose(2, 3).unsqueeze(2), value.unsqueeze(2)
        scores = torch.cat([grouped @ past_key, grouped @ new_key], dim=-1).float()
        scores = torch.where(self.valid, scores, torch.finfo(torch.float32).min)
        weights = torch.softmax(scores, dim=-1).to(query.dtype)
        output = weights[..., :past] @ past_value + weights[..., past:] @ new_value
        return output.reshape(query.shape).transpose(1, 2)


PROTOCOLS = {"scatter": ScatterAttention, "append": AppendAttention}


def _segment_attention(module, query, key, value, _mask, scaling=None, *, segment_cache, **_):
    """The function behind `ATTENTION_NAME`; `segment_cache` travels through the layers' keyword arguments."""
    scale = module.head_dim**-0.5 if scaling is None else scaling
    return segment_cache.attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(ATTENTION_NAME, _segment_attention)


class Segment(nn.Module):
    """Decoder layers [first, first + n) of a model whose attention implementation is `ATTENTION_NAME`.

    Args:
        layers: the Hugging Face decoder layers.
        first_layer: global index of the first one.
        rotary: the model's rotary embedding module.
        protocol: "scatter" or "append".
        tail: final norm and language-model head, for the last segment.
        emit_query: whether a stage follows, which needs the last layer's query and key.
        deepstack: global indexes of the layers behind which vision features are added to the hidden states.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        first_layer: int,
        rotary: nn.Module,
        protocol: str,
        *,
        tail: tuple[nn.Module, nn.Module] | None = None,
        emit_query: bool = False,
        deepstack: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.rotary, (self.norm, self.head) = rotary, tail or (None, None)
        self.first_layer, self.protocol, self.emit_query = first_layer, PROTOCOLS[protocol], emit_query
        self.deepstack = tuple(deepstack)

    def forward(
        self,
        hidden: Tensor,  # [1, S, D]
        position_ids: Tensor,  # [1, S] int64, or [3, 1, S] for multimodal RoPE
        past_len: Tensor,  # [1] int64, valid rows in the caches
        caches: list[Tensor],  # key, value per layer: [1, 1, C, Hkv*d]
        features: list[Tensor],  # [1, S, D] per DeepStack layer of this segment, zero in the rows of text
        logits_index: Tensor | None = None,  # [1] int64, the row whose logits are wanted (last segment)
    ) -> tuple[Tensor, ...]:
        """-> (hidden_out or logits, query and key if emitted, key and value cache outputs per layer)."""
        cache = self.protocol(past_len, caches, self.first_layer, hidden.shape[1])
        positions = self.rotary(hidden, position_ids)
        added = dict(zip(self.deepstack, features, strict=True))
        for index, layer in enumerate(self.layers, self.first_layer):
            hidden = layer(hidden, position_embeddings=positions, position_ids=position_ids, segment_cache=cache)
            if index in added:
                hidden = hidden + added[index]
        if self.head is not None:
            hidden = self.head(self.norm(hidden.index_select(1, logits_index))).squeeze(1)
        stage_inputs = [cache.query, cache.key] if self.emit_query else []
        return (hidden, *stage_inputs, *cache.outputs())
