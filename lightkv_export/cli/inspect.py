"""`lightkv inspect BUNDLE`: what a bundle holds, from its manifest alone; with --save-merges, what its stages do.

lightkv inspect BUNDLE --image F --prompt P [--prompt P2] [--keep K] --save-merges merges.png
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightkv_export.bundle import Bundle, open_bundle
from lightkv_export.errors import UserError
from lightkv_export.manifest import Keep, KeepPlan, Manifest, Size, Tensor
from lightkv_export.manifest_json import plain_value
from lightkv_export.schedule import Request

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
REPORT_NAME = "report.json"


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser("inspect", help="show what is in a bundle", description=__doc__)
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle")
    parser.add_argument("--verify", action="store_true", help="check every file's hash, not its size alone")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    merges = parser.add_argument_group("a picture of what the stages merge")
    merges.add_argument("--save-merges", type=Path, metavar="FILE", help="draw it into this PNG file")
    merges.add_argument("--image", metavar="FILE", help="the image that is asked about")
    merges.add_argument(
        "--prompt", action="append", metavar="TEXT", help="the question; repeat it to see what another one changes"
    )
    merges.add_argument(
        "--keep", type=float, metavar="K", help="share of vision tokens to keep (default: the bundle's)"
    )
    merges.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")


def run(args: argparse.Namespace) -> int:
    """Print the bundle, or draw what its stages do; exit status 0.

    Raises:
        BundleError: not a bundle, or a damaged one. UserError: the picture's image, prompt or keep cannot be used.
    """
    if args.save_merges is not None:
        return _save_merges(args)
    for option in ("image", "prompt", "keep"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} without --save-merges", fix="add --save-merges FILE.png, or leave it out")
    from lightkv_export.cli.console import print_json, progress

    with progress(quiet=args.json or not args.verify) as update:
        bundle = open_bundle(args.bundle, verify=args.verify, on_progress=update)
    if args.json:
        print_json(bundle_document(bundle, verified=args.verify))
    else:
        _print_tables(bundle, verified=args.verify)
    return 0


def _save_merges(args: argparse.Namespace) -> int:
    from lightkv_export.cli.console import print_json, stdout_to_stderr

    if args.image is None or not args.prompt:
        raise UserError("--save-merges without an image and a prompt", fix="add --image FILE and --prompt TEXT")
    with stdout_to_stderr():
        from lightkv_export.drawing import draw_merges, row_from_prompt, save_png, seen_units
        from lightkv_export.runtime import load

        model = load(args.bundle, threads=args.threads, verify=args.verify)
        rows = [row_from_prompt(model, args.image, prompt, args.keep) for prompt in args.prompt]
        save_png(draw_merges(seen_units(model, args.image), rows), args.save_merges)
    if args.json:
        prompts = [
            {
                "prompt": row.prompt,
                "answer": row.answer,
                "units": len(row.units),
                "stages": [
                    {"layer": s.layer, "tokens_in": s.tokens_in, "tokens_out": s.tokens_out} for s in row.units[0]
                ],
                "merges_unlike_first": _merges_unlike(row, rows[0]),
            }
            for row in rows
        ]
        print_json({"picture": str(args.save_merges), "prompts": prompts})
    else:
        for row in rows:
            print(f"{row.prompt}  {row.answer}")
        print(f"saved {args.save_merges}")
    return 0


def _merges_unlike(row: Any, first: Any) -> list[int]:
    """After each stage, how many tokens of all units merged otherwise than under the first prompt."""
    pairs = [zip(*units, strict=True) for units in zip(row.units, first.units, strict=True)]
    return [sum(len(s.links - t.links) for s, t in stage) for stage in zip(*pairs, strict=True)]


def bundle_document(bundle: Bundle, *, verified: bool) -> dict[str, Any]:
    """The JSON document: the manifest, each keep's cache bytes for a typical request, the report if there is one.

    A keep's figures are for images of the default size, per image; `sizes` has the cache bytes of every size.
    """
    manifest, request = bundle.manifest, Request()
    units = manifest.sizes[0].units
    return {
        "path": str(bundle.path),
        "verified": verified,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "request": {"images": request.images, "text_tokens": request.text_tokens, "new_tokens": request.new_tokens},
        "keeps": [
            {
                "requested": keep.requested,
                "keep": keep.keep,
                "vision_tokens_per_layer": [units * count for count in keep.vision_tokens_per_layer],
                "kv_bytes": kv_bytes(manifest, keep, request),
                "kv_bytes_vanilla": kv_bytes(manifest, manifest.keep_named(1.0), request),
            }
            for keep in manifest.keeps
        ],
        "sizes": [
            {
                "name": size.name,
                "units": size.units,
                "tokens": size.tokens,
                "vision_tokens": size.image_tokens,
                "keeps": {f"{k.requested:g}": k.plan_for(size.tokens).keep for k in manifest.keeps},
                "kv_bytes": {f"{k.requested:g}": kv_bytes(manifest, k, request, size) for k in manifest.keeps},
            }
            for size in manifest.sizes
        ],
        "manifest": plain_value(manifest),
        "report": _report(bundle),
    }


def kv_bytes(manifest: Manifest, keep: Keep, request: Request, size: Size | None = None) -> int:
    """Cache bytes of `request` at `keep`, read off the cache inputs that the graphs really have.

    `size` is that of the images; None: the bundle's default.
    """
    size = size or manifest.sizes[0]
    counts = keep.plan_for(size.tokens).vision_tokens_per_layer
    row_bytes = [0] * len(counts)
    for tensor in (tensor for graph in manifest.graphs for tensor in graph.inputs):
        if match := re.fullmatch(r"(?:key|value)_cache_(\d+)", tensor.name):
            row_bytes[int(match[1])] += int(tensor.shape[-1]) * ITEM_BYTES[tensor.dtype]
    text = request.text_tokens + request.new_tokens
    rows = (request.images * size.units * count + text for count in counts)
    return request.batch * sum(bytes_ * count for bytes_, count in zip(row_bytes, rows, strict=True))


def _print_tables(bundle: Bundle, *, verified: bool) -> None:
    from lightkv_export.cli.console import print_table, size_text

    manifest, request = bundle.manifest, Request()
    total = sum(entry.size for entry in manifest.files.values())
    checked = "sizes and hashes match" if verified else "sizes match (hashes: --verify)"
    facts = {
        "bundle": f"{bundle.path} (format {manifest.format_version}, {size_text(total)}, {checked})",
        "model": f"{manifest.name} ({manifest.family}), {len(manifest.keeps[0].vision_tokens_per_layer)} layers",
        "dtype, lowering": f"{manifest.dtype}, {manifest.lowering} (cache protocol {manifest.cache_protocol})",
        "positions, rope": f"{manifest.positions}, {manifest.rope}",
        "a request may have": f"{manifest.max_tokens} tokens, {manifest.max_images} images",
        "source": _facts_line(manifest.source),
        "tools": _facts_line(manifest.tools),
    }
    print_table("Bundle", ("", ""), list(facts.items()))
    length = f"{request.images} image, {request.text_tokens} text and {request.new_tokens} new tokens"
    print_table("Image sizes", ("size", "vision tokens", "units", "of tokens each"), _size_rows(manifest))
    columns = ("keep", "units of", "achieved", "stages", "cache", "of vanilla")
    keep_rows = [_keep_row(manifest, keep, plan, request) for keep in manifest.keeps for plan in keep.plans]
    print_table(f"Keeps (cache for {length})", columns, keep_rows)
    graph_rows = [
        (graph.name, _shapes(graph.inputs), _shapes(graph.outputs), size_text(manifest.files[graph.file].size))
        for graph in manifest.graphs
    ]
    print_table("Graphs", ("graph", "inputs", "outputs", "size"), graph_rows)
    graph_files = {graph.file for graph in manifest.graphs}
    other = [(name, size_text(entry.size)) for name, entry in sorted(manifest.files.items()) if name not in graph_files]
    print_table("Weights and other files", ("file", "size"), other)
    if report := _report(bundle):
        print_table(f"Report ({REPORT_NAME})", ("measured", "value"), list(_flat(report)))


def _size_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    default = manifest.sizes[0]
    return [
        (size.name + (" (default)" if size is default else ""), *map(str, (size.image_tokens, size.units, size.tokens)))
        for size in manifest.sizes
    ]


def _keep_row(manifest: Manifest, keep: Keep, plan: KeepPlan, request: Request) -> tuple[str, ...]:
    """What a keep does to units of one length; the cache is that of the first size which has such."""
    from lightkv_export.cli.console import size_text

    stages = ", ".join(
        f"after layer {s.layer}: {s.tokens_in} -> {s.tokens_out} ({s.windows_per_side}x{s.windows_per_side})"
        for s in plan.stages
    )
    default = " (default)" if keep is manifest.keep_named() else ""
    size = next(size for size in manifest.sizes if size.tokens == plan.tokens)
    used, vanilla = (kv_bytes(manifest, one, request, size) for one in (keep, manifest.keep_named(1.0)))
    return (
        f"{keep.requested:g}{default}",
        f"{plan.tokens} ({size.name})",
        f"{plan.keep:.4f}",
        stages or "none",
        size_text(used),
        f"{used / vanilla:.1%}",
    )


def _shapes(tensors: tuple[Tensor, ...]) -> str:
    """One line per tensor; the caches of further layers, which look like the first one's, are only counted."""
    lines, caches = [], 0
    for tensor in tensors:
        if re.match(r"(key|value)_(cache|new)_\d+", tensor.name):
            caches += 1
            if caches > 1:
                continue
        lines.append(f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]")
    return "\n".join(lines + ([f"... {caches} cache arrays in all"] if caches > 1 else []))


def _facts_line(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(facts.items()) if value is not None)


def _report(bundle: Bundle) -> Any:
    """What verify and bench left beside the bundle, or None; it is no part of the bundle, so damage is only told."""
    file = bundle.path / REPORT_NAME
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return {"cannot be read": str(error)}


def _flat(value: Any, name: str = "") -> list[tuple[str, object]]:
    """The scalars of nested mappings as rows; a list is summed up by its length."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flat(item, f"{name}.{key}" if name else str(key))]
    return [(name, f"{len(value)} entries" if isinstance(value, list) else value)]
