"""Position ids of the tokens of one chunk in one segment.

Three policies say how tokens are numbered after a stage has shortened the sequence:
* original: a survivor keeps the position that it had before the stage (the default: docs/accuracy.md);
* restart: from the chunk's uncompressed start, without gaps (what the authors' release does);
* contiguous: from the segment's own cache length, so decoding continues from there, too.
The position and the cache row are two different things: rows are always contiguous per segment. Where a token has three
positions (mRoPE) they come with the tokens, and only "original" holds.
"""

from __future__ import annotations

import numpy as np

from lightkv_export.errors import BundleError

POLICIES = ("original", "restart", "contiguous")


def chunk_positions(policy: str, start: int, past_len: int, survivors: np.ndarray) -> np.ndarray:
    """Positions int64 [S'] of a chunk's tokens in one segment.

    Args:
        policy: one of `POLICIES`.
        start: uncompressed tokens before the chunk.
        past_len: cache rows filled in this segment before the chunk.
        survivors: int64 [S'], place of each token in the uncompressed chunk, ascending; all places before any stage.
    """
    if policy == "restart":
        return start + np.arange(len(survivors), dtype=np.int64)
    if policy == "original":
        return start + survivors
    if policy == "contiguous":
        return past_len + np.arange(len(survivors), dtype=np.int64)
    raise BundleError(f"position policy {policy!r} is unknown", expected=f"one of: {', '.join(POLICIES)}")
