"""The gate: a bundle against the PyTorch reference. Made for CI.

At keep 1.0 the reference is Hugging Face's `generate` on the unmodified model, token for token; at every keep it is the
eager model with the same stages, logits and tokens, for every image size. Both run on the reference's tokens (teacher
forcing): where every step's best token is the reference's, free greedy decoding gives the same text. Pixel values must
be the checkpoint's own processor's, and cache bytes, as counted, the plan's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from lightkv_export.checkpoint import checkpoint_directory
from lightkv_export.errors import BackendError, UserError
from lightkv_export.families import family_named, resolve_recipe
from lightkv_export.manifest import Keep, Manifest, Size
from lightkv_export.recipe import Recipe
from lightkv_export.reference import EagerSession, Encoded, Reference
from lightkv_export.report import Check
from lightkv_export.runtime import load
from lightkv_export.runtime.generation import Request
from lightkv_export.runtime.image import pixel_values
from lightkv_export.runtime.model import Model
from lightkv_export.schedule import Request as PlanRequest
from lightkv_export.schedule import Schedule, Stage, plan
from lightkv_export.tolerances import PIXELS, Tolerances, tolerances_for
from lightkv_export.trace import TORCH_DTYPES
from lightkv_export.verify_cases import CASES, Case, pictures_for, stages_of, with_other_sizes

OnCase = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Compared:
    """Teacher-forced logits of both sides, [steps, V], and the reference's tokens."""

    expected: np.ndarray
    found: np.ndarray
    tokens: Sequence[int]


@dataclass(frozen=True)
class Against:
    """What a bundle is compared with: the reference, its position policy, tokens per answer, and the limits."""

    reference: Reference
    positions: str
    new_tokens: int
    limits: Tolerances


def verify_bundle(
    path: Path,
    *,
    model: str | None = None,
    cases: Sequence[Case] = CASES,
    new_tokens: int = 64,
    threads: int | None = None,
    on_case: OnCase = lambda name, done, total: None,
) -> list[Check]:
    """Runs every case at every keep of the bundle at `path`.

    Args:
        path: the bundle.
        model: the reference (recipe, directory or hub id); None takes what the bundle was made from.
        cases: conversations; those that do not fit into the bundle's limits are left out.
        new_tokens: tokens compared per answer.
        threads: CPU threads of one graph; None takes all cores.
        on_case: progress.

    Raises:
        BundleError: not a whole bundle. UserError: the reference cannot be loaded, or no tokens to compare.
    """
    if new_tokens < 1:
        raise UserError(f"{new_tokens} new tokens", expected="at least 1 token per answer to compare")
    bundle = load(path, threads=threads)
    manifest = bundle.manifest
    recipe, against = against_from_bundle(bundle, model, new_tokens)
    cases = [case for case in with_other_sizes(cases, manifest) if _fits(case, against, manifest)]
    checks: list[Check] = list(_pixels(cases, against, manifest))
    for done, case in enumerate(cases):
        for keep in manifest.keeps:
            on_case(f"{case.name}, keep {keep.requested:g}", done, len(cases))
            try:
                checks += _conversation(bundle, against, case, keep)
                checks.append(_cache_bytes(bundle, recipe, case, keep))
            except BackendError as error:  # graphs that do not fit together are a result, too
                checks.append(Check(case.name, keep.requested, "the graphs run", 0, "= 1", False, str(error)))
    return checks


def _fits(case: Case, against: Against, manifest: Manifest) -> bool:
    """Whether images and tokens of the whole conversation stay within the bundle's limits."""
    shown = [picture.image for picture in pictures_for(case, manifest)]
    parts = [{"type": "image"}] * len(shown) + [{"type": "text", "text": " ".join(text for text, _ in case.turns)}]
    prompt = against.reference.encode([{"role": "user", "content": parts}], shown)
    margin = 32 * len(case.turns)  # what a template writes around a turn
    tokens = len(prompt.ids) + len(case.turns) * against.new_tokens + margin
    return len(shown) <= manifest.max_images and tokens <= manifest.max_tokens


def _pixels(cases: Sequence[Case], against: Against, manifest: Manifest) -> Iterator[Check]:
    """The runtime's preprocessing against the checkpoint's own, for every size that a case shows alone."""
    for case in cases:
        if case.num_images != 1 or len(case.turns) != 1:
            continue
        (shown,) = pictures_for(case, manifest)
        expected = np.asarray(against.reference.image_inputs([shown.image])["pixel_values"])
        found = pixel_values(manifest.preprocess, shown.image, shown.size)
        same = expected.size == found.size
        difference = np.abs(found - expected.reshape(found.shape)).max() / np.abs(expected).max() if same else np.inf
        note = f"shape {found.shape}, the processor's {expected.shape}"
        yield _at_most(case.name, manifest.keep_named(1.0), "pixel values, relative", float(difference), PIXELS, note)


def against_from_bundle(bundle: Model, model: str | None, new_tokens: int) -> tuple[Recipe, Against]:
    """What `bundle` is compared with, and its recipe; arguments and errors as for `verify_bundle`."""
    manifest = bundle.manifest
    recipe = resolve_recipe(model or manifest.source["model"])
    # What was asked for, not what the manifest says; another model's recipe knows nothing of this bundle.
    asked = manifest.source.get("positions") or recipe.positions
    positions = manifest.positions if model else asked
    family = family_named(recipe.family)
    checkpoint = checkpoint_directory(recipe.checkpoint, recipe.revision)
    reference = Reference(checkpoint, family)
    limits = tolerances_for(manifest.dtype, manifest.source["tolerances"])
    return recipe, Against(reference, positions, new_tokens, limits)


def _conversation(bundle: Model, against: Against, case: Case, keep: Keep) -> Iterator[Check]:
    """Checks of one case at one keep, turn by turn."""
    reference = against.reference
    session = bundle.session(keep.requested)
    shown = pictures_for(case, bundle.manifest)
    chunks: list[_Turn] = []
    done = 0
    for turn, (text, num_images) in enumerate(case.turns):
        new, done = shown[done : done + num_images], done + num_images
        session.append(text, [picture.image for picture in new])
        messages = [message.as_dict() for message in session.messages]
        prompt = reference.encode(messages, [picture.image for picture in shown[:done]])
        inputs = reference.image_inputs([picture.image for picture in new])
        chunks.append(_Turn(len(prompt.ids), inputs, [tokens for picture in new for tokens in picture.units]))
        tokens, expected = _reference_answer(against, prompt, chunks, keep, bundle.manifest.eos_token_ids)
        found: list[np.ndarray] = []
        session.generate(Request(forced=tuple(tokens), on_logits=partial(_append_copy, found)))
        name = case.name if len(case.turns) == 1 else f"{case.name} ({turn + 1})"
        yield from _compare(name, keep, Compared(np.stack(expected), np.stack(found), tokens), against.limits)
        if not stages_of(keep) and bundle.manifest.dtype == "float32":
            generated = reference.generate(prompt, against.new_tokens)
            yield _against_generate(name, keep, generated, tokens, expected, against.limits)


@dataclass(frozen=True)
class _Turn:
    """A turn as the reference takes it: where it ends in the prompt, inputs of its images, and their units."""

    end: int
    image_inputs: Mapping[str, Any]
    units: Sequence[int]


def _append_copy(rows: list[np.ndarray], row: np.ndarray) -> None:
    rows.append(row.copy())


def _reference_answer(
    against: Against, prompt: Encoded, chunks: Sequence[_Turn], keep: Keep, eos: Sequence[int]
) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens and logits of the eager model with the keep's stages; every turn's prompt is one chunk."""
    session, done = EagerSession(against.reference, stages_of(keep), against.positions), 0
    for turn in chunks:
        logits = session.feed(prompt.ids[done : turn.end].tolist(), turn.image_inputs, turn.units)
        done = turn.end
    tokens, chosen_by = session.greedy(logits, against.new_tokens, eos)
    return tokens, [row.numpy() for row in chosen_by]


def _compare(case: str, keep: Keep, both: Compared, limits: Tolerances) -> Iterator[Check]:
    difference = np.abs(both.expected - both.found)
    share = np.linalg.norm(both.expected - both.found, axis=-1) / np.linalg.norm(both.expected, axis=-1)
    rows = np.arange(len(both.tokens))
    chosen = both.found.argmax(-1)
    gap = both.expected.max(-1) - both.expected[rows, chosen]  # 0 where both agree
    agree = gap <= limits.tie
    worst = int(difference.max(-1).argmax())
    where = f"largest difference at new token {worst}"
    yield _at_most(case, keep, "logits, largest difference", float(difference.max()), limits.logits, where)
    yield _at_most(case, keep, "logits, share of norm", float(share.max()), limits.logits_share, where)
    missed = [f"token {i}: {chosen[i]} for {both.tokens[i]}, {gap[i]:.2g} apart" for i in rows[~agree][:3]]
    top1 = float(agree.mean())
    yield Check(
        case, keep.requested, "top-1 agreement", top1, f">= {limits.top1:g}", top1 >= limits.top1, "; ".join(missed)
    )


def _against_generate(
    case: str, keep: Keep, generated: list[int], tokens: list[int], expected: list[np.ndarray], limits: Tolerances
) -> Check:
    """Tokens of Hugging Face's `generate`; after a tie the two may rightly part."""
    same = 0
    while same < min(len(generated), len(tokens)) and generated[same] == tokens[same]:
        same += 1
    whole = same == len(generated) == len(tokens)
    tie = not whole and same < min(len(generated), len(tokens))
    tie = tie and bool(expected[same].max() - expected[same][generated[same]] <= limits.tie)
    note = "" if whole else f"part at new token {same}" + (", at a tie" if tie else "")
    return Check(case, keep.requested, "tokens of generate", same, f"= {len(generated)}", whole or tie, note)


def _cache_bytes(bundle: Model, recipe: Recipe, case: Case, keep: Keep) -> Check:
    """Bytes that the runtime counts for the case's first turn against the planner's, to the byte."""
    text, num_images = case.turns[0]
    shown = pictures_for(case, bundle.manifest)[:num_images]
    result = bundle.run(text, [picture.image for picture in shown], keep=keep.requested, max_new_tokens=2)
    sizes = [picture.size for picture in shown]
    text_tokens = result.prompt_tokens - sum(size.image_tokens for size in sizes)
    bytes_per_element = TORCH_DTYPES[bundle.manifest.dtype].itemsize
    planned = _planned_bytes(
        recipe, keep, bundle.manifest.sizes[0], PlanRequest(text_tokens, 2, 1, 0, bytes_per_element)
    )
    for size in sizes:  # images of different sizes add up
        planned += _planned_bytes(recipe, keep, size, PlanRequest(0, 0, 1, 1, bytes_per_element))
    return Check(case.name, keep.requested, "cache bytes", result.kv_bytes, f"= {planned}", result.kv_bytes == planned)


def _planned_bytes(recipe: Recipe, keep: Keep, size: Size, request: PlanRequest) -> int:
    stages = [
        Stage(s.layer, s.windows_per_side, s.discard_ratio, s.tokens_in, s.tokens_out)
        for s in keep.plan_for(size.tokens).stages
    ]
    vision = replace(recipe.shape.vision, tokens=size.tokens, units=size.units)
    recipe = replace(recipe, shape=replace(recipe.shape, vision=vision))
    return plan(recipe, Schedule(None, recipe.shape.text.layers, size.tokens, tuple(stages)), request).kv_bytes


def _at_most(case: str, keep: Keep, metric: str, value: float, limit: float, note: str) -> Check:
    passed = bool(value <= limit)  # NaN fails
    return Check(case, keep.requested, metric, value, f"<= {limit:g}", passed, "" if passed else note)


def document_from_checks(checks: Sequence[Check]) -> dict[str, Any]:
    """The JSON form of the report; JSON knows no NaN, so a value that is no number is null."""
    listed = [asdict(check) | {"value": check.value if isfinite(check.value) else None} for check in checks]
    return {"passed": all(check.passed for check in checks), "checks": listed}
