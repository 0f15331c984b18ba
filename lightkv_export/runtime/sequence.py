"""One sequence on its way through the model: caches per segment, and `step`, the forward pass of prefill and decode
alike."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np

from lightkv_export.manifest import Keep, KeepStage
from lightkv_export.runtime.backend import Buffer, to_float32
from lightkv_export.runtime.cache import SegmentCache
from lightkv_export.runtime.generation import OnStage, StageTrace
from lightkv_export.runtime.graphs import Graphs
from lightkv_export.runtime.importance import prompt_importance
from lightkv_export.runtime.layout import Layout
from lightkv_export.runtime.positions import chunk_positions, position_ids
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
        self._stages: dict[int, KeepStage] = {stage.after_segment: stage for stage in keep.stages}
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

    def step(self, tokens: Tokens, features: Mapping[int, np.ndarray], on_stage: OnStage | None = None) -> np.ndarray:
        """Run new tokens through every segment and stage and add them to the caches.

        Args:
            tokens: S >= 1 tokens. If a stage will run, every image among them is whole.
            features: serial -> [v, D] of the images among them.
            on_stage: called with what each stage did, importance included.

        Returns:
            Logits float32 [V] after the last token.
        """
        layout = Layout.uncompressed(len(tokens), tokens.images, self.graphs.manifest.image_tokens)
        embedded = self.graphs.embed(tokens, features)
        hidden = self.graphs.workspace.put("embedded", self.graphs.dtype, embedded)  # [1, S, D]
        rows, traces, merged = [], [], False
        for place in range(len(self.caches)):
            outputs = self._run_segment(place, hidden, layout)
            rows.append(layout.length)
            hidden = outputs.get("hidden_out")
            if place in self._stages and layout.images:
                stage = self._stages[place]
                importance = self._importance(outputs, layout) if on_stage is not None else None
                hidden, layout, trace = self._run_stage(stage, outputs, layout)  # [1, S', D]
                traces.append(trace)
                if on_stage is not None:
                    on_stage(replace(trace, importance=importance))
                merged = True
        logits = to_float32(self.graphs.backend.read(outputs["logits"])[0], outputs["logits"].dtype)
        self._commit(tokens, tuple(rows), merged)
        if len(tokens) > 1:
            self.traces = tuple(traces)
            self.graphs.workspace.clear()  # buffers of a prefill's size
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

    def _run_segment(self, place: int, hidden: Buffer, layout: Layout) -> dict[str, Buffer]:
        """Run one segment; returns its outputs other than caches."""
        graphs, past_len, length = self.graphs, self.filled[place], layout.length
        graph, manifest, put = graphs.segments[place], graphs.manifest, graphs.workspace.put
        positions = chunk_positions(manifest.positions, self.length, past_len, layout.survivors)
        inputs, cache_outputs = self.caches[place].bindings(past_len, length)
        inputs = dict(inputs, hidden=hidden)
        inputs["position_ids"] = put(f"position_ids{place}", "int64", position_ids(manifest.rope, positions))
        inputs["past_len"] = put(f"past_len{place}", "int64", np.array([past_len], np.int64))
        wanted = ["hidden_out"]
        if place == len(self.caches) - 1:
            inputs["logits_index"] = put("logits_index", "int64", np.array([length - 1], np.int64))
            wanted = ["logits"]
        elif place in self._stages and layout.images:
            wanted += ["query", "key"]
        outputs = {}
        for tensor in graph.outputs:
            if tensor.name in wanted:
                shape = (1, tensor.shape[-1]) if tensor.name == "logits" else (1, length, tensor.shape[-1])
                # The hidden states of neighbours alternate between two buffers: one is read while the other is written.
                outputs[tensor.name] = graphs.workspace.buffer(f"{tensor.name}{place % 2}", tensor.dtype, shape)
        graphs.executable(graph).run(inputs, {**cache_outputs, **outputs})
        return outputs

    def _run_stage(
        self, stage: KeepStage, probe: Mapping[str, Buffer], layout: Layout
    ) -> tuple[Buffer, Layout, StageTrace]:
        """Merge the vision tokens of a chunk; returns its hidden states and layout after the stage."""
        graphs, num_images, after = self.graphs, len(layout.images), stage.tokens_out
        graph, put, buffer = graphs.manifest.graph_named(stage.graph), graphs.workspace.put, graphs.workspace.buffer
        order = layout.order(after)
        inputs = {
            "hidden": probe["hidden_out"],
            "query": probe["query"],
            "key": probe["key"],
            "text_index": put("text_index", "int64", layout.text_index),
            "vision_index": put("vision_index", "int64", layout.vision_index),
            "order": put("order", "int64", order),
        }
        width = probe["hidden_out"].shape[-1]
        outputs = {
            "merged": buffer("merged", probe["hidden_out"].dtype, (1, len(order), width)),
            "kept": buffer("kept", "int64", (1, num_images, after)),
            "target": buffer("target", "int64", (1, num_images, stage.tokens_in)),
        }
        graphs.executable(graph).run(inputs, outputs)
        kept, target = (graphs.backend.read(outputs[name])[0] for name in ("kept", "target"))
        return outputs["merged"], layout.merged(kept), StageTrace(stage.layer, kept, target)

    def _importance(self, probe: Mapping[str, Buffer], layout: Layout) -> np.ndarray:
        """What the stage graph computes inside, once more on the host, for those who want to see it: float32 [I, v]."""
        text = self.graphs.manifest.model["text"]
        query, key = (to_float32(self.graphs.backend.read(probe[n])[0], probe[n].dtype) for n in ("query", "key"))
        return prompt_importance(query, key, layout.text_index, text["heads"], text["kv_heads"])[layout.vision_index]

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
