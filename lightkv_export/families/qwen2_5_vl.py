"""Qwen2.5-VL: as Qwen2-VL, but most layers of the tower attend within windows (arXiv 2502.13923)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightkv_export.families.qwen2_vl import Qwen2VL
from lightkv_export.families.qwen_vision import QwenFamily, embedded_patches, run_block
from lightkv_export.manifest import Tensor as Spec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig


class Qwen25VL(QwenFamily):
    """Windows are tables too: `window_patches` [W, M] names the M patches of each window, -1 where the image's edge
    cuts one short, and `window_places` [P] where in it every patch stands. Patches keep the image's order throughout.
    """

    text_defaults: Mapping[str, Any] = Qwen2VL.text_defaults
    vision_defaults: Mapping[str, Any] = {
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
    }

    def encoder_shape(self, vision: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "hidden": vision["hidden_size"],
            "intermediate": vision["intermediate_size"],
            "projector_hidden": vision["hidden_size"] * vision["spatial_merge_size"] ** 2,
            "gated_mlp": True,
            "attention_window": _window_patches(
                vision["window_size"], vision["patch_size"], vision["spatial_merge_size"]
            ),
            "global_layers": len(vision["fullatt_block_indexes"]),
        }

    def tables(self, vision: PretrainedConfig, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        import torch
        from transformers.vision_utils import get_vision_window_index

        merge = vision.spatial_merge_size
        order, boundaries = get_vision_window_index(torch.tensor([grid]), merge, vision.window_size, vision.patch_size)
        patches = (order.numpy()[:, None] * merge**2 + np.arange(merge**2)).reshape(-1)  # window by window
        ends = boundaries.numpy()
        windows = np.full((len(ends) - 1, _window_patches(vision.window_size, vision.patch_size, merge)), -1)
        windows[np.arange(windows.shape[1]) < np.diff(ends)[:, None]] = patches
        places = np.empty_like(patches)
        places[windows[windows >= 0]] = np.flatnonzero(windows >= 0)
        return super().tables(vision, grid) | {"window_patches": windows, "window_places": places}

    def vision_inputs(self, config: PretrainedConfig, dtype: str) -> tuple[Spec, ...]:
        vision, inputs = config.vision_config, super().vision_inputs(config, dtype)
        size = _window_patches(vision.window_size, vision.patch_size, vision.spatial_merge_size)
        windows = Spec("window_patches", "int64", ("W", size))
        return (*inputs, windows, Spec("window_places", "int64", inputs[0].shape[:1]))

    def image_features(self, model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        pixels, position_ids, windows, places = inputs
        tower = model.model.visual
        hidden = embedded_patches(tower, pixels)
        rotary = tower.rotary_pos_emb(hidden, position_ids)
        for index, block in enumerate(tower.blocks):
            windowed = {} if index in tower.fullatt_block_indexes else {"windows": windows, "places": places}
            hidden = run_block(block, hidden, rotary, **windowed)
        return tower.merger(hidden)


def _window_patches(window: int, patch: int, merge: int) -> int:
    """Patches in a whole window, whose side is `window` pixels, rounded down to whole vision tokens."""
    return (window // merge // patch * merge) ** 2


FAMILY = Qwen25VL()
