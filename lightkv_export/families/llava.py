"""LLaVA-1.5: CLIP ViT, two-layer MLP projector, LLaMA decoder (arXiv 2310.03744)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightkv_export.families.base import Family
from lightkv_export.recipe import ModelShape, TextShape, VisionShape

if TYPE_CHECKING:
    import torch
    from torch import nn

# config.json leaves out what equals the defaults of transformers' LlamaConfig and LlavaConfig's CLIP tower.
TEXT_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 336,
}


def text_shape(config: Mapping[str, Any], *, tied: bool = False) -> TextShape:
    """Sizes of a LLaMA-like decoder from its part of config.json."""
    text = {**TEXT_DEFAULTS, **config}
    heads = text["num_attention_heads"]
    return TextShape(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=text["intermediate_size"],
        vocab=text["vocab_size"],
        tied_embeddings=tied,
    )


def vision_layers(num_layers: int, feature_layer: int) -> int:
    """Encoder layers that must run to obtain hidden state `feature_layer` (negative counts from the end)."""
    return feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer


class Llava(Family):
    """vision_feature_layer, class token dropped ("default"), projected; one row of v tokens per image."""

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        text = text_shape(config["text_config"], tied=config.get("tie_word_embeddings", False))
        vision = {**VISION_DEFAULTS, **config["vision_config"]}
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        keeps_class = config.get("vision_feature_select_strategy", "default") == "full"
        return ModelShape(
            family="llava",
            text=text,
            vision=VisionShape(
                tokens=patches + keeps_class,
                tiles=1,
                encoder_tokens=patches + 1,
                layers=vision_layers(vision["num_hidden_layers"], config.get("vision_feature_layer", -2)),
                hidden=vision["hidden_size"],
                intermediate=vision["intermediate_size"],
                patch_size=vision["patch_size"],
                image_size=vision["image_size"],
                projector_hidden=text.hidden,
            ),
        )

    def image_features(self, model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        # LlavaModel.get_image_features ends in list(features), which would fix the number of images in a trace.
        states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        features = states[model.config.vision_feature_layer]
        if model.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        return model.model.multi_modal_projector(features)


FAMILY = Llava()
