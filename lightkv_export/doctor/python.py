"""Python, its environment, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator

from lightkv_export.doctor.board import board_model
from lightkv_export.doctor.checks import BLOCK, OK, WARN, Check
from lightkv_export.doctor.gpu import has_gpu, system_tensorrt, tensorrt_version
from lightkv_export.doctor.machine import Machine
from lightkv_export.targets import LEAST_PYTHON, parse_version

GROUP = "python"
MODERN_ORT = (1, 28)  # opset 24 with correct attention; for Python 3.10 there is none
PORTABLE_ORT = (1, 23)
CUDA_PROVIDER = "CUDAExecutionProvider"


def python_checks(machine: Machine) -> Iterator[Check]:
    """Python's version, whether a venv sees JetPack's packages, ONNX Runtime and its providers."""
    text = ".".join(map(str, machine.python))
    least = ".".join(map(str, LEAST_PYTHON))
    if machine.python < LEAST_PYTHON:
        yield Check(
            GROUP, "Python", BLOCK, text, f"{least} or newer", "JetPack 6 and newer have it; use a newer Python"
        )
    else:
        yield Check(GROUP, "Python", OK, text)
    if machine.is_venv and board_model(machine):
        yield _environment(machine)
    yield from _onnxruntime(machine)


def _environment(machine: Machine) -> Check:
    """On a Jetson, TensorRT is a system package, invisible in a venv that does not ask for those."""
    config = machine.prefix / "pyvenv.cfg"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    sees = any(line.replace(" ", "").lower() == "include-system-site-packages=true" for line in text.splitlines())
    if sees or machine.version("tensorrt"):
        return Check(GROUP, "environment", OK, f"{machine.prefix} sees TensorRT")
    return Check(
        GROUP,
        "environment",
        BLOCK if system_tensorrt(machine) else WARN,
        f"{machine.prefix} does not see the system's packages, where JetPack has TensorRT",
        "a virtual environment with system packages",
        "make it again: python3 -m venv --system-site-packages .venv",
    )


def _onnxruntime(machine: Machine) -> Iterator[Check]:
    cpu, gpu = machine.version("onnxruntime"), machine.version("onnxruntime-gpu")
    found = gpu or cpu
    if found is None:
        status = WARN if tensorrt_version(machine) else BLOCK
        yield Check(GROUP, "ONNX Runtime", status, "not installed", "1.28 or newer", "pip install onnxruntime")
        return
    least = MODERN_ORT if machine.python >= (3, 11) else PORTABLE_ORT
    wanted = f"{least[0]}.{least[1]} or newer"
    if cpu and gpu:
        both = f"onnxruntime {cpu} and onnxruntime-gpu {gpu}, which overwrite each other's files"
        yield Check(GROUP, "ONNX Runtime", WARN, both, "one of them", "uninstall both, then install one")
    elif parse_version(found) < least:
        yield Check(GROUP, "ONNX Runtime", BLOCK, found, wanted, f"pip install 'onnxruntime>={least[0]}.{least[1]}'")
    elif parse_version(found) < MODERN_ORT:
        yield Check(
            GROUP, "ONNX Runtime", OK, f"{found}: runs bundles of the portable lowering", "1.28 for the modern one"
        )
    else:
        yield Check(GROUP, "ONNX Runtime", OK, found)
    yield _providers(machine)


def _providers(machine: Machine) -> Check:
    providers = machine.providers()
    if not providers:
        return Check(GROUP, "providers", BLOCK, "ONNX Runtime cannot be imported", "", "python -c 'import onnxruntime'")
    found = ", ".join(providers)
    if has_gpu(machine) and CUDA_PROVIDER not in providers and not tensorrt_version(machine):
        advice = "for the GPU: install TensorRT, or see README, 'With a GPU', for ONNX Runtime"
        return Check(GROUP, "providers", WARN, found, CUDA_PROVIDER, advice)
    return Check(GROUP, "providers", OK, found)
