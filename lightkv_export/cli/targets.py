"""`lightkv targets`: the devices that `--target` knows, with what they hold and what runs there."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from lightkv_export.targets import Target, devices, load_target, target_names


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's `subparsers`."""
    parser = subparsers.add_parser("targets", help="list the devices that --target knows", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print every target; exit status 0."""
    from lightkv_export.cli.console import print_json, print_table

    if args.json:
        print_json({"targets": [_document(load_target(name)) for name in target_names()]})
        return 0
    rows = []
    for device in devices():
        target = load_target(device.name)
        rows.append(
            (
                device.name,
                f"{device.sm / 10:.1f}" if device.sm else "-",
                f"{device.memory_gib:g}{' shared' if device.shared_memory else ''}",
                f"{device.bandwidth_gbps:g}",
                f"{device.fp16_tflops:g}{'' if device.verified else ' ?'}",
                " ".join(target.precisions),
                " ".join(device.jetpack) or (f"TensorRT {target.tensorrt}" if target.tensorrt else "ONNX Runtime"),
            )
        )
    columns = ("target", "sm", "GiB", "GB/s", "FP16 TFLOPS", "precisions", "JetPack or runtime")
    print_table("Targets", columns, rows)
    print("A Jetson's release is written DEVICE@jpRELEASE, another GPU's TensorRT version DEVICE@trtVERSION.")
    print("?: from the maker's data sheet, without a second source. More, and the sources: --json.")
    return 0


def _document(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        **{key: value for key, value in asdict(target.device).items() if key not in ("name", "jetpack")},
        "device": target.device.name,
        "jetpack": target.release.name if target.release else None,
        "cuda": target.release.cuda if target.release else None,
        "python": target.release.python if target.release else None,
        "tensorrt": target.tensorrt,
        "tensorrt_rtx": target.has_rtx,
        "lowering": target.lowering,
        "precisions": [name for name in target.precisions if target.has(name)],
        "available_bytes": target.available_bytes,
        "efficiency": asdict(target.efficiency),
        "warnings": list(target.warnings),
    }
