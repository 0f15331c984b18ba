"""Small random InternVL3, SmolVLM2 and Idefics3 checkpoints for tests: true architecture, real form of template and
prompt."""

from __future__ import annotations

import json
from pathlib import Path

from random_models import randomized, save_checkpoint
from tokenizer_factory import CORPUS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERNVL_SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SMOLVLM_SPECIAL = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
}
SMOLVLM_GRID = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]


def make_internvl(
    path: Path,
    seed: int = 0,
    *,
    tile: int = 64,
    patch: int = 4,
    layers: int = 8,
    hidden: int = 64,
    tied: bool = False,
) -> Path:
    """Saves a float32 InternVL3 with seeded random weights to `path` and returns it.

    Args:
        path: directory to write.
        seed: of the weights.
        tile, patch: in pixels; a tile has (tile / patch / 2)² vision tokens. The vision tower has 2 layers of width 32.
        layers, hidden: of the Qwen2 decoder (4 heads, 2 for keys and values).
        tied: whether the head is the token embedding; it is not in the published checkpoints.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    size = _save_tokenizer(path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], INTERNVL_SPECIAL)
    tokens = (tile // patch // 2) ** 2
    config = InternVLConfig(
        text_config=_text(layers, hidden, size) | {"model_type": "qwen2", "tie_word_embeddings": tied},
        vision_config=_vision() | {"image_size": [tile, tile], "patch_size": [patch, patch]},
        image_token_id=_ids(path)["<IMG_CONTEXT>"],
        image_seq_length=tokens,
        tie_word_embeddings=tied,
    )
    _save_model(InternVLForConditionalGeneration(config), seed, path)
    (path / "chat_template.jinja").write_text(INTERNVL_TEMPLATE)
    images = {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": False, "max_patches": 12}
    _write(path / "preprocessor_config.json", images | {"size": {"height": tile, "width": tile}})
    _write(path / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": tokens})
    return path


def make_smolvlm(
    path: Path,
    seed: int = 0,
    *,
    tile: int = 64,
    patch: int = 4,
    scale: int = 2,
    longest_edge: int = 128,
    layers: int = 10,
    hidden: int = 64,
    tied: bool = False,
    architecture: str = "SmolVLM",
) -> Path:
    """Saves a float32 SmolVLM2 with seeded random weights to `path` and returns it.

    Args:
        path: directory to write.
        seed: of the weights.
        tile, patch, scale: (tile // patch / scale)² vision tokens per tile. The vision tower has 2 layers of width 32.
        longest_edge: pixels to which the longer side of every image is scaled; at most 4 tiles.
        layers, hidden: of the LLaMA decoder (4 heads, 2 for keys and values).
        tied: whether the head is the token embedding, it is not in the published checkpoints.
        architecture: "SmolVLM" or "Idefics3", by which the classes of transformers begin.
    """
    import transformers

    size = _save_tokenizer(path, ["<|endoftext|>", "<|im_start|>", *SMOLVLM_GRID], SMOLVLM_SPECIAL)
    tokens = (tile // patch // scale) ** 2
    config = getattr(transformers, f"{architecture}Config")(
        text_config=_text(layers, hidden, size) | {"model_type": "llama", "tie_word_embeddings": tied},
        vision_config=_vision() | {"image_size": tile, "patch_size": patch, "size": {"longest_edge": longest_edge}},
        image_token_id=_ids(path)["<image>"],
        scale_factor=scale,
        tie_word_embeddings=tied,
    )
    _save_model(getattr(transformers, f"{architecture}ForConditionalGeneration")(config), seed, path)
    (path / "chat_template.jinja").write_text(SMOLVLM_TEMPLATE)
    images = {"image_processor_type": f"{architecture}ImageProcessor", "max_image_size": {"longest_edge": tile}}
    _write(path / "preprocessor_config.json", images | {"size": {"longest_edge": longest_edge}})
    _write(path / "processor_config.json", {"processor_class": f"{architecture}Processor", "image_seq_len": tokens})
    return path


def make_idefics3(path: Path, seed: int = 0, **options: int | bool) -> Path:
    """The same with transformers' Idefics3, as the first SmolVLM is; `options` are those of `make_smolvlm`."""
    return make_smolvlm(path, seed, architecture="Idefics3", **options)


def _text(layers: int, hidden: int, vocab: int) -> dict:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4}
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 2 * hidden, "vocab_size": vocab}
    return sizes | heads | {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 4096}


def _vision() -> dict:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _save_model(model: object, seed: int, path: Path) -> None:
    """Seeded weights; a tied embedding is scaled like a head, or logits would be far apart and one token repeat."""
    model = randomized(model.float(), seed)
    if model.config.tie_word_embeddings:
        model.get_input_embeddings().weight.data *= model.config.text_config.hidden_size**-0.5
    model.generation_config.eos_token_id = 0
    save_checkpoint(model, path, [])


def _save_tokenizer(path: Path, plain: list[str], named: dict[str, str]) -> int:
    """Byte-level BPE as in Qwen2 and SmolLM2, without a token for the beginning; returns the size of the vocabulary.

    `named` are special tokens that the processor asks the tokenizer for by name; the first of `plain` ends a text.
    """
    special = [*plain, *named.values()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320 + len(special), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": plain[0], "pad_token": plain[0]}
    _write(path / "tokenizer_config.json", entries | {"extra_special_tokens": named, "model_max_length": 8192})
    return tokenizer.get_vocab_size()


def _ids(path: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab()


def _write(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=2))
