"""What a model family must say about itself. The defaults fit Hugging Face's LLaVA-like models.

Everything here is called at export (or by the gate), never by the runtime: what depends on an image's size leaves this
package as data. torch and transformers are imported inside methods, so that planning works without them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightkv_export.errors import UserError
from lightkv_export.manifest import Tensor as Spec
from lightkv_export.recipe import ModelShape

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn
    from transformers import PretrainedConfig, ProcessorMixin


@dataclass(frozen=True)
class Checkpoint:
    """The host side of a checkpoint, loaded once per export: no weights.

    Attributes:
        directory: where its files lie.
        config: as transformers reads config.json, defaults filled in.
        processor: the checkpoint's own (`AutoProcessor`, backend "pil").
    """

    directory: Path
    config: PretrainedConfig
    processor: ProcessorMixin


@dataclass(frozen=True)
class SizeLayout:
    """Everything that follows from one image size, computed with the checkpoint's own code.

    Attributes:
        tokens: vision tokens of one unit, the run of tokens that LightKV merges on its own.
        units: units per image.
        prompt: replaces one image token in the rendered chat text; holds the image token exactly `units` times, each of
            which becomes `tokens` vision tokens.
        geometry: how the runtime cuts the pixels, by kind of preprocessing (see runtime/image.py); JSON values.
        tables: further inputs of the vision graph by name, constant for this size, without a batch of images.
        positions: mRoPE only: int64 [3, units * tokens], position ids relative to the image's first.
        advance: mRoPE only: how far the position of the first token after the image lies from the image's first.
    """

    tokens: int
    units: int
    prompt: str
    geometry: Mapping[str, Any]
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)
    positions: np.ndarray | None = None
    advance: int | None = None


def square_size(vision: Mapping[str, Any] | PretrainedConfig) -> int:
    """Pixels per side of a vision tower's square input; config.json writes `n` or `[n, n]`."""
    size = vision["image_size"] if isinstance(vision, Mapping) else vision.image_size
    return int(size[0] if isinstance(size, list | tuple) else size)


class Family(ABC):
    """One architecture: where its parts are, and what its vision side computes.

    Attributes:
        windows: windows per side of consecutive stages (LightKV, schedules of the authors).
        rope: "1d", or "mrope" for three position ids per token.
        preprocess: kind of preprocessing: "clip", "tiles" or "patches", see runtime/image.py.
        vision_attention: name of the vision side's attention implementation. "eager" consists of primitive operators;
            a family whose eager attention cannot be traced registers one of its own with `AttentionInterface`.
    """

    windows: tuple[int, ...] = (4, 2, 1)
    rope = "1d"
    preprocess = "clip"
    vision_attention = "eager"

    @abstractmethod
    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """Sizes from config.json (which omits values equal to the architecture's defaults), at the default image size.

        `vision.tokens` counts the vision tokens of one unit, `vision.units` the units of an image. Reads nothing else
        and needs no torch.
        """

    @abstractmethod
    def image_features(
        self, model: nn.Module, *inputs: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, ...]:
        """The vision graph's body for one image: vision tokens as the language model takes them.

        Traced once for all sizes, with weights that have no values: no branch, shape or constant may depend on what the
        tensors hold or on the size.

        Args:
            model: the Hugging Face model.
            inputs: in the order of `vision_inputs`.

        Returns:
            Features [..., D] whose leading axes flatten row-major to units * tokens; with DeepStack a tuple of them and
            one tensor per layer of `deepstack_layers`, alike.
        """

    def default_sizes(self, config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of the sizes that are exported if nobody names any; the first is the default.

        `config` is config.json. Default: the vision tower's square.
        """
        vision = self.shape(config).vision
        return ((vision.image_size, vision.image_size),)

    def size(self, checkpoint: Checkpoint, width: int, height: int) -> SizeLayout:
        """What follows from images of `width` x `height` pixels. Default: one square that all images are brought to.

        Raises:
            UserError: the checkpoint's processor cannot lay out this size, or would change it.
        """
        config = checkpoint.config
        shape = self.shape(config.to_dict()).vision
        side = shape.image_size
        if (width, height) != (side, side):
            raise UserError(
                f"image size {width}x{height} for a model with one size",
                expected=f"{side}x{side}: {config.model_type} brings every image to it",
                fix="leave --image-size out",
            )
        return SizeLayout(shape.tokens, 1, checkpoint.processor.image_token, {})

    def vision_inputs(self, config: PretrainedConfig, dtype: str) -> tuple[Spec, ...]:
        """Names, dtypes and shapes of the vision graph's inputs; the first is `pixel_values` of `dtype`.

        An axis that changes with the image or its size is a symbol ("N") or a multiple of one ("4*G"); all others come
        from `SizeLayout.tables` by name. Default: `pixel_values` [N, 3, side, side].
        """
        side = square_size(config.vision_config)
        return (Spec("pixel_values", dtype, ("N", 3, side, side)),)

    def deepstack_layers(self, config: PretrainedConfig) -> tuple[int, ...]:  # noqa: ARG002 (others need it)
        """Decoder layers after which further vision features are added to the hidden states (Qwen3-VL)."""
        return ()

    def eager_features(self, model: nn.Module, image_inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The reference's vision side, Hugging Face's own code: rows [total, D] of all images in order, then one such
        tensor per DeepStack layer. `image_inputs` is what the processor gives beside the text."""
        import torch

        features = model.get_image_features(**image_inputs).pooler_output
        return (torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in features]),)

    def positions3(self, model: nn.Module, ids: torch.Tensor, image_inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """mRoPE only: Hugging Face's position ids [3, S] of `ids` [S] that open a text, with all their images."""
        raise NotImplementedError(f"{type(self).__name__} has one position id per token")

    def text_model(self, model: nn.Module) -> nn.Module:
        """The decoder: has `embed_tokens`, `layers`, `norm` and `rotary_emb`."""
        return model.model.language_model

    def rotary(self, model: nn.Module) -> nn.Module:
        """The decoder's rotary embedding as segments trace it: (hidden states, position ids) -> (cos, sin)."""
        return self.text_model(model).rotary_emb

    def head(self, model: nn.Module) -> nn.Module:
        """The language-model head, D -> vocabulary."""
        return model.lm_head

    def image_token_id(self, config: PretrainedConfig) -> int:
        """Id of the placeholder token that an image's vision tokens replace."""
        return config.image_token_id
