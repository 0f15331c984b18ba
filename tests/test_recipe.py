"""Recipes: every shipped file loads, and every kind of mistake in one is named."""

from __future__ import annotations

import subprocess
import sys
from math import isqrt
from pathlib import Path

import pytest

import lightkv_export
from lightkv_export.errors import UserError
from lightkv_export.families import family_named
from lightkv_export.recipe import StageSpec, load_recipe, recipe_from_toml, recipe_names
from lightkv_export.schedule import KEEP_TOLERANCE, schedule_from_stages

TEXT = """
family = "llava"
checkpoint = "org/name"
windows = [2, 1]
[text]
layers = 4
hidden = 8
heads = 2
kv_heads = 1
head_dim = 4
intermediate = 16
vocab = 32
[vision]
tokens = 64
tiles = 1
encoder_tokens = 65
layers = 2
hidden = 8
intermediate = 16
patch_size = 2
image_size = 16
projector_hidden = 8
[[schedule]]
keep = 0.81
stages = ["1:2:0.25", "2:1:0.25"]
[[size]]
image = "16x16"
tokens = 64
[[size]]
image = "32x8"
tokens = 16
units = 3
tiles = 4
encoder_tokens = 40
[tolerances]
logits = 1
"""


def test_shipped_recipes() -> None:
    assert set(recipe_names()) >= {
        "tiny-llava",
        "llava-1.5-7b",
        "llava-1.5-13b",
        "llava-next-vicuna-7b",
        "llava-next-vicuna-13b",
        "llava-next-mistral-7b",
        "qwen2.5-vl-7b",
    }


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_consistent(name: str) -> None:
    recipe = load_recipe(name)
    text, vision = recipe.shape.text, recipe.shape.vision
    assert recipe.name == name and recipe.shape.family == recipe.family
    assert text.heads % text.kv_heads == 0
    patches = (vision.image_size // vision.patch_size) ** 2
    assert vision.encoder_tokens - patches in (0, 1) and vision.patches == patches
    for width, height in recipe.image_sizes or ((vision.image_size, vision.image_size),):
        shape = recipe.at_size(width, height).shape.vision if recipe.sizes else vision
        rows = shape.tiles * (shape.patches // shape.spatial_merge**2)
        line_breaks = shape.tiles * isqrt(shape.patches)  # LLaVA-NeXT ends every row of patches with one
        assert shape.image_tokens <= rows + line_breaks, "no more vision tokens than the projector gives"
    assert not recipe.sizes or recipe.at_size(*recipe.image_sizes[0]) == recipe
    for keep, specs in recipe.schedules.items():
        schedule = schedule_from_stages(text.layers, vision.tokens, specs)
        if name == "tiny-llava":  # tuned: whatever answered best near the keep
            assert abs(schedule.keep - keep) <= KEEP_TOLERANCE
        else:  # published: declared and achieved are no more than rounding apart
            assert abs(schedule.keep - keep) <= KEEP_TOLERANCE / 5
            assert tuple(spec.windows_per_side for spec in specs) == recipe.windows


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_family_that_takes_its_positions(name: str) -> None:
    recipe = load_recipe(name)
    family = family_named(recipe.family)
    assert recipe.windows == family.windows and recipe.image_sizes
    assert recipe.positions == "original" or family.rope == "1d"


def test_tiny_llava_shape() -> None:
    shape = load_recipe("tiny-llava").shape
    assert (shape.text.layers, shape.text.hidden, shape.text.heads, shape.text.head_dim) == (12, 192, 3, 64)
    assert (shape.vision.tokens, shape.vision.layers, shape.text.tied_embeddings) == (576, 4, False)


def test_recipe_from_toml() -> None:
    recipe = recipe_from_toml(TEXT, "mine")
    assert (recipe.name, recipe.revision, recipe.positions, recipe.windows) == ("mine", None, "original", (2, 1))
    assert recipe.schedules == {0.81: (StageSpec(1, 2, 0.25), StageSpec(2, 1, 0.25))}
    assert recipe.tolerances == {"logits": 1.0}
    assert recipe.image_sizes == ((16, 16), (32, 8)) and recipe.at_size(16, 16) == recipe
    wide = recipe.at_size(32, 8).shape.vision
    assert (wide.tokens, wide.units, wide.tiles, wide.encoder_tokens, wide.image_tokens) == (16, 3, 4, 40, 48)
    assert (recipe.shape.vision.patches, wide.patches, wide.layers) == (64, 40, 2)  # 40 patches, no class token
    assert recipe.shape.text.kv_heads == 1 and recipe.shape.vision.spatial_merge == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("family =", "famly =", "unknown key 'famly' (did you mean 'family'?)"),
        ("kv_heads", "kv_head", "[text] has an unknown key 'kv_head' (did you mean 'kv_heads'?)"),
        ("vocab = 32\n", "", "[text] lacks vocab"),
        ("keep = 0.81", "kept = 0.81", "[[schedule]] has an unknown key 'kept'"),
        ("layers = 4", 'layers = "4"', "[text] layers is '4'"),
        ("layers = 4", "layers = true", "[text] layers is True"),
        ("layers = 4", "layers = 0", "[text] layers = 0"),
        ("keep = 0.81", "keep = 81", "keep = 81"),
        ("windows = [2, 1]", "windows = [2, 0]", "windows is [2, 0]"),
        ("windows = [2, 1]", 'windows = [2, 1]\npositions = "absolute"', "positions is 'absolute'"),
        ('"1:2:0.25"', '"1:2:0.75"', "the discard ratio is 0.75"),
        ('stages = ["1:2:0.25", "2:1:0.25"]', "stages = [1]", "stages of keep 0.81 is [1]"),
        ('image = "16x16"', 'image = "16"', "image size '16' cannot be read"),
        ('image = "16x16"', 'image = "0x16"', "image size '0x16' cannot be read"),
        ('image = "16x16"', "image = 16", "[[size]] image is 16"),
        ('image = "16x16"', 'image = "32x8"', "a [[size]] is given twice"),
        ('image = "16x16"\ntokens = 64', 'image = "16x16"\ntokens = 63', "16x16, has other counts than [vision]"),
        ("units = 3", "unit = 3", "[[size]] has an unknown key 'unit' (did you mean 'units'?)"),
        ("logits = 1", 'logits = "loose"', "tolerance logits is 'loose'"),
        ("[text]", "[text", "is not valid TOML"),
    ],
)
def test_mistake_in_recipe(old: str, new: str, message: str) -> None:
    assert TEXT.count(old)
    with pytest.raises(UserError) as caught:
        recipe_from_toml(TEXT.replace(old, new, 1), "mine")
    assert message in str(caught.value)


def test_size_that_a_recipe_does_not_list() -> None:
    with pytest.raises(UserError, match="(?s)image of 8x8 is not known.*lists: 16x16, 32x8.*--image-size"):
        recipe_from_toml(TEXT, "mine").at_size(8, 8)


def test_unknown_recipe() -> None:
    with pytest.raises(
        UserError, match=r"(?s)'llava-1.5-7'.*did you mean 'llava-1.5-7b'.*expected: .*tiny-llava.*to do"
    ):
        load_recipe("llava-1.5-7")


def test_stage_spec_round_trip() -> None:
    spec = StageSpec.parse("12:4:0.5")
    assert spec == StageSpec(12, 4, 0.5) and str(spec) == "12:4:0.5"


@pytest.mark.parametrize("text", ["", "12", "12:4", "12:4:0.5:1", "a:4:0.5", "1.5:4:0.5", "12:4:half"])
def test_stage_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="(?s)cannot be read.*expected: LAYER:WINDOWS:RATIO.*to do"):
        StageSpec.parse(text)


@pytest.mark.parametrize("text", ["-1:4:0.5", "1:0:0.5", "1:4:0", "1:4:-0.1", "1:4:0.51", "1:4:nan", "1:4:inf"])
def test_stage_out_of_range(text: str) -> None:
    with pytest.raises(UserError, match="(?s)stage .*expected: .*to do"):
        StageSpec.parse(text)


def test_planning_loads_the_standard_library_alone() -> None:
    code = (
        "import sys; import lightkv_export.schedule; "
        "heavy = {'torch', 'transformers', 'numpy', 'onnx', 'onnxruntime', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(lightkv_export.__file__).parent.parent)
