"""From checkpoint to bundle: the visible list of steps.

    resolve -> plan -> (trace -> lower) for each graph -> weights -> assemble

Each step is a function from frozen data to frozen data. Weights are streamed; of the model itself only its shape is
ever in memory. A failure names the step and the steps before it, and leaves nothing behind. An interruption leaves
the finished graphs and weight files, which the next export of the same takes over (see resume).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightkv_export import __version__
from lightkv_export.assets import Assets, load_checkpoint, write_assets
from lightkv_export.bundle import Bundle, BundleWriter
from lightkv_export.checkpoint import check_versions, checkpoint_directory
from lightkv_export.digests import Digests
from lightkv_export.errors import UserError
from lightkv_export.export_plan import Cuts, Plan, plan_cuts
from lightkv_export.families import Family, family_named, resolve_recipe
from lightkv_export.graph_files import GraphFile, GraphJob, graph_jobs
from lightkv_export.lower import LOWERINGS, Lowering, attach_weights, lower, save_graph, used_weights
from lightkv_export.manifest import Embedding, Manifest, Size
from lightkv_export.recipe import Recipe, StageSpec
from lightkv_export.resume import Journal, checkpoint_stamps, fingerprint_of
from lightkv_export.sizes import Layouts, layouts_of, recipe_for, unit_lengths, write_sizes
from lightkv_export.skeleton import Skeleton, checkpoint_names, load_skeleton
from lightkv_export.steps import NOTE, OnStep, Steps
from lightkv_export.trace import DTYPE_NAMES
from lightkv_export.weights import TensorRef, WeightFiles, read_checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")
DEFAULT_MAX_TOKENS = 4096
ROOM_FOR_TEXT = 1024  # beside the largest image, where that alone is longer than the default
EMBEDDING = "embedding"  # stem of the weight file that the runtime maps
NOT_CONTENT = ("out", "overwrite", "fresh", "dump")  # fields of a request that do not decide what files hold


@dataclass(frozen=True)
class ExportRequest:
    """What the user asked for; the command line reads its defaults from here.

    Attributes:
        model: a recipe's name, a local checkpoint directory, or a hub id.
        out: the bundle to create.
        keeps: shares of vision tokens to keep; 1.0 is always added.
        stages: explicit stages instead of keeps.
        image_sizes: (width, height) in pixels, the default first; empty: the recipe's, else the family's.
        dtype: "fp32", "fp16" or "bf16".
        lowering: "modern" or "portable", see lower.py.
        positions: how layers behind a stage number their tokens; None: what the recipe says.
        max_tokens: longest uncompressed sequence of a request; None: 4096, or what one image of every size and a
            prompt need, within the model's limit.
        max_images: images per request.
        build_memory: GiB that building one TensorRT engine may take, for which segments are cut finer; None: no limit.
        link_weights: use the checkpoint's bytes in place where they fit.
        overwrite: replace a bundle at `out`.
        fresh: take nothing over from an interrupted export.
        dump: directory for the intermediate results of every step, or None.
    """

    model: str
    out: Path
    keeps: tuple[float, ...] = (0.55,)
    stages: tuple[StageSpec, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    dtype: str = "fp32"
    lowering: str = "modern"
    positions: str | None = None
    max_tokens: int | None = None
    max_images: int = 4
    build_memory: float | None = None
    link_weights: bool = False
    overwrite: bool = False
    fresh: bool = False
    dump: Path | None = None


def plan_export(
    recipe: Recipe, request: ExportRequest, tokens: Sequence[int] = (), deepstack_layers: Sequence[int] = ()
) -> Plan:
    """The request's cuts; `tokens` and `deepstack_layers` as in `Cuts`."""
    memory = None if request.build_memory is None else int(request.build_memory * 2**30)
    size = DTYPES[request.dtype].itemsize
    return plan_cuts(recipe, Cuts(request.keeps, request.stages, tokens, deepstack_layers, memory, size))


def export_bundle(request: ExportRequest, on_step: OnStep = lambda name, done, total: None) -> Bundle:
    """Runs every step and returns the finished bundle.

    Raises:
        UserError: the model, a keep or the output cannot be used. StepError: a step failed, with its name.
    """
    steps = Steps(on_step, request.dump)
    with BundleWriter(request.out, request.overwrite, fresh=request.fresh) as writer, Digests() as digests:
        with steps.step("resolve"):
            check_versions()
            recipe = resolve_recipe(request.model)
            family = family_named(recipe.family)
            _check_positions(family, request.positions or recipe.positions)
            directory = checkpoint_directory(recipe.checkpoint, recipe.revision)
            checkpoint = load_checkpoint(directory)
            assets = write_assets(checkpoint, writer.path, family.preprocess)  # what is missing is said at once
            layouts = layouts_of(family, checkpoint, recipe, request.image_sizes)
            recipe = recipe_for(recipe, layouts)
            steps.keep("recipe.json", lambda: json.dumps(asdict(recipe), indent=2, default=dict))
        with steps.step("plan"):
            plan = plan_export(recipe, request, unit_lengths(layouts), family.deepstack_layers(checkpoint.config))
            steps.keep("plan.json", lambda: json.dumps(asdict(plan), indent=2))
            journal = writer.resume(_fingerprint(request, recipe, plan, directory), digests)
            if journal.parts:
                on_step(f"{NOTE}taken over from an interrupted export: {', '.join(journal.parts)}", 0, 0)
        with steps.step("trace"):
            stored = read_checkpoint(directory)
            files = WeightFiles(writer.path / "onnx" / "weights", DTYPES[request.dtype], link=request.link_weights)
            for file in {ref.file for ref in stored.values() if files.is_linked(ref)}:
                digests.start(file)  # takes longest where nothing is written
            skeleton = load_skeleton(directory, family, DTYPES[request.dtype], stored)
            weights = _model_weights(skeleton, stored)
            writer.require_space(0 if journal.parts else files.bytes_written(weights.values()))
            max_tokens = max_tokens_of(skeleton, request, layouts)
        files.add(EMBEDDING, {skeleton.embedding_name: weights[skeleton.embedding_name]})
        making = Making(steps, journal, LOWERINGS[request.lowering], weights, files)
        jobs = graph_jobs(skeleton, recipe.shape.text, plan, making.lowering.cache_protocol)
        graphs = [making.graph_file(job, writer.path) for job in jobs]
        with steps.step("weights"):
            steps.keep("weights.json", lambda: json.dumps({n: str(r) for n, r in files.placed.items()}, indent=2))
            making.write_weights()
        with steps.step("assemble"):
            sizes = write_sizes(layouts, graphs[0].graph.inputs, writer.path)
            table = files.placed[skeleton.embedding_name]
            export = Export(request, recipe, plan, graphs, assets, table, checkpoint.config, sizes, max_tokens)
            manifest = manifest_from_export(export, writer.path)
            return writer.finish(manifest, lambda name, done, total: on_step("hash", done, total), digests)


def _fingerprint(request: ExportRequest, recipe: Recipe, plan: Plan, directory: Path) -> str:
    """Of everything that decides what the graph and weight files hold."""
    asked = {name: value for name, value in asdict(request).items() if name not in NOT_CONTENT}
    program = {str(path): path.stat().st_mtime_ns for path in Path(__file__).parent.rglob("*.py")}
    return fingerprint_of(
        {
            "request": asked,
            "recipe": asdict(recipe),
            "plan": asdict(plan),
            "checkpoint": checkpoint_stamps(directory),
            "tools": _tools(),
            "program": program,
        }
    )


def _tools() -> dict[str, str]:
    return {"lightkv-export": __version__} | {name: importlib.metadata.version(name) for name in TOOLS}


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Tracing makes millions of small objects that live until the graph is written: looking for garbage among them
    again and again takes a sixth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect()


@dataclass(frozen=True)
class Making:
    """What writing graphs and weights needs; each finished file is noted down, so that it is not made twice."""

    steps: Steps
    journal: Journal
    lowering: Lowering
    weights: Mapping[str, TensorRef]
    files: WeightFiles

    def graph_file(self, job: GraphJob, root: Path) -> GraphFile:
        """Traces, lowers and writes one graph, unless it is there, and gives its weights a place."""
        noted = self.journal.facts(job.name)
        if noted is not None:
            made = GraphFile.from_facts(noted)
            self._place(made)
            return made
        with _no_collector():
            with self.steps.step("trace", job.name):
                traced = job.trace()
                self.steps.keep(f"{job.name}.program.txt", partial(str, traced.program))
            with self.steps.step("lower", job.name):
                model = lower(traced, self.lowering)
                self.steps.keep(f"{job.name}.onnx.txt", partial(str, model))
                made = GraphFile.of(traced, used_weights(model, traced))
                self._place(made)
                path = root / made.graph.file
                path.parent.mkdir(exist_ok=True)
                attach_weights(model, traced, self.files.placed, path.parent)
                save_graph(model, path)
        self.journal.add(job.name, [path], made.facts())
        return made

    def _place(self, made: GraphFile) -> None:
        self.files.add(made.graph.name, {name: self.weights[name] for name in made.weights})

    def write_weights(self) -> None:
        """Writes (or links) every weight file that is not there, with progress in bytes."""
        sizes = {path: size for path, size in self.files.files().items() if self.journal.facts(path.name) is None}
        written, total = 0, sum(sizes.values())

        def on_bytes(count: int) -> None:
            nonlocal written
            written += count
            self.steps.on_step("weights", written, total)

        for path in sizes:
            self.files.write(path, on_bytes)
            self.journal.add(path.name, [path])


def _check_positions(family: Family, policy: str) -> None:
    if family.rope == "mrope" and policy != "original":
        raise UserError(
            f"position policy {policy!r} for a model with 3-D rotary positions (mRoPE)",
            expected="original: a vision token's position says where in the image it was, so survivors keep theirs",
            fix="leave --positions out",
        )


def max_tokens_of(skeleton: Skeleton, request: ExportRequest, layouts: Layouts) -> int:
    """The bundle's limit: what was asked for, checked against the positions that the model knows and its images."""
    known = known_positions(skeleton.text.config)
    if request.max_tokens is not None and request.max_tokens > known:
        raise UserError(
            f"--max-tokens {request.max_tokens} is beyond the model's {known} positions",
            fix=f"choose at most {known}",
        )
    largest = max(layout.units * layout.tokens for layout in layouts.values())
    limit = request.max_tokens or min(known, max(DEFAULT_MAX_TOKENS, largest + ROOM_FOR_TEXT))
    if largest >= limit:
        raise UserError(
            f"an image of {largest} vision tokens does not fit into {limit} tokens",
            expected="room for one image of every size and a prompt",
            fix=f"choose smaller image sizes, or --max-tokens up to {known}",
        )
    return limit


def known_positions(text: PretrainedConfig) -> int:
    """Tokens that every layer can see at once: all positions, or a sliding window of attention if there is one."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    slides = window is not None and (kinds is None or "sliding_attention" in kinds)
    return min(text.max_position_embeddings, window) if slides else text.max_position_embeddings


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


@dataclass(frozen=True)
class Export:
    """What the steps have made, for the manifest; `embedding` is where the token embedding table lies, `config` the
    checkpoint's."""

    request: ExportRequest
    recipe: Recipe
    plan: Plan
    graphs: Sequence[GraphFile]
    assets: Assets
    embedding: TensorRef
    config: PretrainedConfig
    sizes: tuple[Size, ...]
    max_tokens: int


def manifest_from_export(export: Export, root: Path) -> Manifest:
    """The manifest of the bundle in `root`, files aside."""
    request, recipe, plan = export.request, export.recipe, export.plan
    family = family_named(recipe.family)
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
        rope=family.rope,
        max_tokens=export.max_tokens,
        max_images=request.max_images,
        default_keep=plan.default_keep,
        keeps=plan.keeps(),
        graphs=tuple(made.graph for made in export.graphs),
        embedding=Embedding(file, export.embedding.offset, DTYPE_NAMES[export.embedding.dtype], (rows, columns)),
        image_token_id=family.image_token_id(export.config),
        sizes=export.sizes,
        eos_token_ids=export.assets.eos_token_ids,
        preprocess=export.assets.preprocess,
        source={
            "model": request.model,
            "checkpoint": recipe.checkpoint,
            "revision": recipe.revision,
            "tolerances": dict(recipe.tolerances),
            "positions": request.positions,
        },
        tools=_tools(),
        deepstack_layers=tuple(family.deepstack_layers(export.config)),
    )
