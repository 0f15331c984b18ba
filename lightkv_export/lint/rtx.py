"""The verdict of a real parser: TensorRT-RTX, which needs no GPU to parse.

It is of 11.x level and strongly typed, so it says nothing about older versions: the static rules do. It has no plugins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import onnx

from lightkv_export.errors import UserError
from lightkv_export.lint.engine import ERROR, Finding
from lightkv_export.lint.view import fix_axes

PARSER = "tensorrt_rtx"
NO_GPU = re.compile(r"catchCudaError|CUDA driver version|cudaError")  # said on every machine without a GPU


def parser_version() -> str:
    """The parser's version.

    Raises:
        UserError: the package is missing or cannot be loaded.
    """
    return _module().__version__


def parse(path: Path, name: str, fixed_axes: Mapping[str, int] | None = None) -> list[Finding]:
    """What the parser says about the graph at `path`; empty if it takes it.

    Args:
        name: of the graph in findings.
        fixed_axes: numbers for symbolic dimensions, as the builder fixes them before it parses.

    Raises:
        UserError: the package is missing or cannot be loaded.
    """
    trt = _module()

    class Silent(trt.ILogger):
        """Messages come back as findings instead."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            pass

    logger = Silent()
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # strongly typed: the only mode
    parser = trt.OnnxParser(network, logger)
    model = onnx.load(path, load_external_data=False)
    fix_axes(model, fixed_axes or {})
    if parser.parse(model.SerializeToString(), str(path)):
        return []
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [
        Finding(name, error.node_name(), error.node_operator(), "rtx-parser", ERROR, _message(error.desc()))
        for error in errors
    ] or [Finding(name, "", "", "rtx-parser", ERROR, "the parser refuses the graph without a reason")]


def _module() -> ModuleType:
    try:
        import tensorrt_rtx
    except ModuleNotFoundError:
        raise  # the command line names the extra that brings it
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"TensorRT-RTX cannot be loaded: {error}", fix="reinstall lightkv-export[trt]") from error
    return tensorrt_rtx


def _message(text: str) -> str:
    """The parser's lines without those about the missing GPU."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not NO_GPU.search(line)]
    return " | ".join(lines) or text.strip()
