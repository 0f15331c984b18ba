"""Index tables of a LightKV stage: which token of an image lies where, as constants that depend on (v, w, ρ) alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np

from lightkv_export.windows import skips, tokens_after, tokens_discarded, window_members

# Windows are padded to at least this many places per side of the match. CPU libraries multiply narrower matrices with
# kernels that round differently from column to column, and then identical tokens would no longer tie (measured: torch
# 2.13 breaks such ties up to 12 columns, never from 16 on; ONNX Runtime 1.31 never does).
MIN_PLACES = 16


@dataclass(frozen=True)
class MergeTables:
    """Constants of one (v, w, ρ): W windows with at most a tokens of A (even places) and b of B (odd places) each.

    Integers and booleans only, so that a module converted to float16 keeps them exact. Padded places repeat token 0
    where something is gathered (`*_index`) and are masked by `*_valid`. Token 0 is always of A: no match names a padded
    place of B.
    """

    a_index: np.ndarray  # int64 [W, a]: source place, within the image, of every token of A
    a_valid: np.ndarray  # bool [W, a]
    b_index: np.ndarray  # int64 [W, b]
    b_valid: np.ndarray  # bool [W, b]
    removed: np.ndarray  # int64 [W, 1]: r, the tokens of A that a window gives up
    is_b: np.ndarray  # bool [v]: the token belongs to B
    a_slot: np.ndarray  # int64 [v]: where a token of A lies in a_index, flattened; 0 for a token of B
    row: np.ndarray  # int64 [v]: its row in (the image's v tokens, then all W * b places of B)
    places: np.ndarray  # int64 [v]: 0, 1, .. v-1
    before: np.ndarray  # bool [n, n]: row index < column index, n = ceil(sqrt(v))

    @property
    def tokens_out(self) -> int:
        """Tokens v' of one image that survive."""
        return len(self.row) - int(self.removed.sum())


@lru_cache(maxsize=64)
def merge_tables(tokens: int, windows_per_side: int, discard_ratio: float) -> MergeTables | None:
    """The tables for images of `tokens` tokens; None if the stage does nothing (skip rule, or nothing to discard)."""
    if skips(tokens, windows_per_side) or tokens_after(tokens, windows_per_side, discard_ratio) == tokens:
        return None
    windows = window_members(tokens, windows_per_side)
    a_index, a_valid = _padded([window[0::2] for window in windows])
    b_index, b_valid = _padded([window[1::2] for window in windows])
    is_b, a_slot, row = np.zeros(tokens, bool), np.zeros(tokens, np.int64), np.arange(tokens, dtype=np.int64)
    is_b[b_index[b_valid]] = True
    a_slot[a_index[a_valid]] = np.flatnonzero(a_valid)
    row[b_index[b_valid]] = tokens + np.flatnonzero(b_valid)
    removed = np.array([[tokens_discarded(len(window), discard_ratio)] for window in windows], np.int64)
    places = np.arange(tokens, dtype=np.int64)
    side = isqrt(tokens - 1) + 1
    before = np.triu(np.ones((side, side), bool), 1)
    return MergeTables(a_index, a_valid, b_index, b_valid, removed, is_b, a_slot, row, places, before)


def _padded(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of places as one int64 array [len(lists), longest], filled up with 0, and the bool mask of real ones."""
    width = max(MIN_PLACES, *map(len, lists))
    index, valid = np.zeros((len(lists), width), np.int64), np.zeros((len(lists), width), bool)
    for line, places in enumerate(lists):
        index[line, : len(places)] = places
        valid[line, : len(places)] = True
    return index, valid
