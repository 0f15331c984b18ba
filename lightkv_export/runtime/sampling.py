"""Choosing the next token from logits: greedy, or temperature, top-k and top-p in the order of Hugging Face
`generate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightkv_export.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `temperature` 0 is greedy (the lowest index wins a tie); `top_k` 0 and `top_p` 1.0 are off.

    `seed` makes sampling repeatable (numpy's PCG64, so other numbers than torch draws); None draws from the system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a number >= 0 (0 is greedy)"),
            (self.top_k >= 0, "top_k", "an integer >= 0 (0 is off)"),
            (0 < self.top_p <= 1, "top_p", "a number in (0, 1] (1 is off)"),
            (
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "repetition_penalty",
                "a number > 0",
            ),
            (self.seed is None or self.seed >= 0, "seed", "an integer >= 0"),
        )
        for fine, name, expected in checks:
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}", expected=expected)


class Sampler:
    """Draws tokens according to a `Sampling`; holds the random state of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray, seen: Sequence[int]) -> int:
        """logits [V] float32, the token ids so far -> the next token id."""
        if self.sampling.repetition_penalty != 1.0:
            logits = penalize(logits, seen, self.sampling.repetition_penalty)
        if self.sampling.temperature == 0:
            return int(np.argmax(logits))
        probabilities = distribution(logits, self.sampling)
        return int(self._random.choice(len(probabilities), p=probabilities))


def penalize(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """Divide the positive and multiply the negative logits of tokens already seen (arXiv 1909.05858, section 4.1)."""
    logits = logits.copy()
    ids = np.unique(np.asarray(seen, np.int64))
    logits[ids] = np.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    return logits


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """logits [V] -> probabilities [V] float64 after temperature, top-k and top-p."""
    scores = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(scores, kind="stable")
        removed = np.cumsum(_softmax(scores[order])) <= 1 - sampling.top_p
        removed[-1] = False  # the best token always stays
        scores[order[removed]] = -np.inf
    return _softmax(scores)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
