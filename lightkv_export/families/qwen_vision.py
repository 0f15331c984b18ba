"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: images cut into patches at any resolution, and 3-D rotary positions.

Their vision towers take a packed row of patches and derive from the image's grid where each patch stands, which is why
Hugging Face's forward pass cannot be traced for all sizes at once. Here the blocks' own layers run in a loop, and what
depends on the grid comes in as tables, made at export by Hugging Face's own functions. One vision graph then serves all
sizes. It takes one still image at a time, so a layer that attends globally attends to all patches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightkv_export.errors import UserError
from lightkv_export.families.base import Checkpoint, Family, SizeLayout
from lightkv_export.families.llava import text_shape
from lightkv_export.manifest import Tensor as Spec
from lightkv_export.recipe import ModelShape, VisionShape

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

SQUARE = (24, 24)  # vision tokens down and across of the default size: 576, as LLaVA-1.5 has
DEFAULT_GRIDS = (SQUARE, (21, 28), (28, 21))  # and 4:3 and 3:4, what cameras and screens make


class QwenFamily(Family):
    """Patches in, mRoPE positions out; a subclass adds its config.json's defaults and its tower's layers.

    Attributes:
        text_defaults, vision_defaults: what config.json may leave out.
    """

    windows = (6, 4, 2)
    rope = "mrope"
    preprocess = "patches"
    text_defaults: Mapping[str, Any]
    vision_defaults: Mapping[str, Any]

    @abstractmethod
    def encoder_shape(self, vision: Mapping[str, Any]) -> dict[str, Any]:
        """VisionShape's fields that differ between the families, from the vision part of config.json."""

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        nested = config.get("text_config") or config  # the checkpoints of Qwen2-VL and Qwen2.5-VL have one flat table
        tied = config.get("tie_word_embeddings", False) or nested.get("tie_word_embeddings", False)
        vision = {**self.vision_defaults, **config["vision_config"]}
        merge, tokens = vision["spatial_merge_size"], SQUARE[0] * SQUARE[1]
        sizes = {
            "tokens": tokens,
            "tiles": 1,
            "encoder_tokens": tokens * merge**2,
            "layers": vision["depth"],
            "patch_size": vision["patch_size"],
            "image_size": SQUARE[0] * merge * vision["patch_size"],
            "spatial_merge": merge,
            "patch_channels": vision["in_channels"] * vision["temporal_patch_size"],
        }
        return ModelShape(
            family=config["model_type"],
            text=text_shape({**self.text_defaults, **nested}, tied=tied),
            vision=VisionShape(**sizes | self.encoder_shape(vision)),
        )

    def default_sizes(self, config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        vision = self.shape(config).vision
        side = vision.patch_size * vision.spatial_merge
        return tuple((across * side, down * side) for down, across in DEFAULT_GRIDS)

    def size(self, checkpoint: Checkpoint, width: int, height: int) -> SizeLayout:
        processor = checkpoint.processor.image_processor
        patch, merge = processor.patch_size, processor.merge_size
        resized_height, resized_width = _resized(processor, width, height)
        grid = (1, resized_height // patch, resized_width // patch)
        tokens = grid[1] * grid[2] // merge**2
        positions, advance = _relative_positions(checkpoint.config, grid, tokens)
        geometry = {
            "resize": [resized_width, resized_height],
            "patch_size": patch,
            "merge_size": merge,
            "temporal_patch_size": processor.temporal_patch_size,
        }
        tables = self.tables(checkpoint.config.vision_config, grid)
        return SizeLayout(tokens, 1, checkpoint.processor.image_token, geometry, tables, positions, advance)

    def tables(self, vision: PretrainedConfig, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """The vision graph's constant inputs for patches in a `grid` of (frames, down, across)."""
        import torch
        from transformers.vision_utils import get_vision_position_ids

        return {"position_ids": get_vision_position_ids(torch.tensor([grid]), vision.spatial_merge_size).numpy()}

    def vision_inputs(self, config: PretrainedConfig, dtype: str) -> tuple[Spec, ...]:
        vision = config.vision_config
        patches = f"{vision.spatial_merge_size**2}*G"
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return (Spec("pixel_values", dtype, (patches, width)), Spec("position_ids", "int64", (patches, 2)))

    def eager_features(self, model: nn.Module, image_inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        import torch

        output = hugging_face_features(model, image_inputs)
        return (torch.cat(list(output.pooler_output)),)

    def rotary(self, model: nn.Module) -> nn.Module:
        from lightkv_export.rotary import ChosenAxes

        return ChosenAxes(super().rotary(model))

    def positions3(self, model: nn.Module, ids: torch.Tensor, image_inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        image_token = self.image_token_id(model.config)
        return _rope_index(model.model, ids, image_token, image_inputs.get("image_grid_thw"))


def hugging_face_features(model: nn.Module, image_inputs: Mapping[str, torch.Tensor]) -> Any:
    """`get_image_features` without what the processor adds for the text side."""
    return model.get_image_features(image_inputs["pixel_values"], image_inputs["image_grid_thw"])


def embedded_patches(tower: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """[P, C*T*p*p] -> [P, D]. The convolution's kernel covers a whole patch, so it is a matrix product; ONNX Runtime
    takes four times as long for it as a convolution."""
    import torch

    convolution = tower.patch_embed.proj
    return torch.nn.functional.linear(pixels, convolution.weight.flatten(1), convolution.bias)


def run_block(
    block: nn.Module,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    windows: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer of the tower, [P, D] -> [P, D]: every patch attends to all, or to those of its window.

    Args:
        block, hidden: the layer and its input.
        rotary: cos and sin [P, d].
        windows: int64 [W, M], the patches of each window, -1 where it has fewer than M.
        places: int64 [P], where in the flattened `windows` each patch stands.
    """
    hidden = hidden + _attention(block.attn, block.norm1(hidden), rotary, windows, places)
    return hidden + block.mlp(block.norm2(hidden))


def _attention(attention, hidden, rotary, windows, places):
    """[P, D] -> [P, D], softmax in float32; arguments as in `run_block`."""
    import torch
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    heads = (hidden.shape[0], 3, attention.num_heads, attention.head_dim)
    query, key, value = attention.qkv(hidden).reshape(heads).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    query = query * attention.scaling
    if windows is not None:
        inside = windows >= 0
        patches = torch.where(inside, windows, 0).flatten()
        query, key, value = (rows.index_select(0, patches).unflatten(0, windows.shape) for rows in (query, key, value))
    scores = (query.transpose(-3, -2) @ key.movedim(-3, -1)).float()  # [(W,) heads, M or P, M or P]
    if windows is not None:
        scores = torch.where(inside[:, None, None], scores, torch.finfo(torch.float32).min)
    output = (torch.softmax(scores, dim=-1).to(value.dtype) @ value.transpose(-3, -2)).transpose(-3, -2)
    if windows is not None:
        output = output.flatten(0, 1).index_select(0, places)
    return attention.proj(output.reshape(hidden.shape))


def _resized(processor: Any, width: int, height: int) -> tuple[int, int]:
    """(height, width) that the checkpoint's image processor brings an image to."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limits = processor.size["shortest_edge"], processor.size["longest_edge"]
    if min(width, height) < 1:
        raise UserError(f"image size {width}x{height}", expected="at least 1x1 pixel")
    try:
        return smart_resize(height, width, processor.patch_size * processor.merge_size, *limits)
    except ValueError as error:
        raise UserError(f"image size {width}x{height}: {error}", fix="name a size less extreme") from None


def _relative_positions(config: PretrainedConfig, grid: tuple, tokens: int) -> tuple[np.ndarray, int]:
    """Positions [3, tokens] of an image relative to its first, and how far the text after it lies from there."""
    import copy

    import torch
    from transformers import AutoModel

    short = copy.deepcopy(config)  # only a method of the model is wanted, so one layer each is enough
    short.vision_config.depth = short.text_config.num_hidden_layers = 1
    if getattr(short.text_config, "layer_types", None):
        short.text_config.layer_types = short.text_config.layer_types[:1]
    with torch.device("meta"):
        model = AutoModel.from_config(short)
    other = config.image_token_id + 1  # any token that is no image's
    ids = torch.tensor([other, *[config.image_token_id] * tokens, other])
    positions = _rope_index(model, ids, config.image_token_id, torch.tensor([grid])) - 1
    return positions[:, 1:-1].numpy(), int(positions[0, -1])


def _rope_index(model: nn.Module, ids: torch.Tensor, image_token: int, grids: torch.Tensor | None) -> torch.Tensor:
    """Hugging Face's position ids [3, S] for `ids` [S]."""
    is_image = (ids == image_token).int()
    return model.get_rope_index(ids[None], mm_token_type_ids=is_image[None], image_grid_thw=grids)[0][:, 0]
