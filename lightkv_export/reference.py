"""The reference: the untouched Hugging Face model in eager PyTorch, with or without stages between its layers.

`Reference.generate` is Hugging Face's own `generate`. `EagerSession` runs the model's layers one by one and applies the
same stage functions that the exported graphs were traced from; at keep 1.0 it computes what `generate` computes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForImageTextToText, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightkv_export.errors import LightKVError
from lightkv_export.families import Family
from lightkv_export.families.processors import load_processor
from lightkv_export.recipe import StageSpec
from lightkv_export.stages import ImportanceFn, merge_spans

ATTENTION_NAME = "lightkv_reference"
# What a processor returns for the text side: what is ours to make, and what `generate` needs besides.
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MORE_TEXT_INPUTS = ("mm_token_type_ids",)


def _recording_attention(module, query, key, value, attention_mask, *, record, **arguments):
    """SDPA that leaves the last layer's rotated query and key in `record`."""
    record["query"], record["key"] = query, key[:, :, -query.shape[2] :]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)


AttentionInterface.register(ATTENTION_NAME, _recording_attention)


@dataclass(frozen=True)
class Encoded:
    """A prompt as the checkpoint's own processor encodes it.

    Attributes:
        ids: token ids [S], with placeholders for the vision tokens.
        image_inputs: what the model's vision side takes, of all images.
        text_inputs: what `generate` takes besides the ids.
    """

    ids: Tensor
    image_inputs: Mapping[str, Tensor]
    text_inputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Vision:
    """The vision side of a chunk's images.

    Attributes:
        features: rows [N, D] of all images in a row, then one such tensor per DeepStack layer.
        units: vision tokens of every unit, in order; they sum up to N.
        image_inputs: what they were made from.
    """

    features: tuple[Tensor, ...]
    units: tuple[int, ...]
    image_inputs: Mapping[str, Tensor]


class Reference:
    """A checkpoint loaded by transformers, unmodified, with its own processor.

    Args:
        checkpoint: local directory.
        family: its family.
        dtype: dtype of the weights in memory.
    """

    def __init__(self, checkpoint: Path, family: Family, dtype: torch.dtype = torch.float32) -> None:
        self.family = family
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, trust_remote_code=False
        ).eval()
        self.processor = load_processor(checkpoint)
        self.text = family.text_model(self.model)
        self.image_token_id = family.image_token_id(self.model.config)
        self.deepstack_layers = tuple(family.deepstack_layers(self.model.config))

    def encode(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any] = ()) -> Encoded:
        """Messages in the processor's form (their image parts without data) and PIL images, in order."""
        text = self.processor.apply_chat_template(list(messages), add_generation_prompt=True)
        # The template writes the BOS token itself or leaves it to the tokenizer; never both (see apply_chat_template).
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=text,
            images=list(images) or None,
            return_tensors="pt",
            add_special_tokens=not (bos and text.startswith(bos)),
        )
        more = {name: inputs[name] for name in MORE_TEXT_INPUTS if name in inputs}
        return Encoded(inputs["input_ids"][0], _image_inputs(inputs), more)

    def image_inputs(self, images: Sequence[Any]) -> Mapping[str, Tensor]:
        """PIL images -> what the model's vision side takes."""
        if not images:
            return {}
        text = self.processor.image_token * len(images)
        return _image_inputs(self.processor(text=text, images=list(images), return_tensors="pt"))

    @torch.no_grad()
    def vision(self, image_inputs: Mapping[str, Tensor], units: Sequence[int]) -> Vision:
        """Runs the vision side; `units` are the vision tokens of every unit, in order."""
        return Vision(self.family.eager_features(self.model, image_inputs), tuple(units), image_inputs)

    @torch.no_grad()
    def generate(self, prompt: Encoded, max_new_tokens: int) -> list[int]:
        """Greedy tokens of Hugging Face's `generate`, stop token included.

        A repetition penalty in the checkpoint's generation_config.json is no part of the model, so it is switched off.
        """
        ids = prompt.ids[None]
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **prompt.text_inputs,
            **prompt.image_inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
        )
        return output[0, len(prompt.ids) :].tolist()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While open, the decoder attends through `_recording_attention`."""
        before = self.text.config._attn_implementation
        self.text.set_attn_implementation(ATTENTION_NAME)
        try:
            yield
        finally:
            self.text.set_attn_implementation(before)


def _image_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name not in TEXT_INPUTS + MORE_TEXT_INPUTS}


@dataclass(frozen=True)
class Chunk:
    """Tokens on their way through the layers.

    Attributes:
        hidden: [1, S, D]; position: int64 [S] or, with mRoPE, [3, S], for the rotary embedding.
        spans: (start, end) of every unit of vision tokens; units: how many tokens each had at first.
        deepstack: layer -> vision features [1, S, D] to be added behind it.
        query, key: of the last layer that ran, after rotary embedding, [1, H, S, d]; None before the first.
    """

    hidden: Tensor
    position: Tensor
    spans: Sequence[tuple[int, int]] = ()
    units: Sequence[int] = ()
    deepstack: Mapping[int, Tensor] = field(default_factory=dict)
    query: Tensor | None = None
    key: Tensor | None = None


class EagerSession:
    """One conversation with stages: the model's layers, a cache per layer, one chunk of tokens at a time.

    Positions follow the policies of the runtime: "restart" numbers a chunk from its uncompressed start in every layer,
    "original" lets survivors keep their position, "contiguous" continues from each layer's own cache. With mRoPE only
    "original" has a meaning: positions are Hugging Face's, of the uncompressed conversation.

    `feed` is the whole way of a chunk. Experiments go step by step, without gradients: `begin`, then for every layer
    `run_layer` (inside `Reference.recording`) and perhaps `merge`, then `logits`. A `fork` in between shares what ran.

    Args:
        reference: the model.
        stages: for units of every length, or by a unit's length.
        positions: the policy.
    """

    def __init__(
        self,
        reference: Reference,
        stages: Sequence[StageSpec] | Mapping[int, Sequence[StageSpec]],
        positions: str = "original",
    ) -> None:
        self.reference, self.positions = reference, positions
        self.stages = stages
        self.cache = DynamicCache()
        self.seen = 0  # uncompressed tokens so far
        self.next_position = 0  # mRoPE: of the next token

    @torch.no_grad()
    def feed(
        self, ids: Sequence[int], image_inputs: Mapping[str, Tensor] | None = None, units: Sequence[int] = ()
    ) -> Tensor:
        """Appends tokens and returns the last row's logits, float32 [V].

        Args:
            ids: the tokens.
            image_inputs: of the images that stand where `ids` has placeholders; without any these are plain tokens.
            units: vision tokens of every unit of these images, in order.
        """
        chunk = self.begin(ids, self.reference.vision(image_inputs, units) if image_inputs else None)
        self.next_position = int(chunk.position.max()) + 1
        with self.reference.recording():
            for index in range(len(self.reference.text.layers)):
                chunk = self.run_layer(chunk, index)
                settings = [self._setting(tokens, index) for tokens in chunk.units]
                if any(settings):
                    chunk = self.merge(chunk, settings)
        self.seen += len(ids)
        return self.logits(chunk)[0]

    def greedy(self, logits: Tensor, max_new_tokens: int, eos: Sequence[int] = ()) -> tuple[list[int], list[Tensor]]:
        """Greedy tokens from the prompt's last logits on, and the logits that chose each."""
        tokens, chosen_by = [], []
        while len(tokens) < max_new_tokens:
            chosen_by.append(logits)
            tokens.append(int(logits.argmax()))
            if tokens[-1] in eos or len(tokens) == max_new_tokens:
                break
            logits = self.feed([tokens[-1]])
        return tokens, chosen_by

    def fork(self) -> EagerSession:
        """A session with the same past; what either of them appends, the other does not see."""
        other = copy.copy(self)
        other.cache = copy.copy(self.cache)
        other.cache.layers = [copy.copy(layer) for layer in self.cache.layers]  # tensors are never changed in place
        return other

    def begin(self, ids: Sequence[int], vision: Vision | None = None) -> Chunk:
        """Embedded tokens, vision tokens in their places."""
        tokens = torch.as_tensor(ids)
        hidden = self.reference.text.embed_tokens(tokens)[None].clone()
        position = self._positions(tokens, vision)
        if vision is None:
            return Chunk(hidden, position)
        is_image = tokens == self.reference.image_token_id
        features, *extra = (rows.to(hidden.dtype) for rows in vision.features)
        hidden[0, is_image] = features
        deepstack = {}
        for layer, rows in zip(self.reference.deepstack_layers, extra, strict=True):
            deepstack[layer] = torch.zeros_like(hidden)
            deepstack[layer][0, is_image] = rows
        return Chunk(hidden, position, unit_spans(is_image.tolist(), vision.units), vision.units, deepstack)

    def run_layer(self, chunk: Chunk, index: int) -> Chunk:
        """The chunk after decoder layer `index`, whose cache grows."""
        past, length = self.cache.get_seq_length(index), chunk.hidden.shape[1]
        position = past + torch.arange(length) if self.positions == "contiguous" else chunk.position
        mask = torch.arange(past + length)[None] <= past + torch.arange(length)[:, None]
        record: dict[str, Tensor] = {}
        hidden = self.reference.text.layers[index](
            chunk.hidden,
            attention_mask=mask[None, None],
            position_embeddings=self.reference.text.rotary_emb(chunk.hidden, position.unsqueeze(-2)),
            position_ids=position.reshape(-1, length)[:1],
            past_key_values=self.cache,
            use_cache=True,
            record=record,
        )
        if index in chunk.deepstack:
            hidden = hidden + chunk.deepstack[index]
        return replace(chunk, hidden=hidden, query=record["query"], key=record["key"])

    def merge(
        self,
        chunk: Chunk,
        stages: StageSpec | Sequence[StageSpec | None],
        importance_fn: ImportanceFn | None = None,
    ) -> Chunk:
        """The chunk after a stage for all units, or one for each (None: none); `importance_fn` as in `merge_spans`."""
        each = [stages] * len(chunk.units) if isinstance(stages, StageSpec) else stages
        settings = [(stage.windows_per_side, stage.discard_ratio) if stage else None for stage in each]
        hidden, survivors, spans = merge_spans(
            chunk.hidden, chunk.query, chunk.key, chunk.spans, settings, importance_fn
        )
        restart = self.seen + torch.arange(hidden.shape[1])
        position = chunk.position[..., survivors[0]] if self.positions == "original" else restart
        return Chunk(hidden, position, spans, chunk.units)

    def logits(self, chunk: Chunk, rows: int = 1) -> Tensor:
        """Logits float32 [rows, V] of the last tokens, after the last layer."""
        return self.reference.family.head(self.reference.model)(
            self.reference.text.norm(chunk.hidden[0, -rows:])
        ).float()

    def _setting(self, tokens: int, layer: int) -> StageSpec | None:
        """The stage for units of `tokens` vision tokens behind a layer."""
        stages = self.stages.get(tokens, ()) if isinstance(self.stages, Mapping) else self.stages
        return next((stage for stage in stages if stage.layer == layer), None)

    def _positions(self, tokens: Tensor, vision: Vision | None) -> Tensor:
        family = self.reference.family
        if family.rope == "1d":
            return self.seen + torch.arange(len(tokens))
        if vision is None:  # a placeholder that the model itself wrote is text, too
            return (self.next_position + torch.arange(len(tokens))).expand(3, -1)
        return self.next_position + family.positions3(self.reference.model, tokens, vision.image_inputs)


def unit_spans(is_image: Sequence[bool], units: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of every unit: the vision tokens in order, `units` at a time, since two may stand side by side.

    Raises:
        LightKVError: the units do not account for all vision tokens, or text stands within one.
    """
    places = [place for place, flag in enumerate(is_image) if flag]
    starts = list(accumulate(units, initial=0))
    runs = [places[start:end] for start, end in pairwise(starts)]
    if starts[-1] != len(places) or any(run != list(range(run[0], run[0] + len(run))) for run in runs):
        raise LightKVError(f"{len(places)} vision tokens in the prompt", expected=f"units of {list(units)} in a row")
    return [(run[0], run[-1] + 1) for run in runs]
