"""The manifest as JSON text, and back. Standard library only.

Reading is strict: an unknown key, a missing key or a value of another type is an error that names its place. The text
carries a checksum of itself (`manifest_sha256`), so that a changed manifest is noticed as surely as changed weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from lightkv_export.errors import BundleError
from lightkv_export.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from lightkv_export.manifest_checks import check_manifest

CHECKSUM_KEY = "manifest_sha256"
LINE_WIDTH = 120


def manifest_text(manifest: Manifest) -> str:
    """The manifest as JSON text: sorted keys, two spaces per level, checksum included.

    Raises:
        BundleError: the manifest contradicts itself, or holds a value that JSON has no word for.
    """
    check_manifest(manifest)
    try:
        plain = plain_value(manifest)
        return _pretty({**plain, CHECKSUM_KEY: checksum(plain)}) + "\n"
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest of {manifest.name!r} cannot be written as JSON: {error}") from error


def manifest_from_text(text: str) -> Manifest:
    """The manifest that `manifest_text` wrote.

    Raises:
        BundleError: not JSON, another format version, altered, an unknown or missing key, a wrong type.
    """
    again = "export the bundle again, or fetch it again"
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except ValueError as error:
        raise BundleError(f"{MANIFEST_NAME} is not valid JSON: {error}", fix=again) from error
    if not isinstance(data, dict) or "format_version" not in data:
        raise BundleError(f"{MANIFEST_NAME} is not a bundle's manifest", expected="an object with format_version")
    if data["format_version"] != FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST_NAME} has format version {data['format_version']!r}",
            expected=f"format version {FORMAT_VERSION}, which this version of lightkv_export reads",
            fix='export the bundle again with this version, or install the version that wrote it (see "tools")',
        )
    if CHECKSUM_KEY not in data:
        raise BundleError(f"{MANIFEST_NAME} has no {CHECKSUM_KEY}", expected="a complete manifest", fix=again)
    recorded = data.pop(CHECKSUM_KEY)
    manifest = _value(Manifest, data, MANIFEST_NAME)
    if recorded != checksum(data):
        raise BundleError(
            f"{MANIFEST_NAME} was altered after it was written",
            expected=f"content that matches its {CHECKSUM_KEY}",
            fix=again,
        )
    check_manifest(manifest)
    return manifest


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def checksum(plain: Mapping[str, Any]) -> str:
    """sha256 of a manifest's JSON value, its own checksum left out."""
    canonical = json.dumps(plain, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def plain_value(value: Any) -> Any:
    """Dataclasses, mappings and tuples as plain JSON values."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the key {wrong[0]!r} is not text")
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return value


def _pretty(value: Any, indent: int = 0) -> str:
    """JSON text in which whatever fits on a line stays on one: shapes and tensors are read as rows, not columns."""
    line = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, (dict, list)) or (len(line) + indent <= LINE_WIDTH and indent):
        return line
    pad = " " * (indent + 2)
    if isinstance(value, list):
        rows, (left, right) = [_pretty(item, indent + 2) for item in value], "[]"
    else:
        label = {key: json.dumps(key, ensure_ascii=False) + ": " for key in sorted(value)}
        rows, (left, right) = [text + _pretty(value[key], indent + 2) for key, text in label.items()], "{}"
    return f"{left}\n" + ",\n".join(pad + row for row in rows) + f"\n{' ' * indent}{right}"


def _value(kind: Any, data: Any, where: str) -> Any:
    """`data` (from JSON) as a value of the annotated type `kind`; `where` names its place in messages."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    if origin in (types.UnionType, typing.Union):
        for option in args:
            if _fits(option, data):
                return _value(option, data, where)
    elif origin is tuple and isinstance(data, list):
        kinds = (args[0],) * len(data) if args[-1] is Ellipsis else args
        if len(kinds) == len(data):
            return tuple(_value(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, data, strict=True)))
    elif origin is Mapping and isinstance(data, dict):
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in data.items()}
    elif _fits(kind, data):
        return float(data) if kind is float else data
    raise BundleError(f"{where} is {json.dumps(data)[:80]}", expected=str(getattr(kind, "__name__", kind)))


def _fits(kind: Any, data: Any) -> bool:
    """Whether a JSON value may stand for a scalar type or for the container that a generic type describes."""
    origin = typing.get_origin(kind) or kind
    accepted = {float: (int, float), tuple: (list,), types.NoneType: (types.NoneType,)}.get(origin, (origin,))
    return isinstance(data, accepted) and not (isinstance(data, bool) and origin is not bool)


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise BundleError(f"{where} is {json.dumps(data)[:80]}", expected=f"an object ({kind.__name__})")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(data.keys() - hints.keys()):
        raise BundleError(f"{where} has the unknown key {unknown[0]!r}", expected=f"only: {', '.join(hints)}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise BundleError(f"{where} lacks the key {missing[0]!r}", expected=f"all of: {', '.join(hints)}")
    return kind(**{key: _value(hints[key], item, f"{where}.{key}") for key, item in data.items()})
