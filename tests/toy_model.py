"""A toy model for tests of the runtime: hand-made ONNX graphs that honour the contracts of segments, stages and the
vision graph in both cache protocols, and the same model once more in plain numpy as the oracle.

Three layers of single-head attention, cut after layer 1; the stage keeps the odd tokens of each image, averages each
with its left neighbour, and adds a trace of the mean text key so that the text matters.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizer_factory import CHAT_TEMPLATE, EOS, IMAGE, TOKENIZER_CONFIG, byte_level_tokenizer

from lightkv_export.bundle import (
    Bundle,
    BundleWriter,
    Embedding,
    Graph,
    Keep,
    KeepPlan,
    KeepStage,
    Manifest,
    Preprocess,
    Size,
    Tensor,
)

D, V, IMAGE_TOKENS, IMAGE_SIZE = 8, 320, 16, 8
SEGMENTS = ((0, 2), (2, 3))
FLOATS = {"float32": (TensorProto.FLOAT, np.float32), "float16": (TensorProto.FLOAT16, np.float16)}


class ToyModel:
    """Weights and the oracle. `positions` is the policy of the manifest."""

    mrope = False
    deepstack_layers: tuple[int, ...] = ()

    def __init__(self, seed: int = 0, positions: str = "restart") -> None:
        random = np.random.default_rng(seed)
        self.positions = positions
        draw = lambda *shape: random.normal(0, 0.6, shape).astype(np.float32)  # noqa: E731
        self.embedding, self.head = draw(V, D), draw(D, V)
        self.layers = [{name: draw(D, D) * 0.4 for name in "qkvo"} for _ in range(3)]
        self.angle = draw(D)
        self.vision = draw(3 * (IMAGE_SIZE // 4) ** 2, D) * 0.3
        self.angles = np.stack([self.angle, draw(D), draw(D)])  # mRoPE: of the three position ids

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """[3, H, W] -> [v, D]"""
        side = IMAGE_SIZE // 4
        patches = pixels.reshape(3, 4, side, 4, side).transpose(1, 3, 0, 2, 4).reshape(IMAGE_TOKENS, -1)
        return patches @ self.vision

    def layer(self, index: int, hidden: np.ndarray, positions: np.ndarray, past: list) -> tuple:
        """hidden [S, D] with cached (keys, values) `past` -> hidden [S, D], query, key; the past grows.

        positions [S], for mRoPE [3, S].
        """
        weights = self.layers[index]
        angle = positions.T @ self.angles if self.mrope else positions[:, None] * self.angle
        turn = np.cos(angle * 0.3).astype(np.float32)
        query, key, value = hidden @ weights["q"] * turn, hidden @ weights["k"] * turn, hidden @ weights["v"]
        past[index] = [np.concatenate([old, new]) for old, new in zip(past[index], (key, value), strict=True)]
        keys, values = past[index]
        scores = query @ keys.T / np.sqrt(D)
        offset = len(keys) - len(hidden)
        scores[np.arange(len(keys))[None] > np.arange(len(hidden))[:, None] + offset] = -np.inf
        weight = np.exp(scores - scores.max(1, keepdims=True))
        return hidden + (weight / weight.sum(1, keepdims=True)) @ values @ weights["o"], query, key

    def logits(self, chunks: list[tuple[list[int], list[np.ndarray]]], compressed: bool) -> np.ndarray:
        """Chunks (ids with expanded placeholders, features of their images) -> logits [V] after the last token."""
        past = [[np.empty((0, D), np.float32)] * 2 for _ in range(3)]
        start = 0
        for ids, images in chunks:
            hidden = self.embedding[ids]
            vision = np.flatnonzero(np.asarray(ids) == IMAGE)
            if len(vision):
                hidden[vision] = np.concatenate(images)
            survivors = np.arange(len(ids))
            for index in range(3):
                own = len(past[index][0])
                positions = {
                    "restart": start + np.arange(len(hidden)),
                    "original": start + survivors,
                    "contiguous": own + np.arange(len(hidden)),
                }[self.positions]
                hidden, _, key = self.layer(index, hidden, positions, past)
                if index == 1 and compressed and len(vision):
                    text = key[np.setdiff1d(np.arange(len(hidden)), vision)].mean(0)
                    hidden[vision[1::2]] = (hidden[vision[0::2]] + hidden[vision[1::2]]) / 2 + 0.1 * text
                    survivors = np.setdiff1d(np.arange(len(hidden)), vision[0::2])
                    hidden = hidden[survivors]
            start += len(ids)
        return hidden[-1] @ self.head

    def graphs(self, protocol: str, dtype: str) -> list[tuple]:
        """What is saved: the vision graph, the segments and the stages."""
        segments = [_segment(self, index, protocol, dtype) for index in range(len(SEGMENTS))]
        return [_vision(self, dtype), *segments, stage_graph(dtype, IMAGE_TOKENS)]

    def write_tables(self, root: Path) -> None:
        """Its one size needs none."""

    def bundle(self, out: Path, protocol: str = "scatter", dtype: str = "float32", **changes: object) -> Bundle:
        """The model as a bundle with the keeps 1.0 and 0.83 (half of the vision tokens after layer 1 of 3)."""
        stage = toy_stage(IMAGE_TOKENS)
        with BundleWriter(out) as writer:
            (writer.path / "onnx").mkdir()
            self.write_tables(writer.path)
            graphs = tuple(_saved(graph, writer.path) for graph in self.graphs(protocol, dtype))
            (writer.path / "table.bin").write_bytes(b"16 bytes of head" + self.embedding.tobytes())
            byte_level_tokenizer().save(str(writer.path / "tokenizer.json"))
            (writer.path / "tokenizer_config.json").write_text(TOKENIZER_CONFIG)
            (writer.path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
            fields = {
                "name": "toy",
                "family": "toy",
                "model": {},
                "dtype": dtype,
                "lowering": {"scatter": "modern", "append": "portable"}[protocol],
                "cache_protocol": protocol,
                "positions": self.positions,
                "rope": "mrope" if self.mrope else "1d",
                "max_tokens": 400,
                "max_images": 3,
                "default_keep": 0.83,
                "keeps": (
                    Keep(1.0, (KeepPlan(IMAGE_TOKENS, 1.0, (), (16, 16, 16)),)),
                    Keep(0.83, (KeepPlan(IMAGE_TOKENS, 5 / 6, (stage,), (16, 16, 8)),)),
                ),
                "graphs": graphs,
                "embedding": Embedding("table.bin", 16, "float32", (V, D)),
                "image_token_id": IMAGE,
                "sizes": (Size(IMAGE_SIZE, IMAGE_SIZE, IMAGE_TOKENS, 1, "<image>", {}),),
                "eos_token_ids": (EOS,),
                "preprocess": Preprocess(
                    "clip", {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
                ),
                "source": {},
                "tools": {},
            }
            return writer.finish(Manifest(**{**fields, **changes}))


def toy_stage(tokens: int) -> KeepStage:
    """The stage for units of so many vision tokens."""
    return KeepStage(1, 1, 0.5, tokens, tokens // 2, f"stage_v{tokens}_w1_r0.5", 0)


class Builder:
    """Collects nodes and initializers of one graph."""

    def __init__(self, dtype: str) -> None:
        self.onnx_type, self.numpy_type = FLOATS[dtype]
        self.dtype, self.nodes, self.constants = dtype, [], []

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: object) -> str:
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def const(self, value: np.ndarray | list | float) -> str:
        array = np.asarray(value)
        array = array.astype(self.numpy_type if array.dtype.kind == "f" else np.int64)
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def tensor(self, name: str, shape: tuple, integer: bool = False) -> Tensor:
        return Tensor(name, "int64" if integer else self.dtype, shape)


def _saved(parts: tuple, root: Path) -> Graph:
    name, role, build, inputs, outputs, layers = parts
    types = {"int64": TensorProto.INT64, build.dtype: build.onnx_type}
    values = [
        [helper.make_tensor_value_info(t.name, types[t.dtype], t.shape) for t in side] for side in (inputs, outputs)
    ]
    graph = helper.make_graph(build.nodes, name, *values, build.constants)
    opset = 24 if any(node.op_type == "TensorScatter" for node in build.nodes) else 20
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(proto, root / f"onnx/{name}.onnx")
    return Graph(name, f"onnx/{name}.onnx", role, tuple(inputs), tuple(outputs), layers)


def _vision(model: ToyModel, dtype: str) -> tuple:
    build, side = Builder(dtype), IMAGE_SIZE // 4
    split = build.op("Reshape", "pixel_values", build.const([-1, 3, 4, side, 4, side]))
    moved = build.op("Transpose", split, perm=[0, 2, 4, 1, 3, 5])
    rows = build.op("Reshape", moved, build.const([-1, IMAGE_TOKENS, 3 * side * side]))
    build.op("MatMul", rows, build.const(model.vision), out="image_features")
    inputs = [build.tensor("pixel_values", ("N", 3, IMAGE_SIZE, IMAGE_SIZE))]
    return "vision", "vision", build, inputs, [build.tensor("image_features", ("N", IMAGE_TOKENS, D))], None


def _segment(model: ToyModel, index: int, protocol: str, dtype: str) -> tuple:
    build, (first, last) = Builder(dtype), SEGMENTS[index]
    inputs = [
        build.tensor("hidden", (1, "S", D)),
        build.tensor("position_ids", (3, 1, "S") if model.mrope else (1, "S"), True),
        build.tensor("past_len", (1,), True),
    ]
    outputs, hidden = [], "hidden"
    position = build.op("Cast", "position_ids", to=build.onnx_type)
    if model.mrope:
        axes = build.op("Transpose", position, perm=[1, 2, 0])
        angle = build.op("MatMul", axes, build.const(model.angles * 0.3))
    else:
        angle = build.op("Mul", build.op("Unsqueeze", position, build.const([2])), build.const(model.angle * 0.3))
    turn32 = build.op("Cast", angle, to=TensorProto.FLOAT)
    turn = build.op("Cast", build.op("Cos", turn32), to=build.onnx_type)
    for layer in range(first, last):
        weights = model.layers[layer]
        query, key, value = (build.op("MatMul", hidden, build.const(weights[name])) for name in "qkv")
        query, key = build.op("Mul", query, turn), build.op("Mul", key, turn)
        caches = [build.tensor(f"{kind}_cache_{layer}", (1, 1, "C", D)) for kind in ("key", "value")]
        inputs += caches
        attended = (_scatter if protocol == "scatter" else _append)(build, layer, query, key, value, outputs)
        hidden = build.op("Add", hidden, build.op("MatMul", attended, build.const(weights["o"])))
        if layer in model.deepstack_layers:
            inputs.append(build.tensor(f"deepstack_{layer}", (1, "S", D)))
            hidden = build.op("Add", hidden, f"deepstack_{layer}")
    if index == len(SEGMENTS) - 1:
        inputs.append(build.tensor("logits_index", (1,), True))
        row = build.op("Gather", hidden, "logits_index", axis=1)
        row = build.op("Reshape", row, build.const([1, D]))
        build.op("MatMul", row, build.const(model.head), out="logits")
        outputs.append(build.tensor("logits", (1, V)))
    else:
        for name, source in (("hidden_out", hidden), ("query", query), ("key", key)):
            build.op("Identity", source, out=name)
            outputs.append(build.tensor(name, (1, "S", D)))
    return f"segment_{index}", "segment", build, inputs, outputs, (first, last)


def _count(build: Builder, source: str, axis: int) -> str:
    """0 .. n-1 along an axis of `source`."""
    size = build.op("Gather", build.op("Shape", source), build.const(axis))
    return build.op("Range", build.const(0), size, build.const(1))


def _softmax_over(build: Builder, query: str, key: str, value: str, allowed: str) -> str:
    """query [1,S,D]; key and value [1,N,D]; allowed bool [S,N]"""
    scores = build.op("MatMul", query, build.op("Transpose", key, perm=[0, 2, 1]))
    scores = build.op("Mul", scores, build.const(1 / float(np.sqrt(D))))
    masked = build.op("Where", allowed, scores, build.const(-60000.0))
    return build.op("MatMul", build.op("Softmax", masked, axis=-1), value)


def _scatter(build: Builder, layer: int, query: str, key: str, value: str, outputs: list) -> str:
    full = []
    for kind, new in (("key", key), ("value", value)):
        name = f"{kind}_cache_{layer}"
        rows = build.op("Unsqueeze", new, build.const([1]))
        build.op("TensorScatter", name, rows, "past_len", out=f"{name}_out", axis=-2)
        outputs.append(build.tensor(f"{name}_out", (1, 1, "C", D)))
        full.append(build.op("Squeeze", f"{name}_out", build.const([1])))
    column = build.op("Unsqueeze", _count(build, full[0], 1), build.const([0]))
    row = build.op("Unsqueeze", build.op("Add", _count(build, "hidden", 1), "past_len"), build.const([1]))
    return _softmax_over(build, query, *full, build.op("LessOrEqual", column, row))


def _append(build: Builder, layer: int, query: str, key: str, value: str, outputs: list) -> str:
    full = []
    for kind, new in (("key", key), ("value", value)):
        build.op("Unsqueeze", new, build.const([1]), out=f"{kind}_new_{layer}")
        outputs.append(build.tensor(f"{kind}_new_{layer}", (1, 1, "S", D)))
        past = build.op("Squeeze", f"{kind}_cache_{layer}", build.const([1]))
        full.append(build.op("Concat", past, new, axis=1))
    old = build.op("Unsqueeze", _count(build, f"key_cache_{layer}", 2), build.const([0]))
    new_column = build.op("Unsqueeze", _count(build, "hidden", 1), build.const([0]))
    row = build.op("Unsqueeze", _count(build, "hidden", 1), build.const([1]))
    is_past = build.op("Less", old, "past_len")
    is_past = build.op("And", is_past, build.op("GreaterOrEqual", row, build.const([[0]])))
    return _softmax_over(
        build, query, *full, build.op("Concat", is_past, build.op("LessOrEqual", new_column, row), axis=1)
    )


def stage_graph(dtype: str, tokens: int) -> tuple:
    """The stage for units of so many vision tokens."""
    build = Builder(dtype)
    inputs = [build.tensor(name, (1, "S", D)) for name in ("hidden", "query", "key")]
    inputs += [
        build.tensor("text_index", ("T",), True),
        build.tensor("vision_index", ("I", tokens), True),
        build.tensor("order", ("R",), True),
    ]
    text = build.op("Gather", "hidden", "text_index", axis=1)
    mean_key = build.op("ReduceMean", build.op("Gather", "key", "text_index", axis=1), build.const([1]), keepdims=1)
    vision = build.op("Reshape", build.op("Gather", "hidden", "vision_index", axis=1), build.const([1, -1, 2, D]))
    pairs = build.op("ReduceMean", vision, build.const([2]), keepdims=0)
    merged = build.op("Add", pairs, build.op("Mul", mean_key, build.const(0.1)))
    build.op("Gather", build.op("Concat", text, merged, axis=1), "order", axis=1, out="merged")
    rows = build.op("Mul", build.op("Gather", "vision_index", build.const([0]), axis=1), build.const(0))
    build.op("Unsqueeze", build.op("Add", rows, build.const(np.arange(1, tokens, 2))), build.const([0]), out="kept")
    build.op("Unsqueeze", build.op("Add", rows, build.const(np.arange(tokens) // 2)), build.const([0]), out="target")
    outputs = [
        build.tensor("merged", (1, "R", D)),
        build.tensor("kept", (1, "I", tokens // 2), True),
        build.tensor("target", (1, "I", tokens), True),
    ]
    return toy_stage(tokens).graph, "stage", build, inputs, outputs, None
