"""`lightkv plan MODEL`: what a keep, or given stages, cost in cache bytes and FLOPs. Needs no weights and no torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from typing import Any

from lightkv_export.advice import Setting, advise
from lightkv_export.errors import UserError
from lightkv_export.fit import WEIGHT_BYTES, Precision, check_precision, predict
from lightkv_export.recipe import Recipe, StageSpec, parse_image_size
from lightkv_export.schedule import Plan, Request, plan, schedule_from_keep, schedule_from_stages
from lightkv_export.targets import Target, load_target

BYTES_PER_ELEMENT = {"fp16": 2, "bf16": 2, "fp32": 4}
_MIB, _GIB = 2**20, 2**30
_GIGA, _TERA = 10**9, 10**12


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser("plan", help="cache bytes and FLOPs of a keep, without weights", description=__doc__)
    default = {item.name: item.default for item in fields(Request)}
    parser.add_argument("model", metavar="MODEL", help="a recipe's name, a local directory or a hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--keep", type=float, help="share of vision tokens to keep, e.g. 0.55 (1.0: uncompressed)")
    what.add_argument(
        "--stage",
        action="extend",
        nargs="+",
        metavar="LAYER:WINDOWS:RATIO",
        help="a stage after LAYER, WINDOWS per side, discarding RATIO of the vision tokens; repeatable",
    )
    for name, text in (
        ("text_tokens", "tokens of the prompt that are not vision tokens"),
        ("new_tokens", "tokens to generate"),
        ("batch", "sequences"),
        ("images", "images per sequence"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default[name], metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--image-size", metavar="WxH", help="an image size that the recipe lists, in pixels (default: its first)"
    )
    parser.add_argument(
        "--dtype", choices=BYTES_PER_ELEMENT, default="fp16", help="of the cache (default: %(default)s)"
    )
    parser.add_argument(
        "--target", metavar="NAME", help="also: memory, fit and speed there; lightkv targets lists them"
    )
    parser.add_argument(
        "--weights",
        choices=("none", *WEIGHT_BYTES),
        default="none",
        help="with --target: how the decoder's weights are stored (default: as --dtype); quantized ones can be "
        "planned, not exported yet",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit status 0.

    Raises:
        UserError: an unknown model, a stage or keep that cannot be had, or a request that makes no sense.
    """
    from lightkv_export.families import resolve_recipe

    target, precision = _target(args)
    recipe = _at_size(resolve_recipe(args.model), args.image_size)
    request = Request(args.text_tokens, args.new_tokens, args.batch, args.images, BYTES_PER_ELEMENT[args.dtype])
    if args.stage is None:
        schedule = schedule_from_keep(recipe, args.keep)
    else:
        specs = [StageSpec.parse(text) for text in args.stage]
        schedule = schedule_from_stages(recipe.shape.text.layers, recipe.shape.vision.tokens, specs)
    result = plan(recipe, schedule, request)
    fit = {} if target is None else target_document(result, target, precision)
    if args.json:
        print(json.dumps(plan_document(result, args.dtype) | fit, indent=2))
        return 0
    _print_tables(result, args.dtype)
    if target is not None:
        _print_target(target, fit)
    return 0


def plan_document(result: Plan, dtype: str) -> dict[str, Any]:
    """The JSON document of a plan.

    Vision tokens are per image (all its units), those of a stage per unit, because every unit is merged on its own;
    bytes and FLOPs are for the whole batch.
    """
    request, units = result.request, result.recipe.shape.vision.units
    return {
        "model": result.recipe.name,
        "requested_keep": result.schedule.requested,
        "keep": result.schedule.keep,
        "stages": [asdict(stage) for stage in result.schedule.stages],
        "units": units,
        "vision_tokens": units * result.schedule.vision_tokens,
        "vision_tokens_per_layer": [units * count for count in result.schedule.vision_tokens_per_layer],
        "text_tokens": request.text_tokens,
        "new_tokens": request.new_tokens,
        "batch": request.batch,
        "images": request.images,
        "dtype": dtype,
        "kv_bytes": result.kv_bytes,
        "kv_bytes_vanilla": result.kv_bytes_vanilla,
        "kv_bytes_per_layer": list(result.kv_bytes_per_layer),
        "flops": result.flops.total,
        "flops_vanilla": result.flops_vanilla.total,
        "flops_by_part": asdict(result.flops),
        "flops_vanilla_by_part": asdict(result.flops_vanilla),
    }


def target_document(result: Plan, target: Target, precision: Precision) -> dict[str, Any]:
    """The part of the JSON document about a target; all memory in bytes."""
    setting = Setting(result, precision)
    need, speed = setting.memory(target), predict(result, target, precision)
    return {
        "target": {"name": target.name, "tensorrt": target.tensorrt, "lowering": target.lowering},
        "weights": precision.weights,
        "memory": asdict(need) | {"total": need.total, "available": target.available_bytes},
        "fits": setting.fits(target),
        "advice": [asdict(item) for item in advise(setting, target)],
        "warnings": list(target.warnings),
        "predicted": asdict(speed) | {"efficiency": asdict(target.efficiency)},
    }


def _at_size(recipe: Recipe, image_size: str | None) -> Recipe:
    return recipe if image_size is None else recipe.at_size(*parse_image_size(image_size))


def _target(args: argparse.Namespace) -> tuple[Target | None, Precision]:
    precision = Precision(args.dtype, args.weights)
    if args.target is None:
        if args.weights != "none":
            raise UserError(f"--weights {args.weights} without a target", fix="add --target NAME; see lightkv targets")
        return None, precision
    target = load_target(args.target)
    check_precision(target, precision)
    return target, precision


def _print_tables(result: Plan, dtype: str) -> None:
    from rich.console import Console
    from rich.table import Table

    schedule, request, units = result.schedule, result.request, result.recipe.shape.vision.units
    counted = "vision tokens" if units == 1 else f"vision tokens (of each of {units} units)"
    stages = Table("after layer", "windows", "discard ratio", counted, title="Stages")
    for stage in schedule.stages:
        windows = f"{stage.windows_per_side} x {stage.windows_per_side}"
        counts = f"{stage.tokens_in} -> {stage.tokens_out}"
        stages.add_row(str(stage.layer), windows, str(stage.discard_ratio), counts)
    totals = Table("", "uncompressed", "this plan", "share", title="Totals")
    memory, work = result.kv_bytes_vanilla, result.flops_vanilla.total
    gib, tera = memory >= _GIB / 10, work >= _TERA / 10  # a tiny model's figures would vanish in the large units
    vision_tokens = units * schedule.vision_tokens
    mean_tokens = schedule.keep * vision_tokens
    for name, vanilla, planned, unit in (
        ("vision tokens, mean per layer and image", vision_tokens, mean_tokens, 1),
        (f"KV cache, {'GiB' if gib else 'MiB'} ({dtype})", memory, result.kv_bytes, _GIB if gib else _MIB),
        ("TFLOPs" if tera else "GFLOPs", work, result.flops.total, _TERA if tera else _GIGA),
    ):
        digits = 1 if unit == 1 else 3
        totals.add_row(name, f"{vanilla / unit:.{digits}f}", f"{planned / unit:.{digits}f}", _share(planned, vanilla))
    console = Console()
    asked = "" if schedule.requested is None else f" (asked for {schedule.requested})"
    console.print(
        f"{result.recipe.name}: keep {schedule.keep:.4f}{asked}; batch {request.batch}, "
        f"{request.images} x {vision_tokens} vision tokens, {request.text_tokens} text tokens, "
        f"{request.new_tokens} new tokens",
        highlight=False,
        soft_wrap=True,
    )
    if schedule.stages:
        console.print(stages)
    console.print(totals)


def _print_target(target: Target, fit: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, memory, speed = Console(), fit["memory"], fit["predicted"]
    columns = ("weights", "KV cache", "activations", "to run", "to build", "the target has")
    rows = Table(*columns, title=f"GiB on {target.name}")
    names = ("weights", "kv", "activations", "total", "build_peak", "available")
    rows.add_row(*(f"{memory[name] / _GIB:.2f}" for name in names))
    console.print(rows)
    runs = f"TensorRT {target.tensorrt}" if target.tensorrt else "ONNX Runtime"
    used = speed["efficiency"]
    rate = f"{speed['tokens_per_s']:,.{0 if speed['tokens_per_s'] >= 100 else 1}f}"
    predicted = (
        f"predicted: first token after {speed['ttft_ms']:,.0f} ms, then {rate} tokens/s "
        f"(roofline at {used['bandwidth']:.0%} of bandwidth, {used['compute']:.0%} of compute: {used['basis']})"
    )
    lines = [
        f"{target.device.title}, {runs}, {target.lowering} lowering: {'fits' if fit['fits'] else 'does not fit'}",
        *(f"  it would fit with {item['text']}" if item["changes"] else f"  {item['text']}" for item in fit["advice"]),
        *(f"  warning: {text}" for text in fit["warnings"]),
        predicted,
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _share(planned: float, vanilla: float) -> str:
    return f"{planned / vanilla:.1%}" if vanilla else "-"
