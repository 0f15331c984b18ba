"""Model families: what differs between architectures, one small file each, and how a model's name becomes a recipe.

Nothing here imports torch or transformers at the top, so planning works without them.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from lightkv_export.checkpoint import config_of
from lightkv_export.errors import UserError
from lightkv_export.families.base import Family
from lightkv_export.recipe import Recipe, load_recipe, recipe_names

FAMILIES = {  # config.json's model_type -> module in this package, which defines FAMILY
    "llava": "llava",
}


def family_named(model_type: str) -> Family:
    """The family for a `model_type`; raises UserError listing what is supported."""
    if model_type not in FAMILIES:
        raise UserError(
            f"architecture {model_type!r} is not supported",
            expected=f"one of {', '.join(sorted(FAMILIES))}",
            fix="`lightkv plan` works for its recipe; to export it, see 'Adding a family' in the README",
        )
    return importlib.import_module(f"lightkv_export.families.{FAMILIES[model_type]}").FAMILY


def resolve_recipe(model: str) -> Recipe:
    """A recipe's name, a local checkpoint directory or a hub id -> Recipe. Reads no weights and needs no torch."""
    if model in recipe_names():
        return load_recipe(model)
    path = Path(model)
    if not path.is_dir() and (model.count("/") != 1 or path.exists() or model.startswith((".", "/", "~"))):
        raise UserError(
            f"unknown model {model!r}",
            expected="a recipe, a directory with config.json, or a hub id such as org/name",
            fix=f"choose one of the recipes: {', '.join(recipe_names())}",
        )
    config = config_of(model)
    family = family_named(config.get("model_type", "<none>"))
    try:
        shape = family.shape(config)
    except KeyError as error:
        raise UserError(
            f"config.json of {model} lacks {error}", expected=f"a {config['model_type']} checkpoint"
        ) from None
    name = path.resolve().name if path.is_dir() else model.split("/")[1]
    return Recipe(
        name=name,
        family=config["model_type"],
        checkpoint=model,
        revision=None,
        shape=shape,
        windows=family.windows,
        schedules={},
    )


__all__ = ["FAMILIES", "Family", "family_named", "resolve_recipe"]
