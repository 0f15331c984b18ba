"""Around the vision graph: the constant arrays of an image size, and shapes that follow from what goes in."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from math import prod

import numpy as np

from lightkv_export.bundle import Bundle
from lightkv_export.errors import BundleError
from lightkv_export.manifest import POSITION_TABLE, Graph, Size, Tensor
from lightkv_export.runtime.backend import from_float32, host_dtype

_SYMBOL = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)")  # "N", or a multiple: "4*G"


def load_tables(bundle: Bundle, size: Size) -> dict[str, np.ndarray]:
    """The arrays of a size by name; {} if it has none.

    Raises:
        BundleError: the file cannot be read, or its positions are not those of the size's tokens.
    """
    if size.tables is None:
        return {}
    path = bundle.file(size.tables)
    try:
        with np.load(path, allow_pickle=False) as file:
            tables = dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} cannot be read: {error}", fix="export the bundle again") from None
    found = tables[POSITION_TABLE].shape if POSITION_TABLE in tables else None
    expected = (3, size.image_tokens) if size.advance is not None else None
    if found != expected:
        raise BundleError(f"{path} has positions of shape {found}", expected=str(expected))
    return tables


def vision_inputs(graph: Graph, pixels: np.ndarray, tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The vision graph's inputs by name, each in the host form of its dtype.

    Raises:
        BundleError: the graph takes an input that the size has no table for.
    """
    inputs = {}
    for tensor in graph.inputs:
        array = pixels if tensor.name == "pixel_values" else tables.get(tensor.name)
        if array is None:
            raise BundleError(f"the vision graph takes {tensor.name!r}", expected=f"one of: {', '.join(tables)}")
        if array.dtype.kind == "f":
            inputs[tensor.name] = from_float32(array.astype(np.float32, copy=False), tensor.dtype)
        else:
            inputs[tensor.name] = array.astype(host_dtype(tensor.dtype), copy=False)
    return inputs


def symbol_values(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
    """What the symbols in the shapes of a graph's inputs stand for.

    Raises:
        BundleError: an array does not fit its input.
    """
    values: dict[str, int] = {}
    for tensor in graph.inputs:
        shape = inputs[tensor.name].shape
        fits = len(shape) == len(tensor.shape)
        for dimension, length in zip(tensor.shape, shape, strict=False):
            factor, symbol = _parsed(dimension)
            if symbol is None:
                fits &= length == factor
            else:
                fits &= length % factor == 0 and values.setdefault(symbol, length // factor) == length // factor
        if not fits:
            raise BundleError(
                f"preprocessing gives {tensor.name} of shape {shape}",
                expected=f"{tensor.shape}, as the vision graph takes it (with {values})",
                fix="export the bundle again",
            )
    return values


def output_shape(tensor: Tensor, values: Mapping[str, int], elements: int) -> tuple[int, ...]:
    """The shape of an output that holds `elements` numbers; one of its symbols may be of no input and follows then.

    Raises:
        BundleError: no such shape holds so many.
    """
    shape: list[int | None] = []
    for dimension in tensor.shape:
        factor, symbol = _parsed(dimension)
        shape.append(factor if symbol is None else factor * values[symbol] if symbol in values else None)
    known = prod(length for length in shape if length is not None)
    if shape.count(None) == 1 and elements % known == 0:
        shape[shape.index(None)] = elements // known
    if None in shape or prod(shape) != elements:
        raise BundleError(
            f"the vision graph gives {tensor.name} of shape {tensor.shape} (with {dict(values)})",
            expected=f"{elements} numbers, the image's vision tokens",
            fix="export the bundle again",
        )
    return tuple(shape)


def _parsed(dimension: int | str) -> tuple[int, str | None]:
    """A dimension as factor and symbol: 8 -> (8, None), "4*G" -> (4, "G")."""
    if isinstance(dimension, int):
        return dimension, None
    match = _SYMBOL.fullmatch(dimension)
    if match is None:
        raise BundleError(f"the vision graph has the dimension {dimension!r}", expected='a number, "N" or "4*N"')
    return int(match[1] or 1), match[2]
