"""Schedules: how many vision tokens each layer caches, and what that costs. Integers only; standard library only.

Convention, stated once and used everywhere: a stage with layer λ runs AFTER decoder layer λ (0-based). It shortens the
hidden states that layer λ+1 receives, so layers 0..λ of the first stage cache all v vision tokens. *keep* is the mean
over layers of (vision tokens cached in that layer) / v, so planned keep and measured cache bytes are the same number.
(The paper, arXiv 2605.00789, writes λ1 where this has λ1+1.) Everything depends on (v, w, ρ) alone, never on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lightkv_export import flops
from lightkv_export.errors import UserError
from lightkv_export.flops import Flops
from lightkv_export.recipe import ModelShape, Recipe, StageSpec, TextShape
from lightkv_export.solver import KEEP_TOLERANCE, solve
from lightkv_export.windows import (
    MIN_TOKENS_PER_WINDOW,
    most_windows,
    skips,
    tokens_after,
    tokens_discarded,
    window_members,
)

__all__ = [
    "Plan",
    "Request",
    "Schedule",
    "Stage",
    "plan",
    "schedule_from_keep",
    "schedule_from_other",
    "schedule_from_stages",
    "tokens_after",
    "tokens_discarded",
    "window_members",
]


@dataclass(frozen=True)
class Stage:
    """A stage of a schedule; `tokens_in` and `tokens_out` are vision tokens of one unit."""

    layer: int
    windows_per_side: int
    discard_ratio: float
    tokens_in: int
    tokens_out: int

    @property
    def spec(self) -> StageSpec:
        return StageSpec(self.layer, self.windows_per_side, self.discard_ratio)


@dataclass(frozen=True)
class Schedule:
    """The stages of one keep; `vision_tokens` is per unit (see `VisionShape`), `requested` the keep asked for (None:
    stages given)."""

    requested: float | None
    num_layers: int
    vision_tokens: int
    stages: tuple[Stage, ...]

    @property
    def vision_tokens_per_layer(self) -> tuple[int, ...]:
        """Vision tokens of one unit that each layer caches, length `num_layers`."""
        counts = [self.vision_tokens] * self.num_layers
        for stage in self.stages:
            after = self.num_layers - (stage.layer + 1)
            counts[stage.layer + 1 :] = [stage.tokens_out] * after
        return tuple(counts)

    @property
    def keep(self) -> float:
        return sum(self.vision_tokens_per_layer) / (self.num_layers * self.vision_tokens)


@dataclass(frozen=True)
class Request:
    """What is asked of the model; the defaults are the paper's measurement (prompt of about 45 text tokens).

    Attributes:
        text_tokens: tokens of the prompt that are not vision tokens.
        new_tokens: tokens generated.
        batch: sequences, each with `images` images.
        kv_bytes_per_element: 2 for fp16 and bf16, 4 for fp32.
    """

    text_tokens: int = 45
    new_tokens: int = 100
    batch: int = 1
    images: int = 1
    kv_bytes_per_element: int = 2

    def __post_init__(self) -> None:
        for name, least in (("text_tokens", 0), ("new_tokens", 0), ("batch", 1), ("images", 0)):
            value = getattr(self, name)
            if value < least:
                words = name.replace("_", " ")
                raise UserError(
                    f"{words} is {value}",
                    expected=f"at least {least}",
                    fix=f"set --{name.replace('_', '-')} to {least} or more",
                )


@dataclass(frozen=True)
class Plan:
    """What a request costs under a schedule, beside the uncompressed model (`*_vanilla`)."""

    recipe: Recipe
    schedule: Schedule
    request: Request
    kv_bytes_per_layer: tuple[int, ...]
    kv_bytes_vanilla: int
    flops: Flops
    flops_vanilla: Flops

    @property
    def kv_bytes(self) -> int:
        return sum(self.kv_bytes_per_layer)


def schedule_from_stages(num_layers: int, vision_tokens: int, specs: Sequence[StageSpec]) -> Schedule:
    """The schedule of explicitly given stages.

    Raises:
        UserError: layers not ascending or without a layer behind them, or a stage that would do nothing.
    """
    _check_layers(num_layers, specs)
    stages: list[Stage] = []
    tokens = vision_tokens
    for spec in specs:
        left = tokens_after(tokens, spec.windows_per_side, spec.discard_ratio)
        if left == tokens:
            raise UserError(
                f"stage {spec} would do nothing: {_why_idle(tokens, spec)}",
                expected="a stage that discards at least one vision token",
                fix="use fewer windows per side or a larger ratio, or leave the stage out",
            )
        stages.append(Stage(spec.layer, spec.windows_per_side, spec.discard_ratio, tokens, left))
        tokens = left
    return Schedule(None, num_layers, vision_tokens, tuple(stages))


def schedule_from_keep(recipe: Recipe, keep: float, vision_tokens: int | None = None) -> Schedule:
    """A schedule whose keep is within 0.01 of `keep`: the recipe's own nearest one if there is one, else solved.

    1.0 means no stages. `vision_tokens` per unit default to the recipe's. Module `solver` says how stages are placed.

    Raises:
        UserError: a keep outside (0, 1], or one that no stages reach; names the range and the stages at its ends.
    """
    if not 0 < keep <= 1:
        raise UserError(
            f"keep is {keep}",
            expected="a share of vision tokens kept, above 0 and at most 1",
            fix="write 55 % as --keep 0.55; 1.0 is the uncompressed model",
        )
    layers = recipe.shape.text.layers
    tokens = recipe.shape.vision.tokens if vision_tokens is None else vision_tokens
    if keep == 1:
        return Schedule(keep, layers, tokens, ())
    own = [_usable(layers, tokens, specs) for specs in recipe.schedules.values()]
    near = [item for item in own if item is not None and abs(item.keep - keep) <= KEEP_TOLERANCE]
    if near:
        schedule = min(near, key=lambda item: abs(item.keep - keep))
    else:
        schedule = schedule_from_stages(layers, tokens, solve(layers, tokens, recipe.windows, keep))
    return replace(schedule, requested=keep)


def schedule_from_other(recipe: Recipe, other: Schedule, vision_tokens: int) -> Schedule:
    """`other` for units of `vision_tokens` tokens, as another image size has them.

    Stages stay at their layers, with fewer windows where the skip rule asks for it, as long as their keep stays within
    0.01 of the one asked for: then both sizes need the same cuts between segments. Else the keep is solved anew.

    Raises:
        UserError: stages that were given explicitly do nothing here, or the keep is out of reach.
    """
    layers = other.num_layers
    if other.requested is None:
        return schedule_from_stages(layers, vision_tokens, [stage.spec for stage in other.stages])
    specs, left = [], vision_tokens
    for stage in other.stages:
        side = max(1, min(stage.windows_per_side, most_windows(left)))
        specs.append(StageSpec(stage.layer, side, stage.discard_ratio))
        left = tokens_after(left, side, stage.discard_ratio)
    same = _usable(layers, vision_tokens, specs)
    if same is None or abs(same.keep - other.requested) > KEEP_TOLERANCE:
        return schedule_from_keep(recipe, other.requested, vision_tokens)
    return replace(same, requested=other.requested)


def plan(recipe: Recipe, schedule: Schedule, request: Request) -> Plan:
    """Cache bytes and FLOPs of `request`, compressed by `schedule` and uncompressed.

    Bytes: batch x Σ layers (images units v_l + text + new tokens) x 2 x kv_heads x head_dim x bytes per element. FLOPs:
    the prompt, then one pass per generated token, so that every cached row is computed (convention: module `flops`).
    """
    vanilla = Schedule(1.0, schedule.num_layers, schedule.vision_tokens, ())
    return Plan(
        recipe=recipe,
        schedule=schedule,
        request=request,
        kv_bytes_per_layer=_kv_bytes_per_layer(recipe.shape, schedule, request),
        kv_bytes_vanilla=sum(_kv_bytes_per_layer(recipe.shape, vanilla, request)),
        flops=_flops(recipe.shape, schedule, request),
        flops_vanilla=_flops(recipe.shape, vanilla, request),
    )


def _check_layers(num_layers: int, specs: Sequence[StageSpec]) -> None:
    for spec in specs:
        if spec.layer > num_layers - 2:
            raise UserError(
                f"stage {spec} runs after layer {spec.layer} of a model with layers 0 to {num_layers - 1}",
                expected=f"a layer from 0 to {num_layers - 2}, so that at least one layer follows the stage",
                fix="choose a shallower layer",
            )
    for earlier, later in pairwise(specs):
        if later.layer <= earlier.layer:
            raise UserError(
                f"stage {later} is given after stage {earlier}",
                expected="layers in ascending order, each at most once",
                fix="sort the stages by layer",
            )


def _why_idle(tokens: int, spec: StageSpec) -> str:
    if skips(tokens, spec.windows_per_side):
        least = MIN_TOKENS_PER_WINDOW * spec.windows_per_side**2
        return (
            f"{tokens} vision tokens reach it, and a stage with {spec.windows_per_side} x {spec.windows_per_side} "
            f"windows skips fewer than {least} (8 per window)"
        )
    return f"ratio {spec.discard_ratio} of the few tokens in a window rounds down to none"


def _usable(num_layers: int, vision_tokens: int, specs: Sequence[StageSpec]) -> Schedule | None:
    """The schedule of a recipe's stages, or None: with another image size some of them may have nothing to do."""
    try:
        return schedule_from_stages(num_layers, vision_tokens, specs)
    except UserError:
        return None


def _kv_bytes_per_layer(shape: ModelShape, schedule: Schedule, request: Request) -> tuple[int, ...]:
    row = 2 * shape.text.kv_heads * shape.text.head_dim * request.kv_bytes_per_element  # key and value
    return tuple(request.batch * row * (rows + request.new_tokens) for rows in _prompt_rows(shape, schedule, request))


def _prompt_rows(shape: ModelShape, schedule: Schedule, request: Request) -> list[int]:
    """Tokens of one sequence's prompt that each layer sees."""
    units = request.images * shape.vision.units
    return [units * count + request.text_tokens for count in schedule.vision_tokens_per_layer]


def _flops(shape: ModelShape, schedule: Schedule, request: Request) -> Flops:
    text, rows = shape.text, _prompt_rows(shape, schedule, request)
    units = request.images * shape.vision.units
    one_sequence = Flops(
        vision=request.images * flops.vision_flops(shape.vision),
        projector=request.images * flops.projector_flops(shape),
        prefill=sum(flops.prefill_layer_flops(text, count) for count in rows),
        stages=sum(_stage_flops(text, stage, units, request.text_tokens) for stage in schedule.stages) if units else 0,
        decode=sum(flops.decode_layer_flops(text, count, request.new_tokens) for count in rows),
        lm_head=flops.lm_head_flops(text, 1 + request.new_tokens),  # the prompt's last row samples the first token
    )
    return one_sequence.times(request.batch)


def _stage_flops(text: TextShape, stage: Stage, units: int, text_tokens: int) -> int:
    windows = window_members(stage.tokens_in, stage.windows_per_side)
    merge = flops.merge_flops(text, (len(window) for window in windows))
    return flops.importance_flops(text, units * stage.tokens_in + text_tokens, text_tokens) + units * merge
