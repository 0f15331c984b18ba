"""KV caches, one per segment: every layer of a segment sees the same tokens, so one fill count (the sequence's)
serves them all.

A layer's key and value caches are token-major, [1, 1, capacity, row] with row = Hkv*d: the first n rows are
contiguous, so a step binds a view of what is filled, rounded up to `BLOCK` rows, and costs what is filled, not what
is allowed. No row is ever copied. Memory reads as zero until it is written, so masked columns of a view are finite.
"""

from __future__ import annotations

from math import gcd, prod

from lightkv_export.errors import BackendError
from lightkv_export.manifest import Graph
from lightkv_export.runtime.backend import ITEM_BYTES, Backend, Buffer

ALIGNMENT = 256  # bytes, as GPU libraries want it
BLOCK = 64  # rows; views change their shape, and bindings are renewed, once per block


class SegmentCache:
    """Caches of the layers of one segment.

    Args:
        graph: the segment; the last dimension of its `key_cache_{l}` input is the row.
        capacity: rows that a request may fill; not used where the backend's engines fix them.
        protocol: "scatter" (the graph writes rows in place) or "append" (it hands out the new rows).
    """

    def __init__(self, backend: Backend, graph: Graph, capacity: int, protocol: str) -> None:
        shapes = {tensor.name: tensor for tensor in graph.inputs}
        self.layers = range(*graph.layers)
        self.protocol = protocol
        fixed = backend.fixed_rows(graph)
        self.static, self.capacity = fixed is not None, capacity if fixed is None else fixed
        names = [f"{kind}_cache_{layer}" for layer in self.layers for kind in ("key", "value")]
        first = shapes[names[0]]
        shape = (1, 1, self.capacity, first.shape[3])
        # One allocation per segment, its caches at equal and aligned distances: a backend can reach the same rows of
        # all of them with one strided copy.
        stride = -(-prod(shape) * ITEM_BYTES[first.dtype] // ALIGNMENT) * ALIGNMENT
        block = backend.zeros(first.dtype, (len(names), stride // ITEM_BYTES[first.dtype]))
        self._buffers = {
            name: Buffer(first.dtype, shape, block.ptr + place * stride, block.owner)
            for place, name in enumerate(names)
        }
        self._views: dict[str, Buffer] = {}
        self._view_span = (0, 0)
        self._aligned_rows = ALIGNMENT // gcd(
            ALIGNMENT, shape[3] * ITEM_BYTES[first.dtype]
        )  # a view may start at these

    @property
    def nbytes(self) -> int:
        """Bytes of all rows of all layers, counted from the arrays."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def layer_bytes(self, rows: int) -> list[int]:
        """Bytes of the first `rows` rows of every layer (key and value)."""
        view = {name: buffer.rows(0, rows).nbytes for name, buffer in self._buffers.items()}
        return [view[f"key_cache_{layer}"] + view[f"value_cache_{layer}"] for layer in self.layers]

    def bindings(self, past_len: int, new_tokens: int) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """Cache inputs and outputs of a step that fills the rows [past_len, past_len + new_tokens).

        Raises:
            BackendError: the rows are not there.
        """
        end = past_len + new_tokens
        if end > self.capacity:
            # TensorScatter drops rows past the end without a word, so this is checked here.
            raise BackendError(f"a step to row {end} of caches with {self.capacity} rows (layers {self.layers})")
        if self.protocol == "scatter":
            inputs = self._view(end)
            return inputs, {f"{name}_out": buffer for name, buffer in inputs.items()}
        new_rows = {
            name.replace("_cache_", "_new_"): buffer.rows(past_len, end) for name, buffer in self._buffers.items()
        }
        return self._view(past_len, at_end=past_len == 0), new_rows

    def _view(self, rows: int, *, at_end: bool = False) -> dict[str, Buffer]:
        """The first `rows` rows of every cache, rounded up; with `at_end` (nothing in them is valid) as many at the
        end, out of the way of the rows that the step writes, if there is room."""
        rows = self.capacity if self.static else min(max(-(-rows // BLOCK), 1) * BLOCK, self.capacity)
        start = (self.capacity - rows) // self._aligned_rows * self._aligned_rows if at_end else 0
        span = (start, start + rows)
        if span != self._view_span:
            self._views = {name: buffer.rows(*span) for name, buffer in self._buffers.items()}
            self._view_span = span
        return self._views
