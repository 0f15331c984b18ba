"""Jetson: which board, which JetPack, which power mode; and its name for --target."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lightkv_export.doctor.checks import OK, WARN, Check
from lightkv_export.doctor.machine import Machine
from lightkv_export.doctor.memory import meminfo
from lightkv_export.targets import Device, Release, devices, release_of_l4t

GROUP = "board"
KINDS = (("thor", "thor"), ("agx orin", "agx-orin"), ("orin nx", "orin-nx"), ("orin nano", "orin-nano"))
FULL_POWER = re.compile(r"MAXN")


def board_checks(machine: Machine) -> Iterator[Check]:
    """The board, its JetPack and its power mode; on other machines only that it is no Jetson."""
    model = board_model(machine)
    if not model:
        yield Check(GROUP, "model", OK, "no Jetson board")
        return
    device = board_device(machine)
    release = board_release(machine)
    if device is None:
        yield Check(
            GROUP, "model", WARN, model, "an Orin or Thor board", "see lightkv targets for the boards that are known"
        )
    else:
        yield Check(GROUP, "model", OK, f"{model}: target {board_target(machine)}")
    yield _jetpack(machine, device, release)
    yield from _power(machine)


def board_model(machine: Machine) -> str:
    """The device tree's model if it is a Jetson, else ""."""
    model = machine.read("/proc/device-tree/model") or ""
    return model if "jetson" in model.lower() or "thor" in model.lower() else ""


def board_release(machine: Machine) -> Release | None:
    """The JetPack release, from the Jetson Linux version."""
    version = l4t_version(machine)
    return release_of_l4t(version) if version else None


def l4t_version(machine: Machine) -> str:
    """Jetson Linux version such as "36.4.3", or ""."""
    text = machine.read("/etc/nv_tegra_release") or ""
    if match := re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text):
        return f"{match[1]}.{match[2]}"
    packaged = machine.run(["dpkg-query", "-W", "-f=${Version}", "nvidia-l4t-core"]) or ""
    return packaged.partition("-")[0].strip()


def board_device(machine: Machine) -> Device | None:
    """The board of `lightkv targets` with this model name and the nearest memory, in Super mode if it runs so."""
    model = board_model(machine).lower()
    kind = next((name for word, name in KINDS if word in model), None)
    if kind is None:
        return None
    gib = meminfo(machine).get("MemTotal", 0) / 2**30
    boards = [item for item in devices() if item.name.startswith(kind) and not item.name.endswith("-super")]
    nearest = min(boards, key=lambda item: abs(item.memory_gib - gib))
    if "SUPER" in power_mode(machine).upper():
        return next((item for item in devices() if item.name == f"{nearest.name}-super"), nearest)
    return nearest


def board_target(machine: Machine) -> str | None:
    """The name of this board as a target, or None."""
    device, release = board_device(machine), board_release(machine)
    if device is None:
        return None
    return f"{device.name}@jp{release.name}" if release and release.name in device.jetpack else device.name


def power_mode(machine: Machine) -> str:
    """Name of the power mode, e.g. "MAXN_SUPER", or ""."""
    match = re.search(r"NV Power Mode:\s*(\S+)", machine.run(["nvpmodel", "-q"]) or "")
    return match[1] if match else ""


def _jetpack(machine: Machine, device: Device | None, release: Release | None) -> Check:
    version = l4t_version(machine) or "unknown"
    if release is None:
        return Check(GROUP, "JetPack", WARN, f"Jetson Linux {version}", "a release that lightkv targets knows")
    found = f"JetPack {release.name} (Jetson Linux {version}): TensorRT {release.tensorrt}, CUDA {release.cuda}"
    if release.tensorrt.startswith("8."):
        return Check(GROUP, "JetPack", WARN, found, "JetPack 6.1 or newer (TensorRT 10.3)", "flash a newer JetPack")
    if device is not None and release.name not in device.jetpack:
        return Check(GROUP, "JetPack", WARN, found, f"for this board: {', '.join(device.jetpack)}")
    return Check(GROUP, "JetPack", OK, found)


def _power(machine: Machine) -> Iterator[Check]:
    mode = power_mode(machine)
    if not mode:
        yield Check(GROUP, "power mode", WARN, "unknown", "nvpmodel -q names it", "run lightkv doctor with sudo")
    elif FULL_POWER.search(mode):
        yield Check(GROUP, "power mode", OK, mode)
    else:
        yield Check(
            GROUP,
            "power mode",
            WARN,
            f"{mode}: clocks are limited",
            "MAXN or MAXN_SUPER where the supply and cooling allow it",
            "list modes with grep MODEL /etc/nvpmodel.conf, then sudo nvpmodel -m ID",
        )
    shown = machine.run(["jetson_clocks", "--show"]) or ""
    if match := re.search(r"GPU MinFreq=(\d+) MaxFreq=(\d+)", shown):
        fixed = match[1] == match[2]
        status, text = (OK, "fixed at the maximum") if fixed else (WARN, "scaled with the load")
        advice = "" if fixed else "for benchmarks: sudo jetson_clocks"
        yield Check(GROUP, "GPU clock", status, text, "fixed for benchmarks", advice)
