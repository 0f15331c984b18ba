"""Results as people and CI systems read them: a bundle's report.json, and JUnit XML. Standard library only."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightkv_export.errors import UserError

REPORT_NAME = "report.json"


@dataclass(frozen=True)
class Check:
    """One comparison: what was measured, its limit, and whether it holds.

    Attributes:
        case: what was run.
        keep: the keep asked for.
        metric: what was compared.
        value: what was found; `limit`: what is allowed (a text says which way).
        passed: the verdict.
        note: anything a reader of a failure needs.
    """

    case: str
    keep: float
    metric: str
    value: float
    limit: str
    passed: bool
    note: str = ""


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all; raises UserError where it cannot be written."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; raises UserError where it cannot be written."""
    scratch = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}", fix="choose another file") from None


def update_report(bundle: Path, section: str, document: Mapping[str, Any]) -> None:
    """Stores `document` under `section` of the bundle's report.json; other sections stay."""
    path = bundle / REPORT_NAME
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        report = {}
    write_text(path, json.dumps({**report, section: document}, indent=2) + "\n")


def junit_from_checks(suite: str, checks: Sequence[Check]) -> str:
    """JUnit XML with one test case per check, as CI systems show it."""
    failures = str(sum(not check.passed for check in checks))
    root = ET.Element("testsuite", name=suite, tests=str(len(checks)), failures=failures)
    for check in checks:
        name = f"keep {check.keep:g}: {check.metric}"
        case = ET.SubElement(root, "testcase", classname=f"{suite}.{check.case}", name=name)
        if not check.passed:
            failure = ET.SubElement(case, "failure", message=f"{check.value:g}, limit {check.limit}")
            failure.text = check.note
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
