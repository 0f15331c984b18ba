"""A small bundle made by hand: the structure of a real one, a few bytes per file. For the tests of bundle and CLI."""

from __future__ import annotations

import json
from pathlib import Path

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

HIDDEN, ROW, LAYERS, VISION_TOKENS = 8, 4, 4, 16
WEIGHTS = "onnx/weights/text.safetensors"
FILES = {
    "onnx/vision.onnx": b"vision graph",
    "onnx/segment_0.onnx": b"first segment",
    "onnx/segment_1.onnx": b"second segment",
    "onnx/stage_v16_w1_r0.5.onnx": b"stage",
    WEIGHTS: bytes(range(256)) * 4,
    "tokenizer.json": b"{}",
}


def small_manifest(**changes: object) -> Manifest:
    """A consistent manifest of a 4-layer model with keeps 1.0 and 0.75; `files` is left to the writer."""
    stage = KeepStage(1, 1, 0.5, VISION_TOKENS, VISION_TOKENS // 2, "stage_v16_w1_r0.5", 0)
    fields = {
        "name": "hand-made",
        "family": "llava",
        "model": {
            "family": "llava",
            "text": {"layers": LAYERS, "hidden": HIDDEN, "heads": 2, "kv_heads": 1, "head_dim": ROW},
            "vision": {"tokens": VISION_TOKENS, "image_size": 56},
        },
        "dtype": "float32",
        "lowering": "modern",
        "cache_protocol": "scatter",
        "positions": "restart",
        "rope": "1d",
        "max_tokens": 64,
        "max_images": 2,
        "default_keep": 0.75,
        "keeps": (
            Keep(1.0, (KeepPlan(VISION_TOKENS, 1.0, (), (VISION_TOKENS,) * LAYERS),)),
            Keep(0.75, (KeepPlan(VISION_TOKENS, 0.75, (stage,), (16, 16, 8, 8)),)),
        ),
        "graphs": _graphs(),
        "embedding": Embedding(WEIGHTS, 0, "float32", (32, HIDDEN)),
        "image_token_id": 31,
        "sizes": (Size(56, 56, VISION_TOKENS, 1, "<image>", {}),),
        "eos_token_ids": (2,),
        "preprocess": Preprocess("clip", {"size": {"shortest_edge": 56}, "image_mean": [0.5, 0.5, 0.5]}),
        "source": {"checkpoint": "none", "revision": None, "recipe": "hand-made"},
        "tools": {"lightkv_export": "0.1.0", "python": "3.10"},
    }
    return Manifest(**{**fields, **changes})


def write_files(folder: Path, files: dict[str, bytes] = FILES) -> None:
    """Write `files` (relative path -> content) under `folder`."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def small_bundle(out: Path, *, report: dict | None = None, **changes: object) -> Bundle:
    """The small bundle at `out`, optionally with a report beside it."""
    with BundleWriter(out) as writer:
        write_files(writer.path)
        bundle = writer.finish(small_manifest(**changes))
    if report is not None:
        (bundle.path / "report.json").write_text(json.dumps(report))
    return bundle


def _graphs() -> tuple[Graph, ...]:
    hidden, position = Tensor("hidden", "float32", (1, "S", HIDDEN)), Tensor("position_ids", "int64", (1, "S"))
    past = Tensor("past_len", "int64", (1,))

    def caches(first: int, last: int, suffix: str = "") -> tuple[Tensor, ...]:
        names = (f"{kind}_cache_{layer}{suffix}" for layer in range(first, last) for kind in ("key", "value"))
        return tuple(Tensor(name, "float32", (1, 1, "C", ROW)) for name in names)

    return (
        Graph(
            "vision",
            "onnx/vision.onnx",
            "vision",
            (Tensor("pixel_values", "float32", ("N", 3, 56, 56)),),
            (Tensor("image_features", "float32", ("N", VISION_TOKENS, HIDDEN)),),
        ),
        Graph(
            "segment_0",
            "onnx/segment_0.onnx",
            "segment",
            (hidden, position, past, *caches(0, 2)),
            (
                Tensor("hidden_out", "float32", (1, "S", HIDDEN)),
                *caches(0, 2, "_out"),
                Tensor("query", "float32", (1, "S", 2 * ROW)),
                Tensor("key", "float32", (1, "S", ROW)),
            ),
            (0, 2),
        ),
        Graph(
            "segment_1",
            "onnx/segment_1.onnx",
            "segment",
            (hidden, position, past, *caches(2, 4), Tensor("logits_index", "int64", (1,))),
            (Tensor("logits", "float32", (1, 32)), *caches(2, 4, "_out")),
            (2, 4),
        ),
        Graph(
            "stage_v16_w1_r0.5",
            "onnx/stage_v16_w1_r0.5.onnx",
            "stage",
            (hidden, Tensor("vision_index", "int64", ("I", VISION_TOKENS))),
            (Tensor("merged", "float32", (1, "S2", HIDDEN)),),
        ),
    )
