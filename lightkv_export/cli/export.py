"""`lightkv-export MODEL`: a checkpoint becomes a bundle of ONNX graphs with the LightKV stages of every keep."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightkv_export.cli.build import add_engine_options, request_of, show, summary
from lightkv_export.cli.console import print_json, print_table, progress, size_text, stdout_to_stderr
from lightkv_export.errors import UserError
from lightkv_export.recipe import POSITIONS, StageSpec, parse_image_size
from lightkv_export.targets import load_target

DTYPES = ("fp32", "fp16", "bf16")
LOWERINGS = ("modern", "portable")


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser("export", help="make a bundle from a model", description=__doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="a recipe's name, a local checkpoint directory, or a hub id (ORG/NAME@REVISION)"
    )
    _add_schedule_options(parser.add_mutually_exclusive_group())
    parser.add_argument(
        "--image-size",
        action="append",
        metavar="WxH",
        help="an image size to serve, in pixels, as the model's processor would be given it; repeatable, the first is "
        "the default; images of other sizes are fitted to the nearest (default: the recipe's, else the family's)",
    )
    parser.add_argument("--out", type=Path, help="directory to create (default: out/<model>)")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and cache (default: fp32; for a GPU: fp16)")
    parser.add_argument(
        "--lowering",
        choices=LOWERINGS,
        help="modern: opset 24, ONNX Runtime 1.28+, TensorRT 10.15+; portable: opset 20, TensorRT 10.0+ "
        "(default: what the target or the installed TensorRT takes, else modern)",
    )
    parser.add_argument(
        "--positions", choices=POSITIONS, help="how layers behind a stage number their tokens (default: the recipe's)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest sequence, vision tokens uncompressed (default: the model's, at most 4096)",
    )
    parser.add_argument(
        "--max-images", type=int, default=4, metavar="N", help="images per request (default: %(default)s)"
    )
    parser.add_argument(
        "--link-weights", action="store_true", help="hard-link the checkpoint's files where no byte changes"
    )
    _add_trt_options(parser.add_argument_group("TensorRT"))
    parser.add_argument("--overwrite", action="store_true", help="replace the bundle at --out")
    parser.add_argument("--fresh", action="store_true", help="take nothing over from an interrupted export")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write the steps' intermediate results there")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def _add_schedule_options(what: Any) -> None:
    what.add_argument(
        "--keep",
        type=float,
        action="append",
        help="share of vision tokens to keep, e.g. 0.55; repeatable, the first is the bundle's default; 1.0 (the "
        "uncompressed model) is always in the bundle (default: 0.55)",
    )
    what.add_argument(
        "--stage",
        action="extend",
        nargs="+",
        metavar="LAYER:WINDOWS:RATIO",
        help="instead of a keep: a stage after LAYER, WINDOWS per side, RATIO of vision tokens discarded; repeatable",
    )


def _add_trt_options(engines: Any) -> None:
    engines.add_argument(
        "--trt",
        action="store_true",
        help="build engines too: for the GPU here with tensorrt, else ahead of time with tensorrt_rtx (needs no GPU)",
    )
    engines.add_argument(
        "--build-memory", type=float, metavar="GIB", help="cut segments so that building an engine stays below this"
    )
    add_engine_options(engines)


def run(args: argparse.Namespace) -> int:
    """Export and print what was made; exit status 0.

    Raises:
        UserError: the model, a keep or the output cannot be used. StepError: a step failed.
    """
    for name in ("max_tokens", "max_images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}", expected="at least 1")
    image_sizes = tuple(parse_image_size(text) for text in args.image_size or ())
    with stdout_to_stderr(), progress(quiet=args.quiet) as on_step:
        from lightkv_export.pipeline import ExportRequest, export_bundle

        args.dtype, args.lowering = _for_target(args)
        engines = request_of(args, ()) if args.trt else None  # wrong options are said before any work
        given = {item.name: getattr(args, item.name) for item in fields(ExportRequest) if hasattr(args, item.name)}
        given |= {
            "keeps": tuple(args.keep or (0.55,)),
            "stages": tuple(StageSpec.parse(text) for text in args.stage or ()),
            "image_sizes": image_sizes,
            "out": args.out or Path("out") / Path(args.model).name,
        }
        bundle = export_bundle(ExportRequest(**given), on_step)
        built = _build(bundle, engines, on_step) if engines else None
    if args.json:
        print_json(_document(bundle) | ({"engines": summary(built)} if built else {}))
        return 0
    _show(bundle)
    if built:
        show(built)
    print(f'try: lightkv run {given["out"]} --image FILE --prompt "What is in the picture?"')
    return 0


def _document(bundle: Any) -> dict[str, Any]:
    manifest = bundle.manifest
    keeps = [{"requested": k.requested, "keep": k.keep, "stages": [s.layer for s in k.stages]} for k in manifest.keeps]
    graphs = [graph.name for graph in manifest.graphs]
    sizes = [{"name": size.name, "tokens": size.tokens, "units": size.units} for size in manifest.sizes]
    return {"bundle": str(bundle.path), "bytes": _num_bytes(bundle), "keeps": keeps, "sizes": sizes, "graphs": graphs}


def _show(bundle: Any) -> None:
    rows = [
        (
            f"{k.requested:g}",
            k.keep,
            " ".join(f"{s.layer}:{s.windows_per_side}:{s.discard_ratio:g}" for s in k.stages) or "none",
        )
        for k in bundle.manifest.keeps
    ]
    title = f"{bundle.path}: {len(bundle.manifest.graphs)} graphs, {size_text(_num_bytes(bundle))}"
    print_table(title, ("keep", "achieved", "stages"), rows)
    sizes = ", ".join(f"{size.name} ({size.image_tokens} vision tokens)" for size in bundle.manifest.sizes)
    print(f"image sizes: {sizes}")


def _num_bytes(bundle: Any) -> int:
    return sum(entry.size for entry in bundle.manifest.files.values())


def _for_target(args: argparse.Namespace) -> tuple[str, str]:
    """Dtype and lowering: as asked for, else what the target takes, else what the installed TensorRT takes.

    Raises:
        UserError: no such target, or it lacks the dtype. BackendError: `--trt` without a TensorRT, said before any
            work.
    """
    dtype, lowering = "fp32", "modern"
    if args.target:
        target = load_target(args.target)
        dtype, lowering = "fp16" if target.tensorrt else "fp32", target.lowering
        target.check_precision(args.dtype or dtype)
    if args.trt:
        from lightkv_export.engines.library import library_for_building

        dtype, newest = "fp16", library_for_building().lowering
        lowering = lowering if args.target else newest
    return args.dtype or dtype, args.lowering or lowering


def _build(bundle: Any, request: Any, on_step: Any) -> Any:
    from lightkv_export.build import build_engines

    return build_engines(bundle, request, on_step)
