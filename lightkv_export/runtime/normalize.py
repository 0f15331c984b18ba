"""The last step of every image processor: bytes to numbers around zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalized(image: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Rescaled, then less the mean and over the deviation of its channel: uint8 [H, W, 3] -> float32 [3, H, W].

    `settings` is preprocessor_config.json; values that it leaves out are CLIP's. Computed once for each of the 256
    values of a channel, in float64 and float32 as Hugging Face does it, so the result is the same bit for bit and needs
    no copies of the image in float64.
    """
    values = np.arange(256, dtype=np.float32)
    if settings.get("do_rescale", True):
        values = (np.arange(256, dtype=np.float64) * settings.get("rescale_factor", 1 / 255)).astype(np.float32)
    table = np.stack([values] * 3)
    if settings.get("do_normalize", True):
        mean = np.array(settings.get("image_mean") or CLIP_MEAN, np.float32)[:, None]
        std = np.array(settings.get("image_std") or CLIP_STD, np.float32)[:, None]
        table = (table - mean) / std
    return np.stack([table[channel][image[..., channel]] for channel in range(3)])
