"""The image sizes of a bundle: what the family says of each, checked, and written as manifest entries and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lightkv_export.errors import LightKVError, UserError
from lightkv_export.families import Checkpoint, Family, SizeLayout
from lightkv_export.manifest import POSITION_TABLE, Size, size_name
from lightkv_export.manifest import Tensor as Spec
from lightkv_export.recipe import Recipe

Layouts = Mapping[tuple[int, int], SizeLayout]
"""Layouts by (width, height), the default size first."""


def layouts_of(family: Family, checkpoint: Checkpoint, recipe: Recipe, asked: Sequence[tuple[int, int]]) -> Layouts:
    """The layouts of the sizes `asked` for; none: the recipe's, else the family's.

    Raises:
        UserError: the checkpoint cannot lay out a size, or two sizes are the same to it.
    """
    sizes = tuple(asked) or recipe.image_sizes or family.default_sizes(checkpoint.config.to_dict())
    layouts: dict[tuple[int, int], SizeLayout] = {}
    for size in sizes:
        layout = family.size(checkpoint, *size)
        for other, known in layouts.items():
            # Images are given a size by their aspect ratio, so another ratio is another size though tiles are the same.
            if size == other or (_same(layout, known) and _alike(size, other)):
                raise UserError(
                    f"image sizes {size_name(*other)} and {size_name(*size)} are one to this model: {layout.units} x "
                    f"{layout.tokens} vision tokens from the same pixels",
                    expected="sizes that it lays out differently",
                    fix=f"leave {size_name(*size)} out",
                )
        layouts[size] = layout
    return layouts


def unit_lengths(layouts: Layouts) -> tuple[int, ...]:
    """The numbers of vision tokens that units have, each once, the default size's first."""
    return tuple(dict.fromkeys(layout.tokens for layout in layouts.values()))


def recipe_for(recipe: Recipe, layouts: Layouts) -> Recipe:
    """The recipe with the counts of the default size, for planning."""
    (size, layout), *_ = layouts.items()
    if size in recipe.image_sizes:
        recipe = recipe.at_size(*size)
    vision = replace(recipe.shape.vision, tokens=layout.tokens, units=layout.units)
    return replace(recipe, shape=replace(recipe.shape, vision=vision))


def write_sizes(layouts: Layouts, inputs: Sequence[Spec], root: Path) -> tuple[Size, ...]:
    """The manifest's entries; tables go to `sizes/<name>.npz` in the bundle at `root`.

    Args:
        layouts: as `layouts_of` gives them.
        inputs: what the vision graph takes, `pixel_values` first.
        root: the bundle.
    """
    sizes = []
    for (width, height), layout in layouts.items():
        name, tables = f"sizes/{size_name(width, height)}.npz", _checked_tables(layout, inputs[1:])
        if layout.positions is not None:
            tables[POSITION_TABLE] = np.asarray(layout.positions, np.int64)
        if tables:
            (root / "sizes").mkdir(exist_ok=True)
            np.savez(root / name, **tables)
        sizes.append(
            Size(
                width=width,
                height=height,
                tokens=layout.tokens,
                units=layout.units,
                prompt=layout.prompt,
                geometry=dict(layout.geometry),
                tables=name if tables else None,
                advance=layout.advance,
            )
        )
    return tuple(sizes)


def _checked_tables(layout: SizeLayout, inputs: Sequence[Spec]) -> dict[str, np.ndarray]:
    """Tables for just those inputs, of their kind and rank; anything else is a defect of the family."""
    if set(layout.tables) != {spec.name for spec in inputs}:
        raise LightKVError(f"tables {sorted(layout.tables)}", expected=f"{[spec.name for spec in inputs]}")
    for spec in inputs:
        table = layout.tables[spec.name]
        fixed = [(at, size) for at, size in enumerate(spec.shape) if isinstance(size, int)]
        fits = table.ndim == len(spec.shape) and all(table.shape[at] == size for at, size in fixed)
        if not fits or (table.dtype.kind == "f") != ("float" in spec.dtype):
            raise LightKVError(f"table {spec.name}: {table.dtype} {table.shape}", expected=f"{spec.dtype} {spec.shape}")
    return dict(layout.tables)


def _same(one: SizeLayout, other: SizeLayout) -> bool:
    parts = [(item.tokens, item.units, item.prompt, dict(item.geometry), set(item.tables)) for item in (one, other)]
    return parts[0] == parts[1] and all(np.array_equal(one.tables[name], other.tables[name]) for name in one.tables)


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether aspect ratios differ by less than 1 %, about what rounding to whole tokens changes."""
    wide, high = one[0] * other[1], one[1] * other[0]
    return abs(wide - high) < 0.01 * max(wide, high)
