"""Small random LLaVA checkpoints for tests: true structure, tiny-llava's tokenizer and processor, fast to build."""

from __future__ import annotations

import json
from pathlib import Path

from random_models import random_llava, save_checkpoint

SOURCE = Path(__file__).resolve().parent.parent / "recipes" / "tiny-llava"


def make_llava(
    path: Path,
    seed: int = 0,
    *,
    layers: int = 10,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    image_size: int = 96,
    patch: int = 8,
    tied: bool = False,
    **text: object,
) -> Path:
    """Saves a float32 LLaVA with seeded random weights to `path` and returns it.

    Args:
        path: directory to write.
        seed: of the weights.
        layers, hidden, heads, kv_heads: of the LLaMA decoder; head_dim is hidden / heads, kv_heads < heads is GQA.
        image_size, patch: in pixels; (image_size / patch)² vision tokens. The vision tower has 3 layers of width 32.
        tied: whether the head is the token embedding, which is then scaled like a head: answers would repeat one token.
        text: any other entry of the decoder's configuration, e.g. head_dim, rope_parameters.
    """
    from transformers import LlavaConfig

    config = json.loads((SOURCE / "config.json").read_text())
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "head_dim": hidden // heads,
    }
    config["text_config"] |= sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | text
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config["vision_config"] |= vision | {"image_size": image_size, "patch_size": patch}
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    config["image_seq_length"] = (image_size // patch) ** 2
    model = random_llava(LlavaConfig(**config), seed)
    if tied:
        model.get_input_embeddings().weight.data *= hidden**-0.5
    save_checkpoint(model, path, sorted(SOURCE.iterdir()))
    _set(path / "processor_config.json", patch_size=patch)
    crop = {"height": image_size, "width": image_size}
    _set(path / "preprocessor_config.json", size={"shortest_edge": image_size}, crop_size=crop)
    return path


def _set(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2))
