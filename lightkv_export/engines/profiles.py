"""What the engines of a bundle must accept: ranges of every dynamic axis, and cache capacities. Integers only, from
the manifest and the shapes of the vision graph's inputs for each image size.

Axes: S tokens fed at once, C cache rows (static for the scatter protocol, a view of the filled rows for append), T text
tokens, I units that a stage merges, R tokens after it. The axes of the vision graph follow from the image sizes: what
it is given for each of them.

A segment has one profile that serves decode and prefill, or one for each. Measured with TensorRT-RTX 1.7.1 on two
layers of llava-1.5-7b: with two profiles the engine holds 1.70 times its weights, with one 1.00 times, and peak build
memory is 29 % lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

from lightkv_export.errors import UserError
from lightkv_export.manifest import Graph, Keep, KeepPlan, KeepStage, Manifest

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input name -> (min, opt, max) shape, of the inputs with a dynamic axis."""
VisionShapes = Mapping[str, tuple[Shape, ...]]
"""Input of the vision graph -> its shape for each size of the bundle, in the manifest's order."""

TEXT_TOKENS = 512  # text that a prefill may hold beside the images, unless --profile-tokens says otherwise
TYPICAL_TEXT = 64  # kernels are chosen for such a prompt with one image


@dataclass(frozen=True)
class Range:
    """Least, most likely and greatest size of an axis."""

    least: int
    likely: int
    most: int

    @staticmethod
    def of(least: int, likely: int, most: int) -> Range:
        """The range with `likely` moved inside."""
        return Range(least, min(max(likely, least), most), most)

    def joined(self, other: Range) -> Range:
        """The range that holds both, with this one's likely size."""
        return Range(min(self.least, other.least), self.likely, max(self.most, other.most))


@dataclass(frozen=True)
class EnginePlan:
    """One engine: its graph, the number written into axis C (None: C stays dynamic or there is none), and its
    profiles."""

    graph: str
    capacity: int | None
    profiles: tuple[Profile, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON reads them back."""
        profiles = [{name: [list(shape) for shape in shapes] for name, shapes in p.items()} for p in self.profiles]
        return asdict(self) | {"profiles": profiles}


@dataclass(frozen=True)
class Limits:
    """The longest sequence that engines serve, in uncompressed tokens, and the most tokens that one step feeds."""

    max_tokens: int
    chunk: int

    @staticmethod
    def of(manifest: Manifest, max_tokens: int | None, chunk: int | None) -> Limits:
        """What is asked for, else the bundle's limit, and all images and some text at once.

        Raises:
            UserError: a number does not hold an image, or exceeds the bundle's limit.
        """
        sizes = [size.image_tokens for size in manifest.sizes]
        least, longest = max(sizes) + 1, max_tokens or manifest.max_tokens
        whole = min(longest, manifest.max_images * max(sizes) + TEXT_TOKENS)
        limits = Limits(longest, chunk or whole)
        for name, value, most in (
            ("--max-tokens", longest, manifest.max_tokens),
            ("--profile-tokens", limits.chunk, longest),
        ):
            if not least <= value <= most:
                raise UserError(
                    f"{name} is {value}",
                    expected=f"{least} (an image of the largest size and a text token) to {most}, the longest sequence",
                )
        return limits


def capacity(manifest: Manifest, graph: Graph, keeps: tuple[Keep, ...], max_tokens: int) -> int:
    """Cache rows of a segment: what the longest sequence with one image leaves there, for the keep and the size that
    leave most.

    A conversation without an image has that many tokens at most; engines for keep 1.0 hold all `max_tokens`.
    """
    layer = graph.layers[0]
    merged = min(
        size.image_tokens - size.units * keep.plan_for(size.tokens).vision_tokens_per_layer[layer]
        for keep in keeps
        for size in manifest.sizes
    )
    return max_tokens - merged


def plan_engines(
    manifest: Manifest, keeps: tuple[Keep, ...], limits: Limits, vision: VisionShapes, num_profiles: int = 1
) -> tuple[EnginePlan, ...]:
    """The engines that `keeps` need, in the manifest's order.

    Args:
        keeps: stages are built for these; keep 1.0 needs none.
        vision: what the vision graph is given.
        num_profiles: of a segment: 1, or 2 (decode, prefill).
    """
    stages, plans = _stage_ranges(manifest, keeps, limits.chunk), []
    for graph in manifest.graphs:
        if graph.role == "vision":
            plans.append(EnginePlan(graph.name, None, (vision_profile(graph, vision),)))
        elif graph.role == "segment":
            plans.append(_segment(manifest, graph, keeps, limits, num_profiles))
        elif graph.name in stages:
            plans.append(EnginePlan(graph.name, None, (axes_profile(graph, stages[graph.name]),)))
    return tuple(plans)


def vision_profile(graph: Graph, shapes: VisionShapes) -> Profile:
    """From the smallest to the largest that any size needs; the default size, which is the first, is the likely one."""
    profile = {}
    for tensor in graph.inputs:
        if any(isinstance(axis, str) for axis in tensor.shape):
            axes = list(zip(*shapes[tensor.name], strict=True))
            profile[tensor.name] = tuple(tuple(pick(axis) for axis in axes) for pick in (min, itemgetter(0), max))
    return profile


def _segment(
    manifest: Manifest, graph: Graph, keeps: tuple[Keep, ...], limits: Limits, num_profiles: int
) -> EnginePlan:
    static = manifest.cache_protocol == "scatter"
    rows = capacity(manifest, graph, keeps, limits.max_tokens) if static else limits.max_tokens
    typical = manifest.sizes[0].image_tokens + TYPICAL_TEXT
    decode = {"S": Range(1, 1, 1), "C": Range.of(1, typical, rows)}
    prefill = {"S": Range.of(1, typical, limits.chunk), "C": Range.of(1, TYPICAL_TEXT, rows)}
    if static:
        decode["C"] = prefill["C"] = Range(rows, rows, rows)
    # One profile serves both: kernels are chosen for a prefill, since decoding is bound by reading the weights with
    # any kernel.
    chosen = (decode, prefill) if num_profiles == 2 else (prefill,)
    return EnginePlan(
        graph.name, rows if static else None, tuple(axes_profile(graph, axes, static=static) for axes in chosen)
    )


def _stage_ranges(manifest: Manifest, keeps: tuple[Keep, ...], chunk: int) -> dict[str, dict[str, Range]]:
    """Ranges of every stage graph. One may serve units of several lengths: where a stage leaves as many tokens of one
    unit as another has at first."""
    ranges: dict[str, dict[str, Range]] = {}
    used = ((plan, stage) for keep in keeps for plan in keep.plans for stage in plan.stages)
    for unit, stage in used:
        axes = _stage_axes(manifest, unit, stage, chunk)
        known = ranges.get(stage.graph, axes)
        ranges[stage.graph] = {name: known[name].joined(axis) for name, axis in axes.items()}
    return ranges


def _stage_axes(manifest: Manifest, plan: KeepPlan, stage: KeepStage, chunk: int) -> dict[str, Range]:
    """Ranges of a stage after whose like the units of `plan.tokens` vision tokens have `stage.tokens_in` left.

    A chunk that enters the model with i units has i * plan.tokens fewer other tokens, so it is longest here with one.
    """
    per_image = max(size.units for size in manifest.sizes if size.tokens == plan.tokens)
    most = max(1, min(manifest.max_images * per_image, (chunk - 1) // plan.tokens))
    units, text = Range.of(1, per_image, most), Range.of(1, TYPICAL_TEXT, chunk - plan.tokens)

    def length(tokens: int) -> Range:
        return Range.of(1 + tokens, text.likely + units.likely * tokens, text.most + tokens)

    return {"S": length(stage.tokens_in), "R": length(stage.tokens_out), "T": text, "I": units}


def axes_profile(graph: Graph, axes: Mapping[str, Range], *, static: bool = False) -> Profile:
    """Shapes of every input with a named axis; with `static`, C becomes a number in the graph, so the caches need no
    range."""
    profile = {}
    for tensor in graph.inputs:
        names = {axis for axis in tensor.shape if isinstance(axis, str)}
        if names - ({"C"} if static else set()):
            sizes = [{name: getattr(axes[name], which) for name in names} for which in ("least", "likely", "most")]
            profile[tensor.name] = tuple(tuple(size.get(axis, axis) for axis in tensor.shape) for size in sizes)
    return profile
