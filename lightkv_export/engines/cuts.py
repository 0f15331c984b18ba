"""Cutting segments finer than the stages ask for, so that building an engine stays under a memory limit. Integers
only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lightkv_export.errors import UserError
from lightkv_export.fit import BUILD_COPIES, BUILD_FIXED
from lightkv_export.recipe import TextShape

GIB = 1 << 30


def finer_cuts(
    bounds: Sequence[int], text: TextShape, element_bytes: int, memory_bytes: int
) -> tuple[tuple[int, int], ...]:
    """Segments [first, last) between `bounds`, each so small that building its engine is expected to stay in
    `memory_bytes`.

    Args:
        bounds: 0, the layers before which a stage cuts, and the number of layers.
        element_bytes: of a weight.

    Raises:
        UserError: not even one layer fits.
    """
    room = (memory_bytes - BUILD_FIXED) // BUILD_COPIES
    matrices = 2 * text.hidden * text.head_dim * (text.heads + text.kv_heads) + 3 * text.hidden * text.intermediate
    layer, head = matrices * element_bytes, text.hidden * text.vocab * element_bytes
    segments = []
    for first, last in pairwise(bounds):
        limit = (room - (head if last == bounds[-1] else 0)) // layer  # the head is in the last segment
        if limit < 1:
            needed = BUILD_FIXED + BUILD_COPIES * (layer + head)
            raise UserError(
                f"--build-memory is {memory_bytes / GIB:.2f} GiB, which is too little for one layer and the head",
                expected=f"at least {needed / GIB:.2f} GiB, or weights in a smaller dtype",
            )
        parts = -(-(last - first) // limit)
        edges = [first + (last - first) * part // parts for part in range(parts + 1)]
        segments += list(pairwise(edges))
    return tuple(segments)
