"""What a bundle says about itself: the contents of `lightkv.json` as frozen dataclasses. Standard library only.

`check_manifest` refuses contradictions; `manifest_json` turns a manifest into text and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightkv_export.errors import BundleError, UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "lightkv.json"
KEEP_TOLERANCE = 1e-6

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
TENSOR_DTYPES = (*FLOAT_DTYPES, "int64", "int32", "int8", "uint8", "bool")
ROLES = ("vision", "segment", "stage")
PROTOCOLS = {"modern": "scatter", "portable": "append"}  # lowering -> cache protocol
ROPES = ("1d", "mrope")


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
class Keep:
    """One compression level: the share asked for, the share achieved, its stages, and vision tokens cached per layer
    (per image)."""

    requested: float
    keep: float
    stages: tuple[KeepStage, ...]
    vision_tokens_per_layer: tuple[int, ...]


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

    `max_tokens` is the longest uncompressed sequence (vision + text + new tokens) of a request; `image_tokens` counts
    the vision tokens of one image in the uncompressed sequence. `files` holds every file but the manifest itself,
    paths relative to the bundle with forward slashes.
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
    image_tokens: int
    eos_token_ids: tuple[int, ...]
    preprocess: Preprocess
    source: Mapping[str, Any]
    tools: Mapping[str, Any]
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

    def graph_named(self, name: str) -> Graph:
        """The graph called `name`.

        Raises:
            BundleError: there is none.
        """
        for graph in self.graphs:
            if graph.name == name:
                return graph
        raise BundleError(f"no graph named {name!r}", expected=f"one of: {', '.join(g.name for g in self.graphs)}")


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself.

    Raises:
        BundleError: names the contradiction.
    """
    for problem in _problems(manifest):
        raise BundleError(f"{MANIFEST_NAME}: {problem}", fix="export the bundle again")


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


def _problems(m: Manifest) -> Iterator[str]:
    """Contradictions inside a manifest, in words."""
    for name in m.files:
        check_path(name)
    names = {graph.name for graph in m.graphs}
    num_layers = {len(keep.vision_tokens_per_layer) for keep in m.keeps}
    if m.dtype not in FLOAT_DTYPES:
        yield f"dtype {m.dtype!r} is not one of {', '.join(FLOAT_DTYPES)}"
    if PROTOCOLS.get(m.lowering) != m.cache_protocol:
        yield f"lowering {m.lowering!r} with cache protocol {m.cache_protocol!r}; known pairs: {PROTOCOLS}"
    if m.rope not in ROPES:
        yield f"rope {m.rope!r} is not one of {', '.join(ROPES)}"
    if len(names) != len(m.graphs):
        yield "two graphs have the same name"
    if len(num_layers) != 1:
        yield "the keeps disagree about the number of layers"
    if not any(keep.keep == 1.0 and not keep.stages for keep in m.keeps):
        yield "keep 1.0 (the uncompressed model) is missing"
    if not any(m.default_keep in (keep.requested, keep.keep) for keep in m.keeps):
        yield f"default_keep {m.default_keep} is not among the keeps"
    for stage in (stage for keep in m.keeps for stage in keep.stages):
        if stage.graph not in names:
            yield f"a stage after layer {stage.layer} uses graph {stage.graph!r}, which does not exist"
    yield from _graph_problems(m, num_layers)


def _graph_problems(m: Manifest, num_layers: set[int]) -> Iterator[str]:
    """The part of `_problems` about graphs and the files that they use."""
    end = 0
    for graph in m.graphs:
        if graph.role not in ROLES:
            yield f"graph {graph.name!r} has role {graph.role!r}, not one of {', '.join(ROLES)}"
        for tensor in graph.inputs + graph.outputs:
            if tensor.dtype not in TENSOR_DTYPES:
                yield f"graph {graph.name!r}: {tensor.name!r} has unknown dtype {tensor.dtype!r}"
        if graph.role == "segment":
            if graph.layers is None or graph.layers[0] != end:
                yield f"segment {graph.name!r} has layers {graph.layers}, expected them to start at {end}"
                return
            end = graph.layers[1]
    if {end} != num_layers:
        yield f"the segments end at layer {end}, the keeps have {num_layers} layers"
    for file in (*(graph.file for graph in m.graphs), m.embedding.file):
        if m.files and file not in m.files:
            yield f"{check_path(file)!r} is used but not listed in files"


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
