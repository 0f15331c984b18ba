"""How well a bundle answers a frozen set: exact match per keep and skill, with intervals. No torch.

An answer is right when it equals the set's answer; case and outer spaces do not count. Decoding is greedy. Questions
about one image share its vision tokens; below keep 1.0 nothing else can be shared, because the merges depend on the
prompt. Intervals are bootstrap intervals over images (the questions about one image go together), 95 %, seeded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lightkv_export.errors import UserError
from lightkv_export.frozen_sets import FrozenSet, Question
from lightkv_export.runtime.generation import Request
from lightkv_export.runtime.image import ImageFeatures, decode
from lightkv_export.runtime.model import Model

RESAMPLES, LEVEL = 2000, 0.95
GREY = 128  # of the uniform image that a blind answer is given to

OnQuestion = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvalRequest:
    """What is asked; the command line reads its defaults from here.

    Attributes:
        keeps: keeps of the bundle, by what was asked for; empty: all of them. 1.0 is always measured, for comparison.
        limit: use at most so many questions, spread evenly over the set; None: all.
        blank: show a uniform grey image instead of the real one: what the questions alone give away.
    """

    keeps: tuple[float, ...] = ()
    limit: int | None = None
    blank: bool = False


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval; `questions` it was counted over."""

    value: float
    low: float
    high: float
    questions: int


@dataclass(frozen=True)
class KeepScore:
    """How one keep did.

    Attributes:
        keep: as asked for; `achieved`: the share of vision tokens really kept.
        exact_match: share of right answers over all questions.
        of_uncompressed: exact match divided by that of keep 1.0, on the same questions; None where that is 0.
        skills: share of right answers per skill.
        kv_bytes: mean cache bytes of a request.
        seconds: what all answers took, vision graph left out.
        answers: every answer, in the order of the questions.
    """

    keep: float
    achieved: float
    exact_match: Share
    of_uncompressed: Share | None
    skills: dict[str, Share]
    kv_bytes: float
    seconds: float
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Answered:
    """Raw results of one keep."""

    answers: tuple[str, ...]
    kv_bytes: float
    seconds: float


def evaluate(
    model: Model,
    frozen: FrozenSet,
    request: EvalRequest,
    on_question: OnQuestion = lambda name, done, total: None,
) -> list[KeepScore]:
    """Answers every question at every keep; the keeps in the order asked for, 1.0 first.

    Raises:
        UserError: a keep that the bundle lacks, or a limit below 1.
    """
    frozen = frozen.sample(request.limit)
    keeps = [model.manifest.keep_named(keep).requested for keep in (1.0, *request.keeps)]
    if not request.keeps:
        keeps += [keep.requested for keep in model.manifest.keeps]
    raw = answers_of(model, frozen, list(dict.fromkeys(keeps)), blank=request.blank, on_question=on_question)
    images = np.array([question.image for question in frozen.questions])
    right = {keep: right_answers(frozen.questions, found.answers) for keep, found in raw.items()}
    full = right[keeps[0]]
    return [
        KeepScore(
            keep=keep,
            achieved=model.manifest.keep_named(keep).keep,
            exact_match=share(right[keep], images),
            of_uncompressed=ratio(right[keep], full, images) if full.any() else None,
            skills=_per_skill(frozen.questions, right[keep], images),
            kv_bytes=found.kv_bytes,
            seconds=found.seconds,
            answers=found.answers,
        )
        for keep, found in raw.items()
    ]


def answer_tokens(model: Model, questions: Sequence[Question]) -> int:
    """Tokens that the longest right answer needs, a space before it and its end included: what is longer is wrong."""
    tokenizer = model.chat.tokenizer
    return 1 + max(len(tokenizer.encode(f" {q.answer}", add_special_tokens=False).ids) for q in questions)


def right_answers(questions: Sequence[Question], answers: Sequence[str]) -> np.ndarray:
    """bool [N]: which answers are right."""
    return np.array([given == q.answer.lower() for q, given in zip(questions, answers, strict=True)])


def share(right: np.ndarray, group: np.ndarray) -> Share:
    """Mean of `right` [N] with its interval; whole groups (images) are drawn."""
    hits, sizes = _per_group(right, group)
    drawn = _draws(len(sizes))
    low, high = _interval(hits[drawn].sum(1) / sizes[drawn].sum(1))
    return Share(float(right.mean()), low, high, len(right))


def ratio(right: np.ndarray, base: np.ndarray, group: np.ndarray) -> Share:
    """Sum of `right` [N] over that of `base` [N], with a paired interval: both are drawn together."""
    hits, _ = _per_group(right, group)
    base_hits, _ = _per_group(base, group)
    drawn = _draws(len(hits))
    low, high = _interval(hits[drawn].sum(1) / np.maximum(base_hits[drawn].sum(1), 1))
    return Share(float(right.sum() / base.sum()), low, high, len(right))


def difference(right: np.ndarray, base: np.ndarray, group: np.ndarray) -> Share:
    """Mean of `right` [N] less that of `base` [N], with a paired interval."""
    gains, sizes = _per_group(right.astype(float) - base, group)
    drawn = _draws(len(sizes))
    low, high = _interval(gains[drawn].sum(1) / sizes[drawn].sum(1))
    return Share(float(right.mean() - base.mean()), low, high, len(right))


def document_from_scores(model: Model, frozen: FrozenSet, request: EvalRequest, scores: list[KeepScore]) -> dict:
    """The JSON form: the set with its hash, the request, and per keep the figures (without single answers)."""
    manifest = model.manifest
    keeps: list[dict[str, Any]] = [asdict(score) for score in scores]
    for keep in keeps:
        del keep["answers"]
    return {
        "bundle": manifest.name,
        "dtype": manifest.dtype,
        "lowering": manifest.lowering,
        "positions": manifest.positions,
        "set": frozen.name,
        "sha256": frozen.sha256,
        "blank": request.blank,
        "questions": scores[0].exact_match.questions,
        "interval": f"{LEVEL:.0%}, bootstrap over images, {RESAMPLES} resamples",
        "keeps": keeps,
    }


def answers_of(
    model: Model,
    frozen: FrozenSet,
    keeps: Sequence[float],
    *,
    blank: bool = False,
    on_question: OnQuestion = lambda name, done, total: None,
) -> dict[float, Answered]:
    """What the bundle answers to every question of the set, at each keep alone."""
    request = Request(max_new_tokens=answer_tokens(model, frozen.questions))
    texts: dict[float, list[str]] = {keep: [] for keep in keeps}
    kv_bytes, seconds = dict.fromkeys(keeps, 0), dict.fromkeys(keeps, 0.0)
    total = len(frozen.questions) * len(keeps)
    for question, image in _with_images(model, frozen, blank):
        for keep in keeps:
            done = sum(map(len, texts.values()))
            on_question(f"answers: {10 * (10 * done // total)} %", done, total)
            started = time.perf_counter()
            result = model.run(question.text, [image], keep=keep, request=request)
            seconds[keep] += time.perf_counter() - started
            kv_bytes[keep] += result.kv_bytes
            texts[keep].append(result.text.strip().lower())
    count = len(frozen.questions)
    return {keep: Answered(tuple(texts[keep]), kv_bytes[keep] / count, seconds[keep]) for keep in keeps}


def _with_images(model: Model, frozen: FrozenSet, blank: bool) -> Iterator[tuple[Question, ImageFeatures]]:
    """Every question with its encoded image; an image is encoded once for the questions in a row about it."""
    greys: dict[tuple[int, ...], ImageFeatures] = {}
    for name, questions in groupby(frozen.questions, lambda question: question.image):
        if name not in frozen.images:
            raise UserError(f"set {frozen.name!r} asks about {name!r}", expected="an image of the set")
        pixels = decode(frozen.images[name])
        if blank:
            if pixels.shape not in greys:
                greys[pixels.shape] = model.encode(np.full_like(pixels, GREY))
            image = greys[pixels.shape]
        else:
            image = model.encode(pixels)
        for question in questions:
            yield question, image


def _per_skill(questions: Sequence[Question], right: np.ndarray, images: np.ndarray) -> dict[str, Share]:
    skills = np.array([question.skill for question in questions])
    return {str(name): share(right[skills == name], images[skills == name]) for name in np.unique(skills)}


def _per_group(values: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values, and their number, per group."""
    _, owner = np.unique(group, return_inverse=True)
    return np.bincount(owner, values), np.bincount(owner)


def _draws(count: int) -> np.ndarray:
    """int [RESAMPLES, count]: groups drawn with replacement, the same ones every time."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
