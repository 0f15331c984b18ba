"""Memory, swap and disk."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lightkv_export.doctor.checks import BLOCK, OK, WARN, Check
from lightkv_export.doctor.machine import Machine

GIB = 2**30
LEAST_FREE, GOOD_FREE = 1 * GIB, 4 * GIB
SMALL_MEMORY = 20 * GIB  # below it, building an engine of a 7B model wants swap
GOOD_SWAP = 8 * GIB
LEAST_DISK, GOOD_DISK = 1 * GIB, 20 * GIB


def meminfo(machine: Machine) -> dict[str, int]:
    """/proc/meminfo in bytes; {} where there is none."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", machine.read("/proc/meminfo") or "", re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in lines}


def memory_checks(machine: Machine) -> Iterator[Check]:
    """Free memory, swap (and whether it is only compressed memory), free disk space."""
    info = meminfo(machine)
    if info:
        yield _free(info)
        yield _swap(machine, info)
    yield _disk(machine)


def _free(info: dict[str, int]) -> Check:
    free, total = info.get("MemAvailable", 0), info.get("MemTotal", 0)
    found = f"{free / GIB:.1f} GiB available of {total / GIB:.1f}"
    stop = (
        "stop other programs; on a Jetson also the desktop: sudo systemctl set-default multi-user.target, then reboot"
    )
    if free < LEAST_FREE:
        return Check("memory", "memory", BLOCK, found, f"at least {LEAST_FREE / GIB:g} GiB available", stop)
    if free < GOOD_FREE:
        return Check(
            "memory", "memory", WARN, found, f"{GOOD_FREE / GIB:g} GiB or more; lightkv plan --target says", stop
        )
    return Check("memory", "memory", OK, found)


def _swap(machine: Machine, info: dict[str, int]) -> Check:
    swap = info.get("SwapTotal", 0)
    names = re.findall(r"^(/\S+)", machine.read("/proc/swaps") or "", re.MULTILINE)
    only_compressed = bool(names) and all("zram" in name for name in names)
    found = f"{swap / GIB:.1f} GiB" + (" (zram: compressed memory)" if only_compressed else "")
    if info.get("MemTotal", 0) >= SMALL_MEMORY or (swap >= GOOD_SWAP and not only_compressed):
        return Check("memory", "swap", OK, found)
    return Check(
        "memory",
        "swap",
        WARN,
        found,
        f"{GOOD_SWAP / GIB:g} GiB in a file, so that building an engine cannot run out of memory",
        "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile",
    )


def _disk(machine: Machine) -> Check:
    free = machine.free(machine.work)
    found = f"{free / GIB:.1f} GiB free"
    if free < LEAST_DISK:
        return Check(
            "memory", "disk", BLOCK, found, f"at least {LEAST_DISK / GIB:g} GiB", "delete something, or work elsewhere"
        )
    if free < GOOD_DISK:
        expected = f"{GOOD_DISK / GIB:g} GiB for a 7B bundle with its engines"
        return Check("memory", "disk", WARN, found, expected, "keep bundles on a larger disk (NVMe)")
    return Check("memory", "disk", OK, found)
