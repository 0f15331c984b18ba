"""Pictures of what the stages did to an image: which tokens merged into which, and what the prompt looked at.

`follow_merges` composes the stages, so that every patch of a unit knows the token in which it ended; `draw_merges`
draws one panel per stage, one row per prompt, for each unit: the image, or each tile that is merged on its own. numpy
and Pillow only; the same input gives the same pixels.
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
from lightkv_export.manifest import Preprocess, Size
from lightkv_export.report import write_bytes
from lightkv_export.runtime.generation import StageTrace
from lightkv_export.runtime.image import ImageSource, decode, fit_size, framed, seen_image
from lightkv_export.runtime.model import Model
from lightkv_export.runtime.pixels_tiles import tile_views

Grid = tuple[int, int]
"""Rows and columns of vision tokens."""

NEW_TOKENS = 16  # of the answer that is written over its row
CELL = 20  # pixels per patch
GAP, TITLE, HEADER, LEGEND = 16, 28, 34, 32  # pixels
FINE = 2  # lines are drawn so many times larger, then scaled down
BACKGROUND, INK, FAINT = (250, 250, 250), (25, 25, 25), (110, 110, 110)
OUTLINE, LINK, CHANGED = (255, 255, 255, 150), (20, 20, 20, 170), (255, 0, 170, 230)  # RGBA
PALE = 0.7  # how much of its colour a patch keeps that merged away


@dataclass(frozen=True)
class Seen:
    """What a unit of vision tokens shows: uint8 RGB [h, w, 3], and the grid of its tokens over it."""

    picture: np.ndarray
    grid: Grid


@dataclass(frozen=True)
class Merges:
    """A unit's patches after some stages, all arrays over the v tokens that the unit had at first.

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
    """One prompt: what it says, what was answered, and for each unit of the image the merges after each stage."""

    prompt: str
    answer: str
    units: tuple[tuple[Merges, ...], ...]


def row_from_prompt(model: Model, image: ImageSource, prompt: str, keep: float | None = None) -> Row:
    """Asks the model and keeps what the stages did.

    Raises:
        UserError: the keep has no stages, or image, prompt or keep cannot be used.
    """
    chosen, size = model.manifest.keep_named(keep), _size_of(model, decode(image))
    if not chosen.plan_for(size.tokens).stages:
        raise UserError(
            f"keep {chosen.requested:g} merges nothing in an image of {size.name}",
            fix="choose a lower --keep of the bundle",
        )
    traces: list[StageTrace] = []
    result = model.run(prompt, [image], keep=keep, max_new_tokens=NEW_TOKENS, on_stage=traces.append)
    units = tuple(follow_merges(traces, unit) for unit in range(len(traces[0].kept)))
    return Row(prompt, " ".join(result.text.split()), units)  # the title is one line


def seen_units(model: Model, image: ImageSource) -> tuple[Seen, ...]:
    """What each unit of the image shows.

    Raises:
        UserError: the image cannot be used, or its vision tokens do not lie on a grid.
    """
    pixels, preprocess = decode(image), model.manifest.preprocess
    size = _size_of(model, pixels)
    if preprocess.kind == "tiles":
        return _seen_tiles(preprocess, pixels, size)
    grid = (isqrt(size.tokens),) * 2
    if preprocess.kind == "patches":
        side = size.geometry["patch_size"] * size.geometry["merge_size"]
        width, height = size.geometry["resize"]
        grid = height // side, width // side
    _check_grid(grid, size)
    return (Seen(seen_image(preprocess, pixels, size), grid),)


def _size_of(model: Model, image: np.ndarray) -> Size:
    return fit_size(model.manifest.sizes, image.shape[1], image.shape[0])


def _seen_tiles(preprocess: Preprocess, image: np.ndarray, size: Size) -> tuple[Seen, ...]:
    """Tiles are shown as the vision graph sees them."""
    tiles = tile_views(framed(image, size), size.geometry, preprocess.settings)
    if len(tiles) != size.units:
        raise UserError(
            f"the {size.tokens} vision tokens of an image of {size.name} are {len(tiles)} tiles and line breaks",
            expected="vision tokens on one grid, as of a model that merges an image or a tile as a whole",
            fix="the picture cannot be drawn for this model; the stages are listed by lightkv inspect",
        )
    grid = (isqrt(size.tokens),) * 2
    _check_grid(grid, size)
    return tuple(Seen(tile, grid) for tile in tiles)


def _check_grid(grid: Grid, size: Size) -> None:
    if grid[0] * grid[1] != size.tokens:
        raise UserError(f"{size.tokens} vision tokens are no grid", expected="a model with a token per patch")


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes a picture whole or not at all; raises UserError where it cannot be written."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", optimize=True)
    write_bytes(path, encoded.getvalue())


def follow_merges(traces: Sequence[StageTrace], unit: int = 0) -> tuple[Merges, ...]:
    """The stages of one unit of a chunk, composed: stage i works on the survivors of stage i-1.

    Args:
        traces: what `Request.on_stage` was given, importance included; of units of one length.
        unit: which unit of the chunk.
    """
    count = traces[0].target.shape[1]
    owner, weight = np.arange(count), np.ones(count, np.float32)
    place = np.arange(count)  # of every patch's token in the sequence that enters the stage
    token_patch = np.arange(count)  # the patch that every token of this sequence belongs to
    found = []
    for trace in traces:
        kept, target, scores = trace.kept[unit], trace.target[unit], trace.importance[unit]
        total = np.bincount(target, scores, len(kept))[target]
        alone = np.bincount(target, minlength=len(kept))[target] == 1
        portion = np.where(alone, 1, scores / np.maximum(total, 1e-8)).astype(np.float32)
        before, owner = owner, token_patch[kept][target[place]]
        weight = weight * portion[place]
        found.append(Merges(trace.layer, len(target), len(kept), owner, before, weight, scores[place]))
        place, token_patch = target[place], token_patch[kept]
    return tuple(found)


def draw_merges(seen: Sequence[Seen], rows: Sequence[Row]) -> Image.Image:
    """For each unit one row per prompt: what it looked at, then one panel per stage.

    Args:
        seen: what each unit shows; all have the same grid.
        rows: one or more prompts about this image at one keep.
    """
    down, across = (CELL * count for count in seen[0].grid)
    columns, height = len(rows[0].units[0]) + 1, HEADER + TITLE + down + GAP
    lines = [(unit, row) for unit in range(len(seen)) for row in rows]
    canvas = Image.new("RGB", (GAP + columns * (across + GAP), GAP + len(lines) * height + LEGEND), BACKGROUND)
    for line, (unit, row) in enumerate(lines):
        title = f"{row.prompt}  Answer: {row.answer}"
        title = f"Tile {unit + 1} of {len(seen)}.  {title}" if len(seen) > 1 else title
        first = None if row is rows[0] else rows[0].units[unit]
        canvas.paste(_line(seen[unit], title, row.units[unit], first), (0, GAP + line * height))
    legend = "Every patch shows what its token holds: the weighted mean of the patches in it. Outlined: survivors. "
    legend += "Lines: merged into which survivor at this stage"
    legend += " (pink: unlike under the first prompt)." if len(rows) > 1 else "."
    _write(canvas, (GAP, canvas.height - LEGEND), legend, canvas.width - 2 * GAP, FAINT, 17)
    return canvas


def _line(seen: Seen, title: str, stages: Sequence[Merges], first: Sequence[Merges] | None) -> Image.Image:
    """The panels of one prompt for one unit, with titles; `first` holds the stages under the first prompt."""
    down, across = (CELL * count for count in seen.grid)
    base = np.asarray(Image.fromarray(seen.picture).resize((across, down), Image.Resampling.BICUBIC))
    size = (GAP + (len(stages) + 1) * (across + GAP), HEADER + TITLE + down)
    line = Image.new("RGB", size, BACKGROUND)
    _write(line, (GAP, 0), title, line.width - 2 * GAP, INK, 22)
    _write(line, (GAP, HEADER), "what the prompt looks at (bright: most)", across, FAINT, 17)
    line.paste(_attention_panel(base, stages[0].importance, seen.grid), (GAP, HEADER + TITLE))
    for number, stage in enumerate(stages):
        other, left = None if first is None else first[number], GAP + (number + 1) * (across + GAP)
        _write(line, (left, HEADER), _title(stage, other), across, FAINT, 17)
        line.paste(_stage_panel(base, stage, other, seen.grid), (left, HEADER + TITLE))
    return line


def _title(stage: Merges, other: Merges | None) -> str:
    title = f"after layer {stage.layer}: {stage.tokens_in} to {stage.tokens_out} tokens"
    if other is None:
        return title
    links = stage.links
    return f"{title}, {len(links - other.links)} of {len(links)} merges differ"


def _stage_panel(base: np.ndarray, stage: Merges, other: Merges | None, grid: Grid) -> Image.Image:
    """What the tokens hold, survivors outlined, and lines for the merges of this stage."""
    across, fine = grid[1], (base.shape[1] * FINE, base.shape[0] * FINE)
    panel = Image.fromarray(token_contents(base, stage, grid)).resize(fine, Image.Resampling.NEAREST)
    lines = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen, cell = ImageDraw.Draw(lines), CELL * FINE
    for patch in np.flatnonzero(stage.survivors):
        top, left = (int(place) * cell for place in divmod(patch, across))
        pen.rectangle((left, top, left + cell - 1, top + cell - 1), outline=OUTLINE, width=FINE)
    for patch, owner in sorted(stage.links):
        ends = [(place % across * cell + cell // 2, place // across * cell + cell // 2) for place in (patch, owner)]
        changed = other is not None and (patch, owner) not in other.links
        if other is None or changed:
            pen.line(ends, fill=CHANGED if changed else LINK, width=2 * FINE)
            x, y = ends[1]
            radius = 2 * FINE
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=CHANGED if changed else LINK)
    whole = Image.alpha_composite(panel.convert("RGBA"), lines).convert("RGB")
    return whole.resize(base.shape[1::-1], Image.Resampling.BOX)


def token_contents(base: np.ndarray, stage: Merges, grid: Grid) -> np.ndarray:
    """Every patch replaced by the weighted mean of its token's patches; patches that did not survive a little paler.

    uint8 [rows * p, columns * p, 3] -> the same shape.
    """
    rows, columns = grid
    size = base.shape[0] // rows
    patches = base.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(rows * columns, -1).astype(np.float32)
    held = np.zeros_like(patches)
    np.add.at(held, stage.owner, patches * stage.weight[:, None])
    shown = np.where(stage.survivors[:, None], held, PALE * held[stage.owner] + (1 - PALE) * 255)
    squares = shown.reshape(rows, columns, size, size, 3).swapaxes(1, 2)
    return np.rint(squares.reshape(base.shape)).clip(0, 255).astype(np.uint8)


def _attention_panel(base: np.ndarray, importance: np.ndarray, grid: Grid) -> Image.Image:
    """The image, bright where the prompt looks: the least important patch at 12 %, the top twentieth in full."""
    low, high = float(importance.min()), float(np.quantile(importance, 0.95))
    shown = 0.12 + 0.88 * np.clip((importance - low) / max(high - low, 1e-12), 0, 1)
    spread = np.kron(shown.reshape(grid), np.ones((CELL, CELL)))
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
