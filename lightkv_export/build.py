"""Building the TensorRT engines of a finished bundle: `lightkv build`, and the last step of `lightkv-export --trt`.

    library -> plan -> one engine after the other, each with its receipt

An engine is written whole or not at all, and entered into the receipt at once, so a build that was stopped goes on
where it was. The bundle's manifest stays as it is: engines are extra files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightkv_export.bundle import Bundle
from lightkv_export.engines.compiler import OnProgress, weight_bytes
from lightkv_export.engines.library import Library, library_for_building
from lightkv_export.engines.profiles import EnginePlan, Limits, VisionShapes, plan_engines
from lightkv_export.engines.receipt import ENGINES, Engine, Receipt, read_receipt, source_digest, write_receipt
from lightkv_export.engines.worker import Job, Report, compile_here, compile_in_process
from lightkv_export.errors import BundleError, UserError
from lightkv_export.fit import BUILD_COPIES, BUILD_FIXED
from lightkv_export.lint import ERROR, context_for, graphs_of, lint_graphs
from lightkv_export.manifest import Graph, Keep, Manifest
from lightkv_export.targets import load_target

TIMING_CACHE = "timing.cache"
TWO_PROFILES_SINCE = (10, 8)
"""Release notes of TensorRT 10.8: a loss of accuracy with several optimization profiles is fixed. No name in the API
tells."""
STAND_INS = {87: 86, 110: 120}
"""Jetson -> the nearest architecture that TensorRT-RTX has. Such engines show that the graphs build; the board builds
its own."""
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LEAST_WORKSPACE = 64 << 20  # for kernels, when memory is limited
GIB = 1 << 30


@dataclass(frozen=True)
class BuildRequest:
    """How to build; the command line reads its defaults from here.

    Attributes:
        keeps: keeps to build for: their stages, and caches as large as the one that keeps most needs. Empty: every
            keep of the bundle below 1.0. Keep 1.0 needs no stage, so it always runs, as long as its caches suffice.
        target: a target's name (see `targets`), which sets the compute capability and names the directory under
            engines/; empty: the GPU at hand, or `capabilities`; the directory is then named by library, version and
            capabilities.
        capabilities: e.g. ("SM86",), for libraries that build ahead of time.
        max_tokens: longest sequence to serve, in uncompressed tokens; None: the bundle's limit.
        chunk_tokens: most tokens that a step may feed; None: every image of a request and 512 text tokens.
        num_profiles: of a segment: 1, or 2 (decode and prefill apart, which may decode faster and hold weights twice).
        memory_bytes: refuse engines whose build is expected to need more, and limit the kernels' workspace; None:
            no limit.
        rebuild: build engines again that are up to date.
        in_process: build here instead of in one process per engine.
    """

    keeps: tuple[float, ...] = ()
    target: str = ""
    capabilities: tuple[str, ...] = ()
    max_tokens: int | None = None
    chunk_tokens: int | None = None
    num_profiles: int = 1
    memory_bytes: int | None = None
    rebuild: bool = False
    in_process: bool = False

    def __post_init__(self) -> None:
        if self.target and self.capabilities:
            raise UserError("--target and --compute-capability together", fix="leave one of them out")
        if self.num_profiles not in (1, 2):
            raise UserError(f"--profiles is {self.num_profiles}", expected="1, or 2 (decode and prefill apart)")


@dataclass(frozen=True)
class BuildResult:
    """The target directory, its receipt, and the graphs whose engines were up to date."""

    directory: Path
    receipt: Receipt
    reused: tuple[str, ...]


def build_engines(
    bundle: Bundle, request: BuildRequest = BuildRequest(), on_progress: OnProgress = lambda name, done, total: None
) -> BuildResult:
    """Builds every engine that the chosen keeps need and that is not up to date.

    Raises:
        UserError: a keep or a number does not fit the bundle, or a graph does not fit the target. BackendError: no
            TensorRT, or it refuses a graph.
    """
    library, manifest = library_for_building(), bundle.manifest
    keeps = chosen_keeps(manifest, request.keeps)
    capabilities = library.capabilities(_wanted_capabilities(library, manifest, request))
    limits = Limits.of(manifest, request.max_tokens, request.chunk_tokens)
    _check_profiles(library, request.num_profiles)
    if request.target:
        check_for_target(bundle, request.target)
    plans = plan_engines(manifest, keeps, limits, vision_shapes(bundle), request.num_profiles)
    workspaces = {
        plan.graph: _workspace(bundle, manifest.graph_named(plan.graph), request.memory_bytes) for plan in plans
    }
    label = "-".join([library.name, library.version, *capabilities]).lower()
    directory = bundle.path / ENGINES / (load_target(request.target).name if request.target else label)
    achieved = tuple(keep.keep for keep in keeps)
    blank = Receipt(library.name, library.version, capabilities, achieved, limits.max_tokens, limits.chunk)
    receipt = blank if request.rebuild else _continued(directory, blank, manifest, plans)
    reused = tuple(receipt.engines)
    directory.mkdir(parents=True, exist_ok=True)
    write_receipt(directory, receipt)
    for place, plan in enumerate(plans, 1):
        if plan.graph in receipt.engines:
            continue
        label = f"{plan.graph} ({place} of {len(plans)})"
        job = _job(bundle, plan, receipt, directory, workspaces[plan.graph])
        report = _compile(library, job, request.in_process, _labelled(label, on_progress))
        receipt = receipt.with_engine(plan.graph, _entry(manifest, plan, job, report))
        write_receipt(directory, receipt)
    _remove_others(directory, receipt)
    return BuildResult(directory, receipt, reused)


def check_for_target(bundle: Bundle, target: str) -> None:
    """Lints the graphs before anybody waits for an engine; a parser says nothing of the traps that only change results.

    Raises:
        UserError: the target's TensorRT would refuse a graph, or run it wrongly.
    """
    findings = lint_graphs(graphs_of(bundle.path), context_for(target))
    errors = [finding for finding in findings if finding.severity == ERROR]
    if errors:
        first = errors[0]
        raise UserError(
            f"{len(errors)} places in the graphs do not fit {target}, first {first.graph} {first.op}: {first.message}",
            expected="graphs without lint errors",
            fix=f"see all of them with lightkv lint {bundle.path} --target {target}; export with --target {target}",
        )


def vision_shapes(bundle: Bundle) -> VisionShapes:
    """What the vision graph is given for each size: its tables, and the pixels of a black image of that size."""
    from lightkv_export.runtime.image import pixel_values
    from lightkv_export.runtime.vision import load_tables, vision_inputs

    manifest = bundle.manifest
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for graph in (graph for graph in manifest.graphs if graph.role == "vision"):
        for size in manifest.sizes:
            black = np.zeros((size.height, size.width, 3), np.uint8)
            pixels = pixel_values(manifest.preprocess, black, size)
            for name, array in vision_inputs(graph, pixels, load_tables(bundle, size)).items():
                shapes.setdefault(name, []).append(array.shape)
    return {name: tuple(found) for name, found in shapes.items()}


def chosen_keeps(manifest: Manifest, keeps: tuple[float, ...]) -> tuple[Keep, ...]:
    """The bundle's keeps of these names; of none: every keep that has stages, else keep 1.0."""
    if keeps:
        return tuple(manifest.keep_named(keep) for keep in keeps)
    return tuple(keep for keep in manifest.keeps if any(plan.stages for plan in keep.plans)) or manifest.keeps


def _wanted_capabilities(library: Library, manifest: Manifest, request: BuildRequest) -> tuple[str, ...]:
    if not request.target:
        return request.capabilities
    target = load_target(request.target)
    target.check_precision(next(name for name, dtype in DTYPES.items() if dtype == manifest.dtype))
    if target.tensorrt is None:
        raise UserError(f"target {target.name} runs ONNX Runtime; it takes no engines", fix="run the bundle as it is")
    sm = STAND_INS.get(target.device.sm, target.device.sm) if library.builds_ahead else target.device.sm
    return (f"SM{sm}",)


def _check_profiles(library: Library, num_profiles: int) -> None:
    release = tuple(int(part) for part in library.version.split(".")[:2])
    if num_profiles == 2 and not library.builds_ahead and release < TWO_PROFILES_SINCE:
        raise UserError(
            f"TensorRT {library.version} can lose accuracy with two profiles",
            expected="10.8 or newer",
            fix="use --profiles 1",
        )


def _workspace(bundle: Bundle, graph: Graph, memory_bytes: int | None) -> int | None:
    """What a memory limit leaves to the kernels that a build of this graph tries out."""
    if memory_bytes is None:
        return None
    weights = weight_bytes(bundle.file(graph.file))
    needed = BUILD_COPIES * weights + BUILD_FIXED
    left = memory_bytes - needed
    if left < LEAST_WORKSPACE:
        raise UserError(
            f"building {graph.name} ({weights / GIB:.2f} GiB of weights) takes about {needed / GIB:.2f} GiB",
            expected=f"less than the limit of {memory_bytes / GIB:.2f} GiB",
            fix=f"export again with finer segments: --build-memory {memory_bytes / GIB:g}; or raise --memory-limit",
        )
    return left


def _continued(directory: Path, blank: Receipt, manifest: Manifest, plans: tuple[EnginePlan, ...]) -> Receipt:
    """`blank` with those engines of an earlier build that are still what is asked for."""
    try:
        found = read_receipt(directory)
    except BundleError:  # none yet, or damaged: every engine is built
        return blank
    same = ("library", "version", "capabilities")
    if any(getattr(found, name) != getattr(blank, name) for name in same):
        return blank
    for plan in plans:
        engine = found.engines.get(plan.graph)
        if engine is None or (directory / engine.file).name != engine.file:
            continue
        path, wanted = directory / engine.file, plan.as_dict()
        current = (
            engine.source_sha256 == source_digest(manifest, manifest.graph_named(plan.graph))
            and engine.capacity == plan.capacity
            and list(engine.profiles) == wanted["profiles"]
            and path.is_file()
            and path.stat().st_size == engine.size
        )
        if current:
            blank = blank.with_engine(plan.graph, engine)
    return blank


def _job(bundle: Bundle, plan: EnginePlan, receipt: Receipt, directory: Path, workspace: int | None) -> Job:
    graph = bundle.manifest.graph_named(plan.graph)
    return Job(
        library=receipt.library,
        graph=plan.graph,
        onnx=bundle.file(graph.file),
        engine=directory / f"{plan.graph}.engine",
        capacity=plan.capacity,
        profiles=plan.profiles,
        capabilities=receipt.capabilities,
        workspace_bytes=workspace,
        timing_cache=directory / TIMING_CACHE,
    )


def _compile(library: Library, job: Job, in_process: bool, on_progress: OnProgress) -> Report:
    return compile_here(library, job, on_progress) if in_process else compile_in_process(job, on_progress)


def _labelled(label: str, on_progress: OnProgress) -> OnProgress:
    """Progress of one engine under its own name; the phases of TensorRT come and go too fast to be read."""
    on_progress(label, 0, 0)
    return lambda phase, done, total: on_progress(label, done, total)


def _entry(manifest: Manifest, plan: EnginePlan, job: Job, report: Report) -> Engine:
    return Engine(
        file=job.engine.name,
        sha256=report.sha256,
        size=report.size,
        source_sha256=source_digest(manifest, manifest.graph_named(plan.graph)),
        capacity=plan.capacity,
        profiles=tuple(plan.as_dict()["profiles"]),
        dtype=manifest.dtype,
        flags=report.flags,
        build_s=round(report.build_s, 3),
        peak_host_bytes=report.peak_host_bytes,
        peak_device_bytes=report.peak_device_bytes,
    )


def _remove_others(directory: Path, receipt: Receipt) -> None:
    """Removes engine files that the receipt does not name: they were built for other keeps and can never be loaded."""
    named = {engine.file for engine in receipt.engines.values()}
    for path in directory.glob("*.engine"):
        if path.name not in named:
            path.unlink()
