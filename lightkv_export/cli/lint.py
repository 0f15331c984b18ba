"""`lightkv lint BUNDLE_OR_ONNX --target T`: what the target's TensorRT would refuse, ignore or get wrong."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightkv_export.cli.console import print_json, print_table, progress, stdout_to_stderr

STATUS_FOUND = 1


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser("lint", help="check graphs against what a target takes", description=__doc__)
    parser.add_argument("path", metavar="BUNDLE_OR_ONNX", type=Path, help="a bundle's directory or an ONNX file")
    parser.add_argument(
        "--target", required=True, metavar="NAME", help="a name of lightkv targets, or a version alone, e.g. trt10.3"
    )
    parser.add_argument(
        "--parser",
        dest="real_parser",  # `parser` is taken: the command line keeps the argument parser there
        choices=("rtx",),
        help="also ask a real parser: TensorRT-RTX (extra trt, no GPU needed)",
    )
    parser.add_argument(
        "--capacity",
        type=int,
        metavar="C",
        help="cache rows that the builder would fix (default: the bundle's max_tokens)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit status 1 if one of them is an error.

    Raises:
        UserError: no such target or file, or a package is missing. BundleError: not a bundle.
    """
    with stdout_to_stderr(), progress(quiet=args.json) as update:
        from lightkv_export.lint import ERROR, context_for, graphs_of, lint_graphs

        context = context_for(args.target)
        graphs = graphs_of(args.path, args.capacity)
        findings = lint_graphs(graphs, context, on_progress=update)
        parser = None
        if args.real_parser:
            from lightkv_export.lint import rtx

            parser = {"name": rtx.PARSER, "version": rtx.parser_version()}
            for done, graph in enumerate(graphs):
                update(f"parse {graph.name}", done, len(graphs))
                findings += rtx.parse(graph.path, graph.name, graph.fixed_axes)
    count = Counter(item.severity for item in findings)
    status = STATUS_FOUND if count[ERROR] else 0
    document = {
        "target": context.name,
        "runtime": context.label,
        "table": context.table.version if context.table else None,
        "parser": parser,
        "graphs": [graph.name for graph in graphs],
        "findings": [asdict(item) for item in findings],
        "counts": dict(count),
    }
    if args.json:
        print_json(document)
        return status
    _print(document)
    return status


def _print(document: dict[str, Any]) -> None:
    table = f", operator table of {document['table']}" if document["table"] else ""
    against = f"{document['target']} ({document['runtime']}{table})"
    if document["parser"]:
        against += f" and the parser of {document['parser']['name']} {document['parser']['version']}"
    findings = document["findings"]
    if findings:
        names = ("severity", "graph", "node", "op", "rule", "message")
        print_table(f"Findings for {against}", names, [[item[name] for name in names] for item in findings])
    counts = (
        ", ".join(f"{number} {severity}s" for severity, number in document["counts"].items()) or "nothing to report"
    )
    print(f"{len(document['graphs'])} graphs against {against}: {counts}")
