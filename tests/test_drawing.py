"""Pictures of merges: how stages compose, the colours at known merges, and `lightkv inspect --save-merges`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from toy_model import IMAGE_SIZE, ToyModel
from toy_sizes import SizedToy

from lightkv_export.cli import main
from lightkv_export.drawing import (
    CELL,
    GAP,
    HEADER,
    LEGEND,
    TITLE,
    Merges,
    Row,
    Seen,
    draw_merges,
    follow_merges,
    seen_units,
    token_contents,
)
from lightkv_export.errors import UserError
from lightkv_export.manifest import Preprocess, Size
from lightkv_export.runtime.generation import StageTrace
from lightkv_export.runtime.importance import prompt_importance

RED, GREEN, BLUE, GREY = (250, 0, 0), (0, 250, 0), (0, 0, 250), (100, 100, 100)


def trace(layer: int, kept: list[int], target: list[int], importance: list[float]) -> StageTrace:
    return StageTrace(layer, *(np.array([row]) for row in (kept, target)), np.array([importance], np.float32))


# Four patches: 0 into 1 (one to three), then what is left of 0 and 1 into 3; patch 2 stays alone.
TRACES = (trace(2, [1, 2, 3], [0, 0, 1, 2], [1, 3, 5, 7]), trace(5, [1, 2], [1, 0, 1], [2, 9, 2]))


def test_stages_compose():
    first, second = follow_merges(TRACES)
    assert (first.layer, first.tokens_in, first.tokens_out) == (2, 4, 3)
    assert first.owner.tolist() == [1, 1, 2, 3] and first.before.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(first.weight, [0.25, 0.75, 1, 1])
    assert first.links == {(0, 1)} and first.survivors.tolist() == [False, True, True, True]
    assert (second.tokens_in, second.tokens_out) == (3, 2)
    assert second.owner.tolist() == [3, 3, 2, 3] and second.before.tolist() == [1, 1, 2, 3]
    np.testing.assert_allclose(second.weight, [0.125, 0.375, 1, 0.5])
    np.testing.assert_allclose(second.importance, [2, 2, 9, 2])
    assert second.links == {(1, 3)}, "patch 0 merged earlier"
    for stage in (first, second):
        np.testing.assert_allclose(np.bincount(stage.owner, stage.weight)[np.unique(stage.owner)], 1)


def picture(side: int = 2, size: int = 3) -> np.ndarray:
    colours = np.array([RED, GREEN, BLUE, GREY], np.uint8).reshape(side, side, 3)
    return np.kron(colours, np.ones((size, size, 1), np.uint8))


def test_patches_show_what_their_token_holds():
    first, second = follow_merges(TRACES)
    shown = token_contents(picture(), first, (2, 2))
    mean = 0.25 * np.array(RED) + 0.75 * np.array(GREEN)
    np.testing.assert_array_equal(shown[4, 1], BLUE)
    np.testing.assert_array_equal(shown[4, 4], GREY)
    np.testing.assert_allclose(shown[1, 4], mean, atol=1)
    np.testing.assert_allclose(shown[1, 1], 0.7 * mean + 0.3 * 255, atol=1)  # merged away: paler
    shown = token_contents(picture(), second, (2, 2))
    mean = 0.125 * np.array(RED) + 0.375 * np.array(GREEN) + 0.5 * np.array(GREY)
    np.testing.assert_allclose(shown[4, 4], mean, atol=1)
    np.testing.assert_allclose(shown[1, 4], 0.7 * mean + 0.3 * 255, atol=1)


def stages_of(owner: list[int]) -> tuple[Merges, ...]:
    places = np.arange(len(owner))
    kept = np.flatnonzero(np.array(owner) == places)
    target = np.searchsorted(kept, owner)
    return follow_merges([trace(3, kept.tolist(), target.tolist(), [1.0] * len(owner))])


def test_the_picture_is_the_same_every_time_and_marks_what_differs():
    seen = [Seen(picture(size=8), (2, 2))]
    rows = [Row("one?", "yes", (stages_of([1, 1, 2, 3]),)), Row("two?", "no", (stages_of([2, 1, 2, 3]),))]
    drawn = np.asarray(draw_merges(seen, rows))
    np.testing.assert_array_equal(drawn, np.asarray(draw_merges(seen, rows)))
    assert np.asarray(draw_merges(seen, rows[:1])).shape[0] < drawn.shape[0]
    top, left = GAP + HEADER + TITLE, GAP + 2 * CELL + GAP
    panels = [
        drawn[y : y + 2 * CELL, left : left + 2 * CELL].astype(int)
        for y in (top, top + 2 * CELL + HEADER + TITLE + GAP)
    ]
    middle = CELL // 2
    assert panels[0][middle, CELL].max() < 120, "a dark line from patch 0 to patch 1"
    assert panels[0][CELL, middle].min() > 120, "and none to patch 2"
    red, green, blue = panels[1][CELL - 2, middle]
    assert red > 200 > 100 > green and blue > 100, "a pink line from patch 0 to patch 2: unlike the first row"
    assert abs(panels[1][middle, CELL] - panels[1][middle - 4, CELL]).max() < 30, "no line to patch 1"
    outline, inside = panels[0][CELL, CELL + 3], panels[0][CELL + 4, CELL + 4]
    assert outline.min() > inside.max(), "the survivor is outlined"


def test_every_tile_has_its_own_rows():
    units = (stages_of([1, 1, 2, 3, 4, 5]), stages_of([0, 1, 2, 5, 4, 5]))
    one, two = Row("one?", "yes", units[:1]), Row("one?", "yes", units)
    tiles = [Seen(np.full((20, 30, 3), shade, np.uint8), (2, 3)) for shade in (50, 200)]
    whole, first = np.asarray(draw_merges(tiles, [two])), np.asarray(draw_merges(tiles[:1], [one]))
    height = HEADER + TITLE + 2 * CELL + GAP
    assert whole.shape == (first.shape[0] + height, GAP + 2 * (3 * CELL + GAP), 3)
    panel = slice(GAP + HEADER + TITLE, GAP + HEADER + TITLE + 2 * CELL)
    np.testing.assert_array_equal(whole[panel], first[panel])
    left = GAP + 3 * CELL + GAP
    assert whole[panel][CELL + 5, left + 5].max() < 60 and whole[panel.start + height + 5, left + 5].min() > 190


class FakeModel:
    """As much of a model as `seen_units` looks at."""

    def __init__(self, kind: str, size: Size, settings: dict | None = None) -> None:
        self.manifest = self
        self.preprocess, self.sizes = Preprocess(kind, settings or {}), (size,)


IMAGE = np.random.default_rng(1).integers(0, 256, (8, 16, 3), dtype=np.uint8)
TILES = {"tile": 8, "resize": [[16, 8]], "canvas": [16, 8], "overview": None}
SETTINGS = {"resample": 3, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def test_what_a_unit_shows():
    (seen,) = seen_units(
        FakeModel(
            "patches",
            Size(16, 8, 8, 1, "<i>", {"resize": [16, 8], "patch_size": 2, "merge_size": 2, "temporal_patch_size": 2}),
            SETTINGS,
        ),
        IMAGE,
    )
    np.testing.assert_array_equal(seen.picture, IMAGE)
    assert seen.grid == (2, 4)
    left, right = seen_units(FakeModel("tiles", Size(16, 8, 4, 2, "<i><i>", TILES), SETTINGS), IMAGE)
    np.testing.assert_array_equal(np.concatenate([left.picture, right.picture], axis=1), IMAGE)
    assert left.grid == right.grid == (2, 2)


def test_a_grid_is_needed():
    with pytest.raises(UserError, match="10 vision tokens of an image of 16x8 are 2 tiles and line breaks"):
        seen_units(FakeModel("tiles", Size(16, 8, 10, 1, "<i>", TILES), SETTINGS), IMAGE)
    with pytest.raises(UserError, match="5 vision tokens are no grid"):
        seen_units(FakeModel("tiles", Size(16, 8, 5, 2, "<i><i>", TILES), SETTINGS), IMAGE)


def test_importance_is_that_of_the_stages():
    torch = pytest.importorskip("torch")
    from lightkv_export.stages import importance

    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(9, 24)).astype(np.float32), rng.normal(size=(9, 12)).astype(np.float32)
    text = np.array([0, 7, 8])
    expected = importance(*(torch.from_numpy(x)[None] for x in (query, key)), torch.from_numpy(text), 6, 3)[0].numpy()
    np.testing.assert_allclose(prompt_importance(query, key, text, 6, 3), expected, rtol=1e-5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    shape = {"text": {"heads": 1, "kv_heads": 1}}
    return str(ToyModel().bundle(tmp_path_factory.mktemp("toy") / "bundle", model=shape).path)


def test_inspect_saves_the_picture(bundle, tmp_path, capsys):
    image = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, 12, 3), dtype=np.uint8)).save(image)
    out = tmp_path / "merges.png"
    arguments = ["inspect", bundle, "--image", str(image), "--save-merges", str(out), "--threads", "1"]
    prompts = ["--prompt", "What is it?", "--prompt", "Where?"]
    assert main([*arguments, *prompts, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prompts"][0]["stages"] == [{"layer": 1, "tokens_in": 16, "tokens_out": 8}]
    assert document["prompts"][1]["merges_unlike_first"] == [0], "the toy's stage merges alike for all prompts"
    first = out.read_bytes()
    with Image.open(out) as drawn:
        assert drawn.format == "PNG" and drawn.width == GAP + 2 * (4 * CELL + GAP)
    assert main([*arguments, *prompts]) == 0 and out.read_bytes() == first
    assert "saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "x.png"], "--image without --save-merges"),
        (["--save-merges", "x.png", "--prompt", "Hi"], "without an image and a prompt"),
        (["--save-merges", "x.png", "--prompt", "Hi", "--image", "none.png"], "does not exist"),
    ],
)
def test_mistakes_get_a_message(bundle, capsys, arguments, message):
    assert main(["inspect", bundle, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_tiles_of_a_bundle_with_sizes(tmp_path, capsys):
    """8 x 16 px: two tiles of 16 tokens, each merged on its own. 16 x 8 px: one unit of two tiles."""
    bundle = str(SizedToy().bundle(tmp_path / "sized", model={"text": {"heads": 1, "kv_heads": 1}}).path)
    for name, size in (("tall", (8, 16)), ("wide", (16, 8))):
        Image.new("RGB", size, (200, 50, 50)).save(tmp_path / f"{name}.png")
    words = ["--prompt", "Hi", "--keep", "0.83", "--save-merges", str(tmp_path / "out.png"), "--json", "--threads", "1"]
    assert main(["inspect", bundle, "--image", str(tmp_path / "tall.png"), *words]) == 0
    document = json.loads(capsys.readouterr().out)["prompts"][0]
    assert document["units"] == 2 and document["stages"][0]["tokens_in"] == 16
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.height == GAP + 2 * (HEADER + TITLE + 4 * CELL + GAP) + LEGEND
    assert main(["inspect", bundle, "--image", str(tmp_path / "wide.png"), *words]) == 2
    assert "24 vision tokens of an image of 16x8 are 2 tiles" in capsys.readouterr().out
    words[3] = "1"
    assert main(["inspect", bundle, "--image", str(tmp_path / "tall.png"), *words]) == 2
    assert "keep 1 merges nothing in an image of 8x16" in capsys.readouterr().out
