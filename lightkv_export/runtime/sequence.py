"""One sequence on its way through the model: caches per segment, and `step`, the forward pass of prefill and decode
alike."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from lightkv_export.manifest import Keep
from lightkv_export.runtime.backend import Buffer, to_float32
from lightkv_export.runtime.cache import SegmentCache
from lightkv_export.runtime.generation import OnStage, StageTrace
from lightkv_export.runtime.graphs import Graphs
from lightkv_export.runtime.image import ImageFeatures
from lightkv_export.runtime.layout import Layout
from lightkv_export.runtime.merging import Merger
from lightkv_export.runtime.positions import chunk_positions
from lightkv_export.runtime.tokens import Tokens


@dataclass(frozen=True)
class Span:
    """Tokens that were cached together: uncompressed start and length, and per segment the first row and the rows.

    A merged span can only be taken back as a whole; any other one token by token.
    """

    start: int
    length: int
    first_rows: tuple[int, ...]
    rows: tuple[int, ...]
    merged: bool

    def joined(self, other: Span) -> Span:
        """This span and the unmerged one right after it."""
        rows = tuple(a + b for a, b in zip(self.rows, other.rows, strict=True))
        return Span(self.start, self.length + other.length, self.first_rows, rows, False)

    def cut(self, length: int) -> Span:
        """The first tokens of an unmerged span, in which every segment has one row per token."""
        return Span(self.start, length, self.first_rows, (length,) * len(self.rows), False)


@dataclass(frozen=True)
class _Chunk:
    """What a segment needs to know about a step: the new tokens, where they are now, the DeepStack inputs by name, and
    whether a stage follows."""

    tokens: Tokens
    layout: Layout
    deepstack: Mapping[str, np.ndarray]
    probed: bool


class Sequence:
    """Caches of one conversation for one keep, and the tokens in them.

    Args:
        graphs: the bundle's graphs.
        keep: which stages run.
        capacities: cache rows per segment.
    """

    def __init__(self, graphs: Graphs, keep: Keep, capacities: Seq[int]) -> None:
        manifest, backend = graphs.manifest, graphs.backend
        self.graphs, self.keep = graphs, keep
        self.caches = tuple(
            SegmentCache(backend, graph, rows, manifest.cache_protocol)
            for graph, rows in zip(graphs.segments, capacities, strict=True)
        )
        self.traces: tuple[StageTrace, ...] = ()
        self._merger = Merger(graphs, keep)
        # `_spans` says what is cached. It is replaced in one assignment at the end of a step, so a step that is
        # interrupted leaves the sequence as it was: rows and keys beyond the spans are never read.
        self._spans: tuple[Span, ...] = ()
        self._keys = np.empty(0, np.int64)

    @property
    def length(self) -> int:
        """Uncompressed tokens cached so far."""
        return self._spans[-1].start + self._spans[-1].length if self._spans else 0

    @property
    def filled(self) -> tuple[int, ...]:
        """Cache rows filled, per segment."""
        if not self._spans:
            return (0,) * len(self.caches)
        last = self._spans[-1]
        return tuple(first + rows for first, rows in zip(last.first_rows, last.rows, strict=True))

    @property
    def keys(self) -> np.ndarray:
        """int64 [length]: what is cached, see `Tokens.keys`."""
        return self._keys[: self.length]

    @property
    def rows_per_layer(self) -> tuple[int, ...]:
        """Cache rows filled in every layer."""
        return tuple(rows for rows, cache in zip(self.filled, self.caches, strict=True) for _ in cache.layers)

    @property
    def vision_rows_per_layer(self) -> tuple[int, ...]:
        """Vision tokens (of all images) cached in every layer: the rows filled less the text tokens that went in."""
        num_text = int((self.keys >= 0).sum())
        return tuple(rows - num_text for rows in self.rows_per_layer)

    def step(
        self, tokens: Tokens, features: Mapping[int, ImageFeatures], on_stage: OnStage | None = None
    ) -> np.ndarray:
        """Run new tokens through every segment and stage and add them to the caches.

        Args:
            tokens: S >= 1 tokens. Every unit of vision tokens that a stage will merge is whole.
            features: serial -> features of the images among them.
            on_stage: called with what each stage did, importance included.

        Returns:
            Logits float32 [V] after the last token.
        """
        graphs, layout, merger = self.graphs, Layout.of(tokens), self._merger
        hidden = graphs.workspace.put("embedded", graphs.dtype, graphs.embed(tokens, features))  # [1, S, D]
        deepstack = graphs.deepstack(tokens, features)
        rows, traces = [], []
        for place in range(len(self.caches)):
            work = merger.work_after(place, layout)
            chunk = _Chunk(tokens, layout, deepstack, probed=bool(work))
            outputs = self._run_segment(place, hidden, chunk)
            rows.append(layout.length)
            hidden = outputs.get("hidden_out")
            if work:
                merged = merger.merge(work, outputs, layout, on_stage)
                hidden, layout = merged.hidden, merged.layout  # [1, S', D]
                traces += merged.traces
        logits = to_float32(graphs.backend.read(outputs["logits"])[0], outputs["logits"].dtype)
        self._commit(tokens, tuple(rows), bool(traces))
        if len(tokens) > 1:
            self.traces = tuple(traces)
            graphs.workspace.clear()  # buffers of a prefill's size
        return logits

    def rollback(self, length: int) -> int:
        """Forget what lies beyond `length` uncompressed tokens, or a little more: a merged span goes as a whole.

        Returns:
            The tokens that are left. Nothing is moved; the rows are written again later.
        """
        spans = [span for span in self._spans if span.start < length]
        if spans and spans[-1].start + spans[-1].length > length:
            last = spans.pop()
            if not last.merged:
                spans.append(last.cut(length - last.start))
        self._spans = tuple(spans)
        return self.length

    def _run_segment(self, place: int, hidden: Buffer, chunk: _Chunk) -> dict[str, Buffer]:
        """Run one segment; returns its outputs other than caches."""
        graphs, past_len, length = self.graphs, self.filled[place], chunk.layout.length
        graph, put = graphs.segments[place], graphs.workspace.put
        inputs, cache_outputs = self.caches[place].bindings(past_len, length)
        inputs = dict(inputs, hidden=hidden)
        inputs["position_ids"] = put(f"position_ids{place}", "int64", self._position_ids(past_len, chunk))
        inputs["past_len"] = put(f"past_len{place}", "int64", np.array([past_len], np.int64))
        for tensor in graph.inputs:
            if tensor.name in chunk.deepstack:
                inputs[tensor.name] = put(tensor.name, tensor.dtype, chunk.deepstack[tensor.name])
        wanted = ["hidden_out"]
        if place == len(self.caches) - 1:
            inputs["logits_index"] = put("logits_index", "int64", np.array([length - 1], np.int64))
            wanted = ["logits"]
        elif chunk.probed:
            wanted += ["query", "key"]
        outputs = {}
        for tensor in graph.outputs:
            if tensor.name in wanted:
                shape = (1, tensor.shape[-1]) if tensor.name == "logits" else (1, length, tensor.shape[-1])
                # The hidden states of neighbours alternate between two buffers: one is read while the other is written.
                outputs[tensor.name] = graphs.workspace.buffer(f"{tensor.name}{place % 2}", tensor.dtype, shape)
        graphs.executable(graph).run(inputs, {**cache_outputs, **outputs})
        return outputs

    def _position_ids(self, past_len: int, chunk: _Chunk) -> np.ndarray:
        """int64 [1, S], for mRoPE [3, 1, S]."""
        survivors = chunk.layout.survivors
        if chunk.tokens.positions is not None:
            return chunk.tokens.positions[:, None, survivors]
        return chunk_positions(self.graphs.manifest.positions, self.length, past_len, survivors)[None]

    def _commit(self, tokens: Tokens, rows: tuple[int, ...], merged: bool) -> None:
        start, new = self.length, len(tokens)
        span = Span(start, new, self.filled, rows, merged)
        if len(self._keys) < start + new:  # doubled, so that decoding copies nothing most of the time
            grown = np.empty(max(2 * len(self._keys), start + new), np.int64)
            grown[:start] = self._keys[:start]
            self._keys = grown
        self._keys[start : start + new] = tokens.keys
        spans = self._spans
        if spans and not merged and not spans[-1].merged:
            self._spans = (*spans[:-1], spans[-1].joined(span))
        else:
            self._spans = (*spans, span)
