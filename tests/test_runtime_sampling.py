"""Sampling: the distribution equals Hugging Face's warpers, and a seed repeats it."""

from __future__ import annotations

import numpy as np
import pytest

from lightkv_export.errors import UserError
from lightkv_export.runtime.sampling import Sampler, Sampling, distribution, penalize

LOGITS = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.3, top_k=5),
        Sampling(1.0, top_p=0.8),
        Sampling(0.5, top_k=20, top_p=0.9),
        Sampling(2.0, top_k=90),
    ],
)
def test_distribution_equals_hugging_face(sampling):
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(sampling.temperature)(None, torch.from_numpy(LOGITS)[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    np.testing.assert_allclose(distribution(LOGITS, sampling), torch.softmax(scores, -1)[0].numpy(), atol=1e-6)


def test_repetition_penalty_equals_hugging_face():
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    seen = [3, 7, 7, 49]
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([seen]), torch.from_numpy(LOGITS.copy())[None])
    np.testing.assert_allclose(penalize(LOGITS, seen, 1.4), expected[0].numpy(), rtol=1e-6)


def test_greedy_takes_the_first_of_equals():
    assert Sampler(Sampling()).choose(np.array([0, 2, 1, 2], np.float32), []) == 1


def test_a_seed_repeats_and_frequencies_follow_the_distribution():
    sampling = Sampling(1.0, top_k=4, seed=7)
    first, second = Sampler(sampling), Sampler(sampling)
    draws = [first.choose(LOGITS, []) for _ in range(2000)]
    assert draws == [second.choose(LOGITS, []) for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(draws, minlength=50) / 2000, distribution(LOGITS, sampling), atol=0.04)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"repetition_penalty": 0.0},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
