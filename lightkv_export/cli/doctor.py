"""`lightkv doctor`: driver, versions, memory, power mode and disk of this machine, and what to change."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

STATUS_BLOCKED = 1


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser("doctor", help="check this machine", description=__doc__)
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="also: whether this bundle runs here")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print what was found; exit status 1 if something blocks.

    Raises:
        BundleError: the bundle cannot be opened.
    """
    from lightkv_export.cli.console import print_json, print_table, stdout_to_stderr
    from lightkv_export.doctor import BLOCK, OK, Machine, board_target, examine

    machine = Machine() if args.bundle is None else replace(Machine(), work=args.bundle)
    with stdout_to_stderr():
        checks = list(examine(machine, args.bundle))
    blocked = any(check.status == BLOCK for check in checks)
    if args.json:
        print_json({"target": board_target(machine), "blocked": blocked, "checks": [asdict(item) for item in checks]})
        return STATUS_BLOCKED if blocked else 0
    print_table("This machine", ("", "check", "found"), [(item.status, item.name, item.found) for item in checks])
    for item in checks:
        if item.status != OK:
            print(f"{item.status}: {item.name}: {item.found}")
            print("".join(f"  {word}: {text}\n" for word, text in _advice(item) if text), end="")
    print("something blocks: see above" if blocked else "nothing blocks")
    return STATUS_BLOCKED if blocked else 0


def _advice(item: Any) -> tuple[tuple[str, str], ...]:
    return ("expected", item.expected), ("to do", item.to_do)
