"""Recipes: one declarative TOML file per model. Standard library only.

A recipe says where a model's weights are, how large its layers are (so that a plan needs no weights), and which stages
reach which keep. `load_recipe("llava-1.5-7b")` reads `recipes/llava-1.5-7b.toml`; the file's name is the recipe's name.
The one fact you need: every key is checked, and an unknown one is an error, so a misspelt setting never goes unnoticed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lightkv_export.errors import UserError

POSITIONS = ("restart", "original", "contiguous")
MAX_DISCARD_RATIO = 0.5  # a token of set A can only merge into one of set B, and A is half of a window

_T = TypeVar("_T")
_TYPES = {"int": (int,), "bool": (bool,), "float": (int, float), "str": (str,)}


@dataclass(frozen=True)
class TextShape:
    """Sizes of the language model. Its MLP is gated (three matrices), as in LLaMA, Mistral and Qwen2."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool = False


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the vision encoder and of the projector, for the recipe's default image size.

    Attributes:
        tokens: vision tokens of one image in the language model's sequence.
        tiles: encoder passes per image (LLaVA-NeXT cuts an image into tiles).
        encoder_tokens: tokens of one tile inside the encoder, CLS included.
        layers: encoder layers that run (LLaVA-1.5 reads the last but one, so 23 of 24).
        hidden, intermediate: encoder width and MLP width.
        patch_size, image_size: side of a patch and of a tile, in pixels.
        projector_hidden: width between the projector's two matrices.
        spatial_merge: patches per side that the projector folds into one vision token.
        patch_channels: channels of a patch (6 where an image is fed as two frames).
        gated_mlp: the encoder's MLP has three matrices, not two.
        attention_window: tokens that a windowed encoder layer attends to; 0 if every layer attends to the whole tile.
        global_layers: with `attention_window`, how many layers attend to the whole tile all the same.
    """

    tokens: int
    tiles: int
    encoder_tokens: int
    layers: int
    hidden: int
    intermediate: int
    patch_size: int
    image_size: int
    projector_hidden: int
    spatial_merge: int = 1
    patch_channels: int = 3
    gated_mlp: bool = False
    attention_window: int = 0
    global_layers: int = 0


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know about a model: sizes, no weights."""

    family: str
    text: TextShape
    vision: VisionShape


@dataclass(frozen=True)
class StageSpec:
    """One stage as written by a person: it runs after decoder layer `layer` (0-based), in windows_per_side² windows.

    Raises:
        UserError: a negative layer, fewer than one window per side, or a ratio outside (0, 0.5].
    """

    layer: int
    windows_per_side: int
    discard_ratio: float

    def __post_init__(self) -> None:
        for name, least in (("layer", 0), ("windows_per_side", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UserError(
                    f"stage {self}: {name} is {value!r}",
                    expected=f"a whole number of at least {least}",
                    fix="write a stage as LAYER:WINDOWS:RATIO, e.g. 12:4:0.5",
                )
        if not 0 < self.discard_ratio <= MAX_DISCARD_RATIO:
            raise UserError(
                f"stage {self}: the discard ratio is {self.discard_ratio!r}",
                expected=f"more than 0 and at most {MAX_DISCARD_RATIO} (the share of its vision tokens merged away)",
                fix=f"use a ratio of at most {MAX_DISCARD_RATIO}; to discard more, add a stage",
            )

    def __str__(self) -> str:
        return f"{self.layer}:{self.windows_per_side}:{self.discard_ratio}"

    @classmethod
    def parse(cls, text: str) -> StageSpec:
        """Read "LAYER:WINDOWS:RATIO", e.g. "12:4:0.5": after layer 12, in 4 x 4 windows, discard half."""
        try:
            layer, windows, ratio = text.split(":")
            values = int(layer), int(windows), float(ratio)
        except ValueError:
            raise UserError(
                f"stage {text!r} cannot be read",
                expected="LAYER:WINDOWS:RATIO (two whole numbers and a number up to 0.5)",
                fix="write e.g. 12:4:0.5: after layer 12, in 4 x 4 windows, discard half of the vision tokens",
            ) from None
        return cls(*values)


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
    """

    name: str
    family: str
    checkpoint: str
    revision: str | None
    shape: ModelShape
    windows: tuple[int, ...]
    schedules: Mapping[float, tuple[StageSpec, ...]]
    positions: str = "restart"
    tolerances: Mapping[str, float] = field(default_factory=dict)


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
    optional = {"revision": None, "positions": "restart", "schedule": [], "tolerances": {}}
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
            if value < (1 if item.name in required else 0):
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
