"""The window rule of a LightKV stage: which vision tokens share a window, and how many are left. Standard library only.

Everything that decides a shape depends on (v, w, ρ) alone, never on data, so stages compile with static shapes.
Source: LightKV, arXiv 2605.00789, window merging.
"""

from __future__ import annotations

from itertools import pairwise
from math import floor, isqrt

MIN_TOKENS_PER_WINDOW = 8  # skip rule: a stage with fewer tokens per window, on average, does nothing


def window_members(tokens: int, windows_per_side: int) -> list[list[int]]:
    """Token indices (0..tokens-1, ascending) of every window, windows row-major; windows without tokens are left out.

    The tokens are laid row-major on a square of side n = ceil(sqrt(tokens)), the last cells absent; rows and columns
    are split into `windows_per_side` bands, the first n mod windows_per_side one longer.
    """
    side = isqrt(tokens - 1) + 1
    bands = _bands(side, windows_per_side)
    windows = [
        [row * side + column for row in rows for column in columns if row * side + column < tokens]
        for rows in bands
        for columns in bands
    ]
    return [window for window in windows if window]


def tokens_discarded(window_tokens: int, discard_ratio: float) -> int:
    """r = min(floor(ρ n), floor(n/2)), the product in floating point as in the authors' release: 0.29 of 100 is 28."""
    return min(floor(discard_ratio * window_tokens), window_tokens // 2)


def skips(tokens: int, windows_per_side: int) -> bool:
    """The skip rule: a stage does nothing when v < 8 w²."""
    return tokens < MIN_TOKENS_PER_WINDOW * windows_per_side**2


def most_windows(tokens: int) -> int:
    """The most windows per side at which a stage on `tokens` tokens does something; 0 if none does."""
    return isqrt(tokens // MIN_TOKENS_PER_WINDOW)


def tokens_after(tokens: int, windows_per_side: int, discard_ratio: float) -> int:
    """Vision tokens of one image left after a stage: Σ over windows of (n - r), or `tokens` if the skip rule holds."""
    if skips(tokens, windows_per_side):
        return tokens
    windows = window_members(tokens, windows_per_side)
    return tokens - sum(tokens_discarded(len(window), discard_ratio) for window in windows)


def _bands(side: int, count: int) -> list[range]:
    """`side` cells in `count` runs, the first side mod count of them one longer."""
    size, longer = divmod(side, count)
    starts = [band * size + min(band, longer) for band in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]
