"""Doctor: what is installed on this machine, what would be right, and what to change. Standard library only; each group
of checks is a file. To add a check, yield one more `Check` from the group where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightkv_export.doctor.board import board_checks, board_target
from lightkv_export.doctor.bundles import bundle_checks
from lightkv_export.doctor.checks import BLOCK, OK, WARN, Check
from lightkv_export.doctor.gpu import gpu_checks
from lightkv_export.doctor.machine import Machine
from lightkv_export.doctor.memory import memory_checks
from lightkv_export.doctor.python import python_checks

__all__ = ["BLOCK", "OK", "WARN", "Check", "Machine", "board_target", "examine"]

GROUPS = (board_checks, gpu_checks, python_checks, memory_checks)


def examine(machine: Machine, bundle: Path | None = None) -> Iterator[Check]:
    """Every check, and those of a bundle if one is given.

    Raises:
        BundleError: the bundle cannot be opened.
    """
    for group in GROUPS:
        yield from group(machine)
    if bundle is not None:
        yield from bundle_checks(machine, bundle)
