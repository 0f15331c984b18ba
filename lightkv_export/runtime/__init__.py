"""The runtime: drives a bundle with numpy and a backend. No torch, no transformers; names load their modules when used.

>>> from lightkv_export.runtime import load
>>> model = load("out/llava-1.5-7b")
>>> result = model.run(images=["cat.png"], prompt="What is this?", keep=0.55, max_new_tokens=64)
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "load": "model",
    "Model": "model",
    "Session": "session",
    "Result": "generation",
    "Sampling": "sampling",
    "Buffer": "backend",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
