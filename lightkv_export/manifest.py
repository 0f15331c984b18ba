"""What a bundle says about itself: the contents of `lightkv.json` as frozen dataclasses. Standard library only.

`manifest_checks` refuses contradictions; `manifest_json` turns a manifest into text and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightkv_export.errors import BundleError, UserError

FORMAT_VERSION = 2
MANIFEST_NAME = "lightkv.json"
KEEP_TOLERANCE = 1e-6

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
TENSOR_DTYPES = (*FLOAT_DTYPES, "int64", "int32", "int8", "uint8", "bool")
ROLES = ("vision", "segment", "stage")
PROTOCOLS = {"modern": "scatter", "portable": "append"}  # lowering -> cache protocol
ROPES = ("1d", "mrope")
POSITION_TABLE = "positions"  # the table of a size that is no input of the vision graph


def deepstack_name(layer: int) -> str:
    """Output of the vision graph and input of the segment that holds decoder layer `layer`."""
    return f"deepstack_{layer}"


def size_name(width: int, height: int) -> str:
    """An image size in words: "672x504"."""
    return f"{width}x{height}"


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph. `dtype` is a numpy name or "bfloat16"; a dimension is a number or a symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """An ONNX file. `role` is "vision", "segment" or "stage"; a segment holds the layers [first, last)."""

    name: str
    file: str
    role: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class KeepStage:
    """A stage of one keep: runs `graph` after decoder layer `layer` (0-based), which ends segment `after_segment`."""

    layer: int
    windows_per_side: int
    discard_ratio: float
    tokens_in: int
    tokens_out: int
    graph: str
    after_segment: int


@dataclass(frozen=True)
class KeepPlan:
    """What a keep does to units of `tokens` vision tokens: the share of them it keeps, averaged over the layers, its
    stages, and the vision tokens of one unit that each layer caches."""

    tokens: int
    keep: float
    stages: tuple[KeepStage, ...]
    vision_tokens_per_layer: tuple[int, ...]


@dataclass(frozen=True)
class Keep:
    """One compression level: the share asked for, and a plan for every different unit of the bundle's sizes.

    `keep`, `stages` and `vision_tokens_per_layer` are those of the default size's units, for display.
    """

    requested: float
    plans: tuple[KeepPlan, ...]

    @property
    def keep(self) -> float:
        """The share achieved for the default size."""
        return self.plans[0].keep

    @property
    def stages(self) -> tuple[KeepStage, ...]:
        """The stages for the default size."""
        return self.plans[0].stages

    @property
    def vision_tokens_per_layer(self) -> tuple[int, ...]:
        """Vision tokens that each layer caches of one unit of the default size."""
        return self.plans[0].vision_tokens_per_layer

    def plan_for(self, tokens: int) -> KeepPlan:
        """The plan for units of `tokens` vision tokens.

        Raises:
            BundleError: there is none.
        """
        for plan in self.plans:
            if plan.tokens == tokens:
                return plan
        have = ", ".join(str(plan.tokens) for plan in self.plans)
        raise BundleError(f"keep {self.requested:g} has no plan for {tokens} vision tokens", expected=f"one of: {have}")


@dataclass(frozen=True)
class Size:
    """An image size that the bundle takes, and all that follows from it, as the checkpoint's own processor does it.

    Attributes:
        width, height: pixels.
        tokens: vision tokens of one unit. A unit is a run of vision tokens that is merged on its own: a whole image,
            or one tile of it.
        units: units per image.
        prompt: what stands for one image in the rendered chat text: the image token `units` times, and any text
            around it.
        geometry: how pixels are cut, as `runtime.image` takes it; depends on the kind of preprocessing.
        tables: file of constant arrays (npz): the vision graph's inputs besides pixel values, by name; for mRoPE
            also "positions" int64 [3, units * tokens], relative to the position of the image's first token.
        advance: mRoPE: how far the position after the image lies from its first one. None for 1-D positions.
    """

    width: int
    height: int
    tokens: int
    units: int
    prompt: str
    geometry: Mapping[str, Any]
    tables: str | None = None
    advance: int | None = None

    @property
    def name(self) -> str:
        """What `size_name` calls it."""
        return size_name(self.width, self.height)

    @property
    def image_tokens(self) -> int:
        """Vision tokens of one image."""
        return self.units * self.tokens


@dataclass(frozen=True)
class FileEntry:
    """Hash (lower-case hexadecimal) and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Embedding:
    """The token embedding table [vocabulary, hidden], row-major, raw at byte `offset` of `file`."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes pixel values: the kind of preprocessing and the checkpoint's settings for it."""

    kind: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime needs to know before it opens a graph.

    `max_tokens` is the longest uncompressed sequence (vision + text + new tokens) of a request. The first of `sizes`
    is the default. After each of `deepstack_layers`, features of the vision graph are added to the hidden states of
    vision tokens. `files` holds every file but the manifest itself, paths relative to the bundle with forward slashes.
    """

    format_version: int = FORMAT_VERSION
    name: str
    family: str
    model: Mapping[str, Any]
    dtype: str
    lowering: str
    cache_protocol: str
    positions: str
    rope: str
    max_tokens: int
    max_images: int
    default_keep: float
    keeps: tuple[Keep, ...]
    graphs: tuple[Graph, ...]
    embedding: Embedding
    image_token_id: int
    sizes: tuple[Size, ...]
    eos_token_ids: tuple[int, ...]
    preprocess: Preprocess
    source: Mapping[str, Any]
    tools: Mapping[str, Any]
    deepstack_layers: tuple[int, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def keep_named(self, keep: float | None = None) -> Keep:
        """The keep whose requested or achieved share is `keep`; None asks for the bundle's default.

        Raises:
            UserError: the bundle has no such keep; the message lists those it has.
        """
        wanted = self.default_keep if keep is None else keep
        for share in ("requested", "keep"):
            for candidate in self.keeps:
                if abs(getattr(candidate, share) - wanted) <= KEEP_TOLERANCE:
                    return candidate
        have = ", ".join(f"{k.requested:g} (achieves {k.keep:.4g})" for k in self.keeps)
        raise UserError(
            f"bundle {self.name!r} has no keep {wanted:g}",
            expected=f"one of: {have}",
            fix=f"choose one of these, or export the bundle again with --keep {wanted:g} added",
        )

    def size_named(self, name: str) -> Size:
        """The size called `name`, such as "672x504".

        Raises:
            UserError: the bundle has no such size; the message lists those it has.
        """
        for size in self.sizes:
            if size.name == name:
                return size
        raise UserError(
            f"bundle {self.name!r} has no image size {name}",
            expected=f"one of: {', '.join(size.name for size in self.sizes)}",
            fix=f"choose one of these, or export the bundle again with --image-size {name} added",
        )

    def graph_named(self, name: str) -> Graph:
        """The graph called `name`.

        Raises:
            BundleError: there is none.
        """
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise BundleError(f"no graph named {name!r}", expected=f"one of: {', '.join(g.name for g in self.graphs)}")


def check_path(name: str) -> str:
    """`name` itself, if it is a path that stays inside a bundle: relative, forward slashes, no "." or ".." part.

    Raises:
        BundleError: it is not.
    """
    parts = name.split("/")
    bad = any(part in ("", ".", "..") for part in parts) or any(c in name for c in "\\\0") or parts[0][1:2] == ":"
    if bad or name == MANIFEST_NAME or not _is_unicode(name):
        raise BundleError(
            f"{MANIFEST_NAME} names the file {name!r}",
            expected="a relative path inside the bundle, with forward slashes and without '.' and '..'",
            fix="do not use this bundle unless you know who made it; export it again",
        )
    return name


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
