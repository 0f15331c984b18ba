"""Images: from a file, bytes, a PIL image or an array to the float32 pixels that a vision graph takes.

Every kind of input is treated as Hugging Face's processors treat it, so that pixels agree bit for bit: a *file or
bytes* is turned upright by its EXIF tag and converted to RGB (`load_image`), a *PIL image* is taken as it lies (its
EXIF tag is ignored) with transparency laid on white (`convert_to_rgb`), an *array* is RGB already.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lightkv_export.errors import BundleError, UserError
from lightkv_export.manifest import Preprocess

ImageSource: TypeAlias = "str | os.PathLike | bytes | Image.Image | np.ndarray"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = (
    200  # a longer side this many times the shorter one is not a picture, and resizing it would fill the memory
)
_READABLE = "a readable image file (JPEG, PNG, WebP, ...)"


@dataclass(frozen=True)
class ImageFeatures:
    """An image that went through the vision graph: vision tokens [v, D] in the host form of the graphs' dtype.

    `Model.encode` makes it. A session takes it wherever it takes an image, so that several questions about one image
    share the work.
    """

    rows: np.ndarray


def decode(source: ImageSource) -> np.ndarray:
    """Any image source -> RGB uint8 [H, W, 3].

    Raises:
        UserError: missing, not an image, truncated, too large, or of a size or mode that cannot be used.
    """
    if isinstance(source, np.ndarray):
        return _checked(_rgb_from_array(source), "the array")
    if isinstance(source, Image.Image):
        return _checked(_decoded(lambda: _rgb_from_pil(source), "the PIL image"), "the PIL image")
    if isinstance(source, bytes):
        return _checked(_decoded(lambda: _rgb_from_file(io.BytesIO(source)), f"{len(source)} bytes"), "the image")
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(
            f"an image of type {type(source).__name__}", expected="a path, bytes, a PIL image or a uint8 array"
        )
    path = Path(source)
    if not path.is_file():
        state = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"image {str(path)!r} {state}", expected=_READABLE, fix="check the path")
    return _checked(_decoded(lambda: _rgb_from_file(path), repr(str(path))), repr(str(path)))


def pixel_values(preprocess: Preprocess, source: ImageSource) -> np.ndarray:
    """An image source -> float32 [3, H, W], as the bundle's vision graph wants it.

    Raises:
        UserError: the image cannot be used. BundleError: the bundle asks for unknown preprocessing.
    """
    if preprocess.kind not in PREPROCESSORS:
        raise BundleError(
            f"preprocessing kind {preprocess.kind!r} is unknown",
            expected=f"one of: {', '.join(PREPROCESSORS)}",
            fix="update lightkv-export, or export the bundle with this version",
        )
    return PREPROCESSORS[preprocess.kind](decode(source), preprocess.settings)


def seen_image(preprocess: Preprocess, source: ImageSource) -> np.ndarray:
    """An image source -> uint8 RGB [h, w, 3]: the part that the vision graph sees, before it becomes numbers.

    Raises:
        UserError: the image cannot be used. BundleError: the bundle asks for unknown preprocessing.
    """
    if preprocess.kind != "clip":
        raise BundleError(f"preprocessing kind {preprocess.kind!r} has no picture of what is seen", expected="clip")
    return clip_view(decode(source), preprocess.settings)


def clip_view(image: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """CLIP's first two steps, resize and centre crop: uint8 [H, W, 3] -> uint8 [h, w, 3]."""
    if settings.get("do_pad"):
        raise BundleError("preprocessor_config.json sets do_pad", expected="the CLIP steps without padding to a square")
    if settings.get("do_resize", True):
        image = _resized(image, settings.get("size", {"shortest_edge": 224}), settings.get("resample", Image.BICUBIC))
    if settings.get("do_center_crop", True):
        image = _cropped(image, settings.get("crop_size", 224))
    return image


def clip_pixels(image: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """CLIP's steps: resize, centre crop, rescale, normalize. uint8 [H, W, 3] -> float32 [3, h, w].

    `settings` is preprocessor_config.json; values that it leaves out are the defaults of CLIPImageProcessor.
    """
    image = clip_view(image, settings)
    pixels = image.astype(np.float32)
    if settings.get("do_rescale", True):
        # In float64 and back, as Hugging Face computes it.
        pixels = (image.astype(np.float64) * settings.get("rescale_factor", 1 / 255)).astype(np.float32)
    if settings.get("do_normalize", True):
        mean = np.array(settings.get("image_mean") or CLIP_MEAN, np.float32)
        std = np.array(settings.get("image_std") or CLIP_STD, np.float32)
        pixels = (pixels - mean) / std
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


PREPROCESSORS: dict[str, Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]] = {"clip": clip_pixels}


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
