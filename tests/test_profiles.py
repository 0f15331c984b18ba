"""What engines are to accept, in integers: ranges of every axis over the sizes of a bundle, capacities, finer cuts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from toy_model import ToyModel

from lightkv_export.build import vision_shapes
from lightkv_export.bundle import Bundle, open_bundle
from lightkv_export.engines.cuts import finer_cuts
from lightkv_export.engines.profiles import EnginePlan, Limits, plan_engines
from lightkv_export.errors import UserError
from lightkv_export.fit import BUILD_COPIES, BUILD_FIXED
from lightkv_export.manifest import Graph, Keep, KeepPlan, Manifest, Preprocess, Size, Tensor
from lightkv_export.recipe import TextShape

GIB = 1 << 30
PIXELS = {"pixel_values": ((1, 3, 8, 8),)}  # of the toy model's one size


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy model in both cache protocols: 3 layers, a stage after the second that keeps 8 of 16 tokens."""
    root = tmp_path_factory.mktemp("toys")
    return {name: ToyModel().bundle(root / name, name, "float16").path for name in ("scatter", "append")}


def manifest_of(root: Path) -> Manifest:
    return open_bundle(root, verify=False).manifest


def plans(manifest: Manifest, *keeps: float, chunk: int = 200, profiles: int = 1) -> dict[str, EnginePlan]:
    chosen = tuple(manifest.keep_named(keep) for keep in keeps)
    limits = Limits.of(manifest, None, chunk)
    return {p.graph: p for p in plan_engines(manifest, chosen, limits, PIXELS, profiles)}


def test_scatter_engines_hold_what_their_keeps_leave(toys: dict[str, Path]) -> None:
    manifest = manifest_of(toys["scatter"])  # 400 tokens at most, 16 of an image
    compressed, both = plans(manifest, 0.83), plans(manifest, 1.0, 0.83)
    assert [compressed[name].capacity for name in ("segment_0", "segment_1")] == [400, 392]
    assert [both[name].capacity for name in ("segment_0", "segment_1")] == [400, 400]
    (profile,) = compressed["segment_1"].profiles
    assert profile["hidden"] == ((1, 1, 8), (1, 80, 8), (1, 200, 8))
    assert profile.keys() == {"hidden", "position_ids"}  # the caches are static


def test_append_engines_take_views_of_any_length(toys: dict[str, Path]) -> None:
    decode, prefill = plans(manifest_of(toys["append"]), 0.83, profiles=2)["segment_1"].profiles
    assert decode["hidden"] == ((1, 1, 8),) * 3
    assert decode["key_cache_2"] == ((1, 1, 1, 8), (1, 1, 80, 8), (1, 1, 400, 8))
    assert prefill["key_cache_2"] == ((1, 1, 1, 8), (1, 1, 64, 8), (1, 1, 400, 8))
    assert prefill["position_ids"] == ((1, 1), (1, 80), (1, 200))


def test_stages_and_vision_have_their_own_ranges(toys: dict[str, Path]) -> None:
    found = plans(manifest_of(toys["append"]), 1.0, 0.83)
    assert found["vision"].profiles == ({"pixel_values": ((1, 3, 8, 8),) * 3},)
    (profile,) = found["stage_v16_w1_r0.5"].profiles
    assert profile["vision_index"] == ((1, 16), (1, 16), (3, 16))
    assert profile["text_index"] == ((1,), (64,), (184,))
    assert profile["hidden"] == ((1, 17, 8), (1, 80, 8), (1, 200, 8))
    assert profile["order"] == ((9,), (72,), (192,))
    assert "stage_v16_w1_r0.5" not in plans(manifest_of(toys["append"]), 1.0)


def test_the_vision_graph_is_given_these_shapes(toys: dict[str, Path], tmp_path: Path) -> None:
    assert vision_shapes(open_bundle(toys["append"])) == PIXELS
    tables = {"rows": np.zeros((24, 2), np.int64), "positions": np.zeros((3, 6), np.int64)}
    (tmp_path / "sizes").mkdir()
    np.savez(tmp_path / "sizes/16x24.npz", **tables)
    geometry = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 1, "resize": [16, 24]}
    size = Size(16, 24, 6, 1, "<image>", geometry, "sizes/16x24.npz", 3)
    inputs = (Tensor("pixel_values", "float32", ("4*G", 48)), Tensor("rows", "int64", ("4*G", 2)))
    manifest = replace(
        manifest_of(toys["append"]),
        sizes=(size,),
        preprocess=Preprocess("patches", {"resample": 3, "image_mean": [0] * 3, "image_std": [1] * 3}),
        graphs=(Graph("vision", "vision.onnx", "vision", inputs, ()),),
    )
    assert vision_shapes(Bundle(tmp_path, manifest)) == {"pixel_values": ((24, 48),), "rows": ((24, 2),)}


def test_ranges_hold_every_size(toys: dict[str, Path]) -> None:
    toy = manifest_of(toys["append"])
    sizes = (Size(8, 8, 16, 1, "<image>", {}), Size(16, 24, 6, 3, "<image>" * 3, {}))
    (stage,) = toy.keep_named(0.83).stages
    short = replace(stage, tokens_in=6, tokens_out=4, graph="stage_v6")
    keeps = (
        Keep(1.0, (KeepPlan(16, 1.0, (), (16,) * 3), KeepPlan(6, 1.0, (), (6,) * 3))),
        Keep(0.83, (KeepPlan(16, 5 / 6, (stage,), (16, 16, 8)), KeepPlan(6, 8 / 9, (short,), (6, 6, 4)))),
    )
    vision = Graph("vision", "v", "vision", (Tensor("pixel_values", "float32", ("N", 3, 8, 8)), FIXED), ())
    others = [graph for graph in toy.graphs if graph.role != "vision"]
    named = replace(next(graph for graph in others if graph.role == "stage"), name="stage_v6")
    taken = tuple(
        replace(tensor, shape=tuple(6 if axis == 16 else axis for axis in tensor.shape)) for tensor in named.inputs
    )
    segments = [_deepstack(graph) for graph in others]
    manifest = replace(
        toy,
        sizes=sizes,
        keeps=keeps,
        cache_protocol="scatter",
        graphs=(vision, *segments, replace(named, inputs=taken)),
    )
    shapes = {"pixel_values": ((1, 3, 8, 8), (3, 3, 8, 8)), "seed": ((2, 2), (2, 2))}
    limits = Limits.of(manifest, None, None)
    assert limits.chunk == 400 and Limits.of(manifest, 300, 100).chunk == 100
    with pytest.raises(UserError, match="(?s)18.*expected: 19 .an image of the largest size"):
        Limits.of(manifest, None, 18)
    found = {p.graph: p for p in plan_engines(manifest, manifest.keeps[1:], replace(limits, chunk=200), shapes)}
    assert found["vision"].profiles == ({"pixel_values": ((1, 3, 8, 8), (1, 3, 8, 8), (3, 3, 8, 8))},)
    # 16 - 8 rows of the first size are merged, 3 * (6 - 4) of the second: the least decides
    assert [found[name].capacity for name in ("segment_0", "segment_1")] == [400, 394]
    assert found["segment_0"].profiles[0]["deepstack_0"] == found["segment_0"].profiles[0]["hidden"]
    (profile,) = found["stage_v6"].profiles
    assert profile["vision_index"] == ((1, 6), (3, 6), (9, 6))  # 3 units of an image, 3 images
    assert profile["text_index"] == ((1,), (64,), (194,))
    assert profile["hidden"] == ((1, 7, 8), (1, 82, 8), (1, 200, 8))
    (profile,) = found["stage_v16_w1_r0.5"].profiles
    assert profile["vision_index"] == ((1, 16), (1, 16), (3, 16))


def test_a_stage_graph_that_units_of_two_lengths_share(toys: dict[str, Path]) -> None:
    """Units of 16 tokens have 8 left when others of 8 come in: one graph, of which the ranges hold both."""
    toy = manifest_of(toys["append"])
    (first,) = toy.keep_named(0.83).stages
    second = replace(first, layer=2, tokens_in=8, tokens_out=4, graph="stage_v8")
    graph = next(graph for graph in toy.graphs if graph.name == first.graph)
    eight = tuple(
        replace(tensor, shape=tuple(8 if axis == 16 else axis for axis in tensor.shape)) for tensor in graph.inputs
    )
    manifest = replace(
        toy,
        sizes=(Size(8, 8, 16, 1, "<image>", {}), Size(4, 8, 8, 2, "<image><image>", {})),
        graphs=(graph, replace(graph, name="stage_v8", inputs=eight)),
    )
    plans = (KeepPlan(16, 0.7, (first, second), (16, 8, 4)), KeepPlan(8, 0.8, (second,), (8, 8, 4)))
    for ordered in (plans, plans[::-1]):
        found = plan_engines(manifest, (Keep(0.7, ordered),), Limits(400, 200), {})
        shared = next(plan for plan in found if plan.graph == "stage_v8").profiles[0]
        assert [shared["vision_index"][place][0] for place in (0, 2)] == [1, 6]  # 3 images of 2 units
        assert [shared["text_index"][place][0] for place in (0, 2)] == [1, 192]
        assert [shared["hidden"][place][1] for place in (0, 2)] == [9, 200]


FIXED = Tensor("seed", "int64", (2, 2))


def _deepstack(graph: Graph) -> Graph:
    """The graph with DeepStack features beside its hidden states."""
    if graph.role != "segment" or graph.layers[0]:
        return graph
    return replace(graph, inputs=(*graph.inputs, Tensor("deepstack_0", "float16", (1, "S", 8))))


@pytest.mark.parametrize(
    ("longest", "chunk", "message"),
    [
        (None, 16, "--profile-tokens is 16\n.*17 .*to 400"),
        (None, 401, "--profile-tokens is 401"),
        (100, 101, "--profile-tokens is 101\n.*to 100"),
        (401, None, "--max-tokens is 401"),
    ],
)
def test_limits_that_do_not_fit_the_bundle(
    toys: dict[str, Path], longest: int | None, chunk: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Limits.of(manifest_of(toys["append"]), longest, chunk)


def test_segments_are_cut_until_their_engines_fit() -> None:
    text = TextShape(layers=8, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=100, vocab=500)
    layer = 2 * (2 * 64 * 16 * 6 + 3 * 64 * 100)
    head = 2 * 64 * 500
    room = BUILD_FIXED + BUILD_COPIES * (2 * layer + head)
    assert finer_cuts([0, 5, 8], text, 2, GIB) == ((0, 5), (5, 8))
    cuts = finer_cuts([0, 5, 8], text, 2, room)
    assert cuts[0][0] == 0 and cuts[-1][1] == 8 and all(a[1] == b[0] for a, b in pairwise(cuts))
    assert 5 in [first for first, _ in cuts]  # a stage's cut stays
    for first, last in cuts:
        weights = (last - first) * layer + (head if last == 8 else 0)
        assert BUILD_FIXED + BUILD_COPIES * weights <= room
    with pytest.raises(UserError, match="too little for one layer and the head\n.*at least 0.50 GiB"):
        finer_cuts([0, 8], text, 2, BUILD_FIXED + 1)
