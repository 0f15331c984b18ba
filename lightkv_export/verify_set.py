"""The gate on a frozen set: the bundle's answers against the reference's, question by question.

At keep 1.0 the reference is Hugging Face's `generate` on the unmodified model, below it the eager model with the same
stages. Both decode greedily on their own, without teacher forcing: what counts is the text of the answer.
Both see the set's images at the bundle's sizes, because a processor would lay out any other size in its own way.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from lightkv_export.evaluate import answer_tokens, answers_of, right_answers
from lightkv_export.frozen_sets import FrozenSet, Question
from lightkv_export.manifest import Keep, Manifest
from lightkv_export.reference import EagerSession
from lightkv_export.report import Check
from lightkv_export.runtime import load
from lightkv_export.runtime.image import decode, fit_size, seen_image
from lightkv_export.verify import Against, OnCase, against_from_bundle
from lightkv_export.verify_cases import stages_of


def verify_answers(
    path: Path,
    frozen: FrozenSet,
    *,
    model: str | None = None,
    keeps: Sequence[float] = (),
    threads: int | None = None,
    on_case: OnCase = lambda name, done, total: None,
) -> list[Check]:
    """Compares the answers to every question of the set, at `keeps` (none: all of the bundle).

    Other arguments and errors: as for `verify_bundle`.
    """
    bundle = load(path, threads=threads)
    _, against = against_from_bundle(bundle, model, answer_tokens(bundle, frozen.questions))
    frozen = _at_bundle_sizes(frozen, bundle.manifest)
    chosen = [bundle.manifest.keep_named(keep) for keep in keeps] or list(bundle.manifest.keeps)
    found = answers_of(bundle, frozen, [keep.requested for keep in chosen], on_question=on_case)
    checks = []
    for keep in chosen:
        expected = []
        for done, question in enumerate(frozen.questions):
            on_case(f"{frozen.name}, reference at keep {keep.requested:g}", done, len(frozen.questions))
            pixels = decode(frozen.images[question.image])
            expected.append(_reference_answer(against, question, pixels, keep, bundle.manifest))
        checks.append(_equal_answers(against, frozen, keep, expected, found[keep.requested].answers))
    return checks


def _at_bundle_sizes(frozen: FrozenSet, manifest: Manifest) -> FrozenSet:
    """The set with every image framed and resized to the bundle's size that fits it; as it is where all are cropped to
    one."""
    if manifest.preprocess.kind == "clip":
        return frozen
    images = {}
    for name in {question.image for question in frozen.questions} & frozen.images.keys():
        pixels, file = decode(frozen.images[name]), io.BytesIO()
        size = fit_size(manifest.sizes, pixels.shape[1], pixels.shape[0])
        Image.fromarray(seen_image(manifest.preprocess, pixels, size)).save(file, "PNG")
        images[name] = file.getvalue()
    return replace(frozen, images=images)


def _reference_answer(against: Against, question: Question, pixels: np.ndarray, keep: Keep, manifest: Manifest) -> str:
    reference = against.reference
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = reference.encode([{"role": "user", "content": content}], [Image.fromarray(pixels)])
    stages = stages_of(keep)
    if stages:
        size = fit_size(manifest.sizes, pixels.shape[1], pixels.shape[0])
        session = EagerSession(reference, stages, against.positions)
        logits = session.feed(prompt.ids.tolist(), prompt.image_inputs, (size.tokens,) * size.units)
        tokens, _ = session.greedy(logits, against.new_tokens, manifest.eos_token_ids)
    else:
        tokens = reference.generate(prompt, against.new_tokens)
    return reference.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip().lower()


def _equal_answers(
    against: Against, frozen: FrozenSet, keep: Keep, expected: Sequence[str], found: Sequence[str]
) -> Check:
    triples = list(zip(frozen.questions, expected, found, strict=True))
    apart = [f"{q.image} {q.text!r}: {given!r} for {wanted!r}" for q, wanted, given in triples if given != wanted]
    value, limit = 1 - len(apart) / len(triples), against.limits.top1
    note = "; ".join([f"{right_answers(frozen.questions, found).mean():.1%} right", *apart[:3]])
    return Check(frozen.name, keep.requested, "answers as the reference", value, f">= {limit:g}", value >= limit, note)
