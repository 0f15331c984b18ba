"""Which TensorRT there is. Versions 10.3 to 11.4 and TensorRT-RTX are served by one code path: what a version can do
is read from the names in its API, never from its number (enum integers were renumbered in 11, flags came and
went)."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from lightkv_export.engines.cuda import Cuda, Gpu, open_cuda
from lightkv_export.errors import BackendError

NATIVE, PORTABLE = "tensorrt", "tensorrt_rtx"
DEFAULT_CAPABILITIES = (
    "SM86",
    "SM120",
)  # Ampere and Blackwell; they stand in for Orin and Thor, which RTX does not serve
INSTALL_RTX = "pip install tensorrt-rtx-cu13==1.7.1.116 (builds without a GPU)"


@dataclass(frozen=True)
class Library:
    """An imported TensorRT. `cuda` is None where engines are built ahead of time (TensorRT-RTX needs no GPU for
    that)."""

    api: ModuleType
    name: str
    cuda: Cuda | None = None

    @property
    def version(self) -> str:
        """As the library says, e.g. "10.3.0"."""
        return str(self.api.__version__)

    @property
    def lowering(self) -> str:
        """The newest lowering that this version reads: "modern" needs TensorScatter."""
        return "modern" if hasattr(self.api, "IKVCacheUpdateLayer") else "portable"

    @property
    def builds_ahead(self) -> bool:
        """Whether engines are made for named compute capabilities instead of the GPU at hand."""
        return hasattr(self.api, "ComputeCapability")

    def member(self, enum: str, name: str) -> Any | None:
        """A member of an enumeration by name, or None where this version lacks it."""
        return getattr(getattr(self.api, enum, None), name, None)

    def capabilities(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """The compute capabilities to build for: those asked for, else the GPU's, else (ahead of time) two common ones.

        Raises:
            BackendError: the library cannot build for one of them.
        """
        if not self.builds_ahead:
            gpu = self.gpu()
            if any(name != gpu.capability for name in wanted):
                raise BackendError(
                    f"{self.name} builds for the GPU here, {gpu.name} ({gpu.capability}), not for {', '.join(wanted)}",
                    fix=f"leave --compute-capability out, or run this where there is such a GPU, or {INSTALL_RTX}",
                )
            return (gpu.capability,)
        known = [name for name in self.api.ComputeCapability.__members__ if name.startswith("SM")]
        for name in wanted:
            if name not in known:
                raise BackendError(
                    f"{self.name} {self.version} has no compute capability {name}",
                    expected=f"one of: {', '.join(known)}",
                    fix="build on the machine itself: copy the bundle there and run `lightkv build BUNDLE`",
                )
        if wanted:
            return wanted
        with contextlib.suppress(BackendError):  # no GPU is no error here
            here = self.gpu().capability
            if here in known:
                return (here,)
        return DEFAULT_CAPABILITIES

    def gpu(self) -> Gpu:
        """The GPU at hand; raises BackendError without one."""
        return (self.cuda or open_cuda()).gpu()


def library_for_building() -> Library:
    """`tensorrt` if it is installed and there is a GPU, else `tensorrt_rtx`, which needs none.

    Raises:
        BackendError: neither can be used; says why, and what to install.
    """
    reasons = []
    try:
        return Library(import_library(NATIVE), NATIVE, open_cuda())
    except BackendError as error:
        reasons.append(f"{NATIVE}: {error.found}")
    try:
        return Library(import_library(PORTABLE), PORTABLE)
    except BackendError as error:
        reasons.append(f"{PORTABLE}: {error.found}")
    raise BackendError(
        f"no TensorRT to build engines with ({'; '.join(reasons)})",
        expected=f"{NATIVE} with a GPU, or {PORTABLE}",
        fix=f"{INSTALL_RTX}; on a Jetson TensorRT comes with JetPack: use a venv made with --system-site-packages",
    )


def library_for_running(name: str) -> Library:
    """The library that engines were built with, and a GPU.

    Raises:
        BackendError: the library, cuda-python, the driver or the GPU is missing.
    """
    return Library(import_library(name), name, open_cuda())


def import_library(name: str) -> ModuleType:
    """Imports a TensorRT by name; raises BackendError where it is not installed or cannot load its libraries."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: the wheel is there, a shared library is not
        fix = INSTALL_RTX if name == PORTABLE else "install TensorRT; on a Jetson it comes with JetPack"
        raise BackendError(f"the Python package {name!r} cannot be imported: {error}", fix=fix) from error


def logger(api: ModuleType) -> Any:
    """A logger object for `api` that keeps errors and warnings as lists instead of printing them."""

    class Collector(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == api.ILogger.WARNING:
                self.warnings.append(message)

    return Collector()
