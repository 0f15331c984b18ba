"""LightKV: after a decoder layer, merge the vision tokens that the prompt attends to least into similar neighbours.

Source: arXiv 2605.00789 (TMLR 2026), sections on prompt-guided importance and window merging. `lightkv_stage` is the
method on whole tensors; `StageGraph` is the same arithmetic as a traceable module with static shapes per image.

Everything here is written for compilers too: no data-dependent shape, no scatter, no sort. Ranks and slots come from
comparisons, so ties follow a stated rule (lowest index first) in every engine; tokens are merged by a 0/1 matrix.
Token places are carried as float32, exact for the few thousand places of an image; they never pass through a matmul,
which a GPU may round to TF32. Only 0/1 counts do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightkv_export.errors import UserError
from lightkv_export.stages.tables import MergeTables, merge_tables

LEAST_WEIGHT = 1e-8  # clamp of the merge's denominator, as published
LEAST_NORM = 1e-12  # a zero token gets similarity 0 to everything
SAME = (
    1 - 2**-20
)  # more similar than this is 1: what rounding leaves of identical tokens (seen: 6e-7), so that they tie
NO_MATCH = -4.0  # below every cosine: padded places lose every comparison

Spans = Sequence[tuple[int, int]]
ImportanceFn: TypeAlias = "Callable[[Tensor, Tensor, Tensor, int, int], Tensor]"
"""Arguments and result of `importance`."""


def importance(query: Tensor, key: Tensor, text_index: Tensor, heads: int, kv_heads: int) -> Tensor:
    """How much the prompt attends to each position: ξ_i = Σ_h Σ_{j in text} softmax over i of (q_i . k_j / sqrt(d)).

    The softmax runs over the QUERY axis (all S rows, no causal mask), for every head and text column by itself, so only
    S x T scores per head are ever computed. Query head h reads key head h // (heads / kv_heads); keys are not repeated.

    Args:
        query: [B, S, heads * d], after rotary embedding, any float dtype.
        key: [B, S, kv_heads * d], likewise.
        text_index: int64 [T], the positions that are no vision token of any image.

    Returns:
        float32 [B, S]; the rows of vision tokens are the ones that `merge` wants.
    """
    batch, length, width = query.shape
    group, depth = heads // kv_heads, width // heads
    columns = key.index_select(1, text_index).float().reshape(batch, -1, kv_heads, depth).permute(0, 2, 1, 3)
    rows = query.float().reshape(batch, length, kv_heads, group, depth).permute(0, 2, 4, 3, 1)
    scores = torch.matmul(columns, rows.reshape(batch, kv_heads, depth, group * length)) * depth**-0.5
    shares = scores.reshape(batch, kv_heads, -1, group, length).softmax(-1)  # [B, Hkv, T, group, S]
    return shares.sum((1, 2, 3))


def merge(tokens: Tensor, scores: Tensor, windows_per_side: int, discard_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the v vision tokens of every image into v'; v' depends on (v, windows_per_side, discard_ratio) alone.

    Args:
        tokens: hidden states [B, I, v, D], any float dtype; computed in float32.
        scores: the importance of every token, float32 [B, I, v].
        windows_per_side: w; the images are cut into w² windows (spec: row-major on a square).
        discard_ratio: share ρ of a window that is merged away, at most one half.

    Returns:
        merged [B, I, v', D] in the dtype of `tokens`, survivors in ascending source order, untouched ones bit for bit;
        kept int64 [B, I, v'], the source place of each survivor;
        target int64 [B, I, v], the survivor (0..v'-1) in which each source token ended.
    """
    images, count = scores.shape[:2], scores.shape[2]
    tables = merge_tables(count, windows_per_side, discard_ratio)
    if tables is None:
        places = torch.arange(count, device=tokens.device).expand(*images, count)
        return tokens, places, places
    constants = {name: value.to(tokens.device) for name, value in _tensors(tables).items()}
    return _merge(tokens, scores, constants, tables.tokens_out)


def lightkv_stage(
    hidden: Tensor, q: Tensor, k: Tensor, vision_spans: Spans | Tensor, windows_per_side: int, discard_ratio: float
) -> Tensor:
    """One LightKV stage: shortens the sequence that leaves a decoder layer (arXiv 2605.00789).

    Args:
        hidden: hidden states [B, S, D] that leave the layer, any float dtype.
        q: queries [B, Hq, S, d] of that layer after rotary embedding (the scores are scaled by 1/sqrt(d) here).
        k: keys [B, Hkv, S, d], likewise; Hkv divides Hq.
        vision_spans: (start, end) of every image's tokens, end exclusive; lengths may differ. Pairs, array or tensor.
        windows_per_side: w; an image of fewer than 8 w² tokens stays as it is.
        discard_ratio: share of every window that is merged away, in [0, 0.5]; more than half has no effect.

    Returns:
        [B, S', D] in the dtype of `hidden`: text tokens in place, the surviving vision tokens of each image in order.

    Raises:
        UserError: shapes, spans, windows or ratio do not fit together.
    """
    setting = int(windows_per_side), float(discard_ratio)  # they may be arrays read from a file
    return merge_spans(hidden, q, k, vision_spans, [setting] * len(vision_spans))[0]


def merge_spans(
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    vision_spans: Spans | Tensor,
    settings: Sequence[tuple[int, float] | None],
    importance_fn: ImportanceFn | None = None,
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """`lightkv_stage` with settings for every span, and where everything went.

    Args:
        hidden, q, k, vision_spans: as for `lightkv_stage`; the spans in ascending order.
        settings: (windows_per_side, discard_ratio) per span; None leaves its tokens as they are (still no text).
        importance_fn: replaces `importance`, for experiments.

    Returns:
        merged [B, S', D]; survivors int64 [B, S'], the row of `hidden` that each row was (merged ones: where they
        stayed); the spans in the shorter sequence.
    """
    _check_shapes(hidden, q, k)
    spans = _checked_spans(vision_spans, hidden.shape[1])
    rows = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)
    is_text = torch.ones(hidden.shape[1], dtype=torch.bool)
    for start, end in spans:
        is_text[start:end] = False
    text_index = is_text.nonzero()[:, 0].to(hidden.device)
    query, key = (heads.transpose(1, 2).flatten(2) for heads in (q, k))
    scores = (importance_fn or importance)(query, key, text_index, q.shape[1], k.shape[1])
    pieces, survivors, left, done, shift = [], [], [], 0, 0
    for (start, end), setting in zip(spans, settings, strict=True):
        if setting is None:
            left.append((start - shift, end - shift))
            continue
        _check_settings(*setting)
        image = slice(start, end)
        merged, kept, _ = merge(hidden[:, None, image], scores[:, None, image], *setting)
        pieces += [hidden[:, done:start], merged[:, 0]]
        survivors += [rows[:, done:start], start + kept[:, 0]]
        left.append((start - shift, start - shift + merged.shape[2]))
        done, shift = end, shift + (end - start) - merged.shape[2]
    return torch.cat([*pieces, hidden[:, done:]], dim=1), torch.cat([*survivors, rows[:, done:]], dim=1), left


class StageGraph(nn.Module):
    """One LightKV stage for compilers: images of `tokens` vision tokens each; where they stand is data, not shape.

    Dynamic axes: S (sequence), T (text tokens), I (images), R (sequence that leaves). No weights; the index tables are
    small constant buffers.

    Args:
        tokens: v, vision tokens per image that reach the stage.
        windows_per_side: w.
        discard_ratio: share ρ of every window that is merged away.
        heads, kv_heads, head_dim: attention shape of the layer before the stage.

    Raises:
        UserError: the stage would do nothing for images of this size.
    """

    def __init__(
        self, tokens: int, windows_per_side: int, discard_ratio: float, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        _check_settings(windows_per_side, discard_ratio)
        tables = merge_tables(tokens, windows_per_side, discard_ratio)
        if tables is None:
            raise UserError(
                f"a stage with {windows_per_side} x {windows_per_side} windows and ratio {discard_ratio} does nothing "
                f"with images of {tokens} vision tokens",
                expected="at least 8 tokens per window and a ratio that removes one token of some window",
                fix="use fewer windows per side or a larger ratio, or leave the stage out",
            )
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.tokens_in, self.tokens_out = tokens, tables.tokens_out
        for name, value in _tensors(tables).items():
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, hidden: Tensor, query: Tensor, key: Tensor, text_index: Tensor, vision_index: Tensor, order: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, merges and reorders.

        Args:
            hidden: [1, S, D].
            query: [1, S, heads * head_dim]; key: [1, S, kv_heads * head_dim]; both after rotary embedding.
            text_index: int64 [T], positions of the text tokens.
            vision_index: int64 [I, v], positions of every image's tokens.
            order: int64 [R], rows of (text tokens [T], merged tokens [I * v']) in the order in which they leave.

        Returns:
            merged [1, R, D]; kept int64 [1, I, v']; target int64 [1, I, v] (see `merge`).
        """
        constants = dict(self.named_buffers())
        images = vision_index.shape[0]
        flat = vision_index.reshape(-1)
        scores = importance(query, key, text_index, self.heads, self.kv_heads)
        scores = scores.index_select(1, flat).reshape(1, images, self.tokens_in)
        tokens = hidden.index_select(1, flat).reshape(1, images, self.tokens_in, -1)
        merged, kept, target = _merge(tokens, scores, constants, self.tokens_out)
        merged = merged.reshape(1, images * self.tokens_out, -1)
        rows = torch.cat([hidden.index_select(1, text_index), merged], dim=1)
        return rows.index_select(1, order), kept, target


def _tensors(tables: MergeTables) -> dict[str, Tensor]:
    return {field.name: torch.from_numpy(getattr(tables, field.name)) for field in fields(tables)}


def _merge(tokens: Tensor, scores: Tensor, tables: dict[str, Tensor], tokens_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """`merge` with the tables given as tensors: tokens [B, I, v, D], scores [B, I, v]."""
    batch, images, _, width = tokens.shape
    a_place, b_place = tables["a_index"].float(), tables["b_index"].float()  # [W, a], [W, b]
    a, b = (_windows(tokens, tables[name]) for name in ("a_index", "b_index"))  # [B, I, W, a or b, D]
    match, goes = _matches(a.float(), b.float(), tables)  # [B, I, W, a]: place of the best b; merged into it or not
    pairs = ((match[..., None, :] == b_place[..., None]) & goes[..., None, :]).float()  # [B, I, W, b, a], 0 or 1
    weight_a, weight_b = (_windows(scores[..., None], tables[name]) for name in ("a_index", "b_index"))
    new_b = torch.where(pairs.sum(-1, keepdim=True) > 0, _mean(a, weight_a, b, weight_b, pairs), b)

    places = tables["places"].float()
    ends = torch.where(goes, match, a_place).reshape(batch, images, -1).index_select(2, tables["a_slot"])
    ends = torch.where(tables["is_b"], places, ends)  # [B, I, v]: place of the survivor that holds each token
    slots, kept = _slots(ends == places, tables, tokens_out)
    rows = torch.cat([tokens, new_b.reshape(batch, images, -1, width)], dim=2)
    merged = _take_rows(rows, _take(tables["row"], kept))
    return merged, kept, slots.gather(2, ends.long()).long()


def _windows(values: Tensor, index: Tensor) -> Tensor:
    """Rows [B, I, v, D] -> [B, I, W, n, D] by a table [W, n]."""
    batch, images, _, width = values.shape
    return values.index_select(2, index.reshape(-1)).reshape(batch, images, *index.shape, width)


def _matches(a: Tensor, b: Tensor, tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """For every token of A: the place of its most similar b, and whether it is among the r most similar of its window.

    Ties go to the lowest place, twice: the lowest b, and the lower a of two that are equally similar to theirs.
    """
    a_place, b_place = tables["a_index"].float(), tables["b_index"].float()
    similar = torch.matmul(_unit(a), _unit(b).transpose(-1, -2))  # [B, I, W, a, b]
    similar = torch.where(similar > SAME, 1.0, similar)
    similar = torch.where(tables["b_valid"][:, None, :], similar, NO_MATCH)
    best = similar.amax(-1, keepdim=True)
    last = float(tables["is_b"].shape[0] - 1)  # a legal place even where NaN leaves no maximum
    match = torch.where(similar == best, b_place[:, None, :], last).amin(-1)
    best = torch.where(tables["a_valid"], best[..., 0], NO_MATCH)
    mine, other = best[..., :, None], best[..., None, :]  # [B, I, W, a, a]
    earlier = a_place[:, None, :] < a_place[:, :, None]
    rank = ((other > mine) | ((other == mine) & earlier)).float().sum(-1)
    return match, rank < tables["removed"].float()


def _unit(rows: Tensor) -> Tensor:
    return rows / _at_least((rows * rows).sum(-1, keepdim=True).sqrt(), LEAST_NORM)


def _at_least(values: Tensor, least: float) -> Tensor:
    return torch.where(values < least, least, values)


def _mean(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor, pairs: Tensor) -> Tensor:
    """(ξ_b b + Σ ξ_a a) / (ξ_b + Σ ξ_a) over the pairs [B, I, W, b, a], in float32, back in the dtype of b."""
    total = b.float() * weight_b + torch.matmul(pairs, a.float() * weight_a)
    weight = weight_b + torch.matmul(pairs, weight_a)
    return (total / _at_least(weight, LEAST_WEIGHT)).to(b.dtype)


def _slots(survives: Tensor, tables: dict[str, Tensor], tokens_out: int) -> tuple[Tensor, Tensor]:
    """Numbers the survivors (bool [B, I, v]) in ascending order: slot of every place, and its inverse, kept.

    Counts the survivors before each place in two levels, rows of an n x n square and places within a row: v * n
    multiplications, where a running sum would be a loop in TensorRT and one v x v triangle 33 MB at 2880 tokens.
    """
    batch, images, count = survives.shape
    places, before = tables["places"].float(), tables["before"].float()
    side = before.shape[0]
    square = nn.functional.pad(survives.float(), (0, side * side - count)).reshape(batch, images, side, side)
    above = torch.matmul(square.sum(-1)[:, :, None, :], before).transpose(-1, -2)  # [B, I, n, 1]
    slots = (torch.matmul(square, before) + above).reshape(batch, images, -1)[..., :count]
    hit = torch.where(survives, slots, -1.0)[:, :, None, :] == places[:tokens_out, None]  # [B, I, v', v]
    return slots, torch.where(hit, places, 0.0).sum(-1).long()


def _take(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [B, I, N, D] by index [B, I, M] -> [B, I, M, D]; as one flat row gather, whose index stays small."""
    batch, images, count, width = rows.shape
    start = (torch.arange(batch * images, dtype=torch.int64, device=rows.device) * count).reshape(batch, images, 1)
    return rows.reshape(-1, width).index_select(0, (index + start).reshape(-1)).reshape(batch, images, -1, width)


def _check_shapes(hidden: Tensor, q: Tensor, k: Tensor) -> None:
    fits = hidden.ndim == 3 and q.ndim == k.ndim == 4
    fits = fits and q.shape[0] == k.shape[0] == hidden.shape[0] and q.shape[2] == k.shape[2] == hidden.shape[1]
    if not (fits and q.shape[3] == k.shape[3] and q.shape[1] % k.shape[1] == 0):
        raise UserError(
            f"hidden {list(hidden.shape)}, q {list(q.shape)} and k {list(k.shape)} do not fit together",
            expected="hidden [B, S, D], q [B, Hq, S, d] and k [B, Hkv, S, d], Hq a multiple of Hkv",
        )


def _check_settings(windows_per_side: int, discard_ratio: float) -> None:
    if windows_per_side < 1 or not 0 <= discard_ratio < 1:
        raise UserError(
            f"windows_per_side {windows_per_side} with discard_ratio {discard_ratio}",
            expected="at least one window per side, and a ratio from 0 to 0.5",
        )


def _checked_spans(vision_spans: Spans | Tensor, length: int) -> list[tuple[int, int]]:
    """The spans as sorted pairs of int."""
    spans = sorted((int(start), int(end)) for start, end in vision_spans)
    done = 0
    for start, end in spans:
        if not done <= start < end <= length:
            raise UserError(
                f"vision span ({start}, {end}) in a sequence of {length} tokens",
                expected="0 <= start < end <= length, and no two spans over the same token",
            )
        done = end
    return spans
