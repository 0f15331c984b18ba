"""The graphs of a bundle on a backend, and the two lookups around them: token embeddings and image features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lightkv_export.bundle import Bundle
from lightkv_export.errors import BundleError
from lightkv_export.manifest import Graph, Keep
from lightkv_export.runtime.backend import Backend, Buffer, Executable, cast, from_float32, host_dtype
from lightkv_export.runtime.tokens import Tokens


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
        self._loaded: dict[str, Executable] = {}
        self._table = _embedding_table(bundle)

    def executable(self, graph: Graph) -> Executable:
        """The loaded graph."""
        if graph.name not in self._loaded:
            self._loaded[graph.name] = self.backend.load(graph)
        return self._loaded[graph.name]

    def prepare(self, keep: Keep, *, images: bool) -> None:
        """Load what a request needs, so that no load falls into its time to first token."""
        graphs = list(self.segments)
        if images:
            graphs += [self._vision_graph(), *(self.manifest.graph_named(stage.graph) for stage in keep.stages)]
        for graph in graphs:
            self.executable(graph)

    def embed(self, tokens: Tokens, features: Mapping[int, np.ndarray]) -> np.ndarray:
        """Hidden states [1, S, D] of tokens as they enter segment 0, in host form.

        Rows of the embedding table; the rows of vision tokens come from `features` (serial -> [v, D]).
        """
        ids = np.where(tokens.places < 0, tokens.ids, 0)  # a placeholder's own row is never used and may not exist
        hidden = cast(np.asarray(self._table[ids]), self.manifest.embedding.dtype, self.dtype)
        for serial in tokens.serials:
            rows = tokens.keys == -1 - serial
            hidden[rows] = features[serial][tokens.places[rows]]
        return hidden[None]

    def image_features(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels float32 [3, H, W] -> vision tokens [v, D] (host form of the graphs' dtype)."""
        graph = self._vision_graph()
        put, taken = graph.inputs[0], graph.outputs[0]
        expected = tuple(size for size in put.shape[1:])
        if all(isinstance(size, int) for size in expected) and pixels.shape != expected:
            raise BundleError(
                f"preprocessing gives pixels {pixels.shape}", expected=f"{expected}, as the vision graph takes"
            )
        source = self.workspace.put("pixels", put.dtype, from_float32(pixels[None], put.dtype))
        shape = (1, self.manifest.image_tokens, self._table.shape[1])
        target = self.workspace.buffer("features", taken.dtype, shape)
        self.executable(graph).run({put.name: source}, {taken.name: target})
        return self.backend.read(target)[0]

    def _vision_graph(self) -> Graph:
        if self._vision is None:
            raise BundleError(
                f"bundle {self.manifest.name!r} has no vision graph", expected="a bundle that takes images"
            )
        return self._vision


def _embedding_table(bundle: Bundle) -> np.ndarray:
    """The token embedding table [V, D], memory-mapped: only the rows that are looked up are read."""
    table = bundle.manifest.embedding
    return np.memmap(bundle.file(table.file), host_dtype(table.dtype), mode="r", offset=table.offset, shape=table.shape)
