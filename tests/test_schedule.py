"""Windows, token counts, keeps, cache bytes and FLOPs, against slow and obvious versions and the paper's table."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from lightkv_export import flops
from lightkv_export.errors import UserError
from lightkv_export.recipe import StageSpec, TextShape, VisionShape, load_recipe, recipe_names
from lightkv_export.schedule import (
    Request,
    Schedule,
    plan,
    schedule_from_keep,
    schedule_from_other,
    schedule_from_stages,
    tokens_after,
    tokens_discarded,
    window_members,
)
from lightkv_export.solver import KEEP_TOLERANCE, SHALLOWEST_LAYER, solve


def naive_windows(tokens: int, per_side: int) -> list[list[int]]:
    """Cell by cell: which band does this token's row and column fall in?"""
    side = 0
    while side * side < tokens:
        side += 1
    band_of: list[int] = []
    for band in range(per_side):
        band_of += [band] * (side // per_side + (1 if band < side % per_side else 0))
    windows: dict[tuple[int, int], list[int]] = {}
    for index in range(tokens):
        windows.setdefault((band_of[index // side], band_of[index % side]), []).append(index)
    return [windows[key] for key in sorted(windows)]


def random_cases(count: int) -> list[tuple[int, int, float]]:
    generator = random.Random(0)
    return [(generator.randint(1, 900), generator.randint(1, 8), generator.randint(1, 50) / 100) for _ in range(count)]


def test_window_members_match_the_naive_rule() -> None:
    for tokens, per_side, _ in random_cases(400):
        windows = window_members(tokens, per_side)
        assert windows == naive_windows(tokens, per_side), (tokens, per_side)
        assert sorted(index for window in windows for index in window) == list(range(tokens))
        assert all(window and window == sorted(window) for window in windows)


def test_windows_of_a_grid_and_of_what_a_stage_leaves() -> None:
    assert [len(window) for window in window_members(576, 4)] == [36] * 16
    assert window_members(576, 4)[1][:7] == [6, 7, 8, 9, 10, 11, 30]
    # 288 tokens lie on 17 x 17 with one cell absent: bands of 9 and 8
    assert [len(window) for window in window_members(288, 2)] == [81, 72, 72, 63]
    # 5 tokens on 3 x 3: the last row is absent, so the last band of rows has no window
    assert window_members(5, 3) == [[0], [1], [2], [3], [4]]


def test_tokens_after_is_the_sum_over_windows() -> None:
    for tokens, per_side, ratio in random_cases(400):
        expected = 0
        for window in naive_windows(tokens, per_side):
            expected += len(window) - min(int(ratio * len(window)), len(window) // 2)
        if tokens < 8 * per_side**2:
            expected = tokens
        assert tokens_after(tokens, per_side, ratio) == expected, (tokens, per_side, ratio)


def test_the_chain_of_the_specification() -> None:
    assert [tokens_after(576, 4, 0.5), tokens_after(288, 2, 0.5), tokens_after(145, 1, 0.5)] == [288, 145, 73]


@pytest.mark.parametrize(
    ("window", "ratio", "expected"),
    [(100, 0.29, 28), (180, 0.35, 62), (10, 0.3, 3), (36, 0.5, 18), (5, 0.5, 2), (1, 0.5, 0), (3, 0.3, 0)],
)
def test_discarded_tokens_follow_the_floating_point_product_of_the_release(
    window: int, ratio: float, expected: int
) -> None:
    assert tokens_discarded(window, ratio) == expected


@pytest.mark.parametrize(("tokens", "per_side"), [(127, 4), (31, 2), (7, 1)])
def test_skip_rule(tokens: int, per_side: int) -> None:
    assert tokens_after(tokens, per_side, 0.5) == tokens
    assert tokens_after(8 * per_side**2, per_side, 0.5) < 8 * per_side**2


def test_keep_is_the_formula_of_the_specification() -> None:
    generator = random.Random(1)
    for _ in range(200):
        num_layers, tokens = generator.randint(6, 60), generator.randint(300, 2500)
        layers = sorted(generator.sample(range(num_layers - 1), 3))
        specs = [
            StageSpec(layer, w, generator.randint(20, 50) / 100) for layer, w in zip(layers, (4, 2, 1), strict=True)
        ]
        schedule = schedule_from_stages(num_layers, tokens, specs)
        v0, v1, v2, v3 = tokens, *(stage.tokens_out for stage in schedule.stages)
        l1, l2, l3 = layers
        cached = v0 * (l1 + 1) + v1 * (l2 - l1) + v2 * (l3 - l2) + v3 * (num_layers - 1 - l3)
        assert schedule.keep == cached / (num_layers * tokens)
        per_layer = schedule.vision_tokens_per_layer
        assert len(per_layer) == num_layers and sum(per_layer) == cached
        assert per_layer[l1] == v0 and per_layer[l1 + 1] == v1 and per_layer[-1] == v3


def test_the_authors_keep() -> None:
    specs = [StageSpec(12, 4, 0.5), StageSpec(18, 2, 0.5), StageSpec(24, 1, 0.5)]
    assert schedule_from_stages(32, 576, specs).keep == pytest.approx(0.574, abs=0.001)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["31:4:0.5"], "a layer from 0 to 30"),
        (["32:4:0.5"], "layers 0 to 31"),
        (["18:4:0.5", "12:2:0.5"], "ascending"),
        (["12:4:0.5", "12:2:0.5"], "ascending"),
        (["12:9:0.5"], "skips fewer than 648"),
        (["12:4:0.01"], "rounds down to none"),
        (["2:4:0.5", "3:4:0.5", "4:4:0.5", "5:4:0.5"], "77 vision tokens reach it"),
    ],
)
def test_stages_that_cannot_be_had(stages: list[str], message: str) -> None:
    with pytest.raises(UserError, match="(?s).*expected: .*to do: ") as caught:
        schedule_from_stages(32, 576, [StageSpec.parse(text) for text in stages])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_keeps_are_reached(name: str) -> None:
    recipe = replace(load_recipe(name), schedules={})  # by the solver alone
    lowest = 0.30  # 12 layers with three stages from layer 2 on end at 0.387, and two stages at about 0.35
    if recipe.shape.text.layers < 20 or len(recipe.windows) < 3:
        lowest = 0.40
    for percent in (*range(round(lowest * 100), 100, 5), 99):
        schedule = schedule_from_keep(recipe, percent / 100)
        assert abs(schedule.keep - percent / 100) <= 0.01, percent
        assert schedule.requested == percent / 100
        layers = [stage.layer for stage in schedule.stages]
        assert (
            layers == sorted(set(layers))
            and layers[0] >= SHALLOWEST_LAYER
            and layers[-1] < recipe.shape.text.layers - 1
        )
        assert len(layers) == len(recipe.windows) and all(
            stage.tokens_out < stage.tokens_in for stage in schedule.stages
        )
        assert all(stage.discard_ratio == 0.5 for stage in schedule.stages) or percent > 75


@pytest.mark.parametrize(("keep", "layers"), [(0.55, (13, 23, 31)), (0.575, (15, 23, 31)), (0.606, (17, 24, 31))])
def test_the_authors_schedules_are_preferred(keep: float, layers: tuple[int, ...]) -> None:
    schedule = schedule_from_keep(load_recipe("llava-1.5-13b"), keep)
    assert tuple(stage.layer for stage in schedule.stages) == layers


def test_a_recipe_schedule_that_another_image_size_disables_is_solved_anew() -> None:
    schedule = schedule_from_keep(load_recipe("llava-1.5-7b"), 0.574, vision_tokens=64)
    assert [stage.windows_per_side for stage in schedule.stages] == [2, 2, 1]  # as many windows as the skip rule allows
    assert abs(schedule.keep - 0.574) <= 0.01


def test_keep_one_has_no_stages() -> None:
    assert schedule_from_keep(load_recipe("tiny-llava"), 1.0) == Schedule(1.0, 12, 576, ())


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, 55, math.nan, math.inf])
def test_keep_is_a_share(keep: float) -> None:
    with pytest.raises(UserError, match="(?s)keep is .*expected: .*to do: write 55 % as --keep 0.55"):
        schedule_from_keep(load_recipe("tiny-llava"), keep)


def test_unreachable_keep_names_the_range_and_its_stages() -> None:
    with pytest.raises(UserError) as caught:
        schedule_from_keep(load_recipe("tiny-llava"), 0.15)
    message = str(caught.value)
    assert "from 0.387 (--stage 2:4:0.5 --stage 3:2:0.5 --stage 4:1:0.5) to 0.998 (--stage 10:4:0.05)" in message
    assert "--keep 0.387" in message
    assert schedule_from_keep(load_recipe("tiny-llava"), 0.387).keep == pytest.approx(0.387, abs=0.01)


def test_no_stage_fits() -> None:
    for num_layers, tokens in ((3, 576), (12, 7)):
        with pytest.raises(UserError, match="(?s)out of reach.*expected: at least 4 layers and 8 vision tokens"):
            solve(num_layers, tokens, (4, 2, 1), 0.5)


# Text tokens are 45 throughout, within the paper's "41 to 45"; below 44 the 13B LightKV cache is off by > 2 %.
# Tolerances are relative to the table's rounded figures: KV 2 %, FLOPs 6 % (LLaVA-1.5) and 8 % (LLaVA-NeXT).
PAPER = [
    ("llava-1.5-7b", 0.574, 0.06, (10.2, 0.35), (6.6, 0.23)),
    ("llava-1.5-13b", 0.575, 0.06, (19.4, 0.55), (12.6, 0.37)),
    ("llava-next-vicuna-7b", 0.574, 0.08, (34.8, 1.12), (22.3, 0.67)),
    ("llava-next-vicuna-13b", 0.575, 0.08, (65.0, 1.75), (37.3, 1.05)),
]


@pytest.mark.parametrize(("name", "keep", "tolerance", "vanilla", "lightkv"), PAPER)
def test_the_papers_table(
    name: str, keep: float, tolerance: float, vanilla: tuple[float, float], lightkv: tuple[float, float]
) -> None:
    recipe = load_recipe(name)
    result = plan(recipe, schedule_from_stages(*_arguments(recipe, keep)), Request(text_tokens=45, new_tokens=100))
    assert result.flops_vanilla.total / 1e12 == pytest.approx(vanilla[0], rel=tolerance)
    assert result.flops.total / 1e12 == pytest.approx(lightkv[0], rel=tolerance)
    assert result.kv_bytes_vanilla / 2**30 == pytest.approx(vanilla[1], rel=0.02)
    assert result.kv_bytes / 2**30 == pytest.approx(lightkv[1], rel=0.02)


def _arguments(recipe, keep: float):
    return recipe.shape.text.layers, recipe.shape.vision.tokens, recipe.schedules[keep]


def test_other_sizes_keep_the_layers_of_the_first() -> None:
    recipe = load_recipe("llava-next-vicuna-7b")
    for keep in (0.75, 0.574, 0.55, 0.4):
        first = schedule_from_keep(recipe, keep)
        for tokens in (2160, 2340, 2928, 1176, 400, 64):
            other = schedule_from_other(recipe, first, tokens)
            assert (other.vision_tokens, other.requested) == (tokens, keep)
            assert abs(other.keep - keep) <= KEEP_TOLERANCE
            if tokens > 1000:
                assert [stage.layer for stage in other.stages] == [stage.layer for stage in first.stages]
    assert [stage.windows_per_side for stage in other.stages] == [2, 2, 1], "as many as 64 tokens allow"
    assert schedule_from_other(recipe, schedule_from_keep(recipe, 1.0), 64) == Schedule(1.0, 32, 64, ())
    with pytest.raises(UserError, match="keep 0.4 is out of reach with 32 layers and 9 vision tokens"):
        schedule_from_other(recipe, first, 9)
    given = schedule_from_stages(32, 2144, [StageSpec(4, 6, 0.5)])
    assert schedule_from_other(recipe, given, 2160).stages[0].spec == StageSpec(4, 6, 0.5)
    with pytest.raises(UserError, match="would do nothing"):
        schedule_from_other(recipe, given, 64)


def test_cache_bytes_are_rows_times_row_size() -> None:
    recipe = load_recipe("llava-next-mistral-7b")  # 8 KV heads of 128
    schedule = schedule_from_keep(recipe, 0.5)
    request = Request(text_tokens=20, new_tokens=7, batch=3, images=2, kv_bytes_per_element=4)
    result = plan(recipe, schedule, request)
    expected = [3 * (2 * count + 20 + 7) * 2 * 8 * 128 * 4 for count in schedule.vision_tokens_per_layer]
    assert list(result.kv_bytes_per_layer) == expected and result.kv_bytes == sum(expected)
    assert result.kv_bytes_vanilla == 32 * 3 * (2 * 2144 + 27) * 2 * 8 * 128 * 4


def test_every_unit_of_an_image_counts() -> None:
    recipe = load_recipe("llava-1.5-7b")
    vision = replace(recipe.shape.vision, tokens=64, units=3)
    tiled = replace(recipe, shape=replace(recipe.shape, vision=vision))
    schedule = schedule_from_stages(32, 64, [StageSpec(12, 2, 0.5)])
    result = plan(tiled, schedule, Request(text_tokens=20, new_tokens=0, images=2))
    rows = [2 * 3 * count + 20 for count in schedule.vision_tokens_per_layer]
    assert result.kv_bytes == sum(rows) * 2 * 32 * 128 * 2
    assert result.flops.prefill == sum(flops.prefill_layer_flops(tiled.shape.text, count) for count in rows)
    members = [len(window) for window in window_members(64, 2)]
    merge = 6 * flops.merge_flops(tiled.shape.text, members)
    assert result.flops.stages == flops.importance_flops(tiled.shape.text, rows[0], 20) + merge


def test_cache_share_without_text_is_the_keep() -> None:
    recipe = load_recipe("tiny-llava")
    schedule = schedule_from_keep(recipe, 0.55)
    result = plan(recipe, schedule, Request(text_tokens=0, new_tokens=0))
    assert result.kv_bytes / result.kv_bytes_vanilla == schedule.keep


def test_flops_by_hand() -> None:
    text = TextShape(layers=2, hidden=6, heads=3, kv_heads=1, head_dim=4, intermediate=10, vocab=11)
    weights = 6 * 12 + 6 * 4 + 6 * 4 + 12 * 6 + 3 * 6 * 10  # q, k, v, o, MLP
    assert flops.prefill_layer_flops(text, 5) == 2 * (5 * weights + 2 * 5 * 5 * 12)
    steps = [2 * (weights + 2 * columns * 12) for columns in (6, 7, 8)]  # 5 cached, the new token attends to itself
    assert flops.decode_layer_flops(text, 5, 3) == sum(steps)
    assert flops.lm_head_flops(text, 4) == 2 * 4 * 6 * 11
    assert flops.importance_flops(text, 9, 2) == 2 * 9 * 2 * 12
    assert flops.merge_flops(text, [5, 4]) == 2 * 2 * (3 * 2 + 2 * 2) * 6


def test_vision_flops_by_hand() -> None:
    vision = VisionShape(
        tokens=576,
        tiles=1,
        encoder_tokens=577,
        layers=3,
        hidden=128,
        intermediate=512,
        patch_size=4,
        image_size=96,
        projector_hidden=192,
    )
    layer = 577 * (4 * 128**2 + 2 * 128 * 512) + 2 * 577 * 577 * 128
    assert flops.vision_flops(vision) == 2 * (576 * 3 * 16 * 128 + 3 * layer)
    qwen = load_recipe("qwen2.5-vl-7b").shape.vision
    layers = 32 * 2304 * (4 * 1280**2 + 3 * 1280 * 3420) + 2 * 2304 * 1280 * (4 * 2304 + 28 * 64)
    assert flops.vision_flops(qwen) == 2 * (2304 * 6 * 196 * 1280 + layers)
    assert flops.projector_flops(load_recipe("qwen2.5-vl-7b").shape) == 2 * 576 * 5120 * (5120 + 3584)


def test_batch_and_images_multiply() -> None:
    recipe = load_recipe("llava-next-vicuna-7b")
    schedule = schedule_from_keep(recipe, 0.5)
    one = plan(recipe, schedule, Request())
    assert plan(recipe, schedule, Request(batch=4)).flops.total == 4 * one.flops.total
    two_images = plan(recipe, schedule, Request(images=2)).flops
    assert two_images.vision == 2 * one.flops.vision and two_images.total > one.flops.total
    text_only = plan(recipe, schedule, Request(images=0))
    assert text_only.flops == text_only.flops_vanilla and text_only.kv_bytes == text_only.kv_bytes_vanilla


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"text_tokens": -1}, {"new_tokens": -1}, {"images": -1}])
def test_request_that_makes_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="(?s) is -?[01].*expected: at least [01].*to do: set --"):
        Request(**wrong)
