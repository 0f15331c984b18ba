"""Driver, CUDA, TensorRT and TensorRT-RTX."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from lightkv_export.doctor.board import board_model, board_release
from lightkv_export.doctor.checks import BLOCK, OK, WARN, Check
from lightkv_export.doctor.machine import Machine
from lightkv_export.targets import PORTABLE_SINCE, parse_version

GROUP = "gpu"
QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
RTX_PACKAGES = ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx")
INSTALL_RTX = 'pip install "lightkv-export[trt]"'


def gpu_checks(machine: Machine) -> Iterator[Check]:
    """The GPU's driver, CUDA, and both TensorRTs."""
    yield _driver(machine)
    cuda = cuda_version(machine)
    if cuda:
        yield Check(GROUP, "CUDA", OK, cuda)
    yield _tensorrt(machine)
    yield _tensorrt_rtx(machine)


def has_gpu(machine: Machine) -> bool:
    """Whether there is an NVIDIA GPU with a driver that answers."""
    return bool(board_model(machine) or machine.run(QUERY))


def cuda_version(machine: Machine) -> str:
    """Of the toolkit, else what the driver supports, or ""."""
    try:
        return json.loads(machine.read("/usr/local/cuda/version.json") or "{}")["cuda"]["version"]
    except (ValueError, KeyError, TypeError):
        match = re.search(r"CUDA Version:\s*([\d.]+)", machine.run(["nvidia-smi"]) or "")
        return f"{match[1]} (driver)" if match else ""


def tensorrt_version(machine: Machine) -> str:
    """Of the Python package, else of the system's library, or ""."""
    packaged = machine.version("tensorrt")
    return packaged or system_tensorrt(machine)


def system_tensorrt(machine: Machine) -> str:
    """Version of the library that JetPack or apt installed, or ""."""
    for package in ("libnvinfer11", "libnvinfer10", "libnvinfer8"):
        if version := (machine.run(["dpkg-query", "-W", "-f=${Version}", package]) or "").strip():
            return version.partition("-")[0]
    return ""


def _driver(machine: Machine) -> Check:
    if model := board_model(machine):
        return Check(GROUP, "driver", OK, f"part of Jetson Linux ({model})")
    if listed := machine.run(QUERY):
        return Check(GROUP, "driver", OK, "; ".join(line.strip() for line in listed.splitlines() if line.strip()))
    module = machine.read("/proc/driver/nvidia/version")
    if module:
        found = module.splitlines()[0]
        return Check(GROUP, "driver", BLOCK, found, "nvidia-smi answers", "reboot, or install the driver again")
    return Check(GROUP, "driver", OK, "no NVIDIA GPU or driver: bundles run on the CPU with ONNX Runtime")


def _tensorrt(machine: Machine) -> Check:
    found, release = tensorrt_version(machine), board_release(machine)
    wanted = release.tensorrt if release else "10.3 to 11.4"
    if not found:
        needed = has_gpu(machine)
        advice = "sudo apt install nvidia-jetpack" if release else "pip install tensorrt, or use TensorRT-RTX"
        return Check(GROUP, "TensorRT", WARN if needed else OK, "not installed", wanted, advice if needed else "")
    if parse_version(found) < PORTABLE_SINCE:
        return Check(GROUP, "TensorRT", WARN, found, "10.0 or newer", "use a newer JetPack, or ONNX Runtime")
    if release and parse_version(found) != parse_version(release.tensorrt):
        advice = "build engines again after a change of TensorRT; lint against the version that is installed"
        return Check(GROUP, "TensorRT", WARN, found, f"{wanted} (JetPack {release.name})", advice)
    return Check(GROUP, "TensorRT", OK, found)


def _tensorrt_rtx(machine: Machine) -> Check:
    found = next((version for name in RTX_PACKAGES if (version := machine.version(name))), None)
    if found:
        return Check(GROUP, "TensorRT-RTX", OK, found)
    return Check(GROUP, "TensorRT-RTX", OK, "not installed (needed to build ahead of time)", "", INSTALL_RTX)
