"""Images: pixels equal Hugging Face's, and unusable images are refused with a message that helps."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lightkv_export.errors import BundleError, UserError
from lightkv_export.manifest import Preprocess, Size
from lightkv_export.runtime import image as module
from lightkv_export.runtime.image import decode, fit_size, framed, pixel_values, seen_image

SIZES = [(640, 480), (37, 91), (336, 336), (300, 300), (5, 3), (1, 1), (701, 335)]
MODES = ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F", "RGBa"]
SQUARE = Size(336, 336, 576, 1, "<image>", {})
SETTINGS = [
    {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    {"size": {"height": 40, "width": 60}, "crop_size": {"height": 51, "width": 47}, "resample": 2},  # padded, odd
    {"do_resize": False, "crop_size": {"height": 64, "width": 50}, "do_normalize": False},
    {
        "size": {"shortest_edge": 30},
        "do_center_crop": False,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
    },
]


def picture(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """A deterministic noisy picture; size is (width, height)."""
    noise = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA")
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("settings", SETTINGS)
def test_pixels_equal_hugging_face(settings):
    pytest.importorskip("torch")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    processors = CLIPImageProcessorPil(**settings), LlavaImageProcessorPil(**settings)
    for size in SIZES if settings.get("do_center_crop", True) else SIZES[:3]:
        ours = pixel_values(Preprocess("clip", settings), picture(size), SQUARE)[0]
        assert ours.dtype == np.float32
        for processor in processors:
            np.testing.assert_allclose(
                ours, processor(picture(size), return_tensors="np")["pixel_values"][0], atol=1e-6
            )


@pytest.mark.parametrize("mode", MODES)
def test_odd_modes_equal_hugging_face(mode):
    pytest.importorskip("torch")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    via = {"PA": "P", "RGBa": "RGBA", "I;16": "I", "HSV": "RGB"}.get(
        mode, mode
    )  # Pillow converts to these in two steps
    image = picture(mode=via).convert(mode)
    ours = pixel_values(Preprocess("clip", {}), image, SQUARE)[0]
    np.testing.assert_allclose(ours, CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0], atol=1e-6)


def test_files_are_read_like_hugging_face_reads_them(tmp_path):
    pytest.importorskip("torch")
    from transformers.image_utils import load_image

    turned = Image.Exif()
    turned[0x0112] = 6  # rotated by 90 degrees
    files = {
        "upright.jpg": encoded(picture(), "JPEG", exif=turned),
        "alpha.png": encoded(picture(mode="RGBA")),
        "palette.gif": encoded(picture(mode="P"), "GIF"),
        "grey.png": encoded(picture(mode="L")),
        "cmyk.jpg": encoded(picture(mode="CMYK"), "JPEG"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        expected = np.array(load_image(str(tmp_path / name)))
        np.testing.assert_array_equal(decode(tmp_path / name), expected)
        np.testing.assert_array_equal(decode(content), expected)
    assert decode(tmp_path / "upright.jpg").shape == (40, 30, 3)  # the tag turns 40 x 30 upright
    assert decode(Image.open(tmp_path / "upright.jpg")).shape == (30, 40, 3)  # a PIL image is taken as it lies


def test_arrays_are_taken_as_they_are():
    array = np.array(picture())
    assert decode(array) is array


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.png", "does not exist"),
        ("/", "is a directory"),
        (b"", "not an image"),
        (b"plain text", "not an image"),
        (encoded(picture())[:300], "damaged"),
        (encoded(picture((200, 200)), "JPEG")[:-3000], "damaged"),
        (Image.new("RGB", (0, 5)), "0 x 5"),
        (Image.new("RGB", (5000, 2)), "5000 x 2"),
        (np.zeros((4, 4), np.uint8), "array uint8"),
        (np.zeros((4, 4, 3), np.float32), "array float32"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0"),
        (17, "type int"),
    ],
)
def test_unusable_images_are_refused(source, message):
    with pytest.raises(UserError, match=message):
        decode(source)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns from here, and refuses twice as many
    assert decode(encoded(picture((40, 30)))).shape == (30, 40, 3)
    with pytest.raises(UserError, match="too large"):
        decode(encoded(picture((100, 100))))


VIDEOS = {
    "mp4": b"\0\0\0\x20ftypisom\0\0\2\0",
    "avi": b"RIFF\x24\0\0\0AVI LIST",
    "webm": b"\x1a\x45\xdf\xa3" + bytes(20),
    "mpg": b"\0\0\1\xba" + bytes(20),
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_videos_are_refused_with_what_to_do(tmp_path, kind):
    file, named = tmp_path / "clip", tmp_path / f"other.{kind.upper()}"
    file.write_bytes(VIDEOS[kind])
    named.write_bytes(b"anything")
    for source in (VIDEOS[kind], file, str(named)):
        with pytest.raises(UserError, match=r"videos are not supported\n.*\n.*pass them as images"):
            decode(source)


def test_frames_in_one_array_are_a_video():
    with pytest.raises(UserError, match=r"\(2, 4, 4, 3\) is a video"):
        decode(np.zeros((2, 4, 4, 3), np.uint8))


def test_heif_is_no_video():
    with pytest.raises(UserError, match="not an image"):
        decode(b"\0\0\0\x18ftypheic" + bytes(8))


def sizes(*pairs: tuple[int, int]) -> list[Size]:
    return [Size(width, height, 16, 1, "<image>", {}) for width, height in pairs]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((300, 300), "336x336"),
        ((3000, 3000), "672x672"),
        ((640, 480), "448x336"),
        ((480, 640), "336x448"),
        ((4000, 100), "1008x336"),
        ((1, 1), "336x336"),
    ],
)
def test_a_size_fits_by_shape_then_by_area(image, expected):
    known = sizes((336, 336), (672, 672), (448, 336), (336, 448), (1008, 336))
    assert fit_size(known, *image).name == fit_size(known[::-1], *image).name == expected


def test_an_image_of_another_shape_is_padded_in_black():
    (size,) = sizes((20, 10))
    near = np.full((100, 215, 3), 7, np.uint8)  # 7.5 % off: stretched, as Hugging Face would
    assert framed(near, size) is near
    for shape, new_shape in (((100, 100), (100, 200)), ((30, 301), (150, 301)), ((41, 7), (41, 82))):
        image = np.full((*shape, 3), 7, np.uint8)
        canvas = framed(image, size)
        assert canvas.shape[:2] == new_shape and canvas.sum() == image.sum()
        top, left = ((new - old) // 2 for new, old in zip(new_shape, shape, strict=True))
        np.testing.assert_array_equal(canvas[top : top + shape[0], left : left + shape[1]], image)
    with pytest.raises(UserError, match="too large to be padded"):
        framed(np.zeros((100, 20_000, 3), np.uint8), sizes((10, 20))[0])


def test_pixels_of_tiles_and_patches_are_those_of_the_framed_image():
    tiles = Size(16, 8, 8, 1, "<image>", {"tile": 8, "resize": [[16, 8]], "canvas": [16, 8], "overview": None})
    settings = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    square = np.array(picture((40, 40)))
    padded = np.zeros((40, 80, 3), np.uint8)
    padded[:, 20:60] = square
    found = pixel_values(Preprocess("tiles", settings), square, tiles)
    assert found.shape == (2, 3, 8, 8) and found.dtype == np.float32
    np.testing.assert_array_equal(found, pixel_values(Preprocess("tiles", settings), padded, tiles))
    geometry = {"resize": [16, 8], "patch_size": 2, "merge_size": 2, "temporal_patch_size": 2}
    patches = Size(16, 8, 8, 1, "<image>", geometry)
    found = pixel_values(Preprocess("patches", settings), square, patches)
    assert found.shape == (32, 3 * 2 * 2 * 2) and found.dtype == np.float32
    assert seen_image(Preprocess("patches", settings), square, patches).shape == (8, 16, 3)
    assert seen_image(Preprocess("clip", SETTINGS[0]), picture(), SQUARE).shape == (336, 336, 3)


def test_unknown_preprocessing_is_refused():
    with pytest.raises(BundleError, match="anyres"):
        pixel_values(Preprocess("anyres", {}), picture(), SQUARE)
    with pytest.raises(BundleError, match="do_pad"):
        pixel_values(Preprocess("clip", {"do_pad": True}), picture(), SQUARE)
    with pytest.raises(BundleError, match="longest_edge"):
        pixel_values(Preprocess("clip", {"size": {"longest_edge": 3}}), picture(), SQUARE)
    assert set(module.PREPROCESSORS) == {"clip", "tiles", "patches"}
