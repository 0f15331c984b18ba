"""Advice: what makes a plan fit on a target that is too small for it. Standard library only.

Every change is tried alone, gentlest first, and those that suffice are listed; if none does, they are added up until
the plan fits. What is tried was computed, never guessed: each entry carries the bytes that it leads to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightkv_export.errors import UserError
from lightkv_export.fit import Memory, Precision, memory, segment_lengths
from lightkv_export.schedule import Plan, plan, schedule_from_keep
from lightkv_export.targets import Target

KEEPS = (0.75, 0.55, 0.4, 0.3)
WEIGHTS = ("int8", "int4")
LEAST_NEW_TOKENS = 16  # advice to generate fewer is of no use


@dataclass(frozen=True)
class Setting:
    """What can be changed: the plan (its keep and tokens), how weights are stored, how finely segments are cut."""

    plan: Plan
    precision: Precision
    layers_per_segment: int | None = None

    def memory(self, target: Target) -> Memory:
        return memory(self.plan, target, self.precision, self.layers_per_segment)

    def fits(self, target: Target) -> bool:
        return self.memory(target).fits(target.available_bytes)


@dataclass(frozen=True)
class Advice:
    """One way to make it fit: the changes, in words, and the bytes that follow. No changes: nothing here helps."""

    changes: dict[str, float | int | str]
    text: str
    total: int
    build_peak: int


def advise(setting: Setting, target: Target) -> list[Advice]:
    """Ways to make `setting` fit on `target`; empty if it fits already."""
    if setting.fits(target):
        return []
    singles = [changed for _, changed in _changes(setting, target) if changed.fits(target)]
    if singles:
        return [_advice(setting, changed, target) for changed in singles]
    everything = setting
    for kind in ("weights", "segments", "keep", "tokens"):
        options = [changed for name, changed in _changes(everything, target) if name == kind]
        enough = [changed for changed in options if changed.fits(target)]
        if enough:
            return [_advice(setting, enough[0], target)]
        everything = options[-1] if options else everything
    need = everything.memory(target)
    gib = (max(need.total, need.build_peak) / 2**30) + target.device.reserved_gib
    text = f"nothing here makes it fit: use a smaller model, or a target with {gib:.1f} GiB of memory or more"
    return [Advice({}, text, need.total, need.build_peak)]


def _changes(setting: Setting, target: Target) -> Iterator[tuple[str, Setting]]:
    """Each single change with its kind, gentlest first; within a kind, the last one helps most."""
    if segments := _finer_segments(setting, target):
        yield "segments", segments
    for keep in KEEPS:
        if keep < setting.plan.schedule.keep:
            try:
                schedule = schedule_from_keep(setting.plan.recipe, keep, setting.plan.schedule.vision_tokens)
            except UserError:  # out of this model's reach
                continue
            yield "keep", replace(setting, plan=plan(setting.plan.recipe, schedule, setting.plan.request))
    for weights in WEIGHTS:
        candidate = replace(setting.precision, weights=weights)
        if candidate.weight_bytes < setting.precision.weight_bytes and target.has(weights):
            yield "weights", replace(setting, precision=candidate)
    if fewer := _fewer_tokens(setting, target):
        yield "tokens", fewer


def _finer_segments(setting: Setting, target: Target) -> Setting | None:
    """The coarsest cut that builds; else one layer per segment. Building is all that it changes."""
    if setting.memory(target).build_peak <= target.available_bytes:
        return None
    longest = max(segment_lengths(setting.plan, setting.layers_per_segment))
    finer = [replace(setting, layers_per_segment=count) for count in range(longest - 1, 0, -1)]
    return next((item for item in finer if item.memory(target).build_peak <= target.available_bytes), None) or (
        finer[-1] if finer else None
    )


def _fewer_tokens(setting: Setting, target: Target) -> Setting | None:
    """As many new tokens as fit, if that is a useful number."""
    request = setting.plan.request
    least, most = LEAST_NEW_TOKENS, request.new_tokens - 1

    def with_new(count: int) -> Setting:
        changed = replace(request, new_tokens=count)
        return replace(setting, plan=plan(setting.plan.recipe, setting.plan.schedule, changed))

    if most < least or not with_new(least).fits(target):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if with_new(middle).fits(target) else (least, middle - 1)
    return with_new(least)


def _advice(before: Setting, after: Setting, target: Target) -> Advice:
    changes: dict[str, float | int | str] = {}
    words = []
    if after.precision.weights != before.precision.weights:
        changes["weights"] = after.precision.weights
        words.append(f"--weights {after.precision.weights} (planned only: no export quantizes yet)")
    if after.plan.schedule != before.plan.schedule:
        changes["keep"] = after.plan.schedule.requested or after.plan.schedule.keep
        words.append(f"--keep {changes['keep']:g}")
    if after.plan.request.new_tokens != before.plan.request.new_tokens:
        changes["new_tokens"] = after.plan.request.new_tokens
        words.append(f"at most {after.plan.request.new_tokens} new tokens")
    need = after.memory(target)
    if after.layers_per_segment != before.layers_per_segment:
        changes["layers_per_segment"] = after.layers_per_segment or 0
        limit = math.ceil(need.build_peak / 2**30 * 10) / 10
        words.append(f"segments of at most {after.layers_per_segment} layers (export with --build-memory {limit:g})")
    text = f"{' and '.join(words)}: {need.total / 2**30:.2f} GiB to run, {need.build_peak / 2**30:.2f} GiB to build"
    return Advice(changes, text, need.total, need.build_peak)
