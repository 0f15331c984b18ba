"""Layouts, positions, caches and buffers: small parts against obvious oracles."""

from __future__ import annotations

import numpy as np
import pytest

from lightkv_export.errors import BackendError, BundleError, UserError
from lightkv_export.manifest import Graph, Size, Tensor
from lightkv_export.runtime.backend import Buffer, cast, from_float32, open_backend, to_float32
from lightkv_export.runtime.cache import BLOCK, SegmentCache
from lightkv_export.runtime.layout import Layout, Unit
from lightkv_export.runtime.ort import OrtBackend, _check_version
from lightkv_export.runtime.positions import chunk_positions
from lightkv_export.runtime.tokens import ShownImage, Tokens
from lightkv_export.runtime.vision import output_shape, symbol_values


@pytest.mark.parametrize(
    "spans", [[(0, 6)], [(3, 6)], [(2, 6), (8, 6)], [(1, 4), (7, 6), (20, 4)], [(0, 6), (6, 4), (10, 6), (24, 6)]]
)
@pytest.mark.parametrize("merging", [{6}, {4, 6}])
def test_layout_after_a_stage_is_the_sequence_without_what_was_merged_away(spans, merging):
    length, random = 30, np.random.default_rng(len(spans))
    layout = Layout(length, tuple(Unit(start, tokens, tokens) for start, tokens in spans), np.arange(length))
    kept = {
        number: np.sort(random.permutation(tokens)[: tokens - 2])
        for number, (_, tokens) in enumerate(spans)
        if tokens in merging
    }
    merged = layout.merged(kept)
    lost = {spans[n][0] + place for n, row in kept.items() for place in range(spans[n][1]) if place not in row}
    np.testing.assert_array_equal(merged.survivors, [place for place in range(length) if place not in lost])
    text = [place for place in range(length) if not any(start <= place < start + n for start, n in spans)]
    np.testing.assert_array_equal(layout.text_index, text)
    np.testing.assert_array_equal(merged.survivors[merged.text_index], text)
    for number, (start, tokens) in enumerate(spans):
        left, unit = start + kept.get(number, np.arange(tokens)), merged.units[number]
        assert unit.whole == tokens
        np.testing.assert_array_equal(merged.survivors[merged.vision_index([number])[0]], left)
    by_kind = np.concatenate([merged.text_index, *(unit.places for unit in merged.units)])
    np.testing.assert_array_equal(by_kind[merged.order], np.arange(merged.length))
    again = merged.merged({number: np.array([1]) for number in kept})
    units = [unit.places[1:2] if number in kept else unit.places for number, unit in enumerate(merged.units)]
    left = np.sort(np.concatenate([merged.text_index, *units]))
    np.testing.assert_array_equal(again.survivors, merged.survivors[left])


def test_layout_of_a_chunk_that_cuts_units():
    size = Size(8, 16, 3, 2, "<image><image>", {})
    tokens = Tokens.of([1, 9, 9, 9, 9, 9, 9, 5], 9, [ShownImage(0, size)])
    assert Layout.of(tokens).units == (Unit(1, 3, 3), Unit(4, 3, 3))
    assert Layout.of(tokens.part(2, 6)).units == (Unit(0, 2, 3), Unit(2, 2, 3))
    assert Layout.of(tokens.part(7)).units == ()


def test_positions_by_policy():
    survivors = np.array([0, 2, 3, 7])
    assert chunk_positions("restart", 100, 60, survivors).tolist() == [100, 101, 102, 103]
    assert chunk_positions("original", 100, 60, survivors).tolist() == [100, 102, 103, 107]
    assert chunk_positions("contiguous", 100, 60, survivors).tolist() == [60, 61, 62, 63]
    with pytest.raises(BundleError, match="random"):
        chunk_positions("random", 0, 0, survivors)


def test_tokens_know_their_images():
    small, large = Size(8, 8, 2, 1, "<image>", {}), Size(16, 8, 3, 1, "<image>", {})
    images = [ShownImage(4, small), ShownImage(7, large)]
    tokens = Tokens.of([1, 9, 9, 5, 9, 9, 9, 6], image_token_id=9, images=images)
    assert tokens.keys.tolist() == [1, -5, -5, 5, -8, -8, -8, 6]
    assert tokens.vision_counts == {2: 2, 3: 3} and tokens.serials == (4, 7) and tokens.positions is None
    rest = tokens.part(2)
    assert (
        rest.serials == (4, 7) and rest.places.tolist() == [1, -1, 0, 1, 2, -1] and rest.vision_counts == {2: 1, 3: 3}
    )
    assert tokens.then(9).serials == () and tokens.then(9).ids.tolist() == [9], "a model may say the image token"


def test_mrope_positions_go_on_after_an_image():
    size = Size(8, 8, 4, 1, "<image>", {}, "t", advance=2)
    table = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    images = [ShownImage(serial, size, table) for serial in (0, 1)]
    tokens = Tokens.of([1, 9, 9, 9, 9, 9, 9, 9, 9, 5, 6], 9, images, mrope=True)
    assert tokens.positions.tolist() == [
        [0, 1, 1, 1, 1, 3, 3, 3, 3, 5, 6],
        [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6],
        [0, 1, 2, 1, 2, 3, 4, 3, 4, 5, 6],
    ]
    assert tokens.part(3, 6).positions.tolist() == [[1, 1, 3], [2, 2, 3], [1, 2, 3]]
    assert tokens.then(7).then(8).positions.tolist() == [[8]] * 3
    assert Tokens.of([1, 2], 9, mrope=True).positions.tolist() == [[0, 1]] * 3


def test_shapes_of_the_vision_graph_follow_from_its_inputs():
    tensors = (Tensor("pixel_values", "float32", ("4*G", 3)), Tensor("index", "int64", ("G",)))
    graph = Graph("vision", "v.onnx", "vision", tensors, ())
    values = symbol_values(graph, {"pixel_values": np.zeros((8, 3)), "index": np.zeros(2)})
    assert values == {"G": 2}
    assert output_shape(Tensor("image_features", "float32", ("G", 5)), values, 10) == (2, 5)
    assert output_shape(Tensor("image_features", "float32", (1, "R", 5)), values, 35) == (1, 7, 5)
    for shape, elements in ((("G", 5), 11), (("R", 5), 11), (("R", "Q"), 10), (("2 G", 5), 10)):
        with pytest.raises(BundleError, match="vision graph"):
            output_shape(Tensor("image_features", "float32", shape), values, elements)
    for pixels, index in (((7, 3), 2), ((8, 4), 2), ((8, 3), 3), ((8,), 2)):
        with pytest.raises(BundleError, match="preprocessing gives"):
            symbol_values(graph, {"pixel_values": np.zeros(pixels), "index": np.zeros(index)})


def segment(rows: int | str = "C", dtype: str = "float32") -> Graph:
    names = [f"{kind}_cache_{layer}" for layer in (2, 3) for kind in ("key", "value")]
    return Graph("s", "s.onnx", "segment", tuple(Tensor(name, dtype, (1, 1, rows, 4)) for name in names), (), (2, 4))


@pytest.fixture
def backend(tmp_path):
    return OrtBackend(tmp_path)


def test_views_follow_the_fill_in_blocks_and_share_memory(backend):
    cache = SegmentCache(backend, segment(), 150, "scatter")
    assert cache.nbytes == 4 * 150 * 4 * 4 and cache.layer_bytes(10) == [2 * 10 * 4 * 4] * 2
    inputs, outputs = cache.bindings(0, 10)
    assert inputs["key_cache_2"].shape == (1, 1, BLOCK, 4) and list(outputs) == [f"{name}_out" for name in inputs]
    assert all(outputs[f"{name}_out"] == buffer for name, buffer in inputs.items())
    assert cache.bindings(BLOCK - 1, 1)[0] is inputs, "the same views, so nothing is bound anew"
    grown = cache.bindings(BLOCK, 1)[0]["key_cache_2"]
    assert grown.shape == (1, 1, 2 * BLOCK, 4) and grown.ptr == inputs["key_cache_2"].ptr
    assert cache.bindings(149, 1)[0]["key_cache_2"].shape == (1, 1, 150, 4), "capped at the capacity"
    with pytest.raises(BackendError, match="row 151"):
        cache.bindings(150, 1)


def test_append_protocol_binds_new_rows_where_they_belong(backend):
    cache = SegmentCache(backend, segment(), 150, "append")
    inputs, outputs = cache.bindings(0, 10)
    assert inputs["value_cache_3"].shape == (1, 1, BLOCK, 4)
    start = outputs["value_new_3"].ptr
    assert outputs["value_new_3"].shape == (1, 1, 10, 4)
    assert inputs["value_cache_3"].ptr >= start + 10 * 4 * 4  # of an empty past, any rows but those that are written
    inputs, outputs = cache.bindings(70, 1)
    assert inputs["value_cache_3"].ptr == start
    assert inputs["value_cache_3"].shape == (1, 1, 2 * BLOCK, 4)
    assert outputs["value_new_3"].ptr == inputs["value_cache_3"].ptr + 70 * 4 * 4


def test_a_static_cache_is_bound_whole(backend):
    cache = SegmentCache(backend, segment(rows=512), 150, "scatter")
    assert cache.capacity == 512 and cache.bindings(3, 1)[0]["key_cache_2"].shape == (1, 1, 512, 4)


def test_reserved_caches_take_no_memory_until_written(backend):
    psutil = pytest.importorskip("psutil")
    before = psutil.Process().memory_info().rss
    buffer = backend.zeros("float16", (1, 1, 100_000, 4096))
    assert buffer.nbytes == 819_200_000
    backend.write(buffer.rows(5, 6), np.ones((1, 1, 1, 4096), np.float16))
    assert backend.read(buffer.rows(4, 7))[0, 0, :, 0].tolist() == [0, 1, 0]
    assert psutil.Process().memory_info().rss - before < 50_000_000


def test_bfloat16_rounds_to_nearest_even():
    torch = pytest.importorskip("torch")
    special = [0, -0.0, np.inf, -np.inf, 1e-40, 3.4e38]
    values = np.append(np.random.default_rng(0).normal(size=1000), special).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    words = from_float32(values, "bfloat16")
    np.testing.assert_array_equal(words, expected.view(torch.uint16).numpy())
    np.testing.assert_array_equal(to_float32(words, "bfloat16"), expected.float().numpy())
    assert np.isnan(to_float32(from_float32(np.array([np.nan], np.float32), "bfloat16"), "bfloat16")).all()
    assert cast(words, "bfloat16", "bfloat16") is words


def test_buffers_refuse_what_does_not_fit(backend):
    buffer = backend.empty("float32", (2, 3))
    assert isinstance(buffer, Buffer) and buffer.nbytes == 24
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float64)):
        with pytest.raises(BackendError, match="does not fit"):
            backend.write(buffer, wrong)


def test_backends_are_chosen_by_name(tmp_path):
    for arguments, message in (
        (("tpu", "cpu", None), "tpu"),
        (("ort", "npu", None), "npu"),
        (("ort", "cpu", 0), "threads is 0"),
    ):
        name, device, threads = arguments
        with pytest.raises(UserError, match=message):
            open_backend(name, tmp_path, device, threads)
    with pytest.raises(BackendError, match=r"1\.24\.0 is too old"):
        _check_version("1.24.0", "modern")
    _check_version("1.28.0rc1", "modern")
    _check_version("1.23.2", "portable")


def test_a_graph_that_cannot_be_loaded_is_a_backend_error(backend, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"bad\.onnx"):
        backend.load(Graph("bad", "bad.onnx", "vision", (), ()))
