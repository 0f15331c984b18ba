"""Write the surface of the installed cuda-python (functions with their arguments, enumerations, constants) as JSON.

    pip install cuda-bindings==12.9.4 && python scripts/dump_cuda_api.py tests/data/cuda_api

The emulator of the tests is generated from these files, so that a call that the real package lacks fails there too.
No GPU is needed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ENUMS = ("cudaError_t", "cudaMemcpyKind", "cudaDeviceAttr", "cudaStreamCaptureMode")


def main() -> None:
    """One file, named by the package's version, into the directory given."""
    import cuda.bindings
    from cuda.bindings import runtime

    names = sorted(name for name in dir(runtime) if name.startswith("cuda"))
    surface = {
        "version": cuda.bindings.__version__,
        "functions": {name: arguments(getattr(runtime, name)) for name in names if is_function(getattr(runtime, name))},
        "constants": {name: getattr(runtime, name) for name in names if isinstance(getattr(runtime, name), int)},
        "enums": {name: {m.name: int(m) for m in getattr(runtime, name)} for name in ENUMS},
    }
    out = Path(sys.argv[1]) / f"cuda-bindings-{surface['version']}.json"
    out.write_text(json.dumps(surface, indent=1) + "\n")
    print(out)


def is_function(value: Any) -> bool:
    """Functions of an extension module; classes and enumerations are not."""
    return callable(value) and not isinstance(value, type)


def arguments(function: Any) -> list[str]:
    """Argument names, from the signature at the head of the docstring, e.g. `cudaMemcpy(dst, src, size_t count,
    ...)`."""
    match = re.match(r"\w+\((.*)\)", (function.__doc__ or "").partition("\n")[0])
    if match is None or not match[1]:
        return []
    depth, parts = 0, [""]
    for letter in match[1]:
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.partition(":")[0].split()[-1] for part in parts]


if __name__ == "__main__":
    main()
