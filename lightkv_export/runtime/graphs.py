"""The graphs of a bundle on a backend, and the two lookups around them: token embeddings and image features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lightkv_export.bundle import Bundle
from lightkv_export.errors import BundleError
from lightkv_export.manifest import Graph, Keep, Size, deepstack_name
from lightkv_export.runtime.backend import Backend, Buffer, Executable, cast, host_dtype
from lightkv_export.runtime.image import ImageFeatures
from lightkv_export.runtime.tokens import Tokens
from lightkv_export.runtime.vision import load_tables, output_shape, symbol_values, vision_inputs


class Workspace:
    """Named scratch buffers: one per name, allocated anew only when its shape changes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._buffers: dict[str, Buffer] = {}

    def buffer(self, name: str, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """The buffer called `name` in this shape; contents undefined."""
        held = self._buffers.get(name)
        if held is None or held.shape != shape:
            held = self._buffers[name] = self._backend.empty(dtype, shape)
        return held

    def put(self, name: str, dtype: str, array: np.ndarray) -> Buffer:
        """The buffer called `name` with the contents of a host array."""
        buffer = self.buffer(name, dtype, array.shape)
        self._backend.write(buffer, array)
        return buffer

    def clear(self) -> None:
        """Give the memory back (after a long prefill; decoding needs little)."""
        self._buffers.clear()


class Graphs:
    """Loads graphs when they are first needed; segments in layer order. Serves one step at a time."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.manifest, self.backend = bundle.manifest, backend
        self.workspace = Workspace(backend)
        self.segments = tuple(
            sorted((graph for graph in self.manifest.graphs if graph.role == "segment"), key=lambda graph: graph.layers)
        )
        self._vision = next((graph for graph in self.manifest.graphs if graph.role == "vision"), None)
        self.dtype = next(tensor.dtype for tensor in self.segments[0].inputs if tensor.name == "hidden")
        self._bundle = bundle
        self._loaded: dict[str, Executable] = {}
        self._tables: dict[str, dict[str, np.ndarray]] = {}
        self._table = _embedding_table(bundle)

    def executable(self, graph: Graph) -> Executable:
        """The loaded graph."""
        if graph.name not in self._loaded:
            self._loaded[graph.name] = self.backend.load(graph)
        return self._loaded[graph.name]

    def prepare(self, keep: Keep, units: Iterable[int]) -> None:
        """Load what a request needs, so that no load falls into its time to first token.

        Args:
            units: the different lengths v of its units of vision tokens; none for text alone.
        """
        graphs, plans = list(self.segments), [keep.plan_for(tokens) for tokens in units]
        if plans:
            graphs.append(self._vision_graph())
        graphs += [self.manifest.graph_named(stage.graph) for plan in plans for stage in plan.stages]
        for graph in graphs:
            self.executable(graph)

    def tables(self, size: Size) -> dict[str, np.ndarray]:
        """The constant arrays of an image size by name, read once."""
        if size.name not in self._tables:
            self._tables[size.name] = load_tables(self._bundle, size)
        return self._tables[size.name]

    def embed(self, tokens: Tokens, features: Mapping[int, ImageFeatures]) -> np.ndarray:
        """Hidden states [1, S, D] of tokens as they enter segment 0, in host form.

        Rows of the embedding table; the rows of vision tokens come from `features` (by serial).
        """
        ids = np.where(tokens.places < 0, tokens.ids, 0)  # a placeholder's own row is never used and may not exist
        hidden = cast(np.asarray(self._table[ids]), self.manifest.embedding.dtype, self.dtype)
        return _with_rows(hidden, tokens, {serial: image.rows for serial, image in features.items()})

    def deepstack(self, tokens: Tokens, features: Mapping[int, ImageFeatures]) -> dict[str, np.ndarray]:
        """The DeepStack inputs of the segments by name: [1, S, D] in host form, zeros where text is."""
        shape = (len(tokens), self._table.shape[1])
        return {
            deepstack_name(layer): _with_rows(
                np.zeros(shape, host_dtype(self.dtype)),
                tokens,
                {serial: image.deepstack[place] for serial, image in features.items()},
            )
            for place, layer in enumerate(self.manifest.deepstack_layers)
        }

    def image_features(self, pixels: np.ndarray, size: Size) -> ImageFeatures:
        """Pixels float32 of one image (leading axis included, as `image.pixel_values` gives them) -> its features.

        Raises:
            BundleError: the bundle takes no images, or pixels, tables and graph do not fit together.
        """
        graph = self._vision_graph()
        arrays = vision_inputs(graph, pixels, self.tables(size))
        symbols, tokens, width = symbol_values(graph, arrays), size.image_tokens, self._table.shape[1]
        sources = {
            tensor.name: self.workspace.put(f"vision {tensor.name}", tensor.dtype, arrays[tensor.name])
            for tensor in graph.inputs
        }
        targets = {
            tensor.name: self.workspace.buffer(
                f"vision {tensor.name}", tensor.dtype, output_shape(tensor, symbols, tokens * width)
            )
            for tensor in graph.outputs
        }
        self.executable(graph).run(sources, targets)
        rows = {name: self.backend.read(buffer).reshape(tokens, width) for name, buffer in targets.items()}
        deepstack = tuple(rows[deepstack_name(layer)] for layer in self.manifest.deepstack_layers)
        return ImageFeatures(rows["image_features"], size, deepstack)

    def _vision_graph(self) -> Graph:
        if self._vision is None:
            raise BundleError(
                f"bundle {self.manifest.name!r} has no vision graph", expected="a bundle that takes images"
            )
        return self._vision


def _with_rows(hidden: np.ndarray, tokens: Tokens, rows: Mapping[int, np.ndarray]) -> np.ndarray:
    """`hidden` [S, D] with the rows of the images' tokens, by serial, in their places: [1, S, D]."""
    for serial in tokens.serials:
        places = tokens.keys == -1 - serial
        hidden[places] = rows[serial][tokens.places[places]]
    return hidden[None]


def _embedding_table(bundle: Bundle) -> np.ndarray:
    """The token embedding table [V, D], memory-mapped: only the rows that are looked up are read."""
    table = bundle.manifest.embedding
    return np.memmap(bundle.file(table.file), host_dtype(table.dtype), mode="r", offset=table.offset, shape=table.shape)
