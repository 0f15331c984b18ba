"""A conversation: messages on one side, one sequence of cached tokens on the other.

Every answer starts from the rendering of the *whole* conversation. What of it is in the caches already stays there,
the rest is fed: so the tokens that the model has seen always equal the tokenization of the conversation, as Hugging
Face would do it. Where the two part (an answer that tokenizes otherwise than it was generated), the sequence is rolled
back to that place, which costs nothing in text; inside a chunk whose vision tokens were merged, it goes back to the
chunk's start.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from collections.abc import Sequence as Seq
from contextlib import closing

import numpy as np

from lightkv_export.errors import UserError
from lightkv_export.manifest import POSITION_TABLE, Graph, Keep
from lightkv_export.runtime.chat import Chat, Detokenizer
from lightkv_export.runtime.generation import DEFAULT_NEW_TOKENS, GREEDY, Clock, OnStage, Request, Result
from lightkv_export.runtime.graphs import Graphs
from lightkv_export.runtime.image import ImageFeatures, ImagePixels, ImageSource, sized_pixels
from lightkv_export.runtime.sampling import Sampler
from lightkv_export.runtime.sequence import Sequence
from lightkv_export.runtime.tokens import ShownImage, Tokens


class Session:
    """One conversation on a model. Obtain it from `Model.session`.

    Args:
        keep: which keep of the bundle; it holds for the whole conversation.
        one_shot: allocate the cache rows of the first answer exactly, for a single request; otherwise reserve address
            space up to the bundle's limit, of which only what is filled takes memory.
        prefill_chunk: feed at most so many tokens per step where nothing is merged (smaller activations).
    """

    def __init__(
        self, graphs: Graphs, chat: Chat, keep: Keep, *, one_shot: bool = False, prefill_chunk: int | None = None
    ) -> None:
        if prefill_chunk is not None and prefill_chunk < 1:
            raise UserError(f"prefill_chunk is {prefill_chunk}", expected="at least 1")
        self.keep, self.messages = keep, []
        self.result: Result | None = None  # of the last answer
        self.sequence: Sequence | None = None
        self._graphs, self._chat, self._manifest = graphs, chat, graphs.manifest
        self._one_shot, self._prefill_chunk = one_shot, prefill_chunk
        self._limit = min(self._manifest.max_tokens, graphs.backend.max_tokens or self._manifest.max_tokens)
        self._images: dict[int, ImagePixels | ImageFeatures] = {}  # by serial; serials are never used twice
        self._next_serial = 0
        self._prepared_s = 0.0
        self._before_turn = (0, 0)  # messages and images before the unanswered turn

    def append(self, prompt: str | Seq[dict], images: Seq[ImageSource | ImageFeatures] = ()) -> None:
        """Add a user's turn: a text with its images, or messages whose last one is the user's.

        Raises:
            UserError: an empty or unusable prompt, an image that cannot be read, too many images. Nothing is added
                then.
        """
        if isinstance(prompt, str):
            new = [self._chat.message("user", [*[None] * len(images), prompt])]
        else:
            new = self._chat.parse(prompt, len(images))
        if self.messages and self.messages[-1].role == "user":
            raise UserError("the last message has no answer yet", fix="generate an answer first")
        self._check_images(len(self._images) + len(images))
        started = time.perf_counter()
        prepared = [self._prepared(image) for image in images]
        self._prepared_s = time.perf_counter() - started
        self._before_turn = (len(self.messages), len(self._images))
        self._images.update(enumerate(prepared, self._next_serial))
        self._next_serial += len(prepared)
        self.messages += new

    def ask(self, prompt: str, images: Seq[ImageSource | ImageFeatures] = (), request: Request = GREEDY) -> Result:
        """Add a user's turn and answer it."""
        self.append(prompt, images)
        return self.generate(request)

    def generate(self, request: Request = GREEDY) -> Result:
        """Answer the last message. After an interruption (Ctrl-C), what was said so far stays part of the conversation.

        Raises:
            UserError: nothing to answer, or prompt and answer do not fit into the bundle; the unanswered turn is
                dropped.
        """
        with closing(self.stream(request)) as pieces:
            for piece in pieces:
                if request.on_token is not None:
                    request.on_token(piece)
        return self.result

    def stream(self, request: Request = GREEDY) -> Generator[str, None, None]:
        """Answer the last message piece by piece; `result` holds the whole answer afterwards."""
        if not self.messages or self.messages[-1].role != "user":
            raise UserError("there is no message to answer", expected="a user's message", fix="append one first")
        answer: list[int] = []
        self.result = None
        try:
            yield from self._answer(request, answer)
        finally:  # also after an error, an interruption, or a caller who stopped listening
            if answer:
                self.messages.append(self._chat.answer(answer))
            else:
                self._drop_turn()

    def _answer(self, request: Request, answer: list[int]) -> Generator[str, None, None]:
        """The generation loop; appends each token to `answer` as soon as it is known."""
        clock, sampler, pieces = Clock(self._prepared_s), Sampler(request.sampling), Detokenizer(self._chat)
        prompt = self._tokens()
        max_new_tokens = self._room(len(prompt), len(request.forced) or request.max_new_tokens)
        with clock.paused():
            self._graphs.prepare(self.keep, prompt.vision_counts)
        if self.sequence is None:
            self.sequence = Sequence(self._graphs, self.keep, self._capacities(prompt, max_new_tokens))
        cached = self._reuse(prompt)
        self._check_caches(prompt.part(cached), max_new_tokens)
        logits = self._prefill(prompt.part(cached), request.on_stage)
        seen, last = prompt.ids.tolist(), prompt.part(len(prompt) - 1)
        while True:
            if request.on_logits is not None:
                request.on_logits(logits)
            token = request.forced[len(answer)] if request.forced else sampler.choose(logits, seen)
            answer.append(token)
            clock.token()
            stopped = token in self._manifest.eos_token_ids
            text = pieces.push(token)
            if stopped or len(answer) == max_new_tokens:
                break
            if text:
                yield text
            seen.append(token)
            last = last.then(token)
            logits = self.sequence.step(last, {})
        self.result = self._result(answer, "stop" if stopped else "length", clock, prompt, cached)
        if text := text + pieces.finish():
            yield text

    def _tokens(self) -> Tokens:
        """The whole conversation up to the answer."""
        ids = self._chat.ids(self.messages, [image.size for image in self._images.values()])
        mrope = self._manifest.rope == "mrope"
        shown = [
            ShownImage(serial, image.size, self._graphs.tables(image.size)[POSITION_TABLE] if mrope else None)
            for serial, image in self._images.items()
        ]
        return Tokens.of(ids, self._manifest.image_token_id, shown, mrope=mrope)

    def _reuse(self, prompt: Tokens) -> int:
        """Roll the sequence back to what it shares with the prompt; returns how many tokens that is."""
        cached = self.sequence.keys[: len(prompt) - 1]  # the last token is always fed: it gives the logits
        parted = np.flatnonzero(cached != prompt.keys[: len(cached)])
        return self.sequence.rollback(int(parted[0]) if len(parted) else len(cached))

    def _prefill(self, tokens: Tokens, on_stage: OnStage | None) -> np.ndarray:
        """Feed the tokens; returns the logits after the last one."""
        features = {serial: self._features(self._images[serial]) for serial in tokens.serials}
        merging = any(self.keep.plan_for(units).stages for units in tokens.vision_counts)
        limit = self._graphs.backend.chunk_tokens or len(tokens)
        if merging and len(tokens) > limit:
            raise UserError(
                f"{len(tokens)} prompt tokens (images included) must go through the stages together",
                expected=f"at most {limit}, which the engines were built for",
                fix="use fewer images or a shorter prompt, or build again with a larger --profile-tokens",
            )
        size = len(tokens) if merging else min(self._prefill_chunk or limit, limit)
        for start in range(0, len(tokens), size):
            logits = self.sequence.step(tokens.part(start, start + size), features, on_stage)
        return logits

    def _prepared(self, image: ImageSource | ImageFeatures) -> ImagePixels | ImageFeatures:
        """Pixels of an image; one that was encoded already stays as it is, if it is of this bundle."""
        if not isinstance(image, ImageFeatures):
            return sized_pixels(self._manifest, image)
        width, layers = self._manifest.embedding.shape[1], len(self._manifest.deepstack_layers)
        if image.size not in self._manifest.sizes:
            raise UserError(
                f"an encoded image of size {image.size.name} with {image.size.image_tokens} vision tokens",
                expected=f"a size of bundle {self._manifest.name!r}",
                fix="encode the image with the model that is to see it",
            )
        shapes = [rows.shape for rows in (image.rows, *image.deepstack)]
        if shapes != [(image.size.image_tokens, width)] * (1 + layers):
            raise UserError(
                f"an encoded image of shape {', '.join(map(str, shapes))}",
                expected=f"{1 + layers} x {(image.size.image_tokens, width)}",
                fix="encode the image with the model that is to see it",
            )
        return image

    def _features(self, image: ImagePixels | ImageFeatures) -> ImageFeatures:
        return image if isinstance(image, ImageFeatures) else self._graphs.image_features(image.values, image.size)

    def _rows(self, graph: Graph, tokens: Tokens) -> int:
        """Cache rows that the tokens take in a segment. Vision tokens that are not a whole unit are not merged."""
        counts, layer = tokens.vision_counts, graph.layers[0]
        rows = len(tokens) - sum(counts.values())
        for units, count in counts.items():
            rows += count // units * self.keep.plan_for(units).vision_tokens_per_layer[layer] + count % units
        return rows

    def _check_caches(self, tokens: Tokens, max_new_tokens: int) -> None:
        """Prompt and answer fit into every segment's caches. Only engines have fewer rows than the bundle's limit."""
        segments = zip(self._graphs.segments, self.sequence.caches, self.sequence.filled, strict=True)
        for graph, cache, filled in segments:
            needed = filled + self._rows(graph, tokens) + max_new_tokens
            if needed > cache.capacity:
                raise UserError(
                    f"prompt and answer need {needed} cache rows in {graph.name}",
                    expected=f"at most {cache.capacity}, which its engine was built for",
                    fix=f"ask for fewer new tokens or shorten the conversation, or run `lightkv build` with --keep "
                    f"{self.keep.requested:g}",
                )

    def _capacities(self, prompt: Tokens, max_new_tokens: int) -> list[int]:
        """Cache rows per segment: exactly those of this request, or the bundle's limit."""
        if not self._one_shot:
            return [self._limit] * len(self._graphs.segments)
        return [self._rows(graph, prompt) + max_new_tokens for graph in self._graphs.segments]

    def _room(self, num_prompt: int, max_new_tokens: int | None) -> int:
        """The longest answer that is asked for and fits; checked before anything is computed."""
        limit = self._limit
        wanted = max_new_tokens if max_new_tokens is not None else min(DEFAULT_NEW_TOKENS, max(limit - num_prompt, 1))
        if num_prompt + wanted > limit:
            room = limit - num_prompt
            fewer = f"ask for at most {room} new tokens, " if room > 0 else ""
            raise UserError(
                f"{num_prompt} prompt tokens (images included) and {wanted} new tokens are {num_prompt + wanted}",
                expected=f"at most {limit}, the limit of bundle {self._manifest.name!r} on this backend",
                fix=f"{fewer}shorten the conversation, or export the bundle with a higher limit",
            )
        return wanted

    def _check_images(self, num_images: int) -> None:
        if num_images > self._manifest.max_images:
            raise UserError(
                f"{num_images} images in one conversation",
                expected=f"at most {self._manifest.max_images}, the limit of bundle {self._manifest.name!r}",
                fix="use fewer images, or export the bundle with a higher limit",
            )

    def _drop_turn(self) -> None:
        """Forget the turn that got no answer, and its images."""
        num_messages, num_images = self._before_turn
        del self.messages[num_messages:]
        for serial in list(self._images)[num_images:]:
            del self._images[serial]

    def _achieved(self, prompt: Tokens) -> float:
        """The share of the conversation's vision tokens that is cached, averaged over the layers, as planned."""
        counts = prompt.vision_counts
        if not counts:
            return self.keep.keep
        per_unit = {units: self.keep.plan_for(units).vision_tokens_per_layer for units in counts}
        cached = sum(count // units * sum(per_unit[units]) for units, count in counts.items())
        return cached / sum(count * len(per_unit[units]) for units, count in counts.items())

    def _result(self, answer: list[int], finish_reason: str, clock: Clock, prompt: Tokens, cached: int) -> Result:
        sequence, caches = self.sequence, self.sequence.caches
        counted = [cache.capacity for cache in caches] if self._one_shot else sequence.filled
        per_layer = [size for cache, rows in zip(caches, counted, strict=True) for size in cache.layer_bytes(rows)]
        return Result(
            text=self._chat.decode(answer),
            token_ids=tuple(answer),
            finish_reason=finish_reason,
            ttft_ms=clock.ttft_ms,
            tokens_per_s=clock.tokens_per_s,
            kv_bytes=sum(cache.nbytes for cache in caches) if self._one_shot else sum(per_layer),
            kv_bytes_per_layer=tuple(per_layer),
            cache_tokens_per_layer=sequence.rows_per_layer,
            vision_tokens_per_layer=sequence.vision_rows_per_layer,
            keep=self._achieved(prompt),
            prompt_tokens=len(prompt),
            cached_tokens=cached,
        )
