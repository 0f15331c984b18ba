"""What a request asks for and what it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np

from lightkv_export.errors import UserError
from lightkv_export.runtime.sampling import Sampling

DEFAULT_NEW_TOKENS = 256  # when the request names no number: so many, or what still fits into the bundle


@dataclass(frozen=True)
class StageTrace:
    """What a stage did to units of vision tokens (images or tiles) of a chunk.

    Attributes:
        layer: the decoder layer that it follows.
        kept: int64 [I, v'], source place of each survivor within its unit, ascending.
        target: int64 [I, v], the survivor (0..v'-1) in which each source token ended.
        importance: float32 [I, v], how much the prompt attends to each source token, the weights of the merge; None
            unless somebody listens to `Request.on_stage`.
        units: which units of the chunk these are, in order. Units of other lengths have stages of their own.
    """

    layer: int
    kept: np.ndarray
    target: np.ndarray
    importance: np.ndarray | None = None
    units: tuple[int, ...] = (0,)


OnStage: TypeAlias = "Callable[[StageTrace], None]"


@dataclass(frozen=True)
class Request:
    """How to answer.

    Attributes:
        max_new_tokens: longest answer in tokens; None takes up to `DEFAULT_NEW_TOKENS` of what the bundle still allows.
        sampling: how tokens are chosen.
        forced: answer with these tokens instead of choosing any; so two models can be compared on one path.
        on_token: called with each piece of text as it becomes known.
        on_logits: called with the logits float32 [V] of each step (the prefill's first) before a token is chosen.
        on_stage: called with what each stage did, in order, before the first token.
    """

    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    forced: tuple[int, ...] = ()
    on_token: Callable[[str], None] | None = None
    on_logits: Callable[[np.ndarray], None] | None = None
    on_stage: OnStage | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}", expected="at least 1")


GREEDY = Request()


@dataclass(frozen=True)
class Result:
    """An answer and what it cost.

    Attributes:
        text: the answer without special tokens.
        token_ids: generated ids; the end-of-sequence id is the last one if `finish_reason` is "stop".
        finish_reason: "stop" (end of sequence), or "length" (max_new_tokens reached).
        ttft_ms: from the request (image decoding included, graph loading not) to the first token.
        tokens_per_s: tokens after the first per second; None if there is only one.
        kv_bytes: cache bytes counted from the arrays: all that is allocated for a single request, what is filled in a
            conversation (whose arrays reserve address space only).
        kv_bytes_per_layer: the same per layer.
        cache_tokens_per_layer: cache rows filled in each layer.
        vision_tokens_per_layer: vision tokens of all images cached in each layer, counted from the caches.
        keep: the share of the vision tokens that the keep leaves in the caches, for the images of this conversation.
        prompt_tokens: uncompressed tokens of the whole conversation before the answer.
        cached_tokens: how many of them were already in the caches.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    ttft_ms: float
    tokens_per_s: float | None
    kv_bytes: int
    kv_bytes_per_layer: tuple[int, ...]
    cache_tokens_per_layer: tuple[int, ...]
    vision_tokens_per_layer: tuple[int, ...]
    keep: float
    prompt_tokens: int
    cached_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Clock:
    """Times one answer. Work done earlier for it (decoding images) is added as `spent_s`."""

    def __init__(self, spent_s: float) -> None:
        self._start = time.perf_counter() - spent_s
        self._first = self._last = self._start
        self._tokens = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside (loading graphs)."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def token(self) -> None:
        """A token has been chosen."""
        self._last = time.perf_counter()
        self._first = self._last if not self._tokens else self._first
        self._tokens += 1

    @property
    def ttft_ms(self) -> float:
        """Milliseconds to the first token."""
        return 1000 * (self._first - self._start)

    @property
    def tokens_per_s(self) -> float | None:
        """Rate of the tokens after the first."""
        return (self._tokens - 1) / (self._last - self._first) if self._tokens > 1 else None
