"""InternVL3, SmolVLM2 and Idefics3: tiles, prompts and features against Hugging Face's own, without a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models_tiles import make_idefics3, make_internvl, make_smolvlm  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from lightkv_export.errors import BundleError, UserError  # noqa: E402
from lightkv_export.families import family_named  # noqa: E402
from lightkv_export.families.base import Checkpoint, Family  # noqa: E402
from lightkv_export.families.processors import load_processor  # noqa: E402
from lightkv_export.recipe import load_recipe  # noqa: E402
from lightkv_export.runtime.pixels_tiles import tile_pixels  # noqa: E402
from lightkv_export.schedule import schedule_from_keep  # noqa: E402
from lightkv_export.skeleton import checkpoint_names, load_skeleton  # noqa: E402
from lightkv_export.trace import trace_vision  # noqa: E402
from lightkv_export.weights import read_checkpoint  # noqa: E402

SMOLVLM_RECIPES = ["smolvlm-256m", "smolvlm2-256m", "smolvlm2-500m", "smolvlm2-2.2b"]
RECIPES = ["internvl3-1b", "internvl3-2b", "internvl3-8b", *SMOLVLM_RECIPES]
SIZES = [(640, 480), (480, 640), (64, 64), (37, 91), (701, 335), (500, 20), (9, 6)]
SETTINGS = {"resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 1 / 255}


@dataclass(frozen=True)
class Case:
    family: Family
    checkpoint: Checkpoint
    model: torch.nn.Module

    def hugging_face(self, *images: np.ndarray) -> tuple[list[int], np.ndarray]:
        """What the checkpoint's processor makes of some images: ids of the text, and tiles [N, 3, tile, tile]."""
        processor = self.checkpoint.processor
        inputs = processor(images=list(images), text=processor.image_token * len(images), return_tensors="np")
        pixels = inputs["pixel_values"]
        return inputs["input_ids"][0].tolist(), pixels.reshape(-1, *pixels.shape[-3:])


def _case(path: Path) -> Case:
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()
    checkpoint = Checkpoint(path, transformers.AutoConfig.from_pretrained(path), load_processor(path))
    return Case(family_named(model.config.model_type), checkpoint, model)


@pytest.fixture(scope="module", params=[make_internvl, make_smolvlm, make_idefics3], ids=lambda make: make.__name__[5:])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _case(request.param(tmp_path_factory.mktemp("tiles")))


def _image(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_of_the_size_is_as_in_hugging_face(case: Case, size: tuple[int, int]) -> None:
    ids, pixels = case.hugging_face(_image(*size))
    layout = case.family.size(case.checkpoint, *size)
    token = case.checkpoint.processor.image_token
    assert layout.prompt.count(token) == layout.units == len(pixels)
    text = layout.prompt.replace(token, token * layout.tokens)
    assert case.checkpoint.processor.tokenizer(text)["input_ids"] == ids
    geometry = json.loads(json.dumps(layout.geometry))
    settings = json.loads(json.dumps(case.checkpoint.processor.image_processor.to_dict()))
    assert np.array_equal(tile_pixels(_image(*size), geometry, settings), pixels)


@pytest.mark.parametrize(("size", "other"), [((128, 128), (130, 126)), ((128, 64), (150, 74))], ids=["square", "wide"])
def test_another_image_with_the_same_grid_is_as_in_hugging_face(
    case: Case, size: tuple[int, int], other: tuple[int, int]
) -> None:
    geometry = case.family.size(case.checkpoint, *size).geometry
    settings = case.checkpoint.processor.image_processor.to_dict()
    _, pixels = case.hugging_face(_image(*other))
    assert np.array_equal(tile_pixels(_image(*other), geometry, settings), pixels)


def test_several_images_are_their_tiles_one_after_the_other(case: Case) -> None:
    images = [_image(128, 64), _image(64, 64, seed=1), _image(64, 128, seed=2)]
    ids, pixels = case.hugging_face(*images)
    layouts = [case.family.size(case.checkpoint, *image.shape[1::-1]) for image in images]
    token = case.checkpoint.processor.image_token
    text = "".join(layout.prompt.replace(token, token * layout.tokens) for layout in layouts)
    assert case.checkpoint.processor.tokenizer(text)["input_ids"] == ids
    settings = case.checkpoint.processor.image_processor.to_dict()
    ours = [tile_pixels(image, layout.geometry, settings) for image, layout in zip(images, layouts, strict=True)]
    assert np.array_equal(np.concatenate(ours), pixels)


def test_features_traced_without_weights_are_those_of_hugging_face(case: Case) -> None:
    traced = trace_vision(load_skeleton(case.checkpoint.directory, case.family, torch.float32))
    assert traced.outputs[0].shape == ("N", 64, 64)
    program, weights = traced.program.module(), case.model.state_dict()
    program.load_state_dict({name: weights[traced.weights[name]] for name in program.state_dict()}, assign=True)
    for image in (_image(64, 64), _image(128, 64), _image(128, 128)):
        _, pixels = case.hugging_face(image)
        inputs = torch.from_numpy(pixels)
        with torch.no_grad():
            ours = program([inputs])
            batched = inputs if case.model.config.model_type == "internvl" else inputs[None]
            (theirs,) = case.family.eager_features(case.model, {"pixel_values": batched})
        assert ours.shape == (len(pixels), 64, 64)
        torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "recipe"),
    [
        (make_internvl, {"tile": 448, "patch": 14}, "internvl3-1b"),
        (make_smolvlm, {"tile": 512, "patch": 16, "scale": 4, "longest_edge": 2048}, "smolvlm2-256m"),
        (make_smolvlm, {"tile": 384, "patch": 14, "scale": 3, "longest_edge": 1536}, "smolvlm2-2.2b"),
        (make_idefics3, {"tile": 512, "patch": 16, "scale": 4, "longest_edge": 2048}, "smolvlm-256m"),
    ],
    ids=["internvl3", "smolvlm2-256m", "smolvlm2-2.2b", "smolvlm-256m"],
)
def test_recipes_count_as_the_processor_does(make: Callable, options: dict, recipe: str, tmp_path: Path) -> None:
    case, listed = _case(make(tmp_path, layers=1, **options)), load_recipe(recipe)
    config = json.loads((tmp_path / "config.json").read_text())
    assert case.family.default_sizes(config) == listed.image_sizes
    default = case.family.shape(config).vision
    assert (default.tokens, default.units) == (listed.shape.vision.tokens, listed.shape.vision.units)
    for width, height in listed.image_sizes:
        layout, vision = case.family.size(case.checkpoint, width, height), listed.at_size(width, height).shape.vision
        assert (layout.tokens, layout.units, layout.units) == (vision.tokens, vision.units, vision.tiles)
    # 384 px hold 27 patches of 14 px and a rest: the features are Hugging Face's there too.
    side = options["tile"]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = case.family.image_features(case.model, pixels)
        batched = pixels if case.model.config.model_type == "internvl" else pixels[None]
        (theirs,) = case.family.eager_features(case.model, {"pixel_values": batched})
    torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("keep", [0.75, 0.55, 0.4])
def test_recipes_reach_the_usual_keeps(name: str, keep: float) -> None:
    recipe = load_recipe(name)
    schedule = schedule_from_keep(recipe, keep)
    assert abs(schedule.keep - keep) <= 0.01
    assert len(schedule.stages) == len(recipe.windows)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_agree_with_config_json(name: str) -> None:
    shape = load_recipe(name).shape
    text, vision = shape.text, shape.vision
    config: dict[str, Any] = {
        "model_type": shape.family,
        "text_config": {
            "num_hidden_layers": text.layers,
            "hidden_size": text.hidden,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "intermediate_size": text.intermediate,
            "vocab_size": text.vocab,
        },
        "vision_config": {
            "num_hidden_layers": vision.layers,
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "tie_word_embeddings": False,
        "scale_factor": vision.spatial_merge,
    }
    assert family_named(shape.family).shape(config) == shape


def test_a_head_of_its_own_is_not_tied_whatever_config_json_says(tmp_path: Path) -> None:
    """InternVL3's checkpoints store both; a config.json without `tie_word_embeddings` says that they are one."""
    path = make_internvl(tmp_path, tied=True)
    weights = load_file(path / "model.safetensors")
    embedding = next(name for name in weights if name.endswith("embed_tokens.weight"))
    for head, tied in ((weights[embedding].clone(), True), (weights[embedding] + 1e-3, False)):
        save_file(weights | {"lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(path)
        assert torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight) == tied
        skeleton = load_skeleton(path, family_named("internvl"), torch.float32, read_checkpoint(path))
        assert (skeleton.model.lm_head.weight is skeleton.text.embed_tokens.weight) == tied
        names = checkpoint_names(skeleton.model, read_checkpoint(path))
        assert tied or names["lm_head.weight"] == "lm_head.weight"


def test_a_processor_that_disagrees_with_the_model_is_refused(tmp_path: Path) -> None:
    case = _case(make_internvl(tmp_path))
    case.checkpoint.processor.image_seq_length = 16
    with pytest.raises(UserError, match="writes 16 image tokens for 1 tiles"):
        case.family.size(case.checkpoint, 64, 64)


def test_a_processor_with_other_steps_is_refused(tmp_path: Path) -> None:
    case = _case(make_smolvlm(tmp_path))
    case.checkpoint.processor.image_processor.do_normalize = False
    case.checkpoint.processor.image_processor.do_resize = False
    case.family.size(case.checkpoint, 128, 64)  # what is only left out is left out here too
    case.checkpoint.processor.image_processor.size = {"height": 64, "width": 100}
    case.checkpoint.processor.image_processor.do_resize = True
    with pytest.raises(UserError, match="a way that is not supported"):
        case.family.size(case.checkpoint, 128, 64)


def test_an_internvl_with_another_text_model_is_refused(tmp_path: Path) -> None:
    config = json.loads((make_internvl(tmp_path) / "config.json").read_text())
    config["text_config"]["model_type"] = "qwen3"
    with pytest.raises(UserError, match="whose text model is 'qwen3'"):
        family_named("internvl").shape(config)


def test_a_processor_that_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_smolvlm(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
        with pytest.raises(UserError, match="needs a package: Package `num2words` is required"):
            load_processor(path)
    load_processor(path)
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="has no usable processor"):
        load_processor(path)


def test_padding_is_centred_and_black() -> None:
    geometry = {"tile": 4, "resize": [[3, 8]], "canvas": [4, 8], "overview": None}
    settings = SETTINGS | {"do_normalize": False}
    pixels = tile_pixels(np.full((8, 3, 3), 255, np.uint8), geometry, settings)
    assert pixels.shape == (2, 3, 4, 4)
    assert np.array_equal(pixels[..., :3], np.ones((2, 3, 4, 3), np.float32))
    assert not pixels[..., 3].any()


@pytest.mark.parametrize("geometry", [{"canvas": [8, 6]}, {"canvas": [4, 4]}], ids=["no whole tiles", "too small"])
def test_a_geometry_that_loses_pixels_is_refused(geometry: dict) -> None:
    whole = {"tile": 4, "resize": [[8, 4]], "canvas": [8, 4], "overview": None}
    tile_pixels(_image(8, 4), whole, SETTINGS)
    with pytest.raises(BundleError, match="tiles of 4 px"):
        tile_pixels(_image(8, 4), whole | geometry, SETTINGS)
