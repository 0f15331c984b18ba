"""`lightkv eval BUNDLE --set NAME`: how well a bundle answers a frozen set, per keep and skill."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightkv_export.cli.console import print_json, print_table, progress, size_text, stdout_to_stderr

if TYPE_CHECKING:
    from lightkv_export.evaluate import KeepScore, Share


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    from lightkv_export.frozen_sets import set_names

    parser = subparsers.add_parser("eval", help="accuracy of every keep on a frozen set", description=__doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--set", required=True, metavar="NAME", help=f"one of: {', '.join(set_names())}")
    parser.add_argument(
        "--keep",
        type=float,
        action="append",
        metavar="K",
        help="repeatable; 1.0 is always measured too (default: every keep of the bundle)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only N questions, always the same (default: all)")
    parser.add_argument("--blank", action="store_true", help="show a grey image instead: what the text alone tells")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of one graph (default: all cores)")
    parser.add_argument("--backend", default="ort", help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cpu for ort, cuda for trt)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")


def run(args: argparse.Namespace) -> int:
    """Answer, print tables or JSON; the bundle's report.json keeps the figures. Exit status 0.

    Raises:
        UserError: no such set or keep, or the set's files were altered. BundleError: not a whole bundle.
    """
    from lightkv_export.evaluate import EvalRequest, document_from_scores, evaluate
    from lightkv_export.frozen_sets import load_set
    from lightkv_export.report import update_report
    from lightkv_export.runtime import load

    request = EvalRequest(keeps=tuple(args.keep or ()), limit=args.limit, blank=args.blank)
    with stdout_to_stderr(), progress(quiet=args.quiet) as on_question:
        frozen = load_set(args.set)
        model = load(args.bundle, backend=args.backend, device=args.device, threads=args.threads)
        scores = evaluate(model, frozen, request, on_question)
        document = document_from_scores(model, frozen, request, scores)
        update_report(args.bundle, "eval_blank" if args.blank else "eval", document)
    if args.json:
        print_json(document)
    else:
        _print_tables(f"{args.bundle} on {args.set}{', blank images' if args.blank else ''}", scores)
    return 0


def _print_tables(title: str, scores: Sequence[KeepScore]) -> None:
    rows = [
        (
            f"{score.keep:g}",
            f"{score.achieved:.3f}",
            _text(score.exact_match),
            "none" if score.of_uncompressed is None else _text(score.of_uncompressed),
            size_text(score.kv_bytes),
            f"{1000 * score.seconds / len(score.answers):.0f}",
        )
        for score in scores
    ]
    columns = ("keep", "achieved", "exact match [95 %]", "of keep 1.0 [95 %]", "KV cache", "ms each")
    print_table(f"{title}, {len(scores[0].answers)} questions", columns, rows)
    skills = [
        (skill, first.questions, *(_text(score.skills[skill]) for score in scores))
        for skill, first in scores[0].skills.items()
    ]
    print_table("Per skill [95 %]", ("skill", "questions", *(f"keep {score.keep:g}" for score in scores)), skills)


def _text(share: Share) -> str:
    return f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
