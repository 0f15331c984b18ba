"""LLaVA-NeXT (LLaVA 1.6): CLIP ViT over up to five tiles, two-layer MLP projector, LLaMA or Mistral decoder.

An image becomes an overview and a grid of tiles whose shape depends on the image's size ("anyres"). The tiles' features
are laid out as one picture, rows and columns that show padding alone are dropped, and a learned line break ends each
row. All of this only picks rows out of a list, so per size it is a table: Hugging Face's own code is run at export on
features that are nothing but their own place in that list.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lightkv_export.errors import UserError
from lightkv_export.families.base import Checkpoint, Family, SizeLayout, square_size
from lightkv_export.families.llava import text_shape, vision_layers
from lightkv_export.families.tiles import noise, tiles_compared
from lightkv_export.manifest import Tensor as Spec
from lightkv_export.recipe import ModelShape, VisionShape

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

# What config.json leaves out of its text part where transformers' defaults are not those of LLaMA (see llava.py).
TEXT_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": {},
    "mistral": {"intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": {"intermediate_size": 22016, "vocab_size": 151936},
}
CLASS_TOKENS = {"clip_vision_model": 1}  # tokens of a tile beside its patches, by vision model; others have none


class LlavaNext(Family):
    """One unit per image: the overview's tokens, then the picture's rows, each with its line break."""

    windows = (6, 4, 2)
    preprocess = "tiles"
    # What config.json leaves out, by the defaults of transformers' LlavaNextConfig.
    text_type = "llama"
    feature_layer = -2
    vision: Mapping[str, Any] = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 4096,
        "patch_size": 14,
        "image_size": 336,
    }
    # Width and height of images of 3:2 and 4:3, as in COCO, for tiles of `vision["image_size"]`.
    photos = ((640, 427), (427, 640), (640, 480), (480, 640))

    def default_sizes(self, config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        """Photographs of 3:2 (the default) and 4:3, both ways up, and the square that fills 2 x 2 tiles."""
        tile = self._vision(config)["image_size"]
        scale = tile / self.vision["image_size"]
        return (*((round(w * scale), round(h * scale)) for w, h in self.photos), (2 * tile, 2 * tile))

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """Sizes from config.json. The default image size fills the width of 2 x 2 tiles: every checkpoint has them."""
        vision, text = self._vision(config), config["text_config"]
        kind = text.get("model_type", self.text_type)
        if kind not in TEXT_DEFAULTS:
            raise UserError(
                f"a {config['model_type']} checkpoint whose text model is {kind!r}",
                expected=f"one of {', '.join(TEXT_DEFAULTS)}",
            )
        text = text_shape({**TEXT_DEFAULTS[kind], **text}, tied=self.is_tied(config))
        side = vision["image_size"] // vision["patch_size"]
        width, height = self.default_sizes(config)[0]
        padding = (2 * side - int(round(2 * side * height / width, 7))) // 2  # as transformers' unpad_image rounds it
        layers = np.atleast_1d(config.get("vision_feature_layer", self.feature_layer))
        return ModelShape(
            family=config["model_type"],
            text=text,
            vision=VisionShape(
                tokens=side * side + (2 * side - 2 * padding) * (2 * side + 1),
                tiles=5,
                encoder_tokens=side * side + CLASS_TOKENS.get(vision["model_type"], 0),
                layers=max(vision_layers(vision["num_hidden_layers"], int(layer)) for layer in layers),
                hidden=vision["hidden_size"],
                intermediate=vision["intermediate_size"],
                patch_size=vision["patch_size"],
                image_size=vision["image_size"],
                projector_hidden=text.hidden,
            ),
        )

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head is the token embedding, by config.json."""
        return config.get("tie_word_embeddings", False)

    def vision_inputs(self, config: PretrainedConfig, dtype: str) -> tuple[Spec, ...]:
        return (*super().vision_inputs(config, dtype), Spec("token_index", "int64", ("R",)))

    def image_features(self, model: nn.Module, pixel_values: torch.Tensor, token_index: torch.Tensor) -> torch.Tensor:
        """[N, 3, side, side] and [R] -> [R, D]."""
        return self.feature_rows(model, pixel_values).index_select(0, token_index)

    def feature_rows(self, model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """All tiles' projected features, then the line break: [N, 3, side, side] -> [N * patches + 1, D]."""
        import torch

        config = model.config
        states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        layers = np.atleast_1d(config.vision_feature_layer)
        features = torch.cat([states[int(layer)] for layer in layers], dim=-1)
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        features = model.model.multi_modal_projector(features)
        return torch.cat([features.flatten(0, 1), model.model.image_newline[None]])

    def size(self, checkpoint: Checkpoint, width: int, height: int) -> SizeLayout:
        """An image of `width` x `height` pixels: its tiles, and the tables of `tables`.

        Raises:
            UserError: the processor lays out this size in another way than the model, or prepares pixels in another way
                than the runtime.
        """
        config, processor = checkpoint.config, checkpoint.processor
        geometry = self.geometry(checkpoint, width, height)
        tile, canvas = geometry["tile"], geometry["canvas"]
        image = noise(width, height)
        inputs = processor(images=[image], text=processor.image_token)
        counted = int(np.count_nonzero(np.asarray(inputs["input_ids"]) == config.image_token_id))
        pixels = inputs["pixel_values"][0]
        made, same = tiles_compared(processor, image, pixels, geometry)
        try:
            tables = self.tables(config, 1 + (canvas[0] // tile) * (canvas[1] // tile), (height, width))
        except (RuntimeError, ValueError):  # the model cuts this size into other tiles
            tables = {"token_index": np.zeros(0, np.int64)}
        tokens = len(tables["token_index"])
        if counted != tokens or not same:
            raise UserError(
                f"image size {width}x{height}: the checkpoint's processor makes {counted} vision tokens of pixels "
                f"{list(np.shape(pixels))}, its model {tokens} of {list(made)}"
                + ("" if same else ", and the pixels differ"),
                expected="grid pinpoints, tiles and steps that agree in preprocessor_config.json and config.json",
                fix="compare preprocessor_config.json beside the weights with the published one",
            )
        return SizeLayout(tokens, 1, processor.image_token, geometry, tables)

    def geometry(self, checkpoint: Checkpoint, width: int, height: int) -> dict[str, Any]:
        """How the runtime cuts an image (see `runtime/pixels_tiles.py`), by the processor's own functions."""
        from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
        from transformers.image_utils import ChannelDimension

        canvas = select_best_resolution((height, width), checkpoint.processor.image_processor.image_grid_pinpoints)
        image = np.broadcast_to(np.uint8(0), (3, height, width))  # read for its shape alone
        detail = get_patch_output_size(image, canvas, ChannelDimension.FIRST)
        tile = square_size(checkpoint.config.vision_config)
        return {"tile": tile, "overview": "first", "resize": [list(detail[::-1])], "canvas": list(canvas[::-1])}

    def tables(self, config: PretrainedConfig, tiles: int, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
        """`token_index` int64 [R]: which of `feature_rows` each vision token is.

        `image_size` is (height, width), as Hugging Face writes it.
        """
        import torch
        from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

        patches = (square_size(config.vision_config) // config.vision_config.patch_size) ** 2
        numbers = torch.arange(tiles * patches + 1)
        packed, _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config),
            [numbers[:-1].reshape(tiles, patches, 1)],
            torch.tensor([image_size]),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=numbers[-1:],
        )
        return {"token_index": packed[0][:, 0].numpy()}

    def _vision(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.vision, **config.get("vision_config", {})}


FAMILY = LlavaNext()
