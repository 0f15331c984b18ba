"""What InternVL, SmolVLM and Idefics3 share: they cut an image into square tiles, and each is merged on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lightkv_export.errors import UserError
from lightkv_export.families.base import SizeLayout

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def noise(width: int, height: int) -> np.ndarray:
    """A seeded picture, uint8 [height, width, 3], on which every resize and every crop shows."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiles_compared(
    processor: ProcessorMixin, image: np.ndarray, pixels: np.ndarray, geometry: Mapping[str, Any]
) -> tuple[tuple[int, ...], bool]:
    """The shape of the pixels that the runtime makes of `image`, and whether they are the processor's `pixels`."""
    from lightkv_export.runtime.pixels_tiles import tile_pixels

    made = tile_pixels(image, geometry, processor.image_processor.to_dict())
    return made.shape, made.shape == np.shape(pixels) and np.allclose(made, pixels, rtol=1e-5, atol=1e-6)


def tile_layout(
    processor: ProcessorMixin,
    image: np.ndarray,
    pixels: np.ndarray,
    prompt: str,
    geometry: Mapping[str, Any],
    tokens: int,
) -> SizeLayout:
    """The layout of a size at which every tile is a unit.

    Args:
        processor: the checkpoint's own.
        image: uint8 [height, width, 3], not a plain one.
        pixels: what `processor` makes of it, float32 [units, 3, tile, tile].
        prompt: what `processor` puts in its place in the text, with `tokens` image tokens for every tile.
        geometry: how the runtime is to make the same pixels (see `runtime/pixels_tiles.py`).
        tokens: vision tokens of a tile, by the model's configuration.

    Raises:
        UserError: the processor's tiles or tokens are not those of the model, or its pixels cannot be made here.
    """
    token, units, size = processor.image_token, len(pixels), f"image size {image.shape[1]}x{image.shape[0]}"
    if prompt.count(token) != units * tokens:
        raise UserError(
            f"{size}: the checkpoint's processor writes {prompt.count(token)} image tokens for {units} tiles",
            expected=f"{tokens} per tile, as config.json says",
            fix="correct the image's sequence length in processor_config.json beside the weights",
        )
    made, same = tiles_compared(processor, image, pixels, geometry)
    if not same:
        raise UserError(
            f"{size}: the checkpoint's processor prepares images in a way that is not supported: its pixels are "
            f"{list(np.shape(pixels))}, those made here {list(made)}, and they differ",
            expected="steps, tile size and order of the published checkpoints",
            fix="compare preprocessor_config.json beside the weights with the published one",
        )
    return SizeLayout(tokens, units, prompt.replace(token * tokens, token), geometry)
