"""Recipes: one declarative TOML file per model. Standard library only.

A recipe says where a model's weights are, how large its layers are (so that a plan needs no weights), and which stages
reach which keep. `load_recipe("llava-1.5-7b")` reads `recipes/llava-1.5-7b.toml`; the file's name is the recipe's name.
The one fact you need: every key is checked, and an unknown one is an error, so a misspelt setting never goes unnoticed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from lightkv_export.errors import UserError
from lightkv_export.shapes import ModelShape, RecipeSize, StageSpec, TextShape, VisionShape, parse_image_size

__all__ = [
    "POSITIONS",
    "ModelShape",
    "Recipe",
    "RecipeSize",
    "StageSpec",
    "TextShape",
    "VisionShape",
    "load_recipe",
    "parse_image_size",
    "recipe_directory",
    "recipe_from_toml",
    "recipe_names",
]

POSITIONS = ("original", "restart", "contiguous")

_T = TypeVar("_T")
_TYPES = {"int": (int,), "bool": (bool,), "float": (int, float), "str": (str,)}


@dataclass(frozen=True)
class Recipe:
    """A model and how to compress it.

    Attributes:
        name: the recipe's name, or whatever the user called the model.
        family: the model type as Hugging Face writes it, e.g. "llava".
        checkpoint: hub id, local directory or "builtin:NAME"; `revision` pins a hub commit.
        windows: windows per side of consecutive stages, e.g. (4, 2, 1); the solver places that many stages.
        schedules: keep as asked for -> stages that reach it.
        positions: how layers behind a stage number their tokens, one of POSITIONS.
        tolerances: thresholds of `lightkv verify` that this model overrides.
        sizes: image sizes that an export without --image-size has, the default first; empty: the family's own.
    """

    name: str
    family: str
    checkpoint: str
    revision: str | None
    shape: ModelShape
    windows: tuple[int, ...]
    schedules: Mapping[float, tuple[StageSpec, ...]]
    positions: str = "original"
    tolerances: Mapping[str, float] = field(default_factory=dict)
    sizes: tuple[RecipeSize, ...] = ()

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of the sizes that the recipe lists."""
        return tuple(parse_image_size(size.image) for size in self.sizes)

    def at_size(self, width: int, height: int) -> Recipe:
        """This recipe for images of `width` x `height` pixels, for planning.

        Raises:
            UserError: the recipe does not list that size, so its vision tokens are not known here.
        """
        if (width, height) not in self.image_sizes:
            listed = ", ".join(size.image for size in self.sizes) or "none"
            raise UserError(
                f"how many vision tokens {self.name} has for an image of {width}x{height} is not known without its "
                "processor",
                expected=f"a size that the recipe lists: {listed}",
                fix="leave --image-size out to plan for the default, or export with it: lightkv inspect then tells",
            )
        size = self.sizes[self.image_sizes.index((width, height))]
        return replace(self, shape=replace(self.shape, vision=size.shape(self.shape.vision)))


def recipe_names() -> list[str]:
    """Names of the recipes that come with this package, sorted."""
    return sorted(path.stem for path in recipe_directory().glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """Read the recipe called `name`.

    Raises:
        UserError: no such recipe, or its file is not valid TOML, misses a key, or has an unknown or mistyped one.
    """
    if name not in recipe_names():
        raise UserError(
            f"there is no recipe called {name!r}{_did_you_mean(name, recipe_names())}",
            expected="one of " + ", ".join(recipe_names()),
            fix="use one of these names",
        )
    return recipe_from_toml((recipe_directory() / f"{name}.toml").read_text(encoding="utf-8"), name)


def recipe_from_toml(text: str, name: str) -> Recipe:
    """Parse a recipe's TOML `text`; `name` names the recipe and its file in messages.

    Raises:
        UserError: as for `load_recipe`.
    """
    toml = _toml_module()
    where = f"recipe {name}"
    try:
        table = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise UserError(f"{where} is not valid TOML: {error}", fix="correct the file at that place") from None
    optional = {"revision": None, "positions": "original", "schedule": [], "tolerances": {}, "size": []}
    required = ("family", "checkpoint", "windows", "text", "vision")
    _check_keys(table, (*required, *optional), required, where)
    values = optional | table
    for key in ("family", "checkpoint", *(["revision"] if "revision" in table else [])):
        _check_type(values[key], "str", f"{where}: {key}")
    if values["positions"] not in POSITIONS:
        raise UserError(f"{where}: positions is {values['positions']!r}", expected="one of " + ", ".join(POSITIONS))
    text_shape = _from_table(TextShape, values["text"], f"{where}: [text]")
    vision_shape = _from_table(VisionShape, values["vision"], f"{where}: [vision]")
    return Recipe(
        name=name,
        family=values["family"],
        checkpoint=values["checkpoint"],
        revision=values["revision"],
        shape=ModelShape(values["family"], text_shape, vision_shape),
        windows=_windows(values["windows"], where),
        schedules=_schedules(values["schedule"], where),
        positions=values["positions"],
        tolerances=_tolerances(values["tolerances"], where),
        sizes=_sizes(values["size"], vision_shape, where),
    )


def recipe_directory() -> Path:
    """`lightkv_export/recipes` in an installed package, `recipes` beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _toml_module() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib


def _windows(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(item) is not int or item < 1 for item in value):
        raise UserError(f"{where}: windows is {value!r}", expected="whole numbers of at least 1, e.g. [4, 2, 1]")
    return tuple(value)


def _schedules(entries: Any, where: str) -> dict[float, tuple[StageSpec, ...]]:
    """[[schedule]] tables, each `keep = 0.55` and `stages = ["11:4:0.5", ...]`."""
    schedules: dict[float, tuple[StageSpec, ...]] = {}
    if not isinstance(entries, list):
        raise UserError(f"{where}: schedule is a single table", expected="an array of tables, [[schedule]]")
    for entry in entries:
        _check_keys(entry, ("keep", "stages"), ("keep", "stages"), f"{where}: [[schedule]]")
        keep, stages = entry["keep"], entry["stages"]
        _check_type(keep, "float", f"{where}: keep of a schedule")
        if not 0 < keep < 1 or keep in schedules:
            raise UserError(f"{where}: [[schedule]] keep = {keep}", expected="between 0 and 1, each keep once")
        if not isinstance(stages, list) or not stages or not all(isinstance(item, str) for item in stages):
            raise UserError(f"{where}: stages of keep {keep} is {stages!r}", expected='stages = ["12:4:0.5", ...]')
        schedules[float(keep)] = tuple(StageSpec.parse(item) for item in stages)
    return schedules


def _sizes(entries: Any, vision: VisionShape, where: str) -> tuple[RecipeSize, ...]:
    """[[size]] tables, each `image = "640x427"` and `tokens = 2144`; the first one is what [vision] describes."""
    if not isinstance(entries, list):
        raise UserError(f"{where}: size is a single table", expected="an array of tables, [[size]]")
    sizes = tuple(_from_table(RecipeSize, entry, f"{where}: [[size]]") for entry in entries)
    images = [parse_image_size(size.image) for size in sizes]
    if len(set(images)) < len(images):
        raise UserError(f"{where}: a [[size]] is given twice", expected="each image size once")
    if sizes and sizes[0].shape(vision) != vision:
        raise UserError(
            f"{where}: the first [[size]], {sizes[0].image}, has other counts than [vision]",
            expected="the default size first, with the counts of [vision]",
        )
    return sizes


def _tolerances(table: Any, where: str) -> dict[str, float]:
    if not isinstance(table, dict):
        raise UserError(f"{where}: tolerances is {table!r}", expected="a table, [tolerances]")
    for key, value in table.items():
        _check_type(value, "float", f"{where}: tolerance {key}")
    return {key: float(value) for key, value in table.items()}


def _from_table(cls: type[_T], table: Any, where: str) -> _T:
    """A flat dataclass from a TOML table; sizes must not be negative."""
    required = [item.name for item in fields(cls) if item.default is MISSING]
    _check_keys(table, [item.name for item in fields(cls)], required, where)
    for item in fields(cls):
        if item.name in table:
            value = table[item.name]
            _check_type(value, str(item.type), f"{where} {item.name}")
            if not isinstance(value, str) and value < (1 if item.name in required else 0):
                raise UserError(f"{where} {item.name} = {value}", expected="a positive size")
    return cls(**table)


def _check_keys(table: Any, known: Any, required: Any, where: str) -> None:
    if not isinstance(table, dict):
        raise UserError(f"{where} is {table!r}", expected="a table")
    for key in table:
        if key not in known:
            raise UserError(
                f"{where} has an unknown key {key!r}{_did_you_mean(key, known)}",
                expected="one of " + ", ".join(known),
                fix="correct or remove the key",
            )
    missing = [key for key in required if key not in table]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}", fix="add the missing keys")


def _check_type(value: Any, type_name: str, where: str) -> None:
    if type(value) not in _TYPES[type_name]:  # exact: True is not an int here
        raise UserError(f"{where} is {value!r}", expected=f"a value of type {type_name}")


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
