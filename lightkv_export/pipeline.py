"""From checkpoint to bundle: the visible list of steps.

    resolve -> plan -> trace -> lower -> weights -> assemble

Each step is a function from frozen data to frozen data. Weights are streamed; of the model itself only its shape is
ever in memory. A failure names the step and the steps before it, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import onnx_ir as ir
import torch

from lightkv_export import __version__
from lightkv_export.assets import Assets, write_assets
from lightkv_export.bundle import Bundle, BundleWriter
from lightkv_export.checkpoint import checkpoint_directory
from lightkv_export.engines.cuts import finer_cuts
from lightkv_export.errors import LightKVError, StepError, UserError
from lightkv_export.families import family_named, resolve_recipe
from lightkv_export.lower import LOWERINGS, attach_weights, lower, save_graph, used_weights
from lightkv_export.manifest import Embedding, Graph, Keep, KeepStage, Manifest
from lightkv_export.recipe import Recipe, StageSpec
from lightkv_export.schedule import Schedule, Stage, schedule_from_keep, schedule_from_stages
from lightkv_export.skeleton import Skeleton, checkpoint_names, load_skeleton
from lightkv_export.trace import DTYPE_NAMES, Traced, stage_name, trace_segment, trace_stage, trace_vision
from lightkv_export.weights import TensorRef, place_weights, read_checkpoint

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")
EMBEDDING = "embedding"  # stem of the weight file that the runtime maps

OnStep = Callable[[str, int, int], None]
"""Called as (what is being done, done, in all); bytes while weights are written, else steps."""


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for; the command line reads its defaults from here.

    Attributes:
        model: a recipe's name, a local checkpoint directory, or a hub id.
        out: the bundle to create.
        keeps: shares of vision tokens to keep; 1.0 is always added.
        stages: explicit stages instead of keeps.
        dtype: "fp32", "fp16" or "bf16".
        lowering: "modern" or "portable", see lower.py.
        positions: how layers behind a stage number their tokens; None: what the recipe says.
        max_tokens: longest uncompressed sequence of a request; None: the model's limit, at most 4096.
        max_images: images per request.
        build_memory: GiB that building one TensorRT engine may take, for which segments are cut finer; None: no limit.
        link_weights: use the checkpoint's bytes in place where they fit.
        overwrite: replace a bundle at `out`.
        dump: directory for the intermediate results of every step, or None.
    """

    model: str
    out: Path
    keeps: tuple[float, ...] = (0.55,)
    stages: tuple[StageSpec, ...] = ()
    dtype: str = "fp32"
    lowering: str = "modern"
    positions: str | None = None
    max_tokens: int | None = None
    max_images: int = 4
    build_memory: float | None = None
    link_weights: bool = False
    overwrite: bool = False
    dump: Path | None = None


@dataclass
class Steps:
    """Names the steps as they run: progress for people, `StepError` for what goes wrong, files for `--dump`."""

    on_step: OnStep
    dump: Path | None
    done: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.on_step(name, len(self.done), 0)
        start = time.perf_counter()
        try:
            yield
        except (LightKVError, OSError):
            raise
        except Exception as error:
            raise StepError(
                name, self.done, f"{type(error).__name__}: {error}", fix="report this with --debug's output"
            ) from error
        self.done.append(f"{name} {time.perf_counter() - start:.1f} s")

    def keep(self, name: str, text: Callable[[], str]) -> None:
        """Writes an intermediate result into the dump directory, if there is one."""
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            (self.dump / name).write_text(text(), encoding="utf-8")


@dataclass(frozen=True)
class Plan:
    """The cuts: schedules per keep (1.0 first), segments as layer ranges, and the stages as graphs to build."""

    schedules: tuple[Schedule, ...]
    segments: tuple[tuple[int, int], ...]
    default_keep: float

    @property
    def stages(self) -> dict[str, Stage]:
        """Every different stage once, by graph name."""
        return {stage_name(stage): stage for schedule in self.schedules for stage in schedule.stages}

    def is_cut(self, layer: int) -> bool:
        return any(stage.layer == layer for schedule in self.schedules for stage in schedule.stages)


def plan_export(recipe: Recipe, request: ExportRequest) -> Plan:
    """Schedules for every keep (or the explicit stages), and segments cut at the union of their layers."""
    layers, tokens = recipe.shape.text.layers, recipe.shape.vision.tokens
    vanilla = Schedule(1.0, layers, tokens, ())
    if request.stages:
        chosen = [schedule_from_stages(layers, tokens, request.stages)]
    else:
        chosen = [schedule_from_keep(recipe, keep) for keep in dict.fromkeys(request.keeps) if keep != 1.0]
    cuts = sorted({stage.layer + 1 for schedule in chosen for stage in schedule.stages})
    bounds = [0, *cuts, layers]
    segments = tuple(pairwise(bounds))
    if request.build_memory is not None:
        size = DTYPES[request.dtype].itemsize
        segments = finer_cuts(bounds, recipe.shape.text, size, int(request.build_memory * 2**30))
    first = chosen[0] if chosen else vanilla
    return Plan((vanilla, *chosen), segments, first.requested or first.keep)


def export_bundle(request: ExportRequest, on_step: OnStep = lambda name, done, total: None) -> Bundle:
    """Runs every step and returns the finished bundle.

    Raises:
        UserError: the model, a keep or the output cannot be used. StepError: a step failed, with its name.
    """
    steps = Steps(on_step, request.dump)
    with BundleWriter(request.out, overwrite=request.overwrite) as writer:
        with steps.step("resolve"):
            recipe = resolve_recipe(request.model)
            family = family_named(recipe.family)
            checkpoint = checkpoint_directory(recipe.checkpoint, recipe.revision)
            assets = write_assets(checkpoint, writer.path, family.preprocess)  # what is missing is said at once
            steps.keep("recipe.json", lambda: json.dumps(asdict(recipe), indent=2, default=dict))
        with steps.step("plan"):
            plan = plan_export(recipe, request)
            steps.keep("plan.json", lambda: json.dumps(asdict(plan), indent=2))
        with steps.step("trace"):
            skeleton = load_skeleton(checkpoint, family, DTYPES[request.dtype])
            weights = _model_weights(skeleton, read_checkpoint(checkpoint))
            max_tokens = max_tokens_of(skeleton, request)
            graphs = list(_trace_all(skeleton, recipe, plan, request.lowering, steps))
            for traced in graphs:
                steps.keep(f"{traced.name}.program.txt", partial(str, traced.program))
        with steps.step("lower"):
            models = {traced.name: lower(traced, LOWERINGS[request.lowering]) for traced in graphs}
            for name, model in models.items():
                steps.keep(f"{name}.onnx.txt", partial(str, model))
        with steps.step("weights"):
            onnx = writer.path / "onnx"
            groups = _weight_groups(graphs, models, skeleton, weights)
            placed = _place(onnx / "weights", groups, request, on_step)
            steps.keep("weights.json", lambda: json.dumps({name: str(ref) for name, ref in placed.items()}, indent=2))
            for traced in graphs:
                attach_weights(models[traced.name], traced, placed, onnx)
                save_graph(models[traced.name], onnx / f"{traced.name}.onnx")
        with steps.step("assemble"):
            table = placed[skeleton.embedding_name]
            image_token_id = family.image_token_id(skeleton.model.config)
            export = Export(request, recipe, plan, graphs, assets, table, image_token_id, max_tokens)
            manifest = manifest_from_export(export, writer.path)
            return writer.finish(manifest, lambda name, done, total: on_step("hash", done, total))


def max_tokens_of(skeleton: Skeleton, request: ExportRequest) -> int:
    """The bundle's limit: what was asked for, checked against the positions that the model knows."""
    known = skeleton.text.config.max_position_embeddings
    if request.max_tokens is not None and request.max_tokens > known:
        raise UserError(
            f"--max-tokens {request.max_tokens} is beyond the model's {known} positions",
            fix=f"choose at most {known}",
        )
    return request.max_tokens or min(known, 4096)


def _model_weights(skeleton: Skeleton, stored: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The checkpoint's tensors under the model's names; shapes are compared before anything is read."""
    names = checkpoint_names(skeleton.model, stored)
    for name, parameter in skeleton.model.named_parameters():
        ref = stored[names[name]]
        if ref.shape != tuple(parameter.shape):
            raise UserError(
                f"checkpoint tensor {names[name]} has shape {list(ref.shape)}",
                expected=f"{list(parameter.shape)} by config.json",
                fix="check that weights and config.json belong together",
            )
    return {name: stored[names[name]] for name, _ in skeleton.model.named_parameters()}


def _trace_all(skeleton: Skeleton, recipe: Recipe, plan: Plan, lowering: str, steps: Steps) -> Iterator[Traced]:
    protocol = LOWERINGS[lowering].cache_protocol
    total = 1 + len(plan.segments) + len(plan.stages)
    steps.on_step("trace vision", 0, total)
    yield trace_vision(skeleton, recipe.shape.vision.image_size, recipe.shape.vision.tokens)
    for index, layers in enumerate(plan.segments):
        steps.on_step(f"trace segment {index}", 1 + index, total)
        yield trace_segment(skeleton, index, layers, protocol, emit_query=plan.is_cut(layers[1] - 1))
    for index, stage in enumerate(plan.stages.values()):
        steps.on_step(f"trace {stage_name(stage)}", 1 + len(plan.segments) + index, total)
        yield trace_stage(recipe.shape.text, stage, skeleton.dtype)


def _weight_groups(
    graphs: Sequence[Traced], models: Mapping[str, ir.Model], skeleton: Skeleton, weights: Mapping[str, TensorRef]
) -> dict[str, dict[str, TensorRef]]:
    """Weight file -> its tensors: the embedding table, and for each graph what it reads."""
    groups = {EMBEDDING: {skeleton.embedding_name: weights[skeleton.embedding_name]}}
    for traced in graphs:
        groups[traced.name] = {name: weights[name] for name in used_weights(models[traced.name], traced)}
    return groups


def _place(
    directory: Path, groups: Mapping[str, Mapping[str, TensorRef]], request: ExportRequest, on_step: OnStep
) -> dict[str, TensorRef]:
    """Writes (or links) every tensor once, with progress in bytes."""
    total = sum(ref.length for group in groups.values() for ref in group.values())
    written = 0

    def on_bytes(count: int) -> None:
        nonlocal written
        written += count
        on_step("weights", written, total)

    directory.mkdir(parents=True)
    return place_weights(directory, groups, DTYPES[request.dtype], link=request.link_weights, on_bytes=on_bytes)


@dataclass(frozen=True)
class Export:
    """What the steps have made, for the manifest; `embedding` is where the token embedding table lies."""

    request: ExportRequest
    recipe: Recipe
    plan: Plan
    graphs: Sequence[Traced]
    assets: Assets
    embedding: TensorRef
    image_token_id: int
    max_tokens: int


def manifest_from_export(export: Export, root: Path) -> Manifest:
    """The manifest of the bundle in `root`, files aside."""
    request, recipe, plan = export.request, export.recipe, export.plan
    rows, columns = export.embedding.shape
    file = export.embedding.file.relative_to(root).as_posix()
    return Manifest(
        name=recipe.name,
        family=recipe.family,
        model=asdict(recipe.shape),
        dtype=DTYPE_NAMES[DTYPES[request.dtype]],
        lowering=request.lowering,
        cache_protocol=LOWERINGS[request.lowering].cache_protocol,
        positions=request.positions or recipe.positions,
        rope=family_named(recipe.family).rope,
        max_tokens=export.max_tokens,
        max_images=request.max_images,
        default_keep=plan.default_keep,
        keeps=tuple(_keep(schedule, plan) for schedule in plan.schedules),
        graphs=tuple(_graph(traced) for traced in export.graphs),
        embedding=Embedding(file, export.embedding.offset, DTYPE_NAMES[export.embedding.dtype], (rows, columns)),
        image_token_id=export.image_token_id,
        image_tokens=recipe.shape.vision.tokens,
        eos_token_ids=export.assets.eos_token_ids,
        preprocess=export.assets.preprocess,
        source={
            "model": request.model,
            "checkpoint": recipe.checkpoint,
            "revision": recipe.revision,
            "tolerances": dict(recipe.tolerances),
            "positions": request.positions,
        },
        tools={"lightkv-export": __version__} | {name: importlib.metadata.version(name) for name in TOOLS},
    )


def _graph(traced: Traced) -> Graph:
    return Graph(traced.name, f"onnx/{traced.name}.onnx", traced.role, traced.inputs, traced.outputs, traced.layers)


def _keep(schedule: Schedule, plan: Plan) -> Keep:
    ends = [last for _, last in plan.segments]
    stages = tuple(
        KeepStage(
            layer=stage.layer,
            windows_per_side=stage.windows_per_side,
            discard_ratio=stage.discard_ratio,
            tokens_in=stage.tokens_in,
            tokens_out=stage.tokens_out,
            graph=stage_name(stage),
            after_segment=ends.index(stage.layer + 1),
        )
        for stage in schedule.stages
    )
    requested = schedule.keep if schedule.requested is None else schedule.requested
    return Keep(requested, schedule.keep, stages, schedule.vision_tokens_per_layer)
