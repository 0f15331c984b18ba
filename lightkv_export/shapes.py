"""Sizes of a model, of the images it takes, and of a stage: integers that a plan needs. Standard library only."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

from lightkv_export.errors import UserError

MAX_DISCARD_RATIO = 0.5  # a token of set A can only merge into one of set B, and A is half of a window


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
        tokens: vision tokens of one unit in the language model's sequence. A unit is a run of vision tokens that is
            merged on its own: an image, or each of its tiles where these are pictures of their own to the model.
        units: units per image; an image has `units * tokens` vision tokens.
        tiles: encoder passes per image (LLaVA-NeXT cuts an image into tiles).
        encoder_tokens: tokens of one tile inside the encoder, CLS included.
        layers: encoder layers that run (LLaVA-1.5 reads the last but one, so 23 of 24).
        hidden, intermediate: encoder width and MLP width.
        patch_size, image_size: side of a patch and of a (square) tile, in pixels.
        projector_hidden: width between the projector's two matrices; 0 if it is a single matrix (SmolVLM).
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
    projector_hidden: int = 0
    spatial_merge: int = 1
    patch_channels: int = 3
    gated_mlp: bool = False
    attention_window: int = 0
    global_layers: int = 0
    units: int = 1

    @property
    def image_tokens(self) -> int:
        """Vision tokens of one image, all its units."""
        return self.units * self.tokens

    @property
    def patches(self) -> int:
        """Patches of one tile: what the encoder sees without its class token.

        Where an image keeps its own sides (Qwen), it is one tile without a class token, of any number of patches.
        """
        square = (self.image_size // self.patch_size) ** 2
        return square if self.encoder_tokens == square + 1 else self.encoder_tokens


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know about a model: sizes, no weights."""

    family: str
    text: TextShape
    vision: VisionShape

    @property
    def projector_weights(self) -> int:
        """Entries of the projector's matrices."""
        rows = self.vision.hidden * self.vision.spatial_merge**2
        width = self.vision.projector_hidden
        return width * (rows + self.text.hidden) if width else rows * self.text.hidden


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
class RecipeSize:
    """An image size that a recipe lists, as "WIDTHxHEIGHT" in pixels; counts that are 0 are those of [vision]."""

    image: str
    tokens: int
    units: int = 0
    tiles: int = 0
    encoder_tokens: int = 0

    def shape(self, vision: VisionShape) -> VisionShape:
        """`vision` for an image of this size."""
        counts = asdict(self)
        del counts["image"]
        return replace(vision, **{name: count for name, count in counts.items() if count})


def parse_image_size(text: str) -> tuple[int, int]:
    """Read "640x427": width and height in pixels.

    Raises:
        UserError: it is written otherwise, or a side is 0.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if 0 in sides:
        raise UserError(
            f"image size {text!r} cannot be read",
            expected="WIDTHxHEIGHT in pixels, each at least 1",
            fix="write e.g. 640x427: 640 pixels wide and 427 high",
        )
    return sides
