"""InternVL3, Hugging Face's native classes: InternViT over 448 px tiles, pixel shuffle, MLP projector, Qwen2 decoder
(arXiv 2504.10479)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightkv_export.errors import UserError
from lightkv_export.families.base import Checkpoint, Family, SizeLayout, square_size
from lightkv_export.families.llava import text_shape, vision_layers
from lightkv_export.families.tiles import noise, tile_layout
from lightkv_export.recipe import ModelShape, VisionShape

if TYPE_CHECKING:
    import torch
    from torch import nn

# config.json leaves out what equals the defaults of transformers' Qwen2Config and InternVLVisionConfig.
TEXT_DEFAULTS = {"intermediate_size": 22016, "vocab_size": 151936}
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 448,
}


class InternVL(Family):
    """One unit per tile, all side by side: the grid's tiles, then the whole image if there is more than one."""

    preprocess = "tiles"

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        kind = config["text_config"].get("model_type", "qwen2")
        if kind != "qwen2":
            raise UserError(
                f"an InternVL checkpoint whose text model is {kind!r}", expected="'qwen2', as InternVL3 has"
            )
        text = text_shape({**TEXT_DEFAULTS, **config["text_config"]}, tied=config.get("tie_word_embeddings", True))
        vision = {**VISION_DEFAULTS, **config["vision_config"]}
        side, patch = square_size(vision), square_size({"image_size": vision["patch_size"]})
        merge = round(1 / config.get("downsample_ratio", 0.5))
        return ModelShape(
            family="internvl",
            text=text,
            vision=VisionShape(
                tokens=(side // patch // merge) ** 2,
                tiles=1,
                encoder_tokens=(side // patch) ** 2 + 1,
                layers=vision_layers(vision["num_hidden_layers"], config.get("vision_feature_layer", -1)),
                hidden=vision["hidden_size"],
                intermediate=vision["intermediate_size"],
                patch_size=patch,
                image_size=side,
                projector_hidden=text.hidden,
                spatial_merge=merge,
            ),
        )

    def default_sizes(self, config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        """One tile; two, both ways; and four. (The checkpoint's processor cuts up to twelve.)"""
        side = self.shape(config).vision.image_size
        return (side, side), (2 * side, side), (side, 2 * side), (2 * side, 2 * side)

    def size(self, checkpoint: Checkpoint, width: int, height: int) -> SizeLayout:
        """An image of `width` x `height` pixels: its grid of tiles.

        Raises:
            UserError: the processor's tiles or tokens are not those of the model.
        """
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        processor, tile = checkpoint.processor, square_size(checkpoint.config.vision_config)
        image = noise(width, height)
        pixels = processor(images=[image], text=processor.image_token)["pixel_values"]
        limits = processor.image_processor.min_patches, processor.image_processor.max_patches
        across, down = get_optimal_tiled_canvas((height, width), (tile, tile), *limits) if len(pixels) > 1 else (1, 1)
        detail = [across * tile, down * tile]
        geometry = {
            "tile": tile,
            "resize": [detail],
            "canvas": detail,
            "overview": "last" if len(pixels) > 1 else None,
        }
        prompt = processor.replace_image_token({"num_patches": [len(pixels)]}, 0)
        tokens = self.shape(checkpoint.config.to_dict()).vision.tokens
        return tile_layout(processor, image, pixels, prompt, geometry, tokens)

    def image_features(self, model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, side, side] -> [N, v, D]."""
        return model.model.get_image_features(pixel_values, return_dict=True).pooler_output


FAMILY = InternVL()
