"""`lightkv run BUNDLE --image F --prompt P`: answer one question about images."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from lightkv_export.cli.runtime_options import add_runtime_options, load_model, sampling_from


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser("run", help="answer one question about images", description=__doc__)
    add_runtime_options(parser)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the question; '-' reads it from standard input"
    )
    parser.add_argument("--stream", action="store_true", help="print the answer while it is generated")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print the answer; exit status 0.

    Raises:
        LightKVError: the bundle, an image, the prompt or a setting cannot be used.
    """
    from lightkv_export.cli.console import print_json, size_text, stdout_to_stderr

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    streaming = args.stream and not args.json
    with stdout_to_stderr() if args.json else contextlib.nullcontext():
        result = load_model(args).run(
            prompt,
            args.image,
            keep=args.keep,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling_from(args),
            on_token=_print_piece if streaming else None,
        )
    if args.json:
        print_json(result.as_dict())
        return 0
    print("" if streaming else result.text)
    rate = "" if result.tokens_per_s is None else f", {result.tokens_per_s:.1f} tokens/s"
    print(
        f"[keep {result.keep:.3f}, {result.prompt_tokens} prompt tokens, KV cache {size_text(result.kv_bytes)}, "
        f"first token after {result.ttft_ms:.0f} ms{rate}]",
        file=sys.stderr,
    )
    return 0


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)
