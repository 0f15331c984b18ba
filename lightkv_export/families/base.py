"""What a model family must say about itself. The defaults fit Hugging Face's LLaVA-like models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightkv_export.recipe import ModelShape

if TYPE_CHECKING:
    import torch
    from torch import nn


class Family(ABC):
    """One architecture: where its parts are, and what its vision side computes."""

    windows: tuple[int, ...] = (4, 2, 1)  # windows per side of consecutive stages (LightKV, schedules of the authors)
    preprocess = "clip"  # preprocessing kind, see runtime/image.py
    rope = "1d"

    @abstractmethod
    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """Sizes from config.json (which omits values equal to the architecture's defaults)."""

    @abstractmethod
    def image_features(self, model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> vision tokens as the language model takes them, [N, v, D]."""

    def text_model(self, model: nn.Module) -> nn.Module:
        """The decoder: has `embed_tokens`, `layers`, `norm` and `rotary_emb`."""
        return model.model.language_model

    def head(self, model: nn.Module) -> nn.Module:
        """The language-model head, D -> vocabulary."""
        return model.lm_head

    def image_token_id(self, config: Any) -> int:
        """Id of the placeholder token that an image's vision tokens replace."""
        return config.image_token_id
