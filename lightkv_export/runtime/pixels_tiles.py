"""Pixels of the families that cut an image into square tiles: LLaVA-NeXT, LLaVA-OneVision, InternVL, SmolVLM, Idefics3.

Where the tiles lie was decided at export with the checkpoint's own processor and stands in a size's geometry. Here the
image is only resized, padded and cut, with Pillow and in the order of the processors, so pixels agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from lightkv_export.errors import BundleError
from lightkv_export.runtime.normalize import normalized


def tile_pixels(image: np.ndarray, geometry: Mapping[str, Any], settings: Mapping[str, Any]) -> np.ndarray:
    """The tiles of an image as numbers: uint8 RGB [H, W, 3] -> float32 [N, 3, tile, tile]; else as `tile_views`."""
    return np.stack([normalized(tile, settings) for tile in tile_views(image, geometry, settings)])


def tile_views(image: np.ndarray, geometry: Mapping[str, Any], settings: Mapping[str, Any]) -> list[np.ndarray]:
    """An image, cut into tiles: uint8 RGB [H, W, 3] -> uint8 [tile, tile, 3] each, rows of tiles from the top.

    Args:
        image: as decoded; any size.
        geometry: of a size in the manifest, all in pixels:
            "tile": side of a tile;
            "longest_edge" (optional): the image is first scaled until its longer side is this long (SmolVLM);
            "resize": [[w, h], ...], what the image is then resized to, one after the other;
            "canvas": [w, h], whole tiles; the resized image lies in its centre, zeros around it;
            "overview": the whole image squeezed into one more tile, "first" or "last", or null for none;
            "overview_of" (optional): "image" as decoded (default), or the "canvas" (SmolVLM).
        settings: preprocessor_config.json of the bundle (resample filter).

    Raises:
        BundleError: the canvas is not made of whole tiles, or smaller than what lies on it.
    """
    tile, (width, height) = geometry["tile"], geometry["canvas"]
    resample = settings["resample"]
    detail = image
    if "longest_edge" in geometry:
        detail = _resized(detail, _scaled_to(detail, geometry["longest_edge"]), resample)
    for size in geometry["resize"]:
        detail = _resized(detail, size, resample)
    if width % tile or height % tile or width < detail.shape[1] or height < detail.shape[0]:
        raise BundleError(
            f"tiles of {tile} px for an image of {detail.shape[1]} x {detail.shape[0]} px on {width} x {height} px",
            expected="a canvas of whole tiles that holds the image",
            fix="export the bundle again",
        )
    canvas = _centred(detail, width, height)
    tiles = [canvas[y : y + tile, x : x + tile] for y in range(0, height, tile) for x in range(0, width, tile)]
    if geometry["overview"]:
        whole = canvas if geometry.get("overview_of") == "canvas" else image
        overview = _resized(whole, (tile, tile), resample)
        tiles = [overview, *tiles] if geometry["overview"] == "first" else [*tiles, overview]
    return tiles


def _resized(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    return np.array(Image.fromarray(image).resize(tuple(size), resample=resample))


def _scaled_to(image: np.ndarray, edge: int) -> tuple[int, int]:
    """Width and height with a longer side of `edge`, the other rounded down and then up to even, as SmolVLM does it."""
    height, width = image.shape[:2]
    aspect = width / height
    short = int(edge / aspect if width >= height else edge * aspect)
    short = max(short + short % 2, 1)
    return (edge, short) if width >= height else (short, edge)


def _centred(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The image in the middle of black; the odd pixel falls to the right and the bottom."""
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    if top == left == 0 and image.shape[:2] == (height, width):
        return image
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas
