"""Image sizes at export: which of them are one to a model, and how other lengths of units are planned."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from lightkv_export.errors import UserError
from lightkv_export.export_plan import Cuts, plan_cuts
from lightkv_export.families import SizeLayout
from lightkv_export.recipe import StageSpec, load_recipe
from lightkv_export.sizes import layouts_of


class FakeFamily:
    """Lays every image out as rounded to whole cells of 100 px, with one table."""

    def default_sizes(self, config: dict) -> tuple[tuple[int, int], ...]:
        return (config["side"], config["side"]), (200, 100)

    def size(self, checkpoint: object, width: int, height: int) -> SizeLayout:
        grid = [-(-width // 100), -(-height // 100)]
        return SizeLayout(9, grid[0] * grid[1], "<image>", {"grid": sorted(grid)}, {"table": np.array(grid).sum()})


CHECKPOINT = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"side": 100}))
NO_SIZES = SimpleNamespace(image_sizes=())


def sizes_of(*asked: tuple[int, int], recipe: object = NO_SIZES) -> list[tuple[int, int]]:
    return list(layouts_of(FakeFamily(), CHECKPOINT, recipe, asked))


def test_what_is_asked_for_comes_before_the_recipe_and_the_family() -> None:
    listed = SimpleNamespace(image_sizes=((300, 100),))
    assert sizes_of() == [(100, 100), (200, 100)]
    assert sizes_of(recipe=listed) == [(300, 100)]
    assert sizes_of((400, 100), (100, 100), recipe=listed) == [(400, 100), (100, 100)]


def test_sizes_of_another_shape_stay_although_their_tiles_are_the_same() -> None:
    """Images are fitted by aspect ratio, so portrait and landscape are two sizes on the same grid of tiles."""
    assert sizes_of((400, 300), (300, 400), (400, 267)) == [(400, 300), (300, 400), (400, 267)]


@pytest.mark.parametrize("other", [(400, 300), (399, 299), (397, 298)])
def test_sizes_that_are_one_to_the_model(other: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"(?s)400x300 and .* are one to this model: 12 x 9.*leave \d+x\d+ out"):
        sizes_of((400, 300), other)


def test_all_sizes_are_cut_at_the_same_layers() -> None:
    recipe = load_recipe("llava-next-vicuna-7b")
    one, many = (
        plan_cuts(recipe, Cuts(keeps=(0.55, 0.4), tokens=tokens)) for tokens in ((2144,), (2144, 2160, 2340, 2928))
    )
    assert one.segments == many.segments and len(many.stages) == 4 * len(one.stages)
    assert [schedule.vision_tokens for schedule in many.schedules[1]] == [2144, 2160, 2340, 2928]
    with pytest.raises(UserError, match="(?s)images of 9 vision tokens: keep 0.4 .*or leave that image size out"):
        plan_cuts(recipe, Cuts(keeps=(0.4,), tokens=(2144, 9)))
    given = plan_cuts(recipe, Cuts(stages=(StageSpec(3, 2, 0.5),), tokens=(2144, 64)))
    assert [stage.tokens_in for stage in given.stages.values()] == [2144, 64]
