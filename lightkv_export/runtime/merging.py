"""The stages of a keep on a chunk: which units of vision tokens are merged after which segment, and the merging.

Images of different sizes may have units of different lengths, each with stages of its own. Where all units of a chunk
go through one stage, its graph hands out the whole next sequence. Otherwise every stage runs on the same hidden states,
for its own units, and the merged tokens are put together on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lightkv_export.manifest import Keep, KeepStage
from lightkv_export.runtime.backend import Buffer, to_float32
from lightkv_export.runtime.generation import OnStage, StageTrace
from lightkv_export.runtime.graphs import Graphs
from lightkv_export.runtime.importance import prompt_importance
from lightkv_export.runtime.layout import Layout


@dataclass(frozen=True)
class Work:
    """A stage and the units of a chunk that it merges."""

    stage: KeepStage
    units: tuple[int, ...]


@dataclass(frozen=True)
class Merged:
    """A chunk after the stages at one place: hidden states [1, S', D], its layout, and what each stage did."""

    hidden: Buffer
    layout: Layout
    traces: tuple[StageTrace, ...]


class Merger:
    """Runs the stages of one keep."""

    def __init__(self, graphs: Graphs, keep: Keep) -> None:
        self._graphs = graphs
        self._stages = {(plan.tokens, stage.after_segment): stage for plan in keep.plans for stage in plan.stages}

    def work_after(self, segment: int, layout: Layout) -> tuple[Work, ...]:
        """What there is to merge in this chunk after this segment."""
        units: dict[int, list[int]] = {}
        for number, unit in enumerate(layout.units):
            if (unit.whole, segment) in self._stages:
                units.setdefault(unit.whole, []).append(number)
        return tuple(Work(self._stages[whole, segment], tuple(numbers)) for whole, numbers in units.items())

    def merge(
        self, work: tuple[Work, ...], probe: Mapping[str, Buffer], layout: Layout, on_stage: OnStage | None = None
    ) -> Merged:
        """Merge vision tokens of a chunk.

        Args:
            work: what `work_after` found; not empty.
            probe: outputs of the segment: "hidden_out" [1, S, D], "query" and "key".
            on_stage: called with what each stage did, importance included.
        """
        if len(work) == 1 and len(work[0].units) == len(layout.units):
            kept = np.arange(work[0].stage.tokens_out)  # the order after the stage holds whichever tokens survive
            order = layout.merged(dict.fromkeys(work[0].units, kept)).order
            hidden, trace = self._run(work[0], probe, layout, order)
            done = Merged(hidden, layout.merged(dict(zip(trace.units, trace.kept, strict=True))), (trace,))
        else:
            done = self._merge_mixed(work, probe, layout)
        if on_stage is not None:
            for trace in done.traces:
                on_stage(replace(trace, importance=self._importance(probe, layout, trace.units)))
        return done

    def _merge_mixed(self, work: tuple[Work, ...], probe: Mapping[str, Buffer], layout: Layout) -> Merged:
        """Stages for some of the units each; units without a stage here stay as they are."""
        backend, text = self._graphs.backend, layout.text_index
        hidden = backend.read(probe["hidden_out"])[0]  # [S, D]
        rows = [hidden[unit.places] for unit in layout.units]
        kept, traces = {}, []
        for item in work:
            # Of this graph's sequence only the merged tokens are wanted; they follow the text.
            num_rows = len(text) + len(item.units) * item.stage.tokens_out
            merged, trace = self._run(item, probe, layout, np.arange(num_rows, dtype=np.int64))
            vision = backend.read(merged)[0, len(text) :]
            for number, unit_rows in zip(item.units, np.split(vision, len(item.units)), strict=True):
                rows[number] = unit_rows
            kept.update(zip(trace.units, trace.kept, strict=True))
            traces.append(trace)
        after = layout.merged(kept)
        assembled = np.concatenate([hidden[text], *rows])[after.order]
        buffer = self._graphs.workspace.put("merged", probe["hidden_out"].dtype, assembled[None])
        return Merged(buffer, after, tuple(traces))

    def _run(
        self, work: Work, probe: Mapping[str, Buffer], layout: Layout, order: np.ndarray
    ) -> tuple[Buffer, StageTrace]:
        """Run one stage graph; `order` int64 [R] gathers concat(text tokens, merged tokens)."""
        graphs, stage, num_units = self._graphs, work.stage, len(work.units)
        put, buffer = graphs.workspace.put, graphs.workspace.buffer
        inputs = {
            "hidden": probe["hidden_out"],
            "query": probe["query"],
            "key": probe["key"],
            "text_index": put("text_index", "int64", layout.text_index),
            "vision_index": put("vision_index", "int64", layout.vision_index(work.units)),
            "order": put("order", "int64", order),
        }
        width = probe["hidden_out"].shape[-1]
        outputs = {
            "merged": buffer("merged", probe["hidden_out"].dtype, (1, len(order), width)),
            "kept": buffer("kept", "int64", (1, num_units, stage.tokens_out)),
            "target": buffer("target", "int64", (1, num_units, stage.tokens_in)),
        }
        graphs.executable(graphs.manifest.graph_named(stage.graph)).run(inputs, outputs)
        kept, target = (graphs.backend.read(outputs[name])[0] for name in ("kept", "target"))
        return outputs["merged"], StageTrace(stage.layer, kept, target, units=work.units)

    def _importance(self, probe: Mapping[str, Buffer], layout: Layout, units: tuple[int, ...]) -> np.ndarray:
        """What the stage graph computes inside, once more on the host, for those who want to see it: float32 [I, v]."""
        text = self._graphs.manifest.model["text"]
        query, key = (to_float32(self._graphs.backend.read(probe[n])[0], probe[n].dtype) for n in ("query", "key"))
        importance = prompt_importance(query, key, layout.text_index, text["heads"], text["kv_heads"])
        return importance[layout.vision_index(units)]
