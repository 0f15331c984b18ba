"""The LightKV stage: golden vectors, a loop oracle on random sizes, ties, precision; its graph in ONNX and TensorRT."""

from __future__ import annotations

import collections
import functools
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from oracles import lightkv_importance, lightkv_merge, lightkv_stage_oracle, lightkv_windows  # noqa: E402

from lightkv_export.errors import UserError  # noqa: E402
from lightkv_export.schedule import Stage, tokens_after  # noqa: E402
from lightkv_export.stages import StageGraph, lightkv, lightkv_stage, merge_spans  # noqa: E402

GOLDEN = sorted((Path(__file__).parent / "data" / "golden").glob("*.npz"))
# Every one of these is in the documented operator list of TensorRT 10.0 to 11.
ALLOWED = {
    "Add", "And", "Cast", "Concat", "Constant", "Div", "Equal", "Gather", "GatherElements", "Greater", "Identity",
    "Less", "MatMul", "Mul", "Or", "Pad", "Range", "ReduceMax", "ReduceMin", "ReduceSum", "Reshape", "Shape", "Slice",
    "Softmax", "Sqrt", "Squeeze", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
HEADS, KV_HEADS, DEPTH, WIDTH = 4, 2, 8, 24


def inputs(batch: int, length: int, seed: int = 0, heads: int = HEADS, kv_heads: int = KV_HEADS) -> list[torch.Tensor]:
    """hidden, q, k with distinct random tokens; queries sharp enough that importances differ widely."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, WIDTH), (batch, heads, length, DEPTH), (batch, kv_heads, length, DEPTH))
    return [torch.randn(shape, generator=generator) * 1.5 for shape in shapes]


def rows(heads: torch.Tensor) -> torch.Tensor:
    """[B, H, S, d] -> [B, S, H * d], the layout of segments."""
    return heads.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_vectors(path: Path) -> None:
    case = {name: value if value.ndim == 0 else torch.from_numpy(value) for name, value in np.load(path).items()}
    merged = lightkv_stage(
        *(case[n] for n in ("hidden", "q", "k", "vision_spans", "windows_per_side", "discard_ratio"))
    )
    torch.testing.assert_close(merged, case["merged"], atol=1e-5, rtol=0)


def test_golden_vectors_are_there() -> None:
    assert len(GOLDEN) == 4


# batch, heads, kv_heads, length, spans, windows per side, ratio
CASES = {
    "one window": (1, 4, 4, 30, [(3, 27)], 1, 0.5),
    "uneven windows": (2, 4, 2, 60, [(5, 55)], 2, 0.5),
    "third of a ragged square": (1, 4, 1, 120, [(0, 110)], 3, 0.3),
    "quarter, four windows a side": (1, 2, 2, 150, [(4, 141)], 4, 0.25),
    "two images": (2, 4, 2, 110, [(2, 50), (60, 108)], 2, 0.5),
    "images of three sizes, one too small": (3, 2, 1, 130, [(1, 61), (61, 100), (105, 125)], 2, 0.3),
    "image at the end": (1, 2, 2, 40, [(8, 40)], 1, 0.5),
    "skip rule": (1, 2, 2, 50, [(4, 35)], 2, 0.5),
    "nothing to discard": (1, 2, 2, 30, [(4, 24)], 1, 0.0),
    "no image": (2, 2, 2, 12, [], 2, 0.5),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_oracle(case: tuple) -> None:
    batch, heads, kv_heads, length, spans, windows_per_side, ratio = case
    hidden, q, k = inputs(batch, length, heads=heads, kv_heads=kv_heads)
    merged = lightkv_stage(hidden, q, k, spans, windows_per_side, ratio)
    wanted = lightkv_stage_oracle(hidden.numpy(), q.numpy(), k.numpy(), spans, windows_per_side, ratio)
    assert merged.shape[1] == length - sum(e - s - tokens_after(e - s, windows_per_side, ratio) for s, e in spans)
    np.testing.assert_allclose(merged.numpy(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_random_sizes_equal_the_oracle(seed: int) -> None:
    dice = np.random.default_rng(seed)
    sizes = dice.integers(8, 90, dice.integers(1, 4))
    gaps = dice.integers(1, 6, len(sizes) + 1)
    starts = np.cumsum(gaps[:-1]) + np.cumsum(sizes) - sizes
    spans = np.stack([starts, starts + sizes], 1)
    windows_per_side, ratio = int(dice.integers(1, 5)), float(dice.choice([0.5, 0.3, 0.25, 0.4]))
    hidden, q, k = inputs(int(dice.integers(1, 4)), int(gaps.sum() + sizes.sum()), seed)
    merged = lightkv_stage(hidden, q, k, torch.from_numpy(spans), windows_per_side, ratio)
    wanted = lightkv_stage_oracle(hidden.numpy(), q.numpy(), k.numpy(), spans.tolist(), windows_per_side, ratio)
    np.testing.assert_allclose(merged.numpy(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [8, 31, 32, 100, 145, 288, 576, 577, 2144, 2880])
@pytest.mark.parametrize("windows_per_side", [1, 2, 4, 6])
def test_window_tables_follow_the_rule(tokens: int, windows_per_side: int) -> None:
    tables = lightkv.merge_tables(tokens, windows_per_side, 0.5)
    if tokens < 8 * windows_per_side**2:
        assert tables is None
        return
    windows = lightkv_windows(tokens, windows_per_side)
    assert [row[ok].tolist() for row, ok in zip(tables.a_index, tables.a_valid, strict=True)] == [
        w[0::2] for w in windows
    ]
    assert [row[ok].tolist() for row, ok in zip(tables.b_index, tables.b_valid, strict=True)] == [
        w[1::2] for w in windows
    ]
    assert tables.tokens_out == tokens_after(tokens, windows_per_side, 0.5)


def test_kept_and_target_equal_the_oracle() -> None:
    hidden, q, k = inputs(1, 130, seed=3)
    scores = lightkv.importance(rows(q), rows(k), torch.arange(122, 130), HEADS, KV_HEADS)[:, None, :122]
    merged, kept, target = lightkv.merge(hidden[:, None, :122], scores, 3, 0.4)
    wanted = lightkv_merge(hidden[0, :122].double().numpy(), scores[0, 0].tolist(), 3, 0.4)
    assert (kept.flatten().tolist(), target.flatten().tolist()) == wanted[1:]
    np.testing.assert_allclose(merged[0, 0].numpy(), np.array(wanted[0]), atol=1e-5)


@pytest.mark.parametrize(("tokens", "windows_per_side", "kinds"), [(40, 1, 3), (145, 2, 5), (90, 3, 1), (64, 2, 64)])
def test_ties_go_to_the_lowest_place(tokens: int, windows_per_side: int, kinds: int) -> None:
    """Tokens drawn from `kinds` different ones: nearly every similarity occurs many times."""
    dice = np.random.default_rng(kinds)
    # One nonzero value per token, a power of two: similarities are 0 or 1 exactly, in any order of summation.
    tokens_of = np.eye(64, WIDTH * 3)[dice.integers(0, kinds, tokens)] * 2.0 ** dice.integers(-3, 3, (tokens, 1))
    scores = dice.uniform(0.1, 2.0, tokens)
    wanted = lightkv_merge(tokens_of, scores.tolist(), windows_per_side, 0.3)
    tensors = torch.from_numpy(tokens_of).float()[None, None], torch.from_numpy(scores).float()[None, None]
    merged, kept, target = lightkv.merge(*tensors, windows_per_side, 0.3)
    assert (kept.flatten().tolist(), target.flatten().tolist()) == wanted[1:]
    np.testing.assert_allclose(merged[0, 0].numpy(), np.array(wanted[0]), atol=1e-5)


@pytest.mark.parametrize("tokens", range(8, 30))
def test_identical_tokens_of_any_value_tie(tokens: int) -> None:
    """Small windows are where matrix libraries round from column to column (stages/tables.py, MIN_PLACES)."""
    dice = np.random.default_rng(tokens)
    kinds = dice.integers(0, 3, tokens)
    for shift in (0, 3):  # A and B of the same three kinds, then of three kinds each
        values = np.float32(dice.standard_normal((6, 100)))[kinds + shift * (np.arange(tokens) % 2)]
        wanted = lightkv_merge(values.astype(np.float64), [1.0] * tokens, 1, 0.3)
        _, kept, target = lightkv.merge(torch.from_numpy(values)[None, None], torch.ones(1, 1, tokens), 1, 0.3)
        assert (kept.flatten().tolist(), target.flatten().tolist()) == wanted[1:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    hidden, q, k = (tensor.to(dtype) for tensor in inputs(2, 100))
    spans = [(4, 90)]
    merged = lightkv_stage(hidden, q, k, spans, 2, 0.5)
    wanted = lightkv_stage(hidden.float(), q.float(), k.float(), spans, 2, 0.5)
    assert merged.dtype == dtype
    assert torch.equal(merged, wanted.to(dtype))


def test_untouched_tokens_are_bit_identical() -> None:
    hidden, q, k = inputs(1, 100)
    scores = lightkv.importance(rows(q), rows(k), torch.arange(90, 100), HEADS, KV_HEADS)[:, None, :90]
    merged, kept, target = lightkv.merge(hidden[:, None, :90], scores, 2, 0.3)
    sources = collections.Counter(target.flatten().tolist())
    alone = torch.tensor([slot for slot in range(kept.shape[2]) if sources[slot] == 1])
    assert 0 < len(alone) < kept.shape[2]
    assert torch.equal(merged[0, 0, alone], hidden[0, kept[0, 0, alone]])


def test_no_importance_gives_zeros_not_nan() -> None:
    merged, _, _ = lightkv.merge(torch.randn(1, 1, 32, 8), torch.zeros(1, 1, 32), 1, 0.5)
    assert torch.isfinite(merged).all()


def test_the_oracle_rejects_a_wrong_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the softmax over keys instead of queries the comparison must fail: it would not prove much otherwise."""
    hidden, q, k = inputs(1, 60)

    def over_keys(query: torch.Tensor, key: torch.Tensor, text_index: torch.Tensor, heads: int, kv_heads: int):
        keys = key.unflatten(2, (kv_heads, -1)).repeat_interleave(heads // kv_heads, dim=2)
        scores = torch.einsum("bshd,bthd->bhst", query.unflatten(2, (heads, -1)), keys) * DEPTH**-0.5
        return scores.softmax(-1)[..., text_index].sum((1, 3))

    wanted = lightkv_stage_oracle(hidden.numpy(), q.numpy(), k.numpy(), [(5, 55)], 2, 0.5)
    np.testing.assert_allclose(lightkv_stage(hidden, q, k, [(5, 55)], 2, 0.5).numpy(), wanted, atol=1e-5)
    monkeypatch.setattr(lightkv, "importance", over_keys)
    assert np.abs(lightkv_stage(hidden, q, k, [(5, 55)], 2, 0.5).numpy() - wanted).max() > 1e-2


def test_importance_equals_the_oracle() -> None:
    _, q, k = inputs(1, 40, heads=6, kv_heads=2)
    text = [0, 1, 5, 30, 39]
    scores = lightkv.importance(rows(q), rows(k), torch.tensor(text), 6, 2)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(
        scores[0].numpy(), lightkv_importance(*(t[0].double().numpy() for t in (q, k)), text), rtol=1e-4
    )


@pytest.mark.parametrize("spans", [[(0, 30), (20, 40)], [(10, 5)], [(5, 51)], [(-3, 20)]])
def test_wrong_spans_are_named(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(UserError, match="vision span"):
        lightkv_stage(*inputs(1, 50), spans, 1, 0.5)


def test_wrong_settings_are_named() -> None:
    hidden, q, k = inputs(1, 50)
    with pytest.raises(UserError, match="windows_per_side 0"):
        lightkv_stage(hidden, q, k, [(2, 40)], 0, 0.5)
    with pytest.raises(UserError, match="do not fit together"):
        lightkv_stage(hidden, q[:, :3], k, [(2, 40)], 1, 0.5)
    with pytest.raises(UserError, match="does nothing"):
        StageGraph(31, 2, 0.5, HEADS, KV_HEADS, DEPTH)


# ---- the graph


def graph_inputs(
    tokens: int, tokens_out: int, text: list[int], seed: int = 0
) -> tuple[list[torch.Tensor], list[tuple]]:
    """Runs of text with an image after each but the last; the stage graph's inputs, and the spans of the images."""
    spans, index, place = [], [], 0
    for run in text[:-1]:
        index += range(place, place + run)
        spans.append((place + run, place + run + tokens))
        place += run + tokens
    index += range(place, place + text[-1])
    hidden, q, k = inputs(1, place + text[-1], seed)
    order, done = [], 0
    for image, run in enumerate(text):
        order += range(done, done + run)
        done += run
        if image < len(spans):
            first = len(index) + image * tokens_out
            order += range(first, first + tokens_out)
    places = [list(range(*span)) for span in spans]
    return [hidden, rows(q), rows(k), *(torch.tensor(x, dtype=torch.int64) for x in (index, places, order))], spans


@functools.cache
def exported(tokens: int, windows_per_side: int, ratio: float, dtype: torch.dtype) -> bytes:
    trace = pytest.importorskip("lightkv_export.trace")
    recipe = pytest.importorskip("lightkv_export.recipe")
    text = recipe.TextShape(2, WIDTH, HEADS, KV_HEADS, DEPTH, 48, 100)
    stage = Stage(0, windows_per_side, ratio, tokens, tokens_after(tokens, windows_per_side, ratio))
    traced = trace.trace_stage(text, stage, dtype)
    names = {"input_names": [s.name for s in traced.inputs], "output_names": [s.name for s in traced.outputs]}
    with trace.quiet():
        program = torch.onnx.export(
            traced.program, dynamo=True, optimize=False, opset_version=20, verbose=False, **names
        )
    return program.model_proto.SerializeToString()


TEXTS = [[5, 7], [1, 0], [3, 4, 2], [30, 1, 1, 40]]  # one image, an image at the end, two, three


@pytest.mark.parametrize(("tokens", "windows_per_side", "ratio"), [(145, 2, 0.5), (90, 1, 0.3)])
def test_graph_and_its_onnx_equal_the_stage(tokens: int, windows_per_side: int, ratio: float) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    graph = StageGraph(tokens, windows_per_side, ratio, HEADS, KV_HEADS, DEPTH)
    model = exported(tokens, windows_per_side, ratio, torch.float32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert {node.op_type for node in onnx.load_from_string(model).graph.node} <= ALLOWED
    for text in TEXTS:
        args, spans = graph_inputs(tokens, graph.tokens_out, text)
        hidden, query, key = args[:3]
        q, k = (x.unflatten(2, (-1, DEPTH)).transpose(1, 2) for x in (query, key))
        wanted = lightkv_stage(hidden, q, k, spans, windows_per_side, ratio)
        eager = graph(*args)
        torch.testing.assert_close(eager[0], wanted, atol=1e-6, rtol=0)
        found = session.run(None, {node.name: x.numpy() for node, x in zip(session.get_inputs(), args, strict=True)})
        np.testing.assert_allclose(found[0], wanted.numpy(), atol=1e-5, rtol=0)
        for ours, theirs in zip(eager[1:], found[1:], strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs)


def test_ties_are_the_same_in_onnx() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(exported(90, 1, 0.3, torch.float32), providers=["CPUExecutionProvider"])
    graph = StageGraph(90, 1, 0.3, HEADS, KV_HEADS, DEPTH)
    args, _ = graph_inputs(90, graph.tokens_out, [4, 4])
    args[0] = args[0][:, torch.randint(0, 4, (98,), generator=torch.Generator().manual_seed(0))]
    found = session.run(None, {node.name: x.numpy() for node, x in zip(session.get_inputs(), args, strict=True)})
    for ours, theirs in zip(graph(*args), found, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5, rtol=0)


def test_a_module_cast_to_half_keeps_its_places() -> None:
    graph = StageGraph(2880, 6, 0.5, HEADS, KV_HEADS, DEPTH)
    args, _ = graph_inputs(2880, graph.tokens_out, [2, 3])
    _, kept, target = graph(*args)
    graph.half()
    _, kept_half, target_half = graph(*args)
    assert torch.equal(kept, kept_half) and torch.equal(target, target_half)


def test_tensorrt_builds_the_graph_with_dynamic_axes() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    tokens, tokens_out = 145, tokens_after(145, 2, 0.5)
    model = exported(tokens, 2, 0.5, torch.float16)
    assert parser.parse(model), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    sizes = [(2, 1), (45, 1), (200, 3)]  # text tokens, images: minimum, optimum, maximum
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        dynamic = {
            "text_index": [(text,) for text, _ in sizes],
            "vision_index": [(images, tokens) for _, images in sizes],
            "order": [(text + images * tokens_out,) for text, images in sizes],
        }
        states = [(1, text + images * tokens, tensor.shape[-1]) for text, images in sizes]
        profile.set_shape(tensor.name, *dynamic.get(tensor.name, states))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_survivors_and_spans_of_two_images() -> None:
    hidden, query, key = torch.randn(2, 60, 8), torch.randn(2, 2, 60, 4), torch.randn(2, 2, 60, 4)
    spans = [(3, 27), (30, 50)]
    merged, survivors, left = merge_spans(hidden, query, key, spans, [(1, 0.5)] * len(spans))
    assert left == [(3, 15), (18, 28)] and merged.shape == (2, 38, 8) and survivors.shape == (2, 38)
    assert (survivors.diff() > 0).all()
    text = [*range(3), *range(27, 30), *range(50, 60)]
    places = [*range(3), *range(15, 18), *range(28, 38)]
    assert survivors[:, places].tolist() == [text, text]
    assert torch.equal(merged[:, places], hidden[:, text])
