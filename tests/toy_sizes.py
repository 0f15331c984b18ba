"""The toy model with several image sizes: units of 16 and 24 vision tokens with stages of their own, an image of two
units, tables for the vision graph; and as a variant mRoPE positions with DeepStack features. Oracles in plain numpy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizer_factory import IMAGE
from toy_model import IMAGE_SIZE, Builder, D, ToyModel, stage_graph, toy_stage

from lightkv_export.bundle import Bundle, Keep, KeepPlan, Preprocess, Size

SETTINGS = {"resample": 2, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
COLUMNS = {16: 4, 24: 6}  # of a unit's grid
KEEPS = {1.0: (), 0.83: (16, 24), 0.9: (24,)}  # which units a keep merges


def toy_size(width: int, height: int, tokens: int, units: int, prompt: str) -> Size:
    """A size whose image is cut into tiles, as every size of the toy."""
    geometry = {"tile": IMAGE_SIZE, "resize": [[width, height]], "canvas": [width, height], "overview": None}
    return Size(width, height, tokens, units, prompt, geometry, f"sizes/{width}x{height}.npz")


SQUARE, WIDE = toy_size(8, 8, 16, 1, "<image>"), toy_size(16, 8, 24, 1, "<image>")
TALL = toy_size(8, 16, 16, 2, "top <image> and bottom <image>")


@dataclass(frozen=True)
class Shown:
    """An image's features as the oracle has them: rows [n, D], and one such array per DeepStack layer."""

    rows: np.ndarray
    deepstack: tuple[np.ndarray, ...]
    unit: int


@dataclass(frozen=True)
class Chunk:
    """Tokens that are fed together: ids with expanded placeholders, their images, positions int64 [3, S] for mRoPE."""

    ids: Sequence[int]
    images: Sequence[Shown] = ()
    positions: np.ndarray | None = None


class SizedToy(ToyModel):
    """Keeps: 1.0; 0.83 merges every unit; 0.9 merges the units of 24 tokens only."""

    def __init__(self, *, mrope: bool = False) -> None:
        super().__init__(positions="original" if mrope else "restart")
        self.mrope, self.deepstack_layers = mrope, (0, 1) if mrope else ()
        self.sizes = tuple(
            Size(s.width, s.height, s.tokens, s.units, s.prompt, s.geometry, s.tables, COLUMNS[s.tokens])
            for s in (SQUARE, WIDE)
        )
        if not mrope:
            self.sizes = (SQUARE, WIDE, TALL)
        self.deepstack_weights = [np.random.default_rng(7 + place).normal(0, 0.5, (D, D)) for place in range(2)]

    def tables(self, size: Size) -> dict[str, np.ndarray]:
        """Further inputs of the vision graph: which rows of the tiles are vision tokens, and what is added to them."""
        random = np.random.default_rng(size.width * 100 + size.height)
        rows = size.width * size.height // 4
        return {
            "pick": np.sort(random.permutation(rows)[: size.image_tokens]),
            "shift": random.normal(0, 0.3, (size.image_tokens, D)),
        }

    def positions_of(self, size: Size) -> np.ndarray:
        """int64 [3, v]: time 0, row and column of each vision token."""
        return np.stack([np.zeros(size.tokens, int), *np.divmod(np.arange(size.tokens), COLUMNS[size.tokens])])

    def write_tables(self, root: Path) -> None:
        (root / "sizes").mkdir()
        for size in self.sizes:
            extra = {"positions": self.positions_of(size)} if self.mrope else {}
            np.savez(root / size.tables, **self.tables(size), **extra)

    def shown(self, tiles: np.ndarray, size: Size) -> Shown:
        """[N, 3, 8, 8] -> what the vision graph is to give."""
        tables = self.tables(size)
        rows = np.concatenate([self.features(tile) for tile in tiles])[tables["pick"]] + tables["shift"]
        rows = rows.astype(np.float32)
        deepstack = [
            rows @ weights.astype(np.float32) for weights in self.deepstack_weights[: len(self.deepstack_layers)]
        ]
        return Shown(rows, tuple(deepstack), size.tokens)

    def bundle(self, out: Path, protocol: str = "scatter", dtype: str = "float32", **changes: object) -> Bundle:
        keeps = tuple(Keep(keep, (plan(16, 16 in units), plan(24, 24 in units))) for keep, units in KEEPS.items())
        fields = {"sizes": self.sizes, "keeps": keeps, "preprocess": Preprocess("tiles", SETTINGS), "max_images": 6}
        fields["deepstack_layers"] = self.deepstack_layers
        return super().bundle(out, protocol, dtype, **{**fields, **changes})

    def graphs(self, protocol: str, dtype: str) -> list[tuple]:
        segments = super().graphs(protocol, dtype)[1:3]
        return [self._vision_graph(dtype), *segments, stage_graph(dtype, 16), stage_graph(dtype, 24)]

    def _vision_graph(self, dtype: str) -> tuple:
        build, side = Builder(dtype), IMAGE_SIZE // 4
        split = build.op("Reshape", "pixel_values", build.const([-1, 3, 4, side, 4, side]))
        moved = build.op("Transpose", split, perm=[0, 2, 4, 1, 3, 5])
        patches = build.op("Reshape", moved, build.const([-1, 3 * side * side]))
        rows = build.op("Gather", build.op("MatMul", patches, build.const(self.vision)), "pick", axis=0)
        features = build.op("Add", rows, "shift", out="image_features")
        inputs = [
            build.tensor("pixel_values", ("N", 3, IMAGE_SIZE, IMAGE_SIZE)),
            build.tensor("pick", ("M",), True),
            build.tensor("shift", ("M", D)),
        ]
        outputs = [build.tensor("image_features", ("V", D))]
        for layer, weights in zip(self.deepstack_layers, self.deepstack_weights, strict=False):
            build.op("MatMul", features, build.const(weights), out=f"deepstack_{layer}")
            outputs.append(build.tensor(f"deepstack_{layer}", ("V", D)))
        return "vision", "vision", build, inputs, outputs, None

    def slow_positions(self, ids: Sequence[int], sizes: Sequence[Size]) -> np.ndarray:
        """int64 [3, S], token by token, from Hugging Face's rule."""
        found, position, left = [], 0, iter(sizes)
        while len(found) < len(ids):
            if ids[len(found)] != IMAGE:
                found.append((position,) * 3)
                position += 1
                continue
            size = next(left)
            found += [(position + t, position + h, position + w) for t, h, w in self.positions_of(size).T.tolist()]
            position += COLUMNS[size.tokens]
        return np.array(found).T

    def oracle(self, chunks: Sequence[Chunk], merging: Collection[int]) -> np.ndarray:
        """Logits [V] after the last token; units of as many tokens as `merging` names are merged."""
        past = [[np.empty((0, D), np.float32)] * 2 for _ in range(3)]
        start = 0
        for chunk in chunks:
            hidden, units = self.embedding[list(chunk.ids)], np.zeros(len(chunk.ids), int)
            vision = np.flatnonzero(np.asarray(chunk.ids) == IMAGE)
            if len(vision):
                hidden[vision] = np.concatenate([image.rows for image in chunk.images])
                units[vision] = np.repeat([i.unit for i in chunk.images], [len(i.rows) for i in chunk.images])
            survivors = np.arange(len(hidden))
            for index in range(3):
                positions = chunk.positions[:, survivors] if self.mrope else start + np.arange(len(hidden))
                hidden, _, key = self.layer(index, hidden, positions, past)
                if index in self.deepstack_layers and len(vision):
                    hidden[vision] += np.concatenate([image.deepstack[index] for image in chunk.images])
                if index == 1:
                    merged, text = np.flatnonzero(np.isin(units, list(merging))), key[units == 0].mean(0)
                    hidden[merged[1::2]] = (hidden[merged[0::2]] + hidden[merged[1::2]]) / 2 + 0.1 * text
                    survivors = np.setdiff1d(survivors, merged[0::2])
                    hidden = hidden[survivors]
            start += len(chunk.ids)
        return hidden[-1] @ self.head


def plan(tokens: int, merges: bool) -> KeepPlan:
    """What a keep does to units of so many tokens: half of them after layer 1 of 3, or nothing."""
    if not merges:
        return KeepPlan(tokens, 1.0, (), (tokens,) * 3)
    return KeepPlan(tokens, 5 / 6, (toy_stage(tokens),), (tokens, tokens, tokens // 2))
