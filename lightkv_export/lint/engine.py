"""The lint's engine: what a finding is, how a rule is declared, and the operator table of a TensorRT version.

A rule is a small generator function that yields messages about what it was given. `@node_rule` calls it for every node
with one of `ops`, `@graph_rule` once per graph. The decorator's settings say when it applies; the function says what is
wrong with the `Case` it is given. Importing a module of this package registers its rules.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightkv_export.lint.view import Dim, Node, View
from lightkv_export.targets import Target, load_target, parse_version

Version = tuple[int, int]

DATA = Path(__file__).resolve().parent.parent / "data" / "trt_ops.json"
ERROR, WARNING = "error", "warning"
GRAPH = Node("", "", "", (), (), {})  # the node of rules about whole graphs


@dataclass(frozen=True)
class Finding:
    """What a rule has to say about a node, or, with `op` empty, about a value (in `node`) or the whole graph."""

    graph: str
    node: str
    op: str
    rule: str
    severity: str
    message: str


@dataclass(frozen=True)
class OpTable:
    """What one TensorRT version documents: operator -> types of its data operands, inputs that must be constant."""

    version: str
    max_opset: int | None
    min_opset: int
    types: dict[str, tuple[str, ...]]
    constant_inputs: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Context:
    """What graphs are checked against. `table` is None for a target that runs ONNX Runtime."""

    name: str
    version: Version | None
    table: OpTable | None
    target: Target | None = None

    @property
    def label(self) -> str:
        return "ONNX Runtime" if self.version is None else f"TensorRT {self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class Case:
    """What a rule looks at: a graph, what it is checked against, and for node rules the node."""

    view: View
    context: Context
    node: Node = GRAPH

    def dtype(self, index: int) -> str:
        """Type of an input of the node, "" if it is unknown or left out."""
        return self.view.dtype(self.node.input(index))

    def shape(self, index: int) -> tuple[Dim, ...]:
        """Shape of an input of the node, () if it is unknown or left out."""
        return self.view.shapes.get(self.node.input(index), ())

    def is_constant(self, index: int) -> bool:
        """Whether an input of the node is known when the engine is built."""
        return self.node.input(index) in self.view.constants


@dataclass(frozen=True)
class Rule:
    """A check and when it applies: for versions `since` <= version < `until`; `runtime` rules also without TensorRT."""

    name: str
    severity: str
    check: Callable[[Case], Iterator[Any]]
    ops: frozenset[str] = frozenset()
    since: Version | None = None
    until: Version | None = None
    runtime: bool = False
    per_node: bool = True

    def applies(self, context: Context) -> bool:
        if context.version is None:
            return self.runtime
        return (self.since is None or context.version >= self.since) and (
            self.until is None or context.version < self.until
        )


RULES: list[Rule] = []


def node_rule(
    name: str,
    ops: str = "",
    *,
    severity: str = ERROR,
    since: Version | None = None,
    until: Version | None = None,
    runtime: bool = False,
) -> Callable:
    """Registers `check(case)`, which yields messages about the case's node; `ops` "" means every operator."""

    def register(check: Callable) -> Callable:
        RULES.append(Rule(name, severity, check, frozenset(ops.split()), since, until, runtime))
        return check

    return register


def graph_rule(
    name: str,
    *,
    severity: str = ERROR,
    since: Version | None = None,
    until: Version | None = None,
    runtime: bool = False,
) -> Callable:
    """Registers `check(case)`, which yields (name of the value that is meant or "", message)."""

    def register(check: Callable) -> Callable:
        RULES.append(Rule(name, severity, check, frozenset(), since, until, runtime, per_node=False))
        return check

    return register


def context_for(name: str) -> Context:
    """What to check against: a target of `lightkv targets`, or a TensorRT version alone, written `trt10.3`.

    Raises:
        UserError: no such target.
    """
    word = name.strip().lower().removeprefix("tensorrt").removeprefix("trt")
    if word and word.replace(".", "").isdigit() and "." in word:
        version = parse_version(word)
        return Context(f"trt{word}", version, op_table(version))
    target = load_target(name)
    version = target.version
    return Context(target.name, version, None if version is None else op_table(version), target)


def check_view(view: View, context: Context) -> list[Finding]:
    """Every rule that applies, on one graph; in the order of the graph's nodes."""
    findings = []
    rules = [rule for rule in RULES if rule.applies(context)]
    for rule in rules:
        if not rule.per_node:
            for value, message in rule.check(Case(view, context)):
                findings.append(Finding(view.name, value, "", rule.name, rule.severity, message))
    for node in view.nodes:
        for rule in rules:
            if rule.per_node and (not rule.ops or node.op in rule.ops):
                for message in rule.check(Case(view, context, node)):
                    findings.append(Finding(view.name, node.name, node.op, rule.name, rule.severity, message))
    return findings


@functools.lru_cache(maxsize=32)
def op_table(version: Version) -> OpTable:
    """The newest documented table that is not newer than `version`; the oldest one for anything older."""
    stored = json.loads(DATA.read_text(encoding="utf-8"))["tensorrt"]
    known = [name for name in stored if parse_version(name) <= version] or list(stored)[:1]
    types: dict[str, tuple[str, ...]] = {}
    constant: dict[str, tuple[int, ...]] = {}
    for name in known:
        for group, ops in stored[name]["ops"].items():
            types |= dict.fromkeys(ops.split(), tuple(group.split()))
        constant |= {op: tuple(inputs) for op, inputs in stored[name].get("constant_inputs", {}).items()}
    newest = stored[known[-1]]
    return OpTable(known[-1], newest["max_opset"], newest["min_opset"], types, constant)


def first_version_with(op: str) -> str:
    """The oldest documented version that has `op`, or ""."""
    stored = json.loads(DATA.read_text(encoding="utf-8"))["tensorrt"]
    return next((name for name in stored if any(op in ops.split() for ops in stored[name]["ops"].values())), "")
