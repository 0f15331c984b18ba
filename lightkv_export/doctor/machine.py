"""The machine as the checks see it: files, commands and Python packages, all replaceable, so tests can fake it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COMMAND_SECONDS = 15

RunCommand = Callable[[Sequence[str]], "str | None"]
"""Called with the words of a command; its standard output, or None if it is missing or fails."""


def run_command(words: Sequence[str]) -> str | None:
    """The output of a command; None if there is no such command, it fails, or it takes too long."""
    program = shutil.which(words[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *words[1:]], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def package_version(name: str) -> str | None:
    """Version of an installed distribution, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def onnxruntime_providers() -> list[str]:
    """Execution providers of the installed ONNX Runtime; [] if it is missing or cannot be loaded."""
    try:
        import onnxruntime
    except (ImportError, OSError):
        return []
    return list(onnxruntime.get_available_providers())


def free_bytes(path: Path) -> int:
    """Free space of the disk that holds `path`."""
    return shutil.disk_usage(path).free


@dataclass(frozen=True)
class Machine:
    """Where the checks look.

    Attributes:
        root: stands for /, so that a directory with a few files is a fake board.
        run: runs a command. version: of a Python package. providers: of ONNX Runtime. free: bytes on a path's disk.
        python: version of this Python. prefix: its environment. is_venv: whether that is a virtual environment.
        work: the directory whose disk is checked.
    """

    root: Path = Path("/")
    run: RunCommand = run_command
    version: Callable[[str], str | None] = package_version
    providers: Callable[[], list[str]] = onnxruntime_providers
    free: Callable[[Path], int] = free_bytes
    python: tuple[int, int] = field(default_factory=lambda: sys.version_info[:2])
    prefix: Path = field(default_factory=lambda: Path(sys.prefix))
    is_venv: bool = field(default_factory=lambda: sys.prefix != sys.base_prefix)
    work: Path = field(default_factory=Path.cwd)

    def read(self, path: str) -> str | None:
        """Text of a file below the root, without the zero bytes of device trees; None if it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        except OSError:
            return None
