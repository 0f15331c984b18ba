"""What an export will build: the stages of every keep for every unit of vision tokens, and where segments are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightkv_export.engines.cuts import finer_cuts
from lightkv_export.errors import UserError
from lightkv_export.manifest import Keep, KeepPlan, KeepStage
from lightkv_export.recipe import Recipe, StageSpec
from lightkv_export.schedule import Schedule, Stage, schedule_from_keep, schedule_from_other, schedule_from_stages


@dataclass(frozen=True)
class Cuts:
    """What decides where the decoder is cut.

    Attributes:
        keeps: shares of vision tokens to keep; 1.0 is always added.
        stages: explicit stages instead of keeps.
        tokens: the different unit lengths of the image sizes, the default size's first; empty: the recipe's.
        deepstack_layers: layers behind which vision features are added; no stage may stand before the last of them.
        build_memory: bytes that building one TensorRT engine may take; None: no limit.
        weight_bytes: bytes per weight, for that limit.
    """

    keeps: Sequence[float] = ()
    stages: Sequence[StageSpec] = ()
    tokens: Sequence[int] = ()
    deepstack_layers: Sequence[int] = ()
    build_memory: int | None = None
    weight_bytes: int = 4


@dataclass(frozen=True)
class Plan:
    """The cuts: per keep (1.0 first) a schedule for every unit length, and segments as layer ranges."""

    schedules: tuple[tuple[Schedule, ...], ...]
    segments: tuple[tuple[int, int], ...]

    @property
    def stages(self) -> dict[str, Stage]:
        """Every different stage once, by graph name."""
        return {stage_name(stage): stage for stage in self._all_stages()}

    @property
    def default_keep(self) -> float:
        """The first keep that was asked for."""
        return _requested(self.schedules[min(1, len(self.schedules) - 1)])

    def is_cut(self, layer: int) -> bool:
        return any(stage.layer == layer for stage in self._all_stages())

    def keeps(self) -> tuple[Keep, ...]:
        """The manifest's form."""
        ends = [last for _, last in self.segments]
        return tuple(
            Keep(_requested(schedules), tuple(_keep_plan(schedule, ends) for schedule in schedules))
            for schedules in self.schedules
        )

    def _all_stages(self) -> list[Stage]:
        return [stage for schedules in self.schedules for schedule in schedules for stage in schedule.stages]


def stage_name(stage: Stage) -> str:
    """Two keeps that merge alike share a graph: the name says all that its constants depend on."""
    return f"stage_v{stage.tokens_in}_w{stage.windows_per_side}_r{stage.discard_ratio:g}"


def plan_cuts(recipe: Recipe, cuts: Cuts) -> Plan:
    """Schedules for every keep (or the explicit stages), and segments cut at the union of their layers.

    Raises:
        UserError: no stages reach a keep for some unit length, or a stage does nothing or stands where none may.
    """
    layers, lengths = recipe.shape.text.layers, tuple(cuts.tokens) or (recipe.shape.vision.tokens,)
    vanilla = tuple(Schedule(1.0, layers, tokens, ()) for tokens in lengths)
    if cuts.stages:
        chosen = [tuple(schedule_from_stages(layers, tokens, cuts.stages) for tokens in lengths)]
    else:
        keeps = [keep for keep in dict.fromkeys(cuts.keeps) if keep != 1.0]
        chosen = [tuple(_schedules(recipe, keep, lengths)) for keep in keeps]
    stages = [stage for schedules in chosen for schedule in schedules for stage in schedule.stages]
    _check_deepstack(stages, cuts.deepstack_layers)
    bounds = [0, *sorted({stage.layer + 1 for stage in stages}), layers]
    segments = tuple(pairwise(bounds))
    if cuts.build_memory is not None:
        segments = finer_cuts(bounds, recipe.shape.text, cuts.weight_bytes, cuts.build_memory)
    return Plan((vanilla, *chosen), segments)


def _schedules(recipe: Recipe, keep: float, lengths: Sequence[int]) -> Iterator[Schedule]:
    """The keep's schedule for every unit length; where they can, all have their stages at the layers of the first."""
    first = schedule_from_keep(recipe, keep, lengths[0])
    yield first
    for tokens in lengths[1:]:
        try:
            yield schedule_from_other(recipe, first, tokens)
        except UserError as error:
            raise UserError(
                f"for images of {tokens} vision tokens: {error.found}",
                expected=error.expected,
                fix=f"{error.fix}; or leave that image size out" if error.fix else "leave that image size out",
            ) from None


def _check_deepstack(stages: Sequence[Stage], deepstack_layers: Sequence[int]) -> None:
    last = max(deepstack_layers, default=-1)
    early = sorted({stage.layer for stage in stages if stage.layer < last})
    if early:
        raise UserError(
            f"a stage after layer {early[0]}, but this model adds vision features to its tokens up to layer {last}",
            expected=f"stages after layer {last} or later: merged tokens have no place for features of single ones",
            fix=f"choose a larger keep, or name the stages: --stage {last}:4:0.5 or later",
        )


def _requested(schedules: Sequence[Schedule]) -> float:
    first = schedules[0]
    return first.keep if first.requested is None else first.requested


def _keep_plan(schedule: Schedule, ends: Sequence[int]) -> KeepPlan:
    stages = tuple(
        KeepStage(
            layer=stage.layer,
            windows_per_side=stage.windows_per_side,
            discard_ratio=stage.discard_ratio,
            tokens_in=stage.tokens_in,
            tokens_out=stage.tokens_out,
            graph=stage_name(stage),
            after_segment=ends.index(stage.layer + 1),
        )
        for stage in schedule.stages
    )
    return KeepPlan(schedule.vision_tokens, schedule.keep, stages, schedule.vision_tokens_per_layer)
