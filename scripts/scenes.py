"""Scenes for tiny-llava: coloured shapes, words and numbers on textured, cluttered backgrounds, drawn with numpy.

A scene is 96 x 96 pixels with 3 x 3 places of 32 pixels. Two to five shapes and up to two signs (a word or a number)
lie in different places, each somewhere inside its place. The same seed gives the same scene. `patch_labels` tells for
each of the 24 x 24 patches of 4 pixels what it shows; training uses it, evaluation does not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

SIDE, PLACE, PATCH = 96, 32, 4  # pixels
GRID = SIDE // PATCH
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 160, 50),
    "blue": (35, 70, 225),
    "yellow": (245, 220, 30),
    "purple": (140, 40, 170),
    "orange": (250, 135, 20),
    "white": (250, 250, 250),
    "cyan": (40, 210, 225),
}
SIZES = {"small": (14, 18), "large": (24, 30)}  # pixels, upper end exclusive
WORDS = ("cat", "dog", "sun", "car", "bus", "cup", "hat", "key", "box", "fox", "bee", "ice", "egg", "owl", "pen", "map")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

# Label groups of a patch and their number of classes; -1 in a label array: does not apply.
GROUPS = {
    "kind": 3 + len(SHAPES),  # background, the shapes, word, number
    "colour": len(COLOURS),
    "size": 2,
    "row": 3,
    "column": 3,
    "word": len(WORDS),
    "tens": 10,
    "ones": 10,
    "centre": 2,  # whether the middle of the thing lies in this patch
}

_GLYPHS = (  # 3 x 5 pixels, rows from the top
    "a:757 55 b:656 56 c:344 43 d:655 56 e:746 47 f:746 44 g:345 53 h:557 55 i:722 27 j:111 52 k:556 55 l:444 47 "
    "m:577 55 n:655 55 o:255 52 p:656 44 q:255 61 r:656 55 s:342 16 t:722 22 u:555 57 v:555 52 w:557 75 x:552 55 "
    "y:552 22 z:712 47 0:755 57 1:262 27 2:712 47 3:713 17 4:557 11 5:746 17 6:347 57 7:711 22 8:757 57 9:757 16"
)


@dataclass(frozen=True)
class Item:
    """A shape (name, colour, size) or a sign (kind "word" or "number" with its text) at one of the nine places."""

    kind: str
    place: int
    name: str
    colour: str = ""
    size: str = ""


@dataclass(frozen=True)
class Scene:
    """Pixels uint8 [96, 96, 3], the items, and the labels int8 [24, 24, len(GROUPS)]."""

    pixels: np.ndarray
    items: tuple[Item, ...]
    patch_labels: np.ndarray


class SceneMaker:
    """Makes scenes from one seed. Two makers with different seeds share neither scenes nor backgrounds."""

    def __init__(self, seed: int | tuple[int, ...], num_textures: int = 192) -> None:
        self.rng = np.random.default_rng(seed)
        self._textures = [_texture(self.rng) for _ in range(num_textures)]
        self._noise = self.rng.normal(0, 5, (8, SIDE, SIDE, 3)).astype(np.float32)

    def scene(self, *, crowded: bool = False) -> Scene:
        """The next scene; a crowded one has all places filled, mostly with what is hard to read, for the eye."""
        items = self._crowd() if crowded else self._items()
        pixels = self._background()
        labels = _background_labels()
        for item in items:
            self._draw(pixels, labels, item)
        pixels += self._noise[self.rng.integers(len(self._noise))]
        return Scene(np.clip(pixels, 0, 255).astype(np.uint8) & 0xF8, items, labels)  # 5 bits: small PNG files

    def _items(self) -> tuple[Item, ...]:
        """Two to five shapes of few kinds, and up to two signs, in different places."""
        rng = self.rng
        num_words = int(rng.binomial(num_signs := int(rng.choice(3, p=(0.2, 0.5, 0.3))), 0.5))
        num_shapes, num_numbers = int(rng.integers(2, 6)), num_signs - num_words
        places = rng.permutation(9).tolist()
        # Few kinds per scene, so that counts above one and near misses ("a red ring", but no red star) are common.
        shapes = rng.permutation(len(SHAPES))[: rng.integers(2, 5)]
        colours = rng.permutation(len(COLOURS))[: rng.integers(2, 5)]
        names = list(COLOURS)
        items = [
            Item(
                "shape",
                places.pop(),
                SHAPES[rng.choice(shapes)],
                names[rng.choice(colours)],
                ("small", "large")[rng.integers(2)],
            )
            for _ in range(num_shapes)
        ]
        return (*items, *self._signs(places, num_words, num_numbers))

    def _crowd(self) -> tuple[Item, ...]:
        """Five shapes of any kind, three of four small, a word and three numbers."""
        rng = self.rng
        places, names = rng.permutation(9).tolist(), list(COLOURS)
        items = [
            Item(
                "shape",
                places.pop(),
                SHAPES[rng.integers(len(SHAPES))],
                names[rng.integers(len(names))],
                ("small", "small", "small", "large")[rng.integers(4)],
            )
            for _ in range(5)
        ]
        return (*items, *self._signs(places, 1, 3))

    def _signs(self, places: list[int], num_words: int, num_numbers: int) -> list[Item]:
        rng = self.rng
        words = [Item("word", places.pop(), WORDS[rng.integers(len(WORDS))]) for _ in range(num_words)]
        return words + [Item("number", places.pop(), str(rng.integers(10, 100))) for _ in range(num_numbers)]

    def _background(self) -> np.ndarray:
        rng = self.rng
        pixels = self._textures[rng.integers(len(self._textures))]
        pixels = np.roll(pixels, rng.integers(0, SIDE, 2), (0, 1))[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
        pixels = pixels * rng.uniform(0.8, 1.15, 3).astype(np.float32)
        for _ in range(rng.integers(6, 14)):  # clutter: specks and short bars, too small to be things
            y, x, height, width = (*rng.integers(0, SIDE - 4, 2), *rng.integers(1, 5, 2))
            pixels[y : y + height, x : x + width] = rng.integers(0, 256, 3)
        return pixels

    def _draw(self, pixels: np.ndarray, labels: np.ndarray, item: Item) -> None:
        rng = self.rng
        if item.kind == "shape":
            side = int(rng.integers(*SIZES[item.size]))
            alpha = _shape_mask(item.name, side)[..., None]
            plate, ink = None, np.array(COLOURS[item.colour], np.float32) + rng.normal(0, 8, 3).astype(np.float32)
        else:
            scale = 2 if item.kind == "word" else int(rng.integers(2, 4))
            alpha = np.pad(_text_mask(item.name, scale), 2)[..., None]
            plate, ink = rng.uniform(185, 255), rng.uniform(0, 60)
            if rng.random() < 0.5:
                plate, ink = ink, plate
        height, width = alpha.shape[:2]
        row, column = divmod(item.place, 3)
        y = row * PLACE + int(rng.integers(0, PLACE - height + 1))
        x = column * PLACE + int(rng.integers(0, PLACE - width + 1))
        area = pixels[y : y + height, x : x + width]
        area[:] = (area if plate is None else plate) * (1 - alpha) + ink * alpha
        _label(labels, item, (y, x, height, width))


def _label(labels: np.ndarray, item: Item, box: tuple[int, int, int, int]) -> None:
    """Labels the patches whose middle lies in the box (y, x, height, width)."""
    y, x, height, width = box
    top, left = -(-(y - PATCH // 2) // PATCH), -(-(x - PATCH // 2) // PATCH)
    bottom, right = (y + height - 1 - PATCH // 2) // PATCH + 1, (x + width - 1 - PATCH // 2) // PATCH + 1
    area = labels[max(top, 0) : bottom, max(left, 0) : right]
    area[..., 8] = 0
    if item.kind == "shape":
        area[..., 0] = 1 + SHAPES.index(item.name)
        area[..., 1] = list(COLOURS).index(item.colour)
        area[..., 2] = list(SIZES).index(item.size)
    elif item.kind == "word":
        area[..., 0] = 1 + len(SHAPES)
        area[..., 5] = WORDS.index(item.name)
    else:
        area[..., 0] = 2 + len(SHAPES)
        area[..., 6], area[..., 7] = int(item.name[0]), int(item.name[1])
    labels[(y + height // 2) // PATCH, (x + width // 2) // PATCH, 8] = 1


def _background_labels() -> np.ndarray:
    labels = np.full((GRID, GRID, len(GROUPS)), -1, np.int8)
    labels[..., 0] = labels[..., 8] = 0
    labels[..., 3] = np.arange(GRID)[:, None] * 3 // GRID
    labels[..., 4] = np.arange(GRID)[None, :] * 3 // GRID
    return labels


def _texture(rng: np.random.Generator) -> np.ndarray:
    """A muted background float32 [96, 96, 3]: noise of one grain, stripes, a checkerboard or a slope."""
    base = rng.uniform(60, 190) + rng.normal(0, 10, 3)
    y, x = np.mgrid[:SIDE, :SIDE]
    kind = rng.integers(4)
    if kind == 0:
        grain = int(rng.choice((2, 3, 4, 6, 8)))
        coarse = rng.normal(0, 1, (SIDE // grain, SIDE // grain))
        pattern = np.kron(coarse, np.ones((grain, grain)))
    elif kind == 1:
        angle = rng.uniform(0, np.pi)
        pattern = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / rng.uniform(5, 24))
    elif kind == 2:
        cell = int(rng.choice((4, 6, 8, 12)))
        pattern = ((x // cell + y // cell) % 2) * 2.0 - 1
    else:
        pattern = (x * rng.normal() + y * rng.normal()) / SIDE * 2
    tint = rng.uniform(10, 30) * (1 + rng.normal(0, 0.2, 3))
    return np.clip(base + pattern[..., None] * tint, 20, 235).astype(np.float32)


@functools.cache
def _shape_mask(name: str, side: int) -> np.ndarray:
    """Coverage float32 [side, side] of a shape that fills the box, from 4 x 4 samples per pixel."""
    axis = (np.arange(side * 4) + 0.5) / (side * 2) - 1  # -1 .. 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    inside = {
        "circle": radius <= 0.98,
        "square": np.maximum(abs(x), abs(y)) <= 0.88,
        "triangle": (y <= 0.9) & (abs(x) <= (y + 0.95) / 1.85),
        "star": radius <= _star_radius(angle),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95),
        "ring": (radius <= 0.98) & (radius >= 0.52),
        "diamond": abs(x) * 1.25 + abs(y) <= 1,
        "heart": (1.25 * x**2 + (1.15 * -y + 0.05 - 0.75 * np.sqrt(abs(x))) ** 2) <= 0.95,
    }[name]
    return inside.reshape(side, 4, side, 4).mean((1, 3)).astype(np.float32)


def _star_radius(angle: np.ndarray) -> np.ndarray:
    """Edge of a star with five points, inner radius 0.42: straight lines between the corners."""
    sector = np.pi / 5
    part = abs((angle + sector) % (2 * sector) - sector)  # 0 at a point, sector at a notch
    outer, inner = 1.0, 0.42
    return outer * inner * np.sin(sector) / (inner * np.sin(sector - part) + outer * np.sin(part))


@functools.cache
def _text_mask(text: str, scale: int) -> np.ndarray:
    """Ink float32 [5 scale, (4 n - 1) scale] of n letters or digits."""
    rows = _GLYPHS.split()
    glyphs = {rows[i][0]: rows[i][2:] + rows[i + 1] for i in range(0, len(rows), 2)}
    bits = [[[int(row) >> (2 - column) & 1 for column in range(3)] for row in glyphs[letter]] for letter in text]
    ink = np.concatenate([np.pad(np.array(letter), ((0, 0), (0, 1))) for letter in bits], axis=1)[:, :-1]
    return np.kron(ink, np.ones((scale, scale))).astype(np.float32)
