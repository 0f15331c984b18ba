"""LLaVA-OneVision: SigLIP over up to 37 tiles, two-layer MLP projector, Qwen2 decoder (arXiv 2408.03326).

As LLaVA-NeXT, but a picture of more than 1.1² * 9 tiles is shrunk bilinearly to 9 tiles' worth of tokens
("anyres_max_9"). So a vision token is the weighted sum of up to four features, and a size has two tables: which
features, and how much of each.

Every image is laid out by its own size, as by the checkpoint's processor for a flat list of images. (Given the images
of a conversation as a list of its own, that processor shows several images as one square each. The runtime cannot do
so: when it caches a chat's first image, it does not know whether a second will follow.) Videos are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lightkv_export.families.base import square_size
from lightkv_export.families.llava_next import LlavaNext
from lightkv_export.manifest import Tensor as Spec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

TAPS = 4  # features that bilinear interpolation mixes


class LlavaOnevision(LlavaNext):
    """One unit per image: the overview's tokens, then the picture's rows, each with its line break."""

    windows = (6, 4, 2)
    # What config.json leaves out, by the defaults of transformers' LlavaOnevisionConfig.
    text_type = "qwen2"
    feature_layer = -1
    vision: Mapping[str, Any] = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 384,
    }

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        return config.get("tie_word_embeddings", False) or config["text_config"].get("tie_word_embeddings", False)

    def vision_inputs(self, config: PretrainedConfig, dtype: str) -> tuple[Spec, ...]:
        pixels, _ = super().vision_inputs(config, dtype)
        return (pixels, Spec("token_index", "int64", ("R", TAPS)), Spec("token_weight", "float32", ("R", TAPS)))

    def image_features(
        self, model: nn.Module, pixel_values: torch.Tensor, token_index: torch.Tensor, token_weight: torch.Tensor
    ) -> torch.Tensor:
        """[N, 3, side, side], [R, 4] and [R, 4] -> [R, D]; summed in float32, as PyTorch interpolates."""
        rows = self.feature_rows(model, pixel_values)
        # One tap after the other: gathering all four at once would hold four times the features.
        taps = [rows.index_select(0, token_index[:, k]).float() * token_weight[:, k, None] for k in range(TAPS)]
        return sum(taps[1:], taps[0]).to(rows.dtype)

    def tables(self, config: PretrainedConfig, tiles: int, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
        """`token_index` int64 [R, 4] and `token_weight` float32 [R, 4]: vision token r is the sum over k of
        token_weight[r, k] times row token_index[r, k] of `feature_rows`."""
        patches = (square_size(config.vision_config) // config.vision_config.patch_size) ** 2
        newline = tiles * patches
        whole = _packed(config, tiles, image_size, "anyres_max_1000000")  # never shrunk
        shown = _packed(config, tiles, image_size, config.vision_aspect_ratio)
        picture = _rows(whole[patches:], newline)
        height, width = _rows(shown[patches:], newline).shape
        if (height, width) == picture.shape:
            return {
                "token_index": np.repeat(whole[:, None], TAPS, axis=1),
                "token_weight": np.eye(TAPS, dtype=np.float32)[np.zeros(len(whole), int)],
            }
        ys, y_weights = _taps(picture.shape[0], height)
        xs, x_weights = _taps(picture.shape[1], width)
        index = picture[ys[:, None, :, None], xs[None, :, None, :]].reshape(height, width, TAPS)
        weight = (y_weights[:, None, :, None] * x_weights[None, :, None, :]).reshape(height, width, TAPS)
        one = np.eye(TAPS, dtype=np.float32)[0]
        index = np.concatenate([index, np.full((height, 1, TAPS), newline)], axis=1).reshape(-1, TAPS)
        weight = np.concatenate([weight, np.tile(one, (height, 1, 1))], axis=1).reshape(-1, TAPS)
        return {
            "token_index": np.concatenate([np.repeat(whole[:patches, None], TAPS, axis=1), index]),
            "token_weight": np.concatenate([np.tile(one, (patches, 1)), weight]),
        }


def _packed(config: PretrainedConfig, tiles: int, image_size: tuple[int, int], limit: str) -> np.ndarray:
    """Hugging Face's packing of features that are their own number; a shrunk picture holds mixtures of numbers."""
    import torch
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    patches = (square_size(config.vision_config) // config.vision_config.patch_size) ** 2
    numbers = torch.arange(tiles * patches + 1, dtype=torch.float64)
    packed, _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [numbers[:-1].reshape(tiles, patches, 1)],
        torch.tensor([image_size]),
        image_newline=numbers[-1:],
        vision_aspect_ratio=limit,
    )
    return packed[0][:, 0].round().long().numpy()


def _rows(picture: np.ndarray, newline: int) -> np.ndarray:
    """[height * (width + 1)] with a line break at each row's end -> [height, width]."""
    height = np.count_nonzero(picture == newline)
    return picture.reshape(height, -1)[:, :-1]


def _taps(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear interpolation of `before` values to `after`: int64 and float32 [after, 2], places and their weights.

    Read off `interpolate` itself. Its two places are neighbours, so probes that are 1 at every third place tell its
    weights exactly, and where its middle lies tells which of the places with that remainder it took.
    """
    import torch
    from torch.nn.functional import interpolate

    place = torch.arange(before)
    probes = (place % 3 == torch.arange(3)[:, None]).float()
    weights = interpolate(probes[None, :, :, None], [after, 1], mode="bilinear")[0, :, :, 0].T.numpy()
    middle = interpolate(place.double()[None, None, :, None], [after, 1], mode="bilinear")[0, 0, :, 0].numpy()
    nearest = np.round((middle[:, None] - np.arange(3)) / 3).astype(np.int64) * 3 + np.arange(3)
    pair = np.sort(np.argsort(weights, axis=1)[:, 1:], axis=1)
    places = np.take_along_axis(nearest, pair, axis=1).clip(0, before - 1)
    return places, np.take_along_axis(weights, pair, axis=1)


FAMILY = LlavaOnevision()
