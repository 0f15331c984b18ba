"""The reference: the untouched Hugging Face model in eager PyTorch, with or without stages between its layers.

`Reference.generate` is Hugging Face's own `generate`. `EagerSession` runs the model's layers one by one and applies the
same stage functions that the exported graphs were traced from; at keep 1.0 it computes what `generate` computes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightkv_export.families import Family
from lightkv_export.recipe import StageSpec
from lightkv_export.stages import ImportanceFn, merge_spans

ATTENTION_NAME = "lightkv_reference"
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def _recording_attention(module, query, key, value, attention_mask, *, record, **arguments):
    """SDPA that leaves the last layer's rotated query and key in `record`."""
    record["query"], record["key"] = query, key[:, :, -query.shape[2] :]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)


AttentionInterface.register(ATTENTION_NAME, _recording_attention)


@dataclass(frozen=True)
class Encoded:
    """A prompt as the checkpoint's own processor encodes it: token ids [S] with placeholders, and image inputs."""

    ids: Tensor
    image_inputs: Mapping[str, Tensor]


class Reference:
    """A checkpoint loaded by transformers, unmodified, with its own processor.

    Args:
        checkpoint: local directory.
        family: its family.
        image_tokens: vision tokens per image.
        dtype: dtype of the weights in memory.
    """

    def __init__(self, checkpoint: Path, family: Family, image_tokens: int, dtype: torch.dtype = torch.float32) -> None:
        self.family, self.image_tokens = family, image_tokens
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, trust_remote_code=False
        ).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False, backend="pil")
        self.text = family.text_model(self.model)
        self.image_token_id = family.image_token_id(self.model.config)

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
        return Encoded(inputs["input_ids"][0], {k: v for k, v in inputs.items() if k not in TEXT_INPUTS})

    def image_inputs(self, images: Sequence[Any]) -> Mapping[str, Tensor]:
        """PIL images -> what the model's vision side takes."""
        return dict(self.processor.image_processor(images=list(images), return_tensors="pt")) if images else {}

    @torch.no_grad()
    def image_features(self, image_inputs: Mapping[str, Tensor]) -> Tensor:
        """Vision tokens of all images in a row, [N, D]."""
        return torch.cat(list(self.model.get_image_features(**image_inputs).pooler_output))

    @torch.no_grad()
    def generate(self, prompt: Encoded, max_new_tokens: int) -> list[int]:
        """Greedy tokens of Hugging Face's `generate`, stop token included.

        A repetition penalty in the checkpoint's generation_config.json is no part of the model, so it is switched off.
        """
        ids = prompt.ids[None]
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
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


@dataclass(frozen=True)
class Chunk:
    """Tokens on their way through the layers.

    Attributes:
        hidden: [1, S, D]; position: int64 [S], for the rotary embedding.
        spans: (start, end) of every image.
        query, key: of the last layer that ran, after rotary embedding, [1, H, S, d]; None before the first.
    """

    hidden: Tensor
    position: Tensor
    spans: Sequence[tuple[int, int]]
    query: Tensor | None = None
    key: Tensor | None = None


class EagerSession:
    """One conversation with stages: the model's layers, a cache per layer, one chunk of tokens at a time.

    Positions follow the policies of the runtime: "restart" numbers a chunk from its uncompressed start in every layer,
    "original" lets survivors keep their position, "contiguous" continues from each layer's own cache.

    `feed` is the whole way of a chunk. Experiments go step by step, without gradients: `begin`, then for every layer
    `run_layer` (inside `Reference.recording`) and perhaps `merge`, then `logits`. A `fork` in between shares what ran.
    """

    def __init__(self, reference: Reference, stages: Sequence[StageSpec], positions: str = "restart") -> None:
        self.reference, self.positions = reference, positions
        self.stages = {stage.layer: stage for stage in stages}
        self.cache = DynamicCache()
        self.seen = 0  # uncompressed tokens so far

    @torch.no_grad()
    def feed(self, ids: Sequence[int], image_inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """Appends tokens (with images where placeholders stand) and returns the last row's logits, float32 [V]."""
        chunk = self.begin(ids, self.reference.image_features(image_inputs) if image_inputs else None)
        with self.reference.recording():
            for index in range(len(self.reference.text.layers)):
                chunk = self.run_layer(chunk, index)
                if index in self.stages and chunk.spans:
                    chunk = self.merge(chunk, self.stages[index])
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

    def begin(self, ids: Sequence[int], features: Tensor | None = None) -> Chunk:
        """Embedded tokens; `features` [N, D] are the vision tokens of all images in a row."""
        tokens = torch.as_tensor(ids)
        is_image = tokens == self.reference.image_token_id
        hidden = self.reference.text.embed_tokens(tokens)[None].clone()
        if features is not None:
            hidden[0, is_image] = features.to(hidden.dtype)
        spans = image_spans(is_image.tolist(), self.reference.image_tokens)
        return Chunk(hidden, self.seen + torch.arange(len(tokens)), spans)

    def run_layer(self, chunk: Chunk, index: int) -> Chunk:
        """The chunk after decoder layer `index`, whose cache grows."""
        past, length = self.cache.get_seq_length(index), chunk.hidden.shape[1]
        position = past + torch.arange(length) if self.positions == "contiguous" else chunk.position
        mask = torch.arange(past + length)[None] <= past + torch.arange(length)[:, None]
        record: dict[str, Tensor] = {}
        hidden = self.reference.text.layers[index](
            chunk.hidden,
            attention_mask=mask[None, None],
            position_embeddings=self.reference.text.rotary_emb(chunk.hidden, position[None]),
            position_ids=position[None],
            past_key_values=self.cache,
            use_cache=True,
            record=record,
        )
        return replace(chunk, hidden=hidden, query=record["query"], key=record["key"])

    def merge(self, chunk: Chunk, stage: StageSpec, importance_fn: ImportanceFn | None = None) -> Chunk:
        """The chunk after a stage; `importance_fn` as in `merge_spans`."""
        heads, settings = (chunk.query, chunk.key), (stage.windows_per_side, stage.discard_ratio, importance_fn)
        hidden, survivors, spans = merge_spans(chunk.hidden, *heads, chunk.spans, *settings)
        restart = self.seen + torch.arange(hidden.shape[1])
        position = chunk.position[survivors[0]] if self.positions == "original" else restart
        return Chunk(hidden, position, spans)

    def logits(self, chunk: Chunk, rows: int = 1) -> Tensor:
        """Logits float32 [rows, V] of the last tokens, after the last layer."""
        return self.reference.family.head(self.reference.model)(
            self.reference.text.norm(chunk.hidden[0, -rows:])
        ).float()


def image_spans(is_image: Sequence[bool], image_tokens: int) -> list[tuple[int, int]]:
    """(start, end) of every image: two images may stand side by side, so runs are cut every `image_tokens`."""
    places = [place for place, flag in enumerate(is_image) if flag]
    return [(places[i], places[i] + image_tokens) for i in range(0, len(places), image_tokens)]
