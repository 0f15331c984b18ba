"""`lightkv bench BUNDLE`: time to first token, tokens per second, cache bytes and peak memory of every keep here."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightkv_export.cli.console import print_table, progress, size_text, stdout_to_stderr


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    from lightkv_export.bench import BenchRequest

    default = {item.name: item.default for item in fields(BenchRequest)}
    parser = subparsers.add_parser("bench", help="time to first token, tokens per second, memory", description=__doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--keep", type=float, action="append", help="repeatable (default: every keep of the bundle)")
    parser.add_argument("--prompt", default=default["prompt"], help="(default: %(default)s)")
    for name, text in (
        ("num_images", "pictures in the prompt"),
        ("new_tokens", "tokens generated per run"),
        ("runs", "counted runs per keep"),
        ("warmup", "runs per keep that are not counted"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default[name], metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--image-size", default="", metavar="WxH", help="size of the pictures, one of the bundle's (default: its first)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of one graph (default: all cores)")
    parser.add_argument("--backend", default="ort", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and, as the last line, JSON; the bundle's report.json keeps the figures. Status 0."""
    from lightkv_export.bench import BenchRequest, bench, document_from_figures
    from lightkv_export.report import update_report
    from lightkv_export.runtime import load

    given = {item.name: getattr(args, item.name) for item in fields(BenchRequest) if hasattr(args, item.name)}
    request = BenchRequest(**{**given, "keeps": tuple(args.keep or ())})
    with stdout_to_stderr(), progress(quiet=args.quiet) as on_run:
        model = load(args.bundle, backend=args.backend, device=args.device, threads=args.threads)
        figures = bench(model, request, on_run)
        document = document_from_figures(model, request, figures)
        update_report(args.bundle, "bench", document)
    if not args.json:
        rows = [
            (
                f"{f.keep:g}",
                f.achieved,
                f"{f.ttft_ms.median:.1f} ({f.ttft_ms.least:.1f} to {f.ttft_ms.most:.1f})",
                f"{f.tokens_per_s.median:.1f} ({f.tokens_per_s.least:.1f} to {f.tokens_per_s.most:.1f})",
                size_text(f.kv_bytes),
                "unknown" if f.peak_memory_bytes is None else size_text(f.peak_memory_bytes),
            )
            for f in figures
        ]
        columns = ("keep", "achieved", "TTFT ms, median (range)", "tokens/s, median (range)", "KV cache", "peak memory")
        print_table(f"{args.bundle} on {document['device']}, {request.runs} runs", columns, rows)
    print(json.dumps(document), flush=True)
    return 0
