"""One ONNX graph -> one serialized engine, by whichever TensorRT there is.

Networks are strongly typed: the precision is in the graph. Where the cache capacity must be a constant
(TensorScatter), it is written into a copy of the graph in memory; weights stay in the bundle's files, which the
parser finds by the graph's path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightkv_export.engines.library import Library, logger
from lightkv_export.engines.profiles import EnginePlan
from lightkv_export.errors import BackendError

OnProgress = Callable[[str, int, int], None]
"""Called as (phase, steps done, steps in all) while an engine is built."""

NETWORK_FLAGS = ("EXPLICIT_BATCH", "STRONGLY_TYPED")  # the first is gone in 11, where there is no other mode
SHOWN_ERRORS = 4
MORE_MEMORY = "free memory, or export again with finer segments (--build-memory GiB)"
FEWER_OPERATORS = "run `lightkv lint BUNDLE --target NAME`; --lowering portable needs fewer operators"


@dataclass(frozen=True)
class Settings:
    """How to build, beside what.

    Attributes:
        capabilities: compute capabilities of portable engines; empty for a library that builds for the GPU at hand.
        workspace_bytes: limit of the memory that kernels may try out, or None.
        timing_cache: file with measured kernel times, read and written, or None. TensorRT-RTX measures nothing.
    """

    capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Built:
    """A serialized engine (anything with the buffer protocol), and the options that were set for it."""

    blob: Any
    flags: tuple[str, ...]
    warnings: tuple[str, ...]


def compile_graph(library: Library, path: Path, plan: EnginePlan, settings: Settings, on_progress: OnProgress) -> Built:
    """Parse, configure and build one graph.

    Args:
        path: the ONNX file inside its bundle.

    Raises:
        BackendError: the parser or the builder refuses it; carries what the library said, with node names.
    """
    api, log = library.api, logger(library.api)
    builder = api.Builder(log)
    members = {name: library.member("NetworkDefinitionCreationFlag", name) for name in NETWORK_FLAGS}
    flags = [name for name, member in members.items() if member is not None]
    network = builder.create_network(sum(1 << int(members[name]) for name in flags))
    _parse(library, network, log, path, plan)
    config = builder.create_builder_config()
    flags += _configure(library, config, settings)
    for profile in plan.profiles:
        _add_profile(builder, config, profile, plan)
    if settings.timing_cache is not None and not library.builds_ahead:
        _load_timing_cache(config, settings.timing_cache)
    # The monitor must outlive the build, like the logger: the library keeps no reference that Python knows of.
    monitor = config.progress_monitor = _monitor(api, on_progress)
    blob = builder.build_serialized_network(network, config)
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if blob is None:
        raise _failure(library, f"cannot build {plan.graph}", log.errors)
    if settings.timing_cache is not None and not library.builds_ahead:
        settings.timing_cache.write_bytes(memoryview(config.get_timing_cache().serialize()))
    return Built(blob, tuple(flags), tuple(log.warnings))


def _parse(library: Library, network: Any, log: Any, path: Path, plan: EnginePlan) -> None:
    parser = library.api.OnnxParser(network, log)
    if plan.capacity is None:
        parsed = parser.parse(path.read_bytes(), str(path))
    else:
        parsed = parser.parse(with_capacity(path, plan.capacity), str(path))
    if not parsed:
        problems = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"node {p.node_name() or p.node()} ({p.node_operator()}): {p.desc()}" for p in problems]
        raise _failure(library, f"cannot read {plan.graph}", said or log.errors)
    shapes = [network.get_input(i).name for i in range(network.num_inputs) if network.get_input(i).is_shape_tensor]
    if shapes:
        raise BackendError(
            f"{plan.graph}: the inputs {', '.join(shapes)} decide about shapes",
            expected="inputs that are data, which can stay on the GPU",
            fix="export the bundle again with this version of lightkv-export",
        )


def with_capacity(path: Path, capacity: int) -> bytes:
    """The graph in `path`, serialized, with `capacity` for axis C. Weights stay external."""
    model = _load_graph(path)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == "C":
                axis.dim_value = capacity  # a oneof: the name goes
    return model.SerializeToString()


def weight_bytes(path: Path) -> int:
    """Bytes of external weights that a graph refers to."""
    entries = [entry for tensor in _load_graph(path).graph.initializer for entry in tensor.external_data]
    return sum(int(entry.value) for entry in entries if entry.key == "length")


def _load_graph(path: Path) -> Any:
    """An ONNX file without its weights; raises BackendError if the package `onnx` is missing."""
    try:
        import onnx
    except ImportError as error:
        raise BackendError("the Python package 'onnx' is not installed", fix="pip install onnx") from error
    return onnx.load(path, load_external_data=False)


def _configure(library: Library, config: Any, settings: Settings) -> list[str]:
    flags = []
    if settings.capabilities and library.builds_ahead:
        config.num_compute_capabilities = len(settings.capabilities)
        for index, name in enumerate(settings.capabilities):
            config.set_compute_capability(library.member("ComputeCapability", name), index)
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(library.member("MemoryPoolType", "WORKSPACE"), settings.workspace_bytes)
        flags.append(f"WORKSPACE={settings.workspace_bytes}")
    tf32 = library.member("BuilderFlag", "TF32")
    if tf32 is not None:  # on by default; fp32 engines are to agree with ONNX Runtime
        config.clear_flag(tf32)
        flags.append("NO_TF32")
    return flags


def _add_profile(builder: Any, config: Any, profile: dict, plan: EnginePlan) -> None:
    ranges = builder.create_optimization_profile()
    for name, shapes in profile.items():
        ranges.set_shape(name, *shapes)
    if profile and config.add_optimization_profile(ranges) < 0:
        raise BackendError(
            f"{plan.graph}: TensorRT refuses the ranges {profile}", fix="choose another --profile-tokens"
        )


def _load_timing_cache(config: Any, path: Path) -> None:
    """Kernel times of earlier builds. A cache of another version or device is refused by the library: it starts anew
    then."""
    stored = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(stored), False) and stored:
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _monitor(api: Any, on_progress: OnProgress) -> Any:
    """Reports the innermost phase. An exception in the callback cancels the build, and is kept for afterwards."""

    class Monitor(api.IProgressMonitor):
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped_by: BaseException | None = None

        def phase_start(self, name: str, _parent: str | None, steps: int) -> None:
            self.steps[name] = steps

        def step_complete(self, name: str, step: int) -> bool:
            try:
                on_progress(name, step + 1, self.steps.get(name, 0))
            except BaseException as error:  # noqa: BLE001 - not through C++; raised again after the build
                self.stopped_by = error
            return self.stopped_by is None

        def phase_finish(self, name: str) -> None:
            self.steps.pop(name, None)

    return Monitor()


def _failure(library: Library, what: str, said: list[str]) -> BackendError:
    shown = "; ".join(" ".join(line.split()) for line in said[-SHOWN_ERRORS:]) or "no reason given"
    memory = any(word in shown.lower() for word in ("memory", "allocat"))
    return BackendError(
        f"{library.name} {library.version} {what}: {shown}",
        fix=MORE_MEMORY if memory else FEWER_OPERATORS,
    )
