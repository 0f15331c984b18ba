"""Rules about external data: ONNX Runtime and TensorRT read it only beside or below the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from onnx import TensorProto

from lightkv_export.lint.engine import Case, graph_rule
from lightkv_export.lint.view import View


@graph_rule("external-data", runtime=True)
def external_data(case: Case) -> Iterator[tuple[str, str]]:
    """Locations outside the model's directory, through links, missing, or beyond the end of the file. Once per file."""
    seen: set[str] = set()
    for tensor in case.view.model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        problem = _problem(case.view, location, int(entry.get("offset", 0)) + int(entry.get("length", 0)))
        if problem and location not in seen:
            seen.add(location)
            yield tensor.name, f"external data of {tensor.name}: {problem}"


def _problem(view: View, location: str, end: int) -> str:
    """What is wrong with a location, or ""."""
    parts = PurePosixPath(location).parts
    if not location or location.startswith("/") or ".." in parts or location[1:2] == ":":
        return f"{location!r} is outside the model's directory, which both runtimes refuse"
    if view.path is None:
        return ""
    file = view.path.parent / location
    chain = [view.path.parent.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    if any(item.is_symlink() for item in chain):
        return f"{location!r} is a symbolic link, which both runtimes refuse; use a hard link or a copy"
    if not file.is_file():
        return f"{location!r} is missing"
    if file.stat().st_size < end:
        return f"{location!r} has {file.stat().st_size} bytes, but {end} are needed"
    return ""
