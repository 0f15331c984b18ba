"""Options that `lightkv run` and `lightkv chat` share. Defaults come from the dataclasses of the runtime."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lightkv_export.errors import UserError

if TYPE_CHECKING:
    from lightkv_export.runtime.model import Model
    from lightkv_export.runtime.sampling import Sampling


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """BUNDLE, images, keep, length, backend and sampling."""
    from lightkv_export.runtime.backend import BACKENDS
    from lightkv_export.runtime.generation import DEFAULT_NEW_TOKENS
    from lightkv_export.runtime.sampling import Sampling

    default = Sampling()
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of a bundle")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; repeat for several")
    parser.add_argument(
        "--keep", type=float, metavar="K", help="share of vision tokens to keep (default: the bundle's)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"longest answer (default: {DEFAULT_NEW_TOKENS}, or what still fits)",
    )
    run = parser.add_argument_group("where to run")
    run.add_argument("--backend", default=BACKENDS[0], help=f"one of: {', '.join(BACKENDS)} (default: %(default)s)")
    run.add_argument("--device", help="cpu or cuda (default: cpu for ort, cuda for trt)")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    run.add_argument(
        "--no-verify", action="store_true", help="skip the hashes of the bundle's files (sizes are still checked)"
    )
    choice = parser.add_argument_group("how tokens are chosen")
    choice.add_argument(
        "--temperature", type=float, default=default.temperature, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    choice.add_argument("--top-k", type=int, default=default.top_k, metavar="K", help="0 is off (default: %(default)s)")
    choice.add_argument(
        "--top-p", type=float, default=default.top_p, metavar="P", help="1 is off (default: %(default)s)"
    )
    choice.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")


def sampling_from(args: argparse.Namespace) -> Sampling:
    """The sampling that the options ask for.

    Raises:
        UserError: a value out of range, or one that greedy decoding would ignore.
    """
    from lightkv_export.runtime.sampling import Sampling

    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)
    if sampling.temperature == 0 and sampling != Sampling():
        raise UserError(
            "--top-k, --top-p and --seed have no effect at temperature 0",
            fix="add --temperature (0.7, say), or leave them out",
        )
    return sampling


def load_model(args: argparse.Namespace) -> Model:
    """The bundle that the options name, ready to run."""
    from lightkv_export.runtime.model import load

    return load(args.bundle, backend=args.backend, device=args.device, threads=args.threads, verify=not args.no_verify)
