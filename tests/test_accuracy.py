"""The accuracy gate: the trained tiny-llava on a fixed part of the evaluation set, compressed against uncompressed, and
the bundle against the eager model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from lightkv_export.evaluate import EvalRequest, evaluate, right_answers
from lightkv_export.frozen_sets import FrozenSet, load_set
from lightkv_export.recipe import StageSpec, load_recipe
from lightkv_export.runtime import Model, load
from lightkv_export.verify_set import verify_answers

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
from branches import Asker, route_of, tasks_of

QUESTIONS, AGAINST_EAGER = 48, 12
LEAST_RIGHT = 0.95  # at keep 1.0
MOST_LOST = {0.75: 0.03, 0.55: 0.03, 0.4: 0.05, 0.3: 0.05, 0.2: 0.07}  # share of answers; 48 questions: 1 is 0.021
MOST_BLIND = 0.45


@pytest.fixture(scope="module")
def frozen() -> FrozenSet:
    return load_set("tiny-eval").sample(QUESTIONS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from lightkv_export.pipeline import ExportRequest, export_bundle

    out = tmp_path_factory.mktemp("accuracy") / "tiny-llava"
    request = ExportRequest("tiny-llava", out, keeps=tuple(load_recipe("tiny-llava").schedules), max_tokens=1024)
    return load(export_bundle(request).path)


def test_compressed_keeps_answer_like_the_uncompressed(model: Model, frozen: FrozenSet) -> None:
    scores = evaluate(model, frozen, EvalRequest())
    assert {score.keep for score in scores} == {1.0, *MOST_LOST}
    full = scores[0].exact_match.value
    assert full >= LEAST_RIGHT
    for score in scores[1:]:
        lost = full - score.exact_match.value
        assert lost <= MOST_LOST[score.keep], f"keep {score.keep} lost {lost:.1%} of {QUESTIONS} answers"
        assert score.achieved == pytest.approx(score.keep, abs=0.01)


def test_without_the_image_the_gate_fails(model: Model, frozen: FrozenSet) -> None:
    blind = evaluate(model, frozen, EvalRequest(keeps=(1.0,), blank=True))
    assert blind[0].exact_match.value <= MOST_BLIND < LEAST_RIGHT


def test_the_bundle_answers_as_the_eager_model(model: Model, frozen: FrozenSet) -> None:
    for check in verify_answers(model.bundle.path, frozen.sample(AGAINST_EAGER)):
        assert check.passed, check


def test_the_experiments_count_what_the_bundle_counts(model: Model, frozen: FrozenSet) -> None:
    part, recipe = frozen.sample(AGAINST_EAGER), load_recipe("tiny-llava")
    keep = min(recipe.schedules)
    stages = [StageSpec(s.layer, s.windows_per_side, s.discard_ratio) for s in model.manifest.keep_named(keep).stages]
    asker, route = Asker(recipe, part), route_of(stages, model.manifest.positions)
    judged = [asker.judge(task, [route])[route].right for task in tasks_of(part)]
    answers = [model.run(q.text, [part.images[q.image]], keep=keep, max_new_tokens=6).text for q in part.questions]
    expected = right_answers(part.questions, [answer.strip().lower() for answer in answers])
    np.testing.assert_array_equal(judged, expected)
