"""Small random Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints for tests: true structure, their template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizer_factory import CORPUS

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
DEFAULT_SYSTEM = (  # Qwen2-VL and Qwen2.5-VL open every conversation with it, Qwen3-VL does not
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
)
CHAT_TEMPLATE = (  # the one of the checkpoints, without videos and numbered pictures
    "{% for message in messages %}DEFAULT_SYSTEM<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = {
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_heads": 2,
}


def make_qwen2_vl(path: Path, seed: int = 0, **text: Any) -> Path:
    """Saves a float32 Qwen2-VL with seeded random weights to `path` and returns it; vision tokens are 8 x 8 px.

    Args:
        path: directory to write.
        seed: of the weights.
        text: entries of the decoder's configuration.
    """
    vision = VISION | {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "hidden_size": 64}
    return _save(path, seed, "qwen2_vl", _text(text, mrope_section=[2, 3, 3]), vision)


def make_qwen2_5_vl(path: Path, seed: int = 0, **text: Any) -> Path:
    """As `make_qwen2_vl`, for Qwen2.5-VL: layers 0 and 2 of the tower attend in windows of 3 x 3 tokens (24 px)."""
    vision = VISION | {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "window_size": 24,
        "fullatt_block_indexes": [1, 3],
    }
    return _save(path, seed, "qwen2_5_vl", _text(text, mrope_section=[2, 3, 3]), vision)


def make_qwen3_vl(path: Path, seed: int = 0, **text: Any) -> Path:
    """As `make_qwen2_vl`, for Qwen3-VL: what its tower has after layers 0 and 2 joins the decoder after 0 and 1."""
    vision = VISION | {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    }
    decoder = _text({"head_dim": 32} | text, mrope_section=[6, 5, 5], mrope_interleaved=True)
    return _save(path, seed, "qwen3_vl", decoder, vision)


def _text(changes: dict[str, Any], **rope: Any) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": 10,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},
    }
    return sizes | changes


def _save(path: Path, seed: int, model_type: str, text: dict[str, Any], vision: dict[str, Any]) -> Path:
    import torch
    from random_models import randomized, save_checkpoint
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = AutoConfig.for_model(
        model_type,
        text_config=text | {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": ids["<|im_end|>"]},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomized(model, seed)
    projection = model.model.visual.patch_embed.proj.weight  # a matrix, though its name says embedding
    projection.data *= projection[0].numel() ** -0.5
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):  # they undo the gains that make attention pick tokens
            weight.data *= 2
    stops = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=ids["<|endoftext|>"], do_sample=False)
    save_checkpoint(model, path, [])
    system = "" if model_type == "qwen3_vl" else DEFAULT_SYSTEM
    _save_processor(path, tokenizer, CHAT_TEMPLATE.replace("DEFAULT_SYSTEM", system), model_type)
    return path


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": list(SPECIAL)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _save_processor(path: Path, tokenizer: Any, template: str, model_type: str) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if model_type == "qwen3_vl" else {}
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
        patch_size=VISION["patch_size"],
        merge_size=VISION["spatial_merge_size"],
        temporal_patch_size=VISION["temporal_patch_size"],
        **normal,
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    processor = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
    (path / "processor_config.json").write_text(f'{{"processor_class": "{processor[model_type]}"}}\n')
