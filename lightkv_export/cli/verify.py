"""`lightkv verify BUNDLE`: is the bundle right? Exit status 1 if any comparison fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lightkv_export.cli.console import print_table, progress, stdout_to_stderr

NEW_TOKENS = 64


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser(
        "verify", help="compare a bundle with the reference; made for CI", description=__doc__
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--reference", metavar="MODEL", help="the model to compare with (default: what the bundle was made from)"
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=NEW_TOKENS,
        metavar="N",
        help="tokens compared per answer (default: %(default)s)",
    )
    parser.add_argument(
        "--set", metavar="NAME", help="compare the answers to a frozen set, too (about a second per question and keep)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only N questions of the set, always the same")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON; - is standard output")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the results as JUnit XML")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def run(args: argparse.Namespace) -> int:
    """Compare, print a table and write the reports; exit status 0 if all checks pass, else 1."""
    with stdout_to_stderr(), progress(quiet=args.quiet) as on_case:
        from lightkv_export.frozen_sets import load_set
        from lightkv_export.report import junit_from_checks, update_report, write_text
        from lightkv_export.verify import document_from_checks, verify_bundle
        from lightkv_export.verify_set import verify_answers

        # A wrong name ends here, not minutes later.
        frozen = load_set(args.set).sample(args.limit) if args.set else None
        checks = verify_bundle(
            args.bundle, model=args.reference, new_tokens=args.new_tokens, threads=args.threads, on_case=on_case
        )
        if frozen is not None:
            settings = {"model": args.reference, "threads": args.threads, "on_case": on_case}
            checks += verify_answers(args.bundle, frozen, **settings)
        document = document_from_checks(checks)
        update_report(args.bundle, "verify", document)
        text = json.dumps(document, indent=2) + "\n"
        if args.junit is not None:
            write_text(args.junit, junit_from_checks("lightkv-verify", checks))
        if args.json is not None and str(args.json) != "-":
            write_text(args.json, text)
    if str(args.json) == "-":
        print(text, end="")
    else:
        rows = [
            (c.case, f"{c.keep:g}", c.metric, f"{c.value:.6g}", c.limit, "pass" if c.passed else "FAIL", c.note)
            for c in checks
        ]
        print_table(str(args.bundle), ("case", "keep", "metric", "value", "limit", "verdict", "note"), rows)
        failed = sum(not check.passed for check in checks)
        print(f"{len(checks) - failed} checks passed, {failed} failed")
    return 0 if document["passed"] else 1
