"""A bundle on this machine: whether its engines may be loaded here, and whether its lowering suits the runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightkv_export.bundle import open_bundle
from lightkv_export.doctor.board import board_target
from lightkv_export.doctor.checks import BLOCK, OK, WARN, Check
from lightkv_export.doctor.gpu import RTX_PACKAGES, tensorrt_version
from lightkv_export.doctor.machine import Machine
from lightkv_export.doctor.python import MODERN_ORT
from lightkv_export.engines.receipt import Receipt, read_receipt, target_directories
from lightkv_export.errors import BundleError
from lightkv_export.targets import MODERN_SINCE, parse_version

GROUP = "bundle"
BUILD = "lightkv build BUNDLE, here"


def bundle_checks(machine: Machine, path: Path) -> Iterator[Check]:
    """The bundle at `path`: its lowering, and each directory of engines with its receipt.

    Raises:
        BundleError: there is no bundle, or it is damaged.
    """
    bundle = open_bundle(path, verify=False)
    yield _lowering(machine, bundle.manifest.lowering)
    for directory in target_directories(path):
        try:
            yield _engines(machine, directory.name, read_receipt(directory))
        except BundleError as error:
            yield Check(GROUP, f"engines {directory.name}", BLOCK, error.found, error.expected, error.fix)
    if not target_directories(path):
        yield Check(GROUP, "engines", OK, "none: the bundle runs with ONNX Runtime", "", f"for TensorRT: {BUILD}")


def _lowering(machine: Machine, lowering: str) -> Check:
    """The modern lowering wants TensorRT 10.15 or ONNX Runtime 1.28; the portable one runs everywhere."""
    runtimes = (
        ("TensorRT", tensorrt_version(machine), MODERN_SINCE),
        ("ONNX Runtime", machine.version("onnxruntime-gpu") or machine.version("onnxruntime"), MODERN_ORT),
    )
    able = [f"{name} {found}" for name, found, least in runtimes if found and parse_version(found) >= least]
    if lowering == "portable" or able:
        return Check(GROUP, "lowering", OK, lowering + (f", for {' and '.join(able)}" if lowering == "modern" else ""))
    target = board_target(machine)
    again = f"export again with --lowering portable{f' (or --target {target})' if target else ''}"
    return Check(GROUP, "lowering", BLOCK, lowering, "TensorRT 10.15 or ONNX Runtime 1.28, or newer", again)


def _engines(machine: Machine, name: str, receipt: Receipt) -> Check:
    """Engines run with the very version that built them."""
    if receipt.library == "tensorrt":
        here = tensorrt_version(machine)
    else:
        here = next((version for package in RTX_PACKAGES if (version := machine.version(package))), "")
    wanted = f"{receipt.library} {receipt.version}, {', '.join(receipt.capabilities)}"
    if not here:
        advice = f"install it, or {BUILD}, or run with --backend ort"
        return Check(GROUP, f"engines {name}", WARN, f"{receipt.library} is not installed", wanted, advice)
    if not _same_version(here, receipt.version):
        return Check(GROUP, f"engines {name}", BLOCK, f"{receipt.library} {here} is installed", wanted, BUILD)
    return Check(GROUP, f"engines {name}", OK, f"{len(receipt.engines)} engines by {wanted}")


def _same_version(installed: str, built: str) -> bool:
    """Packages add a build number to the library's version: 10.3.0.30 is 10.3.0."""
    first, second = installed.split("."), built.split(".")
    return all(one == other for one, other in zip(first, second, strict=False))
