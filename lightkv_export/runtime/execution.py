"""Running one engine: shapes, addresses, and CUDA graphs. See `trt` for the rules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any

from lightkv_export.errors import BackendError
from lightkv_export.manifest import Graph
from lightkv_export.runtime.backend import ITEM_BYTES, Buffer
from lightkv_export.runtime.device import ALIGNMENT, Device, aligned

NEW_ROWS = ("key_new_", "value_new_")  # outputs of the append protocol

Shapes = dict[str, tuple[int, ...]]


class Context:
    """An execution context for one profile. `profile` is the receipt's: input name -> [min, opt, max]."""

    def __init__(self, context: Any, profile: Mapping[str, Any], device: Device) -> None:
        self.context, self._profile, self._device = context, profile, device
        self._shapes: Shapes = {}
        self._addresses: dict[str, int] = {}
        self._generation = -1
        self._needed = 0
        self.settled = False  # whether a plain run followed the last change of shapes or memory
        self.graph: CapturedGraph | None = None

    def fits(self, shapes: Shapes) -> bool:
        """Whether every dynamic input is within this profile's range."""
        return not self.misfits(shapes)

    def misfits(self, shapes: Shapes) -> list[str]:
        """In words, the inputs that are outside."""
        return [
            f"{name} is {shapes[name]}, from {tuple(least)} to {tuple(most)}"
            for name, (least, _, most) in self._profile.items()
            if not all(a <= n <= b for a, n, b in zip(least, shapes[name], most, strict=True))
        ]

    def set_shapes(self, shapes: Shapes) -> None:
        """Tell the shapes of dynamic inputs, if they changed, and see to it that activations have room."""
        dynamic = {name: shapes[name] for name in self._profile}
        if dynamic != self._shapes or not self._needed:
            self.drop_graph()  # a captured graph holds only as long as its context keeps these shapes
            self._shapes, self.settled = {}, False
            for name, shape in dynamic.items():
                if not self.context.set_input_shape(name, shape):
                    raise BackendError(f"TensorRT refuses {shape} as the shape of {name}")
            # At least one byte, so that "known" and "nothing is needed" differ.
            self._needed = max(self.context.update_device_memory_size_for_shapes(), 1)
            self._shapes = dynamic
        arena = self._device.activations
        arena.reserve(self._needed)
        if self._generation != arena.generation:
            self.context.set_device_memory(arena.ptr, arena.nbytes)
            self._generation, self.settled = arena.generation, False

    def output_bytes(self, name: str, dtype: str) -> int:
        """Size of an output for the shapes that are set."""
        return prod(self.context.get_tensor_shape(name)) * ITEM_BYTES[dtype]

    def bind(self, addresses: Mapping[str, int]) -> bool:
        """Tell the addresses that changed; returns whether none did, nor any shared memory."""
        changed = [name for name, ptr in addresses.items() if self._addresses.get(name) != ptr]
        for name in changed:
            if not self.context.set_tensor_address(name, addresses[name]):
                raise BackendError(f"TensorRT refuses address {addresses[name]:#x} for {name}")
            self._addresses[name] = addresses[name]
        return not changed

    def enqueue(self) -> bool:
        """Queue one run on the device's stream."""
        return self.context.execute_async_v3(self._device.handle)

    def drop_graph(self) -> None:
        """Forget the captured graph."""
        if self.graph is not None:
            self.graph.close()
            self.graph = None


class CapturedGraph:
    """A run as a CUDA graph: launching it replays the same kernels on the same addresses."""

    def __init__(self, context: Context, device: Device) -> None:
        self._cuda, self._stream = device.cuda, device.stream
        self.generations = device.generations
        # Relaxed: memory that the garbage collector gives back meanwhile must not spoil the capture.
        mode = self._cuda.enum("cudaStreamCaptureMode", "cudaStreamCaptureModeRelaxed")
        self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            recorded = context.enqueue()
        finally:  # the stream must leave capture mode, whatever happened
            graph = self._cuda.call("cudaStreamEndCapture", self._stream)
        if not recorded:
            raise BackendError("TensorRT cannot be captured here")
        try:
            self._graph = self._cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda.call("cudaGraphDestroy", graph)

    def launch(self) -> None:
        """Queue a replay."""
        self._cuda.call("cudaGraphLaunch", self._graph, self._stream)

    def close(self) -> None:
        """Give it back."""
        self._cuda.release("cudaGraphExecDestroy", self._graph)


class TrtExecutable:
    """A loaded engine with one context per profile."""

    def __init__(self, graph: Graph, engine: Any, contexts: tuple[Context, ...], device: Device, log: Any) -> None:
        self.name, self._engine, self._contexts, self._device, self._log = graph.name, engine, contexts, device, log
        self._outputs = {tensor.name: tensor.dtype for tensor in graph.outputs}
        self._new_rows = [name for name in self._outputs if name.startswith(NEW_ROWS)]
        self.capturable = True

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """See `backend.Executable.run`."""
        shapes = {name: buffer.shape for name, buffer in inputs.items()}
        context = self._context_for(shapes)
        context.set_shapes(shapes)
        addresses = {name: buffer.ptr for name, buffer in (*inputs.items(), *outputs.items())}
        staged = self._stage(inputs, outputs, addresses)
        self._place_unwanted(context, addresses)
        unchanged = context.bind(addresses)
        self._enqueue(context, unchanged)
        if staged:
            self._copy_new_rows(outputs)

    def close(self) -> None:
        """Give back graphs, contexts and the engine, in this order."""
        for context in self._contexts:
            context.drop_graph()
        self._contexts = ()
        self._engine = None

    def _context_for(self, shapes: Shapes) -> Context:
        for context in self._contexts:
            if context.fits(shapes):
                return context
        raise BackendError(
            f"{self.name}: {'; '.join(self._contexts[-1].misfits(shapes))}",
            expected="a step within the ranges that its engine was built for",
            fix="send a shorter prompt, or build again with a larger --profile-tokens",
        )

    def _stage(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], addresses: dict[str, int]) -> bool:
        """Where new cache rows are written: in place, or behind each other in the staging arena.

        They are staged where an address is not aligned, where the view of the past reaches over them (outputs must not
        overlap inputs), and while decoding: their place in the cache changes with every step, a captured graph must
        not. Returns whether they are staged; `addresses` is changed accordingly.
        """
        rows = [outputs[name] for name in self._new_rows]
        pasts = [inputs[name.replace("_new_", "_cache_")] for name in self._new_rows]
        direct = all(
            row.ptr % ALIGNMENT == 0 and not (row.ptr < past.ptr + past.nbytes and past.ptr < row.ptr + row.nbytes)
            for row, past in zip(rows, pasts, strict=True)
        )
        if not rows or (direct and rows[0].shape[2] > 1):
            return False
        pitch, arena = aligned(rows[0].nbytes), self._device.staged
        arena.reserve(pitch * len(rows))
        addresses.update({name: arena.ptr + place * pitch for place, name in enumerate(self._new_rows)})
        return True

    def _copy_new_rows(self, outputs: Mapping[str, Buffer]) -> None:
        """From the staging arena to the caches: one strided copy where the caches lie at equal distances."""
        rows = [outputs[name] for name in self._new_rows]
        width, source, pitch = rows[0].nbytes, self._device.staged.ptr, aligned(rows[0].nbytes)
        steps = {b.ptr - a.ptr for a, b in pairwise(rows)}
        if len(steps) == 1 and min(steps) >= width:
            self._device.copy_rows((rows[0].ptr, steps.pop()), (source, pitch), width, len(rows))
            return
        for place, buffer in enumerate(rows):
            self._device.copy_rows((buffer.ptr, width), (source + place * pitch, pitch), width, 1)

    def _place_unwanted(self, context: Context, addresses: dict[str, int]) -> None:
        """TensorRT writes every output: those that nobody wants get shared memory."""
        unwanted = [name for name in self._outputs if name not in addresses]
        sizes = [aligned(context.output_bytes(name, self._outputs[name])) for name in unwanted]
        arena, offset = self._device.unwanted, 0
        arena.reserve(sum(sizes))
        for name, size in zip(unwanted, sizes, strict=True):
            addresses[name] = arena.ptr + offset
            offset += size

    def _enqueue(self, context: Context, unchanged: bool) -> None:
        """Replay, capture or run: the first step with given shapes and addresses is run, as TensorRT asks for, the
        second captured."""
        if context.graph is not None and unchanged and context.graph.generations == self._device.generations:
            context.graph.launch()
            return
        context.drop_graph()
        if unchanged and context.settled and self.capturable:
            try:
                context.graph = CapturedGraph(context, self._device)
            except BackendError as error:
                self.capturable = False
                # The same words for every segment, so that Python shows them once.
                warnings.warn(f"engines run without CUDA graphs, so decoding is slower: {error.found}", stacklevel=1)
            else:
                context.graph.launch()
                return
        if not context.enqueue():
            raise BackendError(
                f"TensorRT failed in {self.name}: {'; '.join(self._log.errors[-3:]) or 'no reason given'}",
                fix="if it ran out of memory, use a lower keep, a shorter prompt or fewer images",
            )
        context.settled = True
