"""Pixels of the families that bring every image to one square with CLIP's processor: LLaVA-1.5."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
from PIL import Image

from lightkv_export.errors import BundleError
from lightkv_export.runtime.normalize import normalized


def clip_pixels(image: np.ndarray, _geometry: Mapping[str, Any], settings: Mapping[str, Any]) -> np.ndarray:
    """CLIP's steps: resize, centre crop, rescale, normalize. uint8 [H, W, 3] -> float32 [1, 3, h, w].

    `settings` is preprocessor_config.json; values that it leaves out are the defaults of CLIPImageProcessor. All
    sizes are alike.
    """
    return normalized(clip_view(image, settings), settings)[None]


def clip_view(image: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """CLIP's first two steps, resize and centre crop: uint8 [H, W, 3] -> uint8 [h, w, 3]."""
    if settings.get("do_pad"):
        raise BundleError("preprocessor_config.json sets do_pad", expected="the CLIP steps without padding to a square")
    if settings.get("do_resize", True):
        image = _resized(image, settings.get("size", {"shortest_edge": 224}), settings.get("resample", Image.BICUBIC))
    if settings.get("do_center_crop", True):
        image = _cropped(image, settings.get("crop_size", 224))
    return image


def _resized(image: np.ndarray, size: Mapping[str, int] | int, resample: int) -> np.ndarray:
    height, width = image.shape[:2]
    size = {"shortest_edge": size} if isinstance(size, int) else size
    if "shortest_edge" in size:
        edge, short, long = size["shortest_edge"], min(height, width), max(height, width)
        new_long = int(edge * long / short)
        new_height, new_width = (new_long, edge) if width <= height else (edge, new_long)
    elif "height" in size and "width" in size:
        new_height, new_width = size["height"], size["width"]
    else:
        raise BundleError(
            f"preprocessor_config.json has size {dict(size)}", expected="shortest_edge, or height and width"
        )
    return np.array(Image.fromarray(image).resize((new_width, new_height), resample=resample))


def _cropped(image: np.ndarray, size: Mapping[str, int] | int) -> np.ndarray:
    """Centre crop; what is smaller is padded with zeros first, one pixel more at the top and left when odd."""
    height, width = image.shape[:2]
    crop_height, crop_width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    if top >= 0 and left >= 0:
        return image[top : top + crop_height, left : left + crop_width]
    canvas = np.zeros((max(crop_height, height), max(crop_width, width), 3), image.dtype)
    pad_top, pad_left = ceil((canvas.shape[0] - height) / 2), ceil((canvas.shape[1] - width) / 2)
    canvas[pad_top : pad_top + height, pad_left : pad_left + width] = image
    top, left = top + pad_top, left + pad_left
    return canvas[top : top + crop_height, left : left + crop_width]
