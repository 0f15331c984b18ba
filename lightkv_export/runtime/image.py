"""Images: from a file, bytes, a PIL image or an array to the float32 pixels that a vision graph takes.

An image is decoded, given that size of the bundle whose shape is nearest to its own, brought to it, and cut as the
bundle's kind of preprocessing asks for (`pixels_clip`, `pixels_tiles`, `pixels_patches`).

Every kind of input is treated as Hugging Face's processors treat it, so that pixels agree bit for bit: a *file or
bytes* is turned upright by its EXIF tag and converted to RGB (`load_image`), a *PIL image* is taken as it lies (its
EXIF tag is ignored) with transparency laid on white (`convert_to_rgb`), an *array* is RGB already.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lightkv_export.errors import BundleError, UserError
from lightkv_export.manifest import Manifest, Preprocess, Size
from lightkv_export.runtime.pixels_clip import clip_pixels, clip_view
from lightkv_export.runtime.pixels_patches import patch_pixels
from lightkv_export.runtime.pixels_tiles import tile_pixels
from lightkv_export.runtime.video import HEAD_BYTES, looks_like_video, video_error

ImageSource: TypeAlias = "str | os.PathLike | bytes | Image.Image | np.ndarray"
STRETCH = 1.1  # aspect ratios that differ by this factor are brought together by resizing, others by padding
MAX_ASPECT = (
    200  # a longer side this many times the shorter one is not a picture, and resizing it would fill the memory
)
MAX_PIXELS = 1 << 27  # of a padded image: 400 MB in memory
_READABLE = "a readable image file (JPEG, PNG, WebP, ...)"


@dataclass(frozen=True)
class ImagePixels:
    """An image at a size of the bundle: float32 `pixel_values` of the vision graph."""

    values: np.ndarray
    size: Size


@dataclass(frozen=True)
class ImageFeatures:
    """An image that went through the vision graph, in the host form of the graphs' dtype.

    `Model.encode` makes it. A session takes it wherever it takes an image, so that several questions about one image
    share the work.

    Attributes:
        rows: vision tokens [n, D], n = size.image_tokens.
        size: the size of the bundle at which the image was seen.
        deepstack: for each of the manifest's `deepstack_layers` [n, D].
    """

    rows: np.ndarray
    size: Size
    deepstack: tuple[np.ndarray, ...] = ()


def decode(source: ImageSource) -> np.ndarray:
    """Any image source -> RGB uint8 [H, W, 3].

    Raises:
        UserError: missing, not an image (a video, say), truncated, too large, or of a size or mode that cannot be
            used.
    """
    if isinstance(source, np.ndarray):
        return _checked(_rgb_from_array(source), "the array")
    if isinstance(source, Image.Image):
        return _checked(_decoded(lambda: _rgb_from_pil(source), "the PIL image"), "the PIL image")
    if isinstance(source, bytes):
        if looks_like_video(source[:HEAD_BYTES]):
            raise video_error(f"the input of {len(source)} bytes")
        return _checked(_decoded(lambda: _rgb_from_file(io.BytesIO(source)), f"{len(source)} bytes"), "the image")
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(
            f"an image of type {type(source).__name__}", expected="a path, bytes, a PIL image or a uint8 array"
        )
    path = Path(source)
    if not path.is_file():
        state = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"image {str(path)!r} {state}", expected=_READABLE, fix="check the path")
    if looks_like_video(_head(path), path):
        raise video_error(repr(str(path)))
    return _checked(_decoded(lambda: _rgb_from_file(path), repr(str(path))), repr(str(path)))


def pixel_values(preprocess: Preprocess, source: ImageSource, size: Size) -> np.ndarray:
    """An image source -> float32, the `pixel_values` of one image as the vision graph takes them at this size.

    "clip" gives [1, 3, H, W], "tiles" [N, 3, tile, tile], "patches" [P, numbers of a patch]. Except with "clip", which
    crops, the image is first padded to the size's aspect ratio (see `framed`).

    Raises:
        UserError: the image cannot be used. BundleError: the bundle asks for unknown preprocessing.
    """
    image = decode(source)
    if preprocess.kind not in PREPROCESSORS:
        raise BundleError(
            f"preprocessing kind {preprocess.kind!r} is unknown",
            expected=f"one of: {', '.join(PREPROCESSORS)}",
            fix="update lightkv-export, or export the bundle with this version",
        )
    if preprocess.kind != "clip":
        image = framed(image, size)
    return PREPROCESSORS[preprocess.kind](image, size.geometry, preprocess.settings)


def sized_pixels(manifest: Manifest, source: ImageSource) -> ImagePixels:
    """An image source at that size of the bundle that fits it best.

    Raises:
        UserError: the image cannot be used. BundleError: the bundle asks for unknown preprocessing.
    """
    image = decode(source)
    size = fit_size(manifest.sizes, image.shape[1], image.shape[0])
    return ImagePixels(pixel_values(manifest.preprocess, image, size), size)


def fit_size(sizes: Sequence[Size], width: int, height: int) -> Size:
    """The size with the aspect ratio nearest to that of an image of width x height pixels; among equals the one
    nearest in area."""

    def distance(size: Size) -> tuple[float, float]:
        aspect = abs(log(width * size.height / (height * size.width)))
        return round(aspect, 9), abs(log(width * height / (size.width * size.height)))

    return min(sizes, key=distance)


def framed(image: np.ndarray, size: Size) -> np.ndarray:
    """An image padded to the aspect ratio of a size, black and centred: uint8 [H, W, 3] -> uint8 [H', W', 3].

    Aspect ratios that differ by no more than `STRETCH` are left to the resizing that follows, as the processors of
    Hugging Face do it. So an image that they would lay out alike has exactly their pixels.

    Raises:
        UserError: the padded image would be too large.
    """
    height, width = image.shape[:2]
    wide, high = width * size.height, height * size.width
    if max(wide, high) <= STRETCH * min(wide, high):
        return image
    new_width, new_height = max(width, round(high / size.height)), max(height, round(wide / size.width))
    if new_width * new_height > MAX_PIXELS:
        raise UserError(
            f"an image of {width} x {height} pixels is too large to be padded to {size.name}",
            expected=f"at most {MAX_PIXELS} pixels after padding",
            fix="scale it down or crop it first",
        )
    canvas = np.zeros((new_height, new_width, 3), np.uint8)
    top, left = (new_height - height) // 2, (new_width - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas


def seen_image(preprocess: Preprocess, source: ImageSource, size: Size) -> np.ndarray:
    """An image source -> uint8 RGB [h, w, 3]: what of it the vision graph sees at this size, before it is cut and
    becomes numbers.

    Raises:
        UserError: the image cannot be used.
    """
    image = decode(source)
    if preprocess.kind == "clip":
        return clip_view(image, preprocess.settings)
    stretched = Image.fromarray(framed(image, size)).resize((size.width, size.height), Image.Resampling.BICUBIC)
    return np.array(stretched)


PREPROCESSORS: dict[str, Callable[[np.ndarray, Mapping[str, Any], Mapping[str, Any]], np.ndarray]] = {
    "clip": clip_pixels,
    "tiles": tile_pixels,
    "patches": patch_pixels,
}
"""By kind: (uint8 image [H, W, 3], the size's geometry, preprocessor_config.json) -> float32 pixel values."""


def _decoded(convert: Callable[[], np.ndarray], name: str) -> np.ndarray:
    """Run a decoder; what Pillow can throw becomes a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
            return convert()
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is too large: {error}", fix="scale it down first") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image that can be read", expected=_READABLE) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"image {name} is damaged: {error}", expected=_READABLE, fix="get a whole copy of it") from None


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""  # Pillow will meet the same and say so


def _rgb_from_file(file: Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        image.load()
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _rgb_from_pil(image: Image.Image) -> np.ndarray:
    if 0 in image.size:  # Pillow cannot convert it; `_checked` says what is wrong
        return np.zeros((image.height, image.width, 3), np.uint8)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _rgb_from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        raise video_error(f"an array of shape {array.shape}")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"an image array {array.dtype} {array.shape}", expected="uint8 RGB of shape (height, width, 3)")
    return array


def _checked(image: np.ndarray, name: str) -> np.ndarray:
    height, width = image.shape[:2]
    if min(height, width) == 0:
        raise UserError(f"{name} has size {width} x {height}", expected="at least 1 x 1 pixel")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"{name} has size {width} x {height}",
            expected=f"sides that differ at most {MAX_ASPECT} times",
            fix="crop it first",
        )
    return image
