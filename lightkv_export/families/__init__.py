"""Model families: what differs between architectures, one small file each, and how a model's name becomes a recipe.

Nothing here imports torch or transformers at the top, so planning works without them.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

from lightkv_export.checkpoint import config_of, split_revision
from lightkv_export.errors import UserError
from lightkv_export.families.base import Checkpoint, Family, SizeLayout
from lightkv_export.recipe import Recipe, load_recipe, recipe_names

FAMILIES = {  # config.json's model_type -> module in this package, which defines FAMILY
    "llava": "llava",
    "llava_next": "llava_next",
    "llava_onevision": "llava_onevision",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl",
    "smolvlm": "smolvlm",
    "idefics3": "idefics3",
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
    """A recipe's name, a local checkpoint directory or a hub id -> Recipe. Reads no weights and needs no torch.

    Recipes and hub ids may name a revision: NAME@REVISION.
    """
    name, revision = split_revision(model)
    if name in recipe_names():
        recipe = load_recipe(name)
        return replace(recipe, revision=revision) if revision else recipe
    path = Path(name)
    if not path.is_dir() and (name.count("/") != 1 or path.exists() or name.startswith((".", "/", "~"))):
        raise UserError(
            f"unknown model {model!r}",
            expected="a recipe, a directory with config.json, or a hub id such as org/name",
            fix=f"choose one of the recipes: {', '.join(recipe_names())}",
        )
    config = config_of(name, revision)
    family = family_named(config.get("model_type", "<none>"))
    try:
        shape = family.shape(config)
    except KeyError as error:
        raise UserError(
            f"config.json of {model} lacks {error}", expected=f"a {config['model_type']} checkpoint"
        ) from None
    return Recipe(
        name=path.resolve().name if path.is_dir() else path.name,
        family=config["model_type"],
        checkpoint=name,
        revision=revision,
        shape=shape,
        windows=family.windows,
        schedules={},
    )


__all__ = ["FAMILIES", "Checkpoint", "Family", "SizeLayout", "family_named", "resolve_recipe"]
