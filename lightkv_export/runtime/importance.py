"""How much the prompt attends to each token, in numpy, for pictures. The stage graphs compute it on their own."""

from __future__ import annotations

import numpy as np


def prompt_importance(
    query: np.ndarray, key: np.ndarray, text_index: np.ndarray, heads: int, kv_heads: int
) -> np.ndarray:
    """ξ_i = Σ_h Σ_{j in text} softmax over i of (q_i . k_j / sqrt(d)) (arXiv 2605.00789), as `stages.importance`.

    Args:
        query: float32 [S, heads * d], after rotary embedding; key: float32 [S, kv_heads * d], likewise.
        text_index: int64 [T], the positions that are no vision token of any image.

    Returns:
        float32 [S].
    """
    length, depth = len(query), query.shape[1] // heads
    rows = query.reshape(length, heads, depth)
    columns = np.repeat(key[text_index].reshape(-1, kv_heads, depth), heads // kv_heads, axis=1)
    scores = np.einsum("ihd,jhd->hji", rows, columns, optimize=True) * depth**-0.5
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return (shares / shares.sum(-1, keepdims=True)).sum((0, 1)).astype(np.float32)
