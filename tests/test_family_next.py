"""LLaVA-NeXT and LLaVA-OneVision: tiles, tables and features against Hugging Face's own, without a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models_next import make_llava_next, make_llava_onevision  # noqa: E402

from lightkv_export.errors import UserError  # noqa: E402
from lightkv_export.families import family_named  # noqa: E402
from lightkv_export.families.base import Checkpoint, Family  # noqa: E402
from lightkv_export.families.llava_onevision import TAPS  # noqa: E402
from lightkv_export.families.processors import load_processor  # noqa: E402
from lightkv_export.recipe import load_recipe  # noqa: E402
from lightkv_export.runtime.pixels_tiles import tile_pixels  # noqa: E402

NEXT = [make_llava_next, make_llava_onevision]
WIDE, TALL, SQUARE, BANNER = (61, 41), (41, 61), (64, 64), (200, 40)
SHRUNK = ((300, 290), (133, 100))  # LLaVA-OneVision: more than 9 tiles, interpolated


@dataclass(frozen=True)
class Case:
    family: Family
    checkpoint: Checkpoint
    model: torch.nn.Module

    def hugging_face(self, *images: np.ndarray) -> tuple[dict, list[torch.Tensor], int]:
        """What the processor gives for a flat list of images, their features, and the image tokens in its prompt."""
        processor = self.checkpoint.processor
        inputs = processor(images=list(images), text=processor.image_token * len(images), return_tensors="pt")
        tokens = int((inputs.pop("input_ids") == self.model.config.image_token_id).sum())
        inputs.pop("attention_mask")
        with torch.no_grad():
            return inputs, list(self.model.get_image_features(**inputs).pooler_output), tokens

    def inputs(self, image: np.ndarray, width: int, height: int) -> list[torch.Tensor]:
        """The vision graph's inputs for an image at a size."""
        size = self.family.size(self.checkpoint, width, height)
        pixels = tile_pixels(image, size.geometry, self.checkpoint.processor.image_processor.to_dict())
        specs = self.family.vision_inputs(self.model.config, "float32")
        assert [spec.name for spec in specs] == ["pixel_values", *size.tables]
        return [torch.from_numpy(values) for values in (pixels, *size.tables.values())]


@pytest.fixture(scope="module", params=NEXT, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _case(request.param(tmp_path_factory.mktemp("next")))


def _case(path: Path) -> Case:
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()
    return Case(family_named(model.config.model_type), _checkpoint(path), model)


def _checkpoint(path: Path) -> Checkpoint:
    return Checkpoint(path, transformers.AutoConfig.from_pretrained(path), load_processor(path))


def _image(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE, BANNER, *SHRUNK], ids=str)
def test_an_image_of_the_size_is_as_in_hugging_face(case: Case, size: tuple[int, int]) -> None:
    inputs, features, tokens = case.hugging_face(_image(*size))
    layout = case.family.size(case.checkpoint, *size)
    assert (layout.units, layout.prompt) == (1, "<image>")
    assert layout.tokens == tokens == len(features[0])
    json.dumps(layout.geometry)
    ours = case.inputs(_image(*size), *size)
    assert np.array_equal(ours[0].numpy(), inputs["pixel_values"][0].numpy())
    with torch.no_grad():
        rows = case.family.image_features(case.model, *ours)
    torch.testing.assert_close(rows, features[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("image", [(122, 82), (60, 41), (500, 340)], ids=str)
def test_other_images_of_the_same_layout_have_the_same_pixels(tmp_path: Path, image: tuple[int, int]) -> None:
    case = _case(make_llava_next(tmp_path))
    (inputs, (features,), _), (pixels, index) = case.hugging_face(_image(*image)), case.inputs(_image(*image), *WIDE)
    assert np.array_equal(pixels.numpy(), inputs["pixel_values"][0].numpy())
    assert len(index) == len(features)


def test_several_images_are_each_laid_out_by_their_own_size(case: Case) -> None:
    sizes = (WIDE, SQUARE)
    _, features, tokens = case.hugging_face(*(_image(*size) for size in sizes))
    layouts = [case.family.size(case.checkpoint, *size) for size in sizes]
    assert tokens == sum(layout.tokens for layout in layouts)
    for size, rows in zip(sizes, features, strict=True):
        with torch.no_grad():
            ours = case.family.image_features(case.model, *case.inputs(_image(*size), *size))
        torch.testing.assert_close(ours, rows, rtol=1e-6, atol=1e-6)


def test_one_program_serves_every_size(case: Case) -> None:
    family, config = case.family, case.model.config

    class Vision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return family.image_features(self.model, *inputs)

    specs = family.vision_inputs(config, "float32")
    dims = {name: torch.export.Dim(name, min=2, max=1 << 20) for name in ("N", "R")}
    shapes = tuple({axis: dims[name] for axis, name in enumerate(spec.shape) if name in dims} for spec in specs)
    example = case.inputs(_image(*WIDE), *WIDE)
    with torch.no_grad():
        program = torch.export.export(Vision(), tuple(example), dynamic_shapes=(shapes,), strict=False)
        for size in (TALL, BANNER):
            features = case.hugging_face(_image(*size))[1][0]
            rows = program.module()(*case.inputs(_image(*size), *size))
            torch.testing.assert_close(rows, features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "make", "tile"),
    [
        ("llava-next-vicuna-7b", make_llava_next, 336),
        ("llava-next-vicuna-13b", make_llava_next, 336),
        ("llava-next-mistral-7b", make_llava_next, 336),
        ("llava-onevision-0.5b", make_llava_onevision, 384),
        ("llava-onevision-7b", make_llava_onevision, 384),
    ],
)
def test_recipe_counts_are_the_processors(tmp_path: Path, recipe: str, make: Callable[..., Path], tile: int) -> None:
    checkpoint = _checkpoint(make(tmp_path, tile=tile, patch=14, layers=1))  # only the language model is smaller
    family = family_named(checkpoint.config.model_type)
    config, shipped = json.loads((tmp_path / "config.json").read_text()), load_recipe(recipe)
    vision = family.shape(config).vision
    assert shipped.image_sizes == family.default_sizes(config) and shipped.windows == family.windows
    for name in ("tokens", "tiles", "encoder_tokens", "units"):
        assert getattr(vision, name) == getattr(shipped.shape.vision, name), name
    for size in shipped.image_sizes:
        layout = family.size(checkpoint, *size)
        assert layout.tokens == shipped.at_size(*size).shape.vision.tokens
        columns, rows = np.array(layout.geometry["canvas"]) // tile
        assert 1 + columns * rows == shipped.at_size(*size).shape.vision.tiles


@pytest.mark.parametrize("recipe", ["llava-next-mistral-7b", "llava-onevision-0.5b", "llava-onevision-7b"])
def test_text_shape_without_what_config_json_leaves_out(recipe: str) -> None:
    shipped = load_recipe(recipe).shape
    classes = {"llava_next": transformers.MistralConfig, "llava_onevision": transformers.Qwen2Config}
    heads = {"num_attention_heads": shipped.text.heads, "num_key_value_heads": shipped.text.kv_heads}
    text = classes[shipped.family](
        num_hidden_layers=shipped.text.layers,
        hidden_size=shipped.text.hidden,
        intermediate_size=shipped.text.intermediate,
        vocab_size=shipped.text.vocab,
        tie_word_embeddings=shipped.text.tied_embeddings,
        **heads,
    )
    written = {"model_type": text.model_type} | text.to_diff_dict()
    family = family_named(shipped.family)
    assert family.shape({"model_type": shipped.family, "text_config": written, "vision_config": {}}) == shipped


@pytest.mark.parametrize("size", SHRUNK, ids=str)
def test_a_shrunk_picture_is_a_weighted_mean_of_neighbours(tmp_path: Path, size: tuple[int, int]) -> None:
    checkpoint = _checkpoint(make_llava_onevision(tmp_path))
    tables = family_named("llava_onevision").size(checkpoint, *size).tables
    index, weight = tables["token_index"], tables["token_weight"]
    assert index.shape == weight.shape == (len(index), TAPS)
    assert (index.dtype, weight.dtype) == (np.int64, np.float32)
    np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-6)
    assert weight.min() >= 0 and (weight > 0).sum(axis=1).max() == TAPS


def test_mistral_decoder(tmp_path: Path) -> None:
    path = make_llava_next(tmp_path, text_type="mistral")
    shape = family_named("llava_next").shape(json.loads((path / "config.json").read_text()))
    assert (shape.text.heads, shape.text.kv_heads, shape.text.tied_embeddings) == (4, 2, False)
    assert transformers.AutoConfig.from_pretrained(path).text_config.model_type == "mistral"


@pytest.mark.parametrize(
    "entries",
    [
        {"image_grid_pinpoints": [[96, 32]]},
        {"size": {"shortest_edge": 24}},
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    ],
    ids=["other pinpoints", "resized again", "other tile"],
)
def test_processor_that_does_not_fit_the_model(tmp_path: Path, entries: dict) -> None:
    path = make_llava_next(tmp_path)
    settings = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(settings | entries))
    with pytest.raises(UserError, match="(?s)image size 61x41.*expected: grid pinpoints.*to do"):
        family_named("llava_next").size(_checkpoint(path), *WIDE)


def test_unknown_text_model(tmp_path: Path) -> None:
    config = {"model_type": "llava_next", "text_config": {"model_type": "mamba"}, "vision_config": {}}
    with pytest.raises(UserError, match="(?s)text model is 'mamba'.*llama, mistral, qwen2"):
        family_named("llava_next").shape(config)
