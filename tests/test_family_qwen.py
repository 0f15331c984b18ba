"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches, tables, features, positions against Hugging Face, without a bundle."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models_qwen import make_qwen2_5_vl, make_qwen2_vl, make_qwen3_vl  # noqa: E402
from torch.utils._pytree import tree_unflatten  # noqa: E402

from lightkv_export.errors import UserError  # noqa: E402
from lightkv_export.families import family_named  # noqa: E402
from lightkv_export.families.base import Checkpoint, Family  # noqa: E402
from lightkv_export.recipe import load_recipe  # noqa: E402
from lightkv_export.runtime.pixels_patches import patch_pixels  # noqa: E402
from lightkv_export.segment import ATTENTION_NAME, Segment  # noqa: E402
from lightkv_export.skeleton import checkpoint_names, load_skeleton  # noqa: E402
from lightkv_export.trace import trace_vision  # noqa: E402

QWEN = [make_qwen2_vl, make_qwen2_5_vl, make_qwen3_vl]
SIZES = [(96, 64), (56, 84), (40, 120), (24, 24)]  # px; the second is rounded to 56x80, the last enlarged to 32x32
FLAT_QWEN2_VL_7B = {  # config.json on the hub, what matters here: one table for the decoder and the whole
    "model_type": "qwen2_vl",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
}
FLAT_QWEN2_5_VL_3B = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "temporal_patch_size": 2,
    },
}
NESTED_QWEN3_VL_2B = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
        "vocab_size": 151936,
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}
PUBLISHED = {
    "qwen2-vl-7b": FLAT_QWEN2_VL_7B,
    "qwen2.5-vl-3b": FLAT_QWEN2_5_VL_3B,
    "qwen3-vl-2b": NESTED_QWEN3_VL_2B,
}


@dataclass(frozen=True)
class Case:
    family: Family
    checkpoint: Checkpoint
    model: torch.nn.Module

    def processed(self, *images: np.ndarray) -> dict[str, torch.Tensor]:
        """What the checkpoint's own image processor gives."""
        return dict(self.checkpoint.processor.image_processor(images=list(images), return_tensors="pt"))

    def tables(self, width: int, height: int) -> list[torch.Tensor]:
        tables = self.family.size(self.checkpoint, width, height).tables
        specs = self.family.vision_inputs(self.checkpoint.config, "float32")
        assert [spec.name for spec in specs] == ["pixel_values", *tables]
        return [torch.from_numpy(table) for table in tables.values()]

    def ids(self, *tokens: int) -> torch.Tensor:
        """A prompt with an image for each entry of `tokens`, and text before, between and after."""
        config = self.checkpoint.config
        parts = [[5, 17, 40]]
        for count in tokens:
            image = [config.image_token_id] * count
            parts += [[config.vision_start_token_id, *image, config.vision_end_token_id], [99, 23]]
        return torch.tensor([token for part in parts for token in part])


@pytest.fixture(scope="module", params=QWEN, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = request.param(tmp_path_factory.mktemp("qwen"))
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()
    images = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
    processor = SimpleNamespace(image_processor=images, image_token="<|image_pad|>")
    return Case(family_named(model.config.model_type), Checkpoint(path, model.config, processor), model)


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_gives_hugging_face_s_pixels_tokens_and_features(case, size):
    image = picture(*size)
    layout = case.family.size(case.checkpoint, *size)
    theirs = case.processed(image)
    settings = case.checkpoint.processor.image_processor.to_dict()
    pixels = patch_pixels(image, json.loads(json.dumps(layout.geometry)), settings)
    assert pixels.dtype == np.float32 and np.array_equal(pixels, theirs["pixel_values"].numpy())
    with torch.no_grad():
        ours = case.family.image_features(case.model, torch.from_numpy(pixels), *case.tables(*size))
        features = case.family.eager_features(case.model, theirs)
    ours = ours if isinstance(ours, tuple) else (ours,)
    assert len(ours) == 1 + len(case.family.deepstack_layers(case.model.config))
    assert layout.units == 1 and len(features[0]) == layout.tokens and layout.prompt == "<|image_pad|>"
    for rows, expected in zip(ours, features, strict=True):
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_windows_of_qwen2_5_matter(case):
    """Else a wrong table would not show: the same patches attending globally are something else."""
    if case.model.config.model_type != "qwen2_5_vl":
        pytest.skip("has no windows")
    pixels, (positions, windows, places) = case.processed(picture(96, 64))["pixel_values"], case.tables(96, 64)
    assert windows.shape == (12, 36) and (windows < 0).any()
    with torch.no_grad():
        one = torch.arange(len(pixels))
        windowed = case.family.image_features(case.model, pixels, positions, windows, places)
        whole = case.family.image_features(case.model, pixels, positions, one[None], one)
    assert (windowed - whole).abs().max() > 0.01 * whole.abs().max()


def test_one_traced_vision_graph_serves_all_sizes(case):
    """Traced on weights without values; run with the real ones."""
    skeleton = load_skeleton(case.checkpoint.directory, case.family, torch.float32)
    traced = trace_vision(skeleton)
    assert all(isinstance(spec.shape[0], str) and spec.shape[1:] == (64,) for spec in traced.outputs)
    state = case.model.state_dict() | dict(case.model.named_buffers())
    weights = {name: state[name.removeprefix("whole.")] for name in traced.program.state_dict}
    program = traced.program
    program._state_dict = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in weights.items()}
    for size in SIZES:
        theirs = case.processed(picture(*size))
        with torch.no_grad():
            inputs = [theirs["pixel_values"], *case.tables(*size)]
            args, _ = tree_unflatten(inputs, program.call_spec.in_spec)
            ours = program.module()(*args)
            features = case.family.eager_features(case.model, theirs)
        for rows, expected in zip(ours if isinstance(ours, tuple) else (ours,), features, strict=True):
            torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_positions_of_a_size_are_those_of_a_whole_prompt(case):
    sizes = [(96, 64), (40, 120)]
    layouts = [case.family.size(case.checkpoint, *size) for size in sizes]
    ids = case.ids(*(layout.tokens for layout in layouts))
    found = case.family.positions3(case.model, ids, case.processed(*(picture(*size) for size in sizes))).numpy()
    position, expected, left = 0, [], list(layouts)
    is_image = (ids == case.model.config.image_token_id).tolist()
    while len(expected) < len(ids):
        if is_image[len(expected)]:
            layout = left.pop(0)
            expected += (position + layout.positions.T).tolist()
            position += layout.advance
        else:
            expected.append([position] * 3)
            position += 1
    assert found.T.tolist() == expected
    assert case.family.positions3(case.model, ids[:3], {}).tolist() == [[0, 1, 2]] * 3


def test_the_rotary_embedding_of_segments_is_hugging_face_s(case):
    """Bit for bit, also where every axis has its own position."""
    theirs, ours = case.family.text_model(case.model).rotary_emb, case.family.rotary(case.model)
    assert ours is not theirs
    positions = torch.randint(0, 4000, (3, 1, 50), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16):
        x = torch.zeros(1, dtype=dtype)
        for got, expected in zip(ours(x, positions), theirs(x, positions), strict=True):
            assert got.dtype == dtype and torch.equal(got, expected)


@torch.no_grad()
def test_a_segment_of_the_decoder_gives_hugging_face_s_logits(case):
    """Prefill with two images and one decoded token, through the portable cache protocol."""
    images = [picture(96, 64), picture(40, 120)]
    inputs = case.processed(*images)
    ids = case.ids(*(inputs["image_grid_thw"].prod(-1) // 4).tolist())
    ids = torch.cat([ids, torch.tensor([33])])  # the last one alone, as in decoding
    kinds = (ids == case.model.config.image_token_id).int()
    expected = case.model(input_ids=ids[None], mm_token_type_ids=kinds[None], **inputs).logits[0, -2:]

    family, text = case.family, case.family.text_model(case.model)
    features, *deepstack = family.eager_features(case.model, inputs)
    hidden = text.embed_tokens(ids)[None].clone()
    hidden[0, kinds.bool()] = features
    added = [torch.zeros_like(hidden) for _ in deepstack]
    for rows, tensor in zip(deepstack, added, strict=True):
        tensor[0, kinds.bool()] = rows
    layers = family.deepstack_layers(case.model.config)
    tail = text.norm, family.head(case.model)
    segment = Segment(text.layers, 0, family.rotary(case.model), "append", tail=tail, deepstack=layers)
    positions = family.positions3(case.model, ids, inputs)[:, None]
    row = text.config.num_key_value_heads * text.layers[0].self_attn.head_dim
    caches = [torch.zeros(1, 1, 0, row)] * (2 * len(text.layers))
    before = text.config._attn_implementation
    text.set_attn_implementation(ATTENTION_NAME)
    try:
        found = []
        for chunk in (slice(0, len(ids) - 1), slice(len(ids) - 1, None)):
            past, last = torch.tensor([chunk.start]), torch.tensor([len(ids[chunk]) - 1])
            chunks = hidden[:, chunk], positions[..., chunk], past, caches, [rows[:, chunk] for rows in added]
            logits, *caches = segment(*chunks, last)
            found.append(logits)
    finally:
        text.set_attn_implementation(before)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["as saved", "old", "new"])
def test_tensor_names_of_old_and_new_checkpoints_are_found(case, layout):
    """Qwen2-VL's and Qwen2.5-VL's checkpoints have names from before the decoder moved below `language_model`."""
    from safetensors import safe_open

    if case.model.config.model_type == "qwen3_vl" and layout == "old":
        pytest.skip("is younger than the new names")

    with safe_open(case.checkpoint.directory / "model.safetensors", "pt") as file:
        saved = list(file.keys())
    old = [name.replace("model.visual.", "visual.").replace("model.language_model.", "model.") for name in saved]
    new = [re.sub("^model", "model.language_model", re.sub("^visual", "model.visual", name)) for name in old]
    new = [name.replace("model.language_model.visual", "model.visual") for name in new]
    stored = {"as saved": saved, "old": old, "new": new}[layout]
    model = load_skeleton(case.checkpoint.directory, case.family, torch.float32).model
    found = checkpoint_names(model, dict.fromkeys(stored))
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters <= set(found) and sorted(found.values()) == sorted(stored)


def test_a_size_that_is_no_picture_is_refused(case):
    for size in [(4000, 8), (0, 64)]:
        with pytest.raises(UserError, match=f"image size {size[0]}x{size[1]}"):
            case.family.size(case.checkpoint, *size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_and_default_sizes_from_config_json_are_the_recipe_s(name):
    config, recipe = PUBLISHED[name], load_recipe(name)
    family = family_named(config["model_type"])
    assert family.shape(config) == recipe.shape
    assert family.default_sizes(config) == recipe.image_sizes
    assert (recipe.windows, recipe.positions) == (family.windows, "original")


def test_files_as_the_hub_has_them_mean_the_same(case, tmp_path):
    """One flat config.json, with the names of earlier versions of transformers, and limits of pixels beside `size`."""
    directory, model_type = case.checkpoint.directory, case.model.config.model_type
    config = json.loads((directory / "config.json").read_text())
    if model_type != "qwen3_vl":  # its checkpoints have always been nested
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "rope_type": "default", "mrope_section": rope["mrope_section"]}
        config = text | config | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        config["vision_config"] |= {"in_chans": 3, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    limits = settings.pop("size")
    settings |= {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))

    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    processor = SimpleNamespace(image_processor=images, image_token="<|image_pad|>")
    assert case.family.shape(config) == case.family.shape(json.loads((directory / "config.json").read_text()))
    for size in SIZES:
        here, there = (
            case.family.size(checkpoint, *size)
            for checkpoint in (Checkpoint(tmp_path, loaded, processor), case.checkpoint)
        )
        assert here.geometry == there.geometry and here.advance == there.advance
        assert np.array_equal(here.positions, there.positions) and here.tables.keys() == there.tables.keys()
        assert all(np.array_equal(here.tables[name], there.tables[name]) for name in here.tables)


def test_a_checkpoint_s_config_json_has_the_shape_of_its_model(case):
    shape = case.family.shape(json.loads((Path(case.checkpoint.directory) / "config.json").read_text()))
    tower, text = case.model.model.visual, case.model.model.language_model
    assert (shape.text.layers, shape.text.head_dim) == (len(text.layers), text.layers[0].self_attn.head_dim)
    assert shape.vision.layers == len(tower.blocks)
    assert shape.vision.hidden == tower.patch_embed.proj.weight.shape[0]
    assert shape.vision.patch_channels * shape.vision.patch_size**2 == tower.patch_embed.proj.weight[0].numel()
