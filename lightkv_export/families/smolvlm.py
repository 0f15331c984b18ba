"""SmolVLM2: SigLIP over tiles of a scaled-up image, pixel shuffle, a linear layer, SmolLM2 decoder (arXiv 2504.05299).

Every image is first scaled until its longer side has the length that the processor's `size` says (2048 px with tiles of
512), so that its shape alone decides the grid of tiles. Text with a tile's row and column stands before each.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

from lightkv_export.families.base import Checkpoint, Family, SizeLayout
from lightkv_export.families.llava import text_shape
from lightkv_export.families.tiles import noise, tile_layout
from lightkv_export.recipe import ModelShape, VisionShape

if TYPE_CHECKING:
    import torch
    from torch import nn

# config.json leaves out what equals the defaults of transformers' SmolVLMVisionConfig.
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "patch_size": 32,
    "image_size": 224,
}
TILES_PER_SIDE = 4  # of an image's longer side, in all published checkpoints
SHAPES = ((4, 3), (3, 4), (1, 1), (3, 2), (2, 3), (16, 9), (9, 16))  # of photographs and screens


class SmolVLM(Family):
    """One unit per tile: the grid's tiles, then the whole image."""

    windows = (2, 1)  # a tile has 64 or 81 vision tokens: 16 or 20 per window at first
    preprocess = "tiles"

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        text = text_shape(config["text_config"], tied=config.get("tie_word_embeddings", False))
        vision = {**VISION_DEFAULTS, **config["vision_config"]}
        tile, patch, scale = vision["image_size"], vision["patch_size"], config.get("scale_factor", 2)
        width, height = self.default_sizes(config)[0]
        units = 1 + ceil(width / tile) * ceil(height / tile)
        return ModelShape(
            family=config["model_type"],
            text=text,
            vision=VisionShape(
                tokens=(tile // patch // scale) ** 2,
                tiles=units,
                encoder_tokens=(tile // patch) ** 2,
                layers=vision["num_hidden_layers"],
                hidden=vision["hidden_size"],
                intermediate=vision["intermediate_size"],
                patch_size=patch,
                image_size=tile,
                spatial_merge=scale,
                units=units,
            ),
        )

    def default_sizes(self, config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        """Images of 4:3 (the default), 1:1, 3:2 and 16:9, as large as the processor makes them."""
        vision = {**VISION_DEFAULTS, **config["vision_config"]}
        edge = vision.get("size", {}).get("longest_edge", TILES_PER_SIDE * vision["image_size"])
        return tuple((edge * w // max(w, h), edge * h // max(w, h)) for w, h in SHAPES)

    def size(self, checkpoint: Checkpoint, width: int, height: int) -> SizeLayout:
        """An image of `width` x `height` pixels: its grid of tiles, and the text around them.

        Raises:
            UserError: the processor's tiles or tokens are not those of the model.
        """
        processor, tile = checkpoint.processor, checkpoint.config.vision_config.image_size
        image = noise(width, height)
        outputs = processor.image_processor([[image]], return_row_col_info=True, return_tensors="np")
        rows, columns = int(outputs["rows"][0][0]), int(outputs["cols"][0][0])
        detail = [max(columns, 1) * tile, max(rows, 1) * tile]
        geometry = {
            "tile": tile,
            "resize": [detail],
            "canvas": detail,
            "overview": "last" if rows else None,
            "overview_of": "canvas",
        }
        if processor.image_processor.do_resize and "longest_edge" in processor.image_processor.size:
            geometry["longest_edge"] = processor.image_processor.size["longest_edge"]
        prompt = processor.replace_image_token(outputs, 0)
        tokens = self.shape(checkpoint.config.to_dict()).vision.tokens
        return tile_layout(processor, image, outputs["pixel_values"][0], prompt, geometry, tokens)

    def image_features(self, model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, tile, tile] -> [N, v, D].

        A tile is always full. So the position table is taken as it lies: Hugging Face looks every patch up by its place
        in the image, which a trace with any number of tiles cannot follow.
        """
        vision = model.model.vision_model
        patches = vision.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        states = vision.encoder(patches + vision.embeddings.position_embedding.weight).last_hidden_state
        return model.model.connector(vision.post_layernorm(states))

    def text_model(self, model: nn.Module) -> nn.Module:
        return model.model.text_model


FAMILY = SmolVLM()
