"""Pixels of the families that cut an image of any size into patches: Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from lightkv_export.runtime.normalize import normalized


def patch_pixels(image: np.ndarray, geometry: Mapping[str, Any], settings: Mapping[str, Any]) -> np.ndarray:
    """An image as a row of flat patches: uint8 RGB [H, W, 3] -> float32 [P, 3*T*p*p].

    Bit for bit those of transformers' Qwen2VLImageProcessorPil: patches that become one vision token stand side by
    side, tokens in rows from the top, the patches of a token likewise. A still image is fed as T equal frames.

    Args:
        image: as decoded; any size.
        geometry: of a size in the manifest: "resize" [width, height] in pixels, whole vision tokens; "patch_size" p in
            pixels; "merge_size", patches per side of a vision token; "temporal_patch_size" T.
        settings: preprocessor_config.json of the bundle (resample filter, rescale factor, mean and deviation).
    """
    width, height = geometry["resize"]
    resized = np.array(Image.fromarray(image).resize((width, height), resample=settings["resample"]))
    patch, merge, frames = (geometry[key] for key in ("patch_size", "merge_size", "temporal_patch_size"))
    down, across = height // (patch * merge), width // (patch * merge)
    cut = normalized(resized, settings).reshape(3, down, merge, patch, across, merge, patch)
    cut = cut.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]  # token row, column; patch row, column; RGB, 1, p, p
    cut = np.broadcast_to(cut, (*cut.shape[:5], frames, patch, patch))
    return cut.reshape(down * across * merge**2, 3 * frames * patch**2)
