"""An emulator of TensorRT and CUDA for tests without a GPU.

Its surface is generated from API dumps of the real packages (tests/data/trt_api, tests/data/cuda_api), its behaviour
enforces the rules (strong typing, profile ranges, addresses, alignment, aliasing, order, capture, memory), and its
arithmetic is ONNX Runtime on the same graph. The code under test imports it as `tensorrt` and
`cuda.bindings.runtime`:

    machine = emulator.install(monkeypatch, "10.3.0")
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from emulator import builder, runtime
from emulator.cuda_api import cuda_runtime, install_cuda
from emulator.machine import Machine
from emulator.surface import Misuse, Surface

__all__ = ["VERSIONS", "Machine", "Misuse", "install", "tensorrt"]

DATA = Path(__file__).resolve().parent.parent / "data" / "trt_api"
VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")
BEHAVIOURS = {
    "Builder": builder.Builder,
    "OnnxParser": builder.OnnxParser,
    "IHostMemory": builder.HostMemory,
    "Runtime": runtime.Runtime,
}


def tensorrt(version: str, machine: Machine) -> ModuleType:
    """`tensorrt` in this version, on `machine`."""
    dump = json.loads((DATA / f"tensorrt-{version}.json").read_text())
    surface = Surface("tensorrt", dump, BEHAVIOURS)
    surface.machine = machine
    return surface.module


def install(monkeypatch, version: str, cuda: str = "13.0.3", **settings: object) -> Machine:
    """Puts the emulated packages into sys.modules for one test; returns the machine that they run on."""
    machine = Machine(**settings)
    modules = {"tensorrt": tensorrt(version, machine)} | install_cuda(cuda_runtime(machine, cuda))
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)  # other packages ask whether there is a TensorRT
        monkeypatch.setitem(sys.modules, name, module)
    return machine
