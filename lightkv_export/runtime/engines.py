"""Which engines of a bundle this machine may load: those whose receipt matches the library, its version and the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightkv_export.bundle import open_bundle
from lightkv_export.engines.library import Library, library_for_running
from lightkv_export.engines.receipt import (
    Engine,
    Receipt,
    check_engine,
    differences,
    read_receipt,
    source_digest,
    target_directories,
)
from lightkv_export.errors import BackendError
from lightkv_export.manifest import Graph, Manifest

BUILD = "run `lightkv build {}` on this machine"


@dataclass(frozen=True)
class EngineSet:
    """One directory of engines with its receipt, and the library that runs them."""

    directory: Path
    receipt: Receipt
    library: Library
    manifest: Manifest

    def engine(self, graph: Graph) -> Engine:
        """The receipt's entry of a graph; the engine itself is checked by `path`.

        Raises:
            BackendError: there is none.
        """
        engine = self.receipt.engines.get(graph.name)
        if engine is None:
            keeps = ", ".join(f"{keep:.4g}" for keep in self.receipt.keeps)
            raise BackendError(
                f"{self.directory} has no engine for {graph.name}",
                expected=f"a graph that the keeps {keeps} need, for which these engines were built",
                fix=f"choose one of these, or {BUILD.format(self.directory.parent.parent)} with --keep for each keep",
            )
        return engine

    def path(self, graph: Graph) -> Path:
        """The engine file, after a check of its bytes and sources against the receipt; raises BundleError."""
        self.engine(graph)
        return check_engine(self.directory, graph.name, self.receipt, source_digest(self.manifest, graph))


def open_engines(root: Path) -> EngineSet:
    """The engines under `root` that may run here; of several directories, the one that was built last.

    Raises:
        BackendError: there are none; says for each directory what differs. Or the library, cuda-python, the driver or
            the GPU is missing.
    """
    directories = target_directories(root)
    if not directories:
        raise BackendError(f"{root} has no TensorRT engines", fix=BUILD.format(root))
    manifest, refused = open_bundle(root, verify=False).manifest, []
    fitting: list[EngineSet] = []
    for directory in directories:
        receipt = read_receipt(directory)
        try:
            library = library_for_running(receipt.library)
        except BackendError as error:
            if len(directories) == 1:
                raise
            refused.append(f"{directory.name}: {error.found}")
            continue
        reasons = list(differences(receipt, library.name, library.version, library.gpu().capability))
        if reasons:
            refused.append(f"{directory.name}: {'; '.join(reasons)}")
        else:
            fitting.append(EngineSet(directory, receipt, library, manifest))
    if not fitting:
        raise BackendError(
            f"no engines of {root} may be loaded here: {' | '.join(refused)}",
            expected="engines built by the same library, in the same version, for this GPU",
            fix=BUILD.format(root),
        )
    return max(fitting, key=lambda engines: (engines.directory / "receipt.json").stat().st_mtime)
