"""`lightkv build BUNDLE`: TensorRT engines for the GPU at hand, or ahead of time with TensorRT-RTX and no GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lightkv_export.cli.console import print_json, print_table, progress, size_text, stdout_to_stderr
from lightkv_export.errors import UserError

GIB = 1 << 30


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser("build", help="build the TensorRT engines of a bundle", description=__doc__)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory of a bundle")
    parser.add_argument(
        "--keep",
        type=float,
        action="append",
        help="build for this keep of the bundle; repeatable (default: every keep below 1.0; 1.0 always runs, as long "
        "as the caches of these suffice)",
    )
    add_engine_options(parser)
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest sequence to serve (default: the bundle's; less saves memory)",
    )
    parser.add_argument("--rebuild", action="store_true", help="build engines again that are up to date")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """The options that `lightkv export --trt` has too."""
    parser.add_argument("--target", default="", metavar="NAME", help="build for this device, see `lightkv targets`")
    parser.add_argument(
        "--compute-capability",
        action="append",
        metavar="SM",
        help="with tensorrt_rtx: build for this GPU architecture, e.g. SM89; repeatable (default: SM86 and SM120)",
    )
    parser.add_argument(
        "--profile-tokens",
        type=int,
        metavar="N",
        help="most tokens that one step may feed (default: all images and 512)",
    )
    parser.add_argument(
        "--profiles",
        type=int,
        choices=(1, 2),
        default=1,
        help="of a segment; 2: decode and prefill apart, which may decode faster and hold weights twice "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="refuse engines whose build needs more than this"
    )


def request_of(args: argparse.Namespace, keeps: tuple[float, ...]) -> Any:
    """The BuildRequest that the options ask for.

    Raises:
        UserError: an option's value makes no sense.
    """
    from lightkv_export.build import BuildRequest

    if args.memory_limit is not None and args.memory_limit <= 0:
        raise UserError(f"--memory-limit is {args.memory_limit:g}", expected="GiB, more than 0")
    return BuildRequest(
        keeps=keeps,
        target=args.target,
        capabilities=tuple(name.upper() for name in args.compute_capability or ()),
        max_tokens=getattr(args, "max_tokens", None) if hasattr(args, "rebuild") else None,  # export has its own
        chunk_tokens=args.profile_tokens,
        num_profiles=args.profiles,
        memory_bytes=None if args.memory_limit is None else int(args.memory_limit * GIB),
        rebuild=getattr(args, "rebuild", False),
    )


def run(args: argparse.Namespace) -> int:
    """Build and print what was made; exit status 0.

    Raises:
        BundleError: not a bundle. UserError, BackendError: see `build_engines`.
    """
    with stdout_to_stderr(), progress(quiet=args.quiet) as on_step:
        from lightkv_export.build import build_engines
        from lightkv_export.bundle import open_bundle

        request = request_of(args, tuple(args.keep or ()))
        bundle = open_bundle(
            args.bundle, on_progress=lambda _name, done, total: on_step("verify the bundle", done, total)
        )
        result = build_engines(bundle, request, on_step)
    if args.json:
        print_json(summary(result))
    else:
        show(result)
    return 0


def summary(result: Any) -> dict[str, Any]:
    """What was built, for --json."""
    receipt = result.receipt
    engines = {
        name: {"bytes": e.size, "build_s": e.build_s, "peak_host_bytes": e.peak_host_bytes, "capacity": e.capacity}
        for name, e in receipt.engines.items()
    }
    return {
        "directory": str(result.directory),
        "library": f"{receipt.library} {receipt.version}",
        "compute_capabilities": list(receipt.capabilities),
        "keeps": list(receipt.keeps),
        "max_tokens": receipt.max_tokens,
        "chunk_tokens": receipt.chunk_tokens,
        "reused": list(result.reused),
        "engines": engines,
    }


def show(result: Any) -> None:
    """What was built, for people."""
    receipt = result.receipt
    rows = [
        (
            name,
            size_text(e.size),
            "up to date" if name in result.reused else f"{e.build_s:.1f} s",
            size_text(e.peak_host_bytes),
            e.capacity or "-",
        )
        for name, e in receipt.engines.items()
    ]
    made_for = ", ".join(receipt.capabilities)
    title = f"{result.directory}: {receipt.library} {receipt.version} for {made_for}"
    print_table(title, ("engine", "size", "built in", "peak memory", "cache rows"), rows)
