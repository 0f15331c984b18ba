"""Receipts: what every engine was built from, by what, for which GPU. Standard library only.

An engine is code, so it is loaded only if its file, its sources, the library's version and the GPU are those of the
receipt `engines/<target>/receipt.json`. That guards against mix-ups and damage; it is no signature. Build engines
yourself for bundles whose maker you do not trust.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightkv_export.errors import BundleError
from lightkv_export.filesystem import sync
from lightkv_export.manifest import Graph, Manifest

FORMAT_VERSION = 1
RECEIPT_NAME = "receipt.json"
ENGINES = "engines"
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Engine:
    """One engine file.

    Attributes:
        file, sha256, size: the engine, beside the receipt.
        source_sha256: of the graph and of the weights that it may refer to, see `source_digest`.
        capacity: cache rows written into the graph, or None.
        profiles: input name -> [min, opt, max] shapes, per profile.
        dtype: of the graph's floating-point tensors.
        flags: what was set beside the defaults.
        build_s: seconds. peak_host_bytes: of the building process. peak_device_bytes: on the GPU, or None.
    """

    file: str
    sha256: str
    size: int
    source_sha256: str
    capacity: int | None
    profiles: tuple[Mapping[str, Any], ...]
    dtype: str
    flags: tuple[str, ...]
    build_s: float
    peak_host_bytes: int
    peak_device_bytes: int | None


@dataclass(frozen=True)
class Receipt:
    """The engines of one target directory; all by one library for the same compute capabilities.

    `max_tokens` is the longest sequence and `chunk_tokens` the most tokens of a step; `keeps` are those whose stages
    and capacities were built.
    """

    library: str
    version: str
    capabilities: tuple[str, ...]
    keeps: tuple[float, ...]
    max_tokens: int
    chunk_tokens: int
    engines: Mapping[str, Engine] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def with_engine(self, name: str, engine: Engine) -> Receipt:
        """The receipt with one engine added or replaced."""
        return dataclasses.replace(self, engines={**self.engines, name: engine})


def source_digest(manifest: Manifest, graph: Graph) -> str:
    """One hash over the graph's file and, unless it is a stage, every weight file: hashes of the manifest, nothing is
    read."""
    folder = graph.file.rpartition("/")[0]
    names = [graph.file]
    if graph.role != "stage":
        names += [n for n in sorted(manifest.files) if n.startswith(f"{folder}/") and not n.endswith(".onnx")]
    return hashlib.sha256("\n".join(f"{name} {manifest.files[name].sha256}" for name in names).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_receipt(directory: Path, receipt: Receipt) -> None:
    """Replaces the receipt in one step; on the disk when this returns."""
    partial = directory / f".{RECEIPT_NAME}.{os.getpid()}"
    partial.write_text(json.dumps(asdict(receipt), indent=1), encoding="utf-8")
    sync(partial)
    partial.replace(directory / RECEIPT_NAME)


def read_receipt(directory: Path) -> Receipt:
    """The receipt of a target directory.

    Raises:
        BundleError: there is none, it is damaged, or its format is another.
    """
    path, again = directory / RECEIPT_NAME, "run `lightkv build BUNDLE` again"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries["format_version"] != FORMAT_VERSION:
            raise BundleError(f"{path} has format {entries['format_version']}", expected=f"{FORMAT_VERSION}", fix=again)
        engines = {name: _engine(values) for name, values in entries["engines"].items()}
        lists = {name: tuple(entries[name]) for name in ("capabilities", "keeps")}
        return Receipt(**{**entries, **lists, "engines": engines})
    except FileNotFoundError:
        raise BundleError(
            f"{directory} has no {RECEIPT_NAME}", expected="engines with their receipt", fix=again
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is damaged: {type(error).__name__}: {error}", fix=again) from error


def differences(receipt: Receipt, library: str, version: str, capability: str) -> Iterator[str]:
    """Why engines of this receipt must not be loaded by this library on this GPU, in words; nothing if they may."""
    if receipt.library != library:
        yield f"built by {receipt.library}, here is {library}"
    elif receipt.version != version:
        yield f"built by {receipt.library} {receipt.version}, here is {version}"
    if capability not in receipt.capabilities:
        yield f"built for {', '.join(receipt.capabilities)}, the GPU here is {capability}"


def check_engine(directory: Path, name: str, receipt: Receipt, source: str) -> Path:
    """The path of an engine whose bytes and sources are those of the receipt.

    Args:
        source: `source_digest` of the graph as the bundle has it now.

    Raises:
        BundleError: no engine for this graph; or its file or its graph is another than the receipt says.
    """
    again = "run `lightkv build BUNDLE` again"
    engine = receipt.engines.get(name)
    if engine is None:
        raise BundleError(
            f"{directory} has no engine for {name}", expected=f"one of: {', '.join(receipt.engines)}", fix=again
        )
    if engine.source_sha256 != source:
        raise BundleError(
            f"the engine {engine.file} was built from another {name} than the bundle has now",
            expected=f"sources with sha256 {engine.source_sha256}",
            fix=again,
        )
    path = directory / engine.file
    if path.parent != directory or not path.is_file():
        raise BundleError(f"{path} is missing", expected=f"{engine.size} bytes", fix=again)
    found = file_digest(path) if path.stat().st_size == engine.size else f"{path.stat().st_size} bytes"
    if found != engine.sha256:
        raise BundleError(
            f"the engine {path} is altered: {found}",
            expected=f"sha256 {engine.sha256}, {engine.size} bytes; an engine is code, so it is not loaded",
            fix=again,
        )
    return path


def target_directories(bundle: Path) -> list[Path]:
    """Every directory with engines, sorted by name."""
    return sorted(path.parent for path in (bundle / ENGINES).glob(f"*/{RECEIPT_NAME}"))


def _engine(values: Mapping[str, Any]) -> Engine:
    lists = {name: tuple(values[name]) for name in ("profiles", "flags")}
    return Engine(**{**values, **lists})
