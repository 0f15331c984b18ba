"""Small random LLaVA-NeXT and LLaVA-OneVision checkpoints for tests: true architecture, real form of the templates."""

from __future__ import annotations

import json
from pathlib import Path

from random_models import randomized, save_checkpoint
from tokenizers import Tokenizer

SOURCE = Path(__file__).resolve().parent.parent / "recipes" / "tiny-llava"  # for its tokenizer
IMAGE, EOS = 4, 1  # ids there
VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% else %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'system' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEXT_GRID = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # rows and columns of tiles, as llava-hf's checkpoints have them


def make_llava_next(
    path: Path,
    seed: int = 0,
    *,
    tile: int = 32,
    patch: int = 8,
    layers: int = 8,
    hidden: int = 64,
    text_type: str = "llama",
) -> Path:
    """Saves a float32 LLaVA-NeXT with seeded random weights to `path` and returns it.

    Args:
        path: directory to write.
        seed: of the weights.
        tile, patch: in pixels; (tile / patch)² features per tile. The vision tower has 3 layers of width 32.
        layers, hidden: of the decoder (4 heads; "mistral" has 2 for keys and values).
        text_type: "llama" (as with Vicuna) or "mistral".
    """
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    kv_heads = {"llama": 4, "mistral": 2}[text_type]
    text = _text(layers, hidden, kv_heads) | {"model_type": text_type}
    if text_type == "mistral":
        text["sliding_window"] = None
    config = LlavaNextConfig(
        text_config=text,
        vision_config=_vision(3, tile, patch) | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[rows * tile, columns * tile] for rows, columns in NEXT_GRID],
        image_seq_length=(tile // patch) ** 2,
    )
    files = [SOURCE / name for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")]
    save_checkpoint(randomized(LlavaNextForConditionalGeneration(config).float(), seed), path, files)
    _write(path / "tokenizer_config.json", processor_class="LlavaNextProcessor")
    (path / "chat_template.jinja").write_text(VICUNA_TEMPLATE if text_type == "llama" else MISTRAL_TEMPLATE)
    square = {"height": tile, "width": tile}
    images = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": tile}, "crop_size": square}
    _write(path / "preprocessor_config.json", **images, image_grid_pinpoints=config.image_grid_pinpoints)
    _processor(path, "LlavaNextProcessor", "default", patch_size=patch, num_additional_image_tokens=1)
    return path


def make_llava_onevision(
    path: Path,
    seed: int = 0,
    *,
    tile: int = 32,
    patch: int = 8,
    layers: int = 8,
    hidden: int = 64,
    tied: bool = True,
    grid: int = 6,
    limit: int = 9,
) -> Path:
    """Saves a float32 LLaVA-OneVision with seeded random weights to `path` and returns it.

    Args:
        path: directory to write.
        seed: of the weights.
        tile, patch: in pixels; (tile // patch)² features per tile. The vision tower has 3 layers of width 32.
        layers, hidden: of the Qwen2 decoder (4 heads, 2 for keys and values).
        tied: whether the head is the token embedding, as in the checkpoint of 0.5B.
        grid: pictures of 1 to `grid` tiles per side.
        limit: tiles' worth of tokens to which larger pictures are shrunk.
    """
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    path.mkdir(parents=True, exist_ok=True)
    tokens = _qwen_tokenizer(path)
    text = _text(layers, hidden, 2) | {"model_type": "qwen2", "vocab_size": len(tokens), "tie_word_embeddings": tied}
    config = LlavaOnevisionConfig(
        text_config=text | {"bos_token_id": None, "eos_token_id": tokens["<|im_end|>"]},
        vision_config=_vision(3, tile, patch) | {"model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=tokens["<image>"],
        video_token_index=tokens["<video>"],
        image_grid_pinpoints=[[tile * y, tile * x] for y in range(1, grid + 1) for x in range(1, grid + 1)],
        vision_aspect_ratio=f"anyres_max_{limit}",
        tie_word_embeddings=tied,
    )
    model = randomized(LlavaOnevisionForConditionalGeneration(config).float(), seed)
    if tied:  # scaled like a head, or logits would lie far apart and one token repeat
        model.get_input_embeddings().weight.data *= hidden**-0.5
    model.generation_config.eos_token_id = tokens["<|im_end|>"]
    save_checkpoint(model, path, [])
    (path / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    images = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": tile, "width": tile}}
    _write(path / "preprocessor_config.json", **images, image_grid_pinpoints=config.image_grid_pinpoints)
    features = {"num_image_tokens": (tile // patch) ** 2, "vision_aspect_ratio": config.vision_aspect_ratio}
    _processor(path, "LlavaOnevisionProcessor", "full", **features)
    return path


def _text(layers: int, hidden: int, kv_heads: int) -> dict:
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "head_dim": hidden // 4}
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 2 * hidden, "vocab_size": 1024}
    return sizes | heads | {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": 3, "max_position_embeddings": 4096}


def _vision(layers: int, tile: int, patch: int) -> dict:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    return sizes | {"image_size": tile, "patch_size": patch}


def _qwen_tokenizer(path: Path) -> dict[str, int]:
    """tiny-llava's byte-level tokenizer with Qwen2's special tokens and no token for the beginning -> ids by token."""
    document = json.loads((SOURCE / "tokenizer.json").read_text())
    tokenizer = Tokenizer.from_str(json.dumps(document | {"post_processor": None}))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<video>"])
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    special = {"image_token": "<image>", "video_token": "<video>"}
    _write(path / "tokenizer_config.json", **names, extra_special_tokens=special, model_max_length=8192)
    return tokenizer.get_vocab()


def _processor(path: Path, name: str, strategy: str, **entries: object) -> None:
    common = {"processor_class": name, "image_token": "<image>", "vision_feature_select_strategy": strategy}
    _write(path / "processor_config.json", **common, **entries)


def _write(path: Path, **entries: object) -> None:
    """Adds entries to a JSON file, or makes it."""
    document = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(document | entries, indent=2))
