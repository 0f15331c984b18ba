"""Qwen3-VL: learned and rotary patch positions, DeepStack features, Qwen3 decoder (arXiv 2511.21631)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightkv_export.families.qwen_vision import QwenFamily, embedded_patches, hugging_face_features, run_block
from lightkv_export.manifest import Tensor as Spec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig


class Qwen3VL(QwenFamily):
    """The learned position grid is resampled to the image's: `interp_indices` and `interp_weights` say from where.

    DeepStack: features of some layers of the tower are added to the hidden states behind the decoder's first layers.
    """

    text_defaults: Mapping[str, Any] = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "intermediate_size": 22016,
        "vocab_size": 151936,
    }
    vision_defaults: Mapping[str, Any] = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": (8, 16, 24),
    }

    def encoder_shape(self, vision: Mapping[str, Any]) -> dict[str, Any]:
        projectors = 1 + len(vision["deepstack_visual_indexes"])
        return {
            "hidden": vision["hidden_size"],
            "intermediate": vision["intermediate_size"],
            "projector_hidden": projectors * vision["hidden_size"] * vision["spatial_merge_size"] ** 2,
        }

    def tables(self, vision: PretrainedConfig, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        import torch
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        indices, weights = get_vision_interpolation_indices_and_weights(
            torch.tensor([grid]),
            int(vision.num_position_embeddings**0.5),
            align_corners=True,
            spatial_merge_size=vision.spatial_merge_size,
        )
        return super().tables(vision, grid) | {"interp_indices": indices.numpy(), "interp_weights": weights.numpy()}

    def vision_inputs(self, config: PretrainedConfig, dtype: str) -> tuple[Spec, ...]:
        inputs = super().vision_inputs(config, dtype)
        taps = (inputs[0].shape[0], 4)
        return (*inputs, Spec("interp_indices", "int64", taps), Spec("interp_weights", "float32", taps))

    def deepstack_layers(self, config: PretrainedConfig) -> tuple[int, ...]:
        return tuple(range(len(config.vision_config.deepstack_visual_indexes)))

    def image_features(self, model: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels, position_ids, indices, weights = inputs
        tower = model.model.visual
        hidden = embedded_patches(tower, pixels)
        # Hugging Face multiplies by float32 weights and rounds the sum, whatever the model's dtype.
        learned = (tower.pos_embed(indices) * weights[:, :, None]).sum(1)
        hidden = hidden + learned.to(hidden.dtype)
        rotary = tower.rotary_pos_emb(hidden, position_ids)
        tapped = []
        for index, block in enumerate(tower.blocks):
            hidden = run_block(block, hidden, rotary)
            if index in tower.deepstack_visual_indexes:
                merger = tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)]
                tapped.append(merger(hidden))
        return (tower.merger(hidden), *tapped)

    def eager_features(self, model: nn.Module, image_inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        import torch

        output = hugging_face_features(model, image_inputs)
        return tuple(torch.cat(list(rows)) for rows in (output.pooler_output, *output.deepstack_features))


FAMILY = Qwen3VL()
