"""Layouts, positions, caches and buffers: small parts against obvious oracles."""

from __future__ import annotations

import numpy as np
import pytest

from lightkv_export.errors import BackendError, BundleError, UserError
from lightkv_export.manifest import Graph, Tensor
from lightkv_export.runtime.backend import Buffer, cast, from_float32, open_backend, to_float32
from lightkv_export.runtime.cache import BLOCK, SegmentCache
from lightkv_export.runtime.layout import Layout
from lightkv_export.runtime.ort import OrtBackend, _check_version
from lightkv_export.runtime.positions import chunk_positions, position_ids
from lightkv_export.runtime.tokens import Tokens


@pytest.mark.parametrize("images", [(0,), (3,), (2, 8), (1, 7, 20)])
def test_layout_after_a_stage_is_the_sequence_without_what_was_merged_away(images):
    tokens, after, length = 6, 4, 30
    layout = Layout.uncompressed(length, images, tokens)
    kept = np.sort(np.stack([np.random.default_rng(i).permutation(tokens)[:after] for i in images]), axis=1)
    merged = layout.merged(kept)
    lost = {
        start + place for start, row in zip(images, kept, strict=True) for place in range(tokens) if place not in row
    }
    np.testing.assert_array_equal(merged.survivors, [place for place in range(length) if place not in lost])
    text = [place for place in range(length) if not any(start <= place < start + tokens for start in images)]
    np.testing.assert_array_equal(layout.text_index, text)
    np.testing.assert_array_equal(merged.survivors[merged.text_index], text)
    for start, row, new_start in zip(images, kept, merged.images, strict=True):
        np.testing.assert_array_equal(merged.survivors[new_start : new_start + after], start + row)
    again = merged.merged(np.tile([0, 3], (len(images), 1)))
    left = np.sort(np.concatenate([merged.text_index, merged.vision_index[:, [0, 3]].ravel()]))
    np.testing.assert_array_equal(again.survivors, merged.survivors[left])


def test_positions_by_policy():
    survivors = np.array([0, 2, 3, 7])
    assert chunk_positions("restart", 100, 60, survivors).tolist() == [100, 101, 102, 103]
    assert chunk_positions("original", 100, 60, survivors).tolist() == [100, 102, 103, 107]
    assert chunk_positions("contiguous", 100, 60, survivors).tolist() == [60, 61, 62, 63]
    assert position_ids("1d", survivors).shape == (1, 4)
    with pytest.raises(BundleError, match="random"):
        chunk_positions("random", 0, 0, survivors)
    with pytest.raises(BundleError, match="mrope"):
        position_ids("mrope", survivors)


def test_tokens_know_their_images():
    tokens = Tokens.of([1, 9, 9, 5, 9, 9, 6], image_token_id=9, image_tokens=2, serials=(4, 7))
    assert tokens.keys.tolist() == [1, -5, -5, 5, -8, -8, 6]
    assert tokens.images == (1, 4) and tokens.serials == (4, 7)
    rest = tokens.part(2)
    assert rest.images == (2,) and rest.serials == (4, 7) and rest.places.tolist() == [1, -1, 0, 1, -1]


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
