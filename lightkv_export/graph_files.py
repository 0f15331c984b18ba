"""The graphs of a bundle as work to do, one at a time, and as what is left of each once its file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightkv_export.export_plan import Plan, stage_name
from lightkv_export.manifest import Graph, Tensor
from lightkv_export.recipe import TextShape
from lightkv_export.skeleton import Skeleton
from lightkv_export.trace import Traced, trace_segment, trace_stage, trace_vision


@dataclass(frozen=True)
class GraphJob:
    """A graph that is to be made: its name, and how to trace it."""

    name: str
    trace: Callable[[], Traced]


@dataclass(frozen=True)
class GraphFile:
    """A graph whose file is written: its entry in the manifest, and the model's names of the weights that it reads."""

    graph: Graph
    weights: tuple[str, ...]

    @classmethod
    def of(cls, traced: Traced, weights: list[str]) -> GraphFile:
        file = f"onnx/{traced.name}.onnx"
        return cls(Graph(traced.name, file, traced.role, traced.inputs, traced.outputs, traced.layers), tuple(weights))

    def facts(self) -> dict[str, Any]:
        """As JSON, for the journal of an export."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> GraphFile:
        entry = facts["graph"]
        tensors = {
            side: tuple(Tensor(item["name"], item["dtype"], tuple(item["shape"])) for item in entry[side])
            for side in ("inputs", "outputs")
        }
        layers = None if entry["layers"] is None else tuple(entry["layers"])
        return cls(Graph(**{**entry, **tensors, "layers": layers}), tuple(facts["weights"]))


def graph_jobs(skeleton: Skeleton, text: TextShape, plan: Plan, protocol: str) -> Iterator[GraphJob]:
    """The vision graph, then the segments, then the stages of every keep."""
    yield GraphJob("vision", lambda: trace_vision(skeleton))
    for index, layers in enumerate(plan.segments):
        emit_query = plan.is_cut(layers[1] - 1)

        def segment(index: int = index, layers: tuple[int, int] = layers, emit_query: bool = emit_query) -> Traced:
            return trace_segment(skeleton, index, layers, protocol, emit_query=emit_query)

        yield GraphJob(f"segment_{index}", segment)
    for stage in plan.stages.values():
        yield GraphJob(stage_name(stage), lambda stage=stage: trace_stage(text, stage, skeleton.dtype))
