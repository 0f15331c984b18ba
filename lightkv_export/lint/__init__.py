"""Lint: what a target will refuse, ignore or get wrong, found in seconds from the graphs' structure; no weight is read.

`lint_graphs(graphs_of(path), context_for("orin-nano-8gb@jp6.2"))` gives findings. Rules are small functions, one file
per group; to add one, write a generator with `@node_rule` or `@graph_rule` in the group where it belongs, and two
graphs in `tests/test_lint.py`: one on which it must fire, one on which it must not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightkv_export.errors import UserError
from lightkv_export.lint import attention, files, operators, quantization, scatter, selection, shapes  # noqa: F401 - they register their rules
from lightkv_export.lint.engine import ERROR, RULES, WARNING, Context, Finding, check_view, context_for
from lightkv_export.lint.view import View, open_view, view_of

__all__ = [
    "ERROR",
    "RULES",
    "WARNING",
    "Context",
    "Finding",
    "GraphFile",
    "View",
    "check_view",
    "context_for",
    "graphs_of",
    "lint_graphs",
    "view_of",
]

MANIFEST = "lightkv.json"


@dataclass(frozen=True)
class GraphFile:
    """An ONNX file to check; `fixed_axes` are symbols that the builder replaces by numbers before it parses."""

    name: str
    path: Path
    fixed_axes: Mapping[str, int] = field(default_factory=dict)


def graphs_of(path: Path, capacity: int | None = None) -> list[GraphFile]:
    """The graphs of a bundle, or of one ONNX file.

    In a bundle, the cache capacity C is fixed at `capacity`, by default the manifest's `max_tokens`, because engines
    are built so; an ONNX file is taken as it is, unless a capacity is given.

    Raises:
        UserError: there is no such file. BundleError: a directory that is no bundle, or a damaged one.
    """
    if path.is_dir():
        from lightkv_export.bundle import open_bundle

        manifest = open_bundle(path, verify=False).manifest
        axes = {"C": capacity or manifest.max_tokens}
        return [GraphFile(graph.name, path / graph.file, axes) for graph in manifest.graphs]
    if not path.is_file():
        raise UserError(f"{path} does not exist", expected="a bundle's directory or an ONNX file")
    return [GraphFile(path.stem, path, {} if capacity is None else {"C": capacity})]


def lint_graphs(
    graphs: Sequence[GraphFile],
    context: Context,
    *,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Finding]:
    """Every rule on every graph.

    Raises:
        UserError: a file is no ONNX model.
    """
    from google.protobuf.message import DecodeError  # late: it comes with onnx, whose absence has a better message

    findings: list[Finding] = []
    for done, graph in enumerate(graphs):
        on_progress(f"lint {graph.name}", done, len(graphs))
        try:
            view = open_view(graph.path, graph.name, graph.fixed_axes)
        except DecodeError as error:
            raise UserError(f"{graph.path} is no ONNX model: {error}", expected="a bundle or an ONNX file") from None
        findings += check_view(view, context)
    return findings
