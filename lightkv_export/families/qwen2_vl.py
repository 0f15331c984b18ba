"""Qwen2-VL: ViT with 2-D rotary positions and any resolution, Qwen2 decoder with mRoPE (arXiv 2409.12191)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightkv_export.families.qwen_vision import QwenFamily, embedded_patches, run_block

if TYPE_CHECKING:
    import torch
    from torch import nn


class Qwen2VL(QwenFamily):
    """Every layer of the tower attends to the whole image."""

    text_defaults: Mapping[str, Any] = {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 29568,
        "vocab_size": 152064,
    }
    vision_defaults: Mapping[str, Any] = {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }

    def encoder_shape(self, vision: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "hidden": vision["embed_dim"],
            "intermediate": vision["embed_dim"] * vision["mlp_ratio"],
            "projector_hidden": vision["embed_dim"] * vision["spatial_merge_size"] ** 2,
        }

    def image_features(self, model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        pixels, position_ids = inputs
        tower = model.model.visual
        hidden = embedded_patches(tower, pixels)
        rotary = tower.rotary_pos_emb(hidden, position_ids)
        for block in tower.blocks:
            hidden = run_block(block, hidden, rotary)
        return tower.merger(hidden)


FAMILY = Qwen2VL()
