"""Pictures of what the stages did to an image: which tokens merged into which, and what the prompt looked at.

`follow_merges` composes the stages, so that every patch of the image knows the token in which it ended; `draw_merges`
draws one panel per stage, one row per prompt. numpy and Pillow only; the same input gives the same pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lightkv_export.errors import UserError
from lightkv_export.report import write_bytes
from lightkv_export.runtime.generation import StageTrace
from lightkv_export.runtime.image import ImageSource
from lightkv_export.runtime.model import Model

NEW_TOKENS = 16  # of the answer that is written over its row
CELL = 20  # pixels per patch
GAP, TITLE, HEADER, LEGEND = 16, 28, 34, 32  # pixels
FINE = 2  # lines are drawn so many times larger, then scaled down
BACKGROUND, INK, FAINT = (250, 250, 250), (25, 25, 25), (110, 110, 110)
OUTLINE, LINK, CHANGED = (255, 255, 255, 150), (20, 20, 20, 170), (255, 0, 170, 230)  # RGBA
PALE = 0.7  # how much of its colour a patch keeps that merged away


@dataclass(frozen=True)
class Merges:
    """An image's patches after some stages, all arrays over the v tokens that the image had at first.

    Attributes:
        layer: the decoder layer that the last of these stages follows.
        tokens_in, tokens_out: vision tokens before and after it.
        owner: int64 [v], the patch whose token each patch is part of now; a survivor owns itself.
        before: int64 [v], the same before the last stage.
        weight: float32 [v], the patch's share of its token, 1 where it stands alone.
        importance: float32 [v], how much the prompt attends to the patch's token as it entered the last stage.
    """

    layer: int
    tokens_in: int
    tokens_out: int
    owner: np.ndarray
    before: np.ndarray
    weight: np.ndarray
    importance: np.ndarray

    @property
    def survivors(self) -> np.ndarray:
        """bool [v]: the patches whose token is still there."""
        return self.owner == np.arange(len(self.owner))

    @property
    def links(self) -> frozenset[tuple[int, int]]:
        """(patch, survivor) of every token that the last stage merged away."""
        merged = (self.before == np.arange(len(self.owner))) & ~self.survivors
        return frozenset((int(patch), int(self.owner[patch])) for patch in np.flatnonzero(merged))


@dataclass(frozen=True)
class Row:
    """One prompt: what it says, what was answered, and the merges after each stage."""

    prompt: str
    answer: str
    stages: tuple[Merges, ...]


def row_from_prompt(model: Model, image: ImageSource, prompt: str, keep: float | None = None) -> Row:
    """Asks the model and keeps what the stages did.

    Raises:
        UserError: the keep has no stages, or image, prompt or keep cannot be used.
    """
    if not model.manifest.keep_named(keep).stages:
        raise UserError("keep 1.0 merges nothing", fix="choose a lower --keep of the bundle")
    traces: list[StageTrace] = []
    result = model.run(prompt, [image], keep=keep, max_new_tokens=NEW_TOKENS, on_stage=traces.append)
    return Row(prompt, result.text.strip(), follow_merges(traces))


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes a picture whole or not at all; raises UserError where it cannot be written."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", optimize=True)
    write_bytes(path, encoded.getvalue())


def follow_merges(traces: Sequence[StageTrace], image: int = 0) -> tuple[Merges, ...]:
    """The stages of one image of a chunk, composed: stage i works on the survivors of stage i-1.

    Args:
        traces: what `Request.on_stage` was given, importance included.
        image: which image of the chunk.
    """
    count = traces[0].target.shape[1]
    owner, weight = np.arange(count), np.ones(count, np.float32)
    place = np.arange(count)  # of every patch's token in the sequence that enters the stage
    token_patch = np.arange(count)  # the patch that every token of this sequence belongs to
    found = []
    for trace in traces:
        kept, target, scores = trace.kept[image], trace.target[image], trace.importance[image]
        total = np.bincount(target, scores, len(kept))[target]
        alone = np.bincount(target, minlength=len(kept))[target] == 1
        portion = np.where(alone, 1, scores / np.maximum(total, 1e-8)).astype(np.float32)
        before, owner = owner, token_patch[kept][target[place]]
        weight = weight * portion[place]
        found.append(Merges(trace.layer, len(target), len(kept), owner, before, weight, scores[place]))
        place, token_patch = target[place], token_patch[kept]
    return tuple(found)


def draw_merges(seen: np.ndarray, rows: Sequence[Row]) -> Image.Image:
    """One row per prompt: what it looked at, then one panel per stage.

    Args:
        seen: uint8 RGB [h, w, 3], the image as the vision graph sees it.
        rows: one or more prompts about this image at one keep.

    Raises:
        UserError: the image's tokens are no square grid.
    """
    side = isqrt(len(rows[0].stages[0].owner))
    if side * side != len(rows[0].stages[0].owner):
        raise UserError(
            f"{len(rows[0].stages[0].owner)} vision tokens are no square grid",
            expected="a model with a token per patch",
        )
    base = np.asarray(Image.fromarray(seen).resize((side * CELL, side * CELL), Image.Resampling.BICUBIC))
    panel, columns = side * CELL, len(rows[0].stages) + 1
    height = HEADER + TITLE + panel + GAP
    canvas = Image.new("RGB", (GAP + columns * (panel + GAP), GAP + len(rows) * height + LEGEND), BACKGROUND)
    for line, row in enumerate(rows):
        top = GAP + line * height
        _write(canvas, (GAP, top), f"{row.prompt}  Answer: {row.answer}", canvas.width - 2 * GAP, INK, 22)
        _write(canvas, (GAP, top + HEADER), "what the prompt looks at (bright: most)", panel, FAINT, 17)
        canvas.paste(_attention_panel(base, row.stages[0].importance), (GAP, top + HEADER + TITLE))
        for number, stage in enumerate(row.stages):
            other = rows[0].stages[number] if line else None
            corner = (GAP + (number + 1) * (panel + GAP), top + HEADER)
            _write(canvas, corner, _title(stage, other), panel, FAINT, 17)
            canvas.paste(_stage_panel(base, stage, other), (corner[0], corner[1] + TITLE))
    legend = "Every patch shows what its token holds: the weighted mean of the patches in it. Outlined: survivors. "
    legend += "Lines: merged into which survivor at this stage"
    legend += " (pink: unlike under the first prompt)." if len(rows) > 1 else "."
    _write(canvas, (GAP, canvas.height - LEGEND), legend, canvas.width - 2 * GAP, FAINT, 17)
    return canvas


def _title(stage: Merges, other: Merges | None) -> str:
    title = f"after layer {stage.layer}: {stage.tokens_in} to {stage.tokens_out} tokens"
    if other is None:
        return title
    links = stage.links
    return f"{title}, {len(links - other.links)} of {len(links)} merges differ"


def _stage_panel(base: np.ndarray, stage: Merges, other: Merges | None) -> Image.Image:
    """What the tokens hold, survivors outlined, and lines for the merges of this stage."""
    side, edge = isqrt(len(stage.owner)), base.shape[0] * FINE
    panel = Image.fromarray(token_contents(base, stage)).resize((edge, edge), Image.Resampling.NEAREST)
    lines = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen, cell = ImageDraw.Draw(lines), CELL * FINE
    for patch in np.flatnonzero(stage.survivors):
        top, left = (int(place) * cell for place in divmod(patch, side))
        pen.rectangle((left, top, left + cell - 1, top + cell - 1), outline=OUTLINE, width=FINE)
    for patch, owner in sorted(stage.links):
        ends = [(place % side * cell + cell // 2, place // side * cell + cell // 2) for place in (patch, owner)]
        changed = other is not None and (patch, owner) not in other.links
        if other is None or changed:
            pen.line(ends, fill=CHANGED if changed else LINK, width=2 * FINE)
            x, y = ends[1]
            radius = 2 * FINE
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=CHANGED if changed else LINK)
    whole = Image.alpha_composite(panel.convert("RGBA"), lines).convert("RGB")
    return whole.resize(base.shape[1::-1], Image.Resampling.BOX)


def token_contents(base: np.ndarray, stage: Merges) -> np.ndarray:
    """Every patch replaced by the weighted mean of its token's patches; patches that did not survive a little paler.

    uint8 [side * p, side * p, 3] -> the same shape.
    """
    side = isqrt(len(stage.owner))
    size = base.shape[0] // side
    patches = base.reshape(side, size, side, size, 3).swapaxes(1, 2).reshape(side * side, -1).astype(np.float32)
    held = np.zeros_like(patches)
    np.add.at(held, stage.owner, patches * stage.weight[:, None])
    shown = np.where(stage.survivors[:, None], held, PALE * held[stage.owner] + (1 - PALE) * 255)
    squares = shown.reshape(side, side, size, size, 3).swapaxes(1, 2)
    return np.rint(squares.reshape(base.shape)).clip(0, 255).astype(np.uint8)


def _attention_panel(base: np.ndarray, importance: np.ndarray) -> Image.Image:
    """The image, bright where the prompt looks: the least important patch at 12 %, the top twentieth in full."""
    side = isqrt(len(importance))
    low, high = float(importance.min()), float(np.quantile(importance, 0.95))
    shown = 0.12 + 0.88 * np.clip((importance - low) / max(high - low, 1e-12), 0, 1)
    spread = np.kron(shown.reshape(side, side), np.ones((CELL, CELL)))
    return Image.fromarray((base * spread[..., None]).astype(np.uint8))


def _write(
    canvas: Image.Image, corner: tuple[int, int], text: str, width: int, ink: tuple[int, int, int], size: int
) -> None:
    """One line of text, cut with an ellipsis where it is wider than `width` pixels."""
    font = ImageFont.load_default(size)
    whole = text
    while text and font.getlength(text if text == whole else text + "...") > width:
        text = text[:-1]
    ImageDraw.Draw(canvas).text(corner, text if text == whole else text + "...", ink, font)
