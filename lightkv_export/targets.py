"""Targets: the devices that bundles are made for, what they hold and what runs there. Standard library only.

A target's name is a device, with the JetPack release or TensorRT version where it matters: `orin-nano-8gb@jp6.2`,
`agx-orin-64gb@jp7.2`, `rtx-4090`, `rtx-4090@trt10.13`, `cpu`. A Jetson without `@` means its newest JetPack. The
figures are in `data/targets.toml`, each with its source; JetPack fixes the TensorRT version, and that the lowering.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from lightkv_export.errors import UserError

DATA = Path(__file__).resolve().parent / "data" / "targets.toml"
MODERN_SINCE = (10, 15)  # RMSNormalization, RotaryEmbedding and TensorScatter; Attention came one release earlier
PORTABLE_SINCE = (10, 0)
NEWEST_TENSORRT = "11.4"  # of a device that may take any
KNOWN_TENSORRT = ("8.6", "10.0", "10.3", "10.7", "10.9", "10.13", "10.14", "10.15", "10.16", "11.1", "11.4")
RTX_SMS = (80, 86, 89, 120, 121)  # compute capabilities that TensorRT-RTX builds for ahead of time
LEAST_PYTHON = (3, 10)


@dataclass(frozen=True)
class Efficiency:
    """Share of a family's peaks that is reached: memory bandwidth in decoding, FP16 compute in prefill."""

    bandwidth: float
    compute: float
    basis: str


@dataclass(frozen=True)
class Release:
    """A JetPack release: what it fixes. `l4t` are the Jetson Linux versions (or their beginnings) that belong to it."""

    name: str
    tensorrt: str
    cuda: str
    python: str
    aliases: tuple[str, ...] = ()
    l4t: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """A board, card or processor.

    Attributes:
        sm: compute capability times ten, 0 for a CPU.
        memory_gib: memory as the data sheet says; reserved_gib of it is gone before we start (OS, one CUDA context).
        bandwidth_gbps: 10^9 bytes per second. fp16_tflops: dense, FP32 sums, 10^12 per second.
        shared_memory: CPU and GPU use the same memory.
        jetpack: names of its JetPack releases, oldest first; empty for anything that is no Jetson.
        verified: a second public source agrees with `source`.
    """

    name: str
    title: str
    family: str
    memory_gib: float
    reserved_gib: float
    bandwidth_gbps: float
    fp16_tflops: float
    source: str
    sm: int = 0
    shared_memory: bool = False
    jetpack: tuple[str, ...] = ()
    verified: bool = False


@dataclass(frozen=True)
class Target:
    """A device with the software that it runs. `tensorrt` is None on a CPU, where ONNX Runtime runs the bundle."""

    name: str
    device: Device
    release: Release | None
    tensorrt: str | None
    precisions: tuple[str, ...]
    efficiency: Efficiency

    @property
    def version(self) -> tuple[int, int] | None:
        """Major and minor TensorRT version."""
        return None if self.tensorrt is None else parse_version(self.tensorrt)

    @property
    def lowering(self) -> str:
        """The lowering that bundles for this target use: "modern" or "portable"."""
        return "modern" if self.version is None or self.version >= MODERN_SINCE else "portable"

    @property
    def available_bytes(self) -> int:
        """Memory for weights, caches and activations together."""
        return int((self.device.memory_gib - self.device.reserved_gib) * 2**30)

    @property
    def has_rtx(self) -> bool:
        """Whether TensorRT-RTX engines can be built for it ahead of time."""
        return self.device.sm in RTX_SMS

    @property
    def warnings(self) -> tuple[str, ...]:
        """What stands in the way of running a bundle there, in words."""
        found = []
        if self.version is not None and self.version < PORTABLE_SINCE:
            found.append(f"TensorRT {self.tensorrt} is older than 10.0, which the portable lowering is made for")
        if self.release is not None and parse_version(self.release.python) < LEAST_PYTHON:
            found.append(f"JetPack {self.release.name} has Python {self.release.python}; this package needs 3.10")
        return tuple(found)

    def has(self, precision: str) -> bool:
        """Whether both the device and its TensorRT have a precision (the names: see `check_precision`)."""
        since = _since(precision)
        new_enough = self.version is None or since is None or self.version >= parse_version(since)
        return precision in self.precisions and new_enough

    def check_precision(self, precision: str) -> None:
        """Refuse a precision that the device or its TensorRT lacks.

        Args:
            precision: "fp32", "fp16", "bf16", "int8", "int4", "fp8" or "nvfp4".

        Raises:
            UserError: says why, and what the target has.
        """
        if self.has(precision):
            return
        if precision in self.precisions:
            reason = f"TensorRT {self.tensorrt} takes {precision} only from {_since(precision)}"
        else:
            reason = f"{self.device.title} has no {precision} ({self._kind()})"
        raise UserError(
            f"target {self.name}: {precision} is not possible: {reason}",
            expected=f"one of: {', '.join(name for name in self.precisions if self.has(name))}",
            fix="choose one of these, or a target that has it (see lightkv targets)",
        )

    def _kind(self) -> str:
        sm = self.device.sm
        return f"compute capability {sm // 10}.{sm % 10}" if sm else "a CPU"


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor of a dotted version such as "10.3.0"."""
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


def devices() -> tuple[Device, ...]:
    """Every device, Jetson boards first."""
    return _catalogue().devices


def target_names() -> list[str]:
    """Every target: each Jetson board with each of its JetPack releases, every other device once."""
    return [
        name
        for device in devices()
        for name in ([f"{device.name}@jp{release}" for release in device.jetpack] or [device.name])
    ]


def load_target(name: str) -> Target:
    """The target called `name`: DEVICE, DEVICE@jpRELEASE or DEVICE@trtVERSION.

    Raises:
        UserError: there is no such device, or it never had that release; names the nearest ones.
    """
    wanted = name.strip().lower()
    word, _, suffix = wanted.partition("@")
    catalogue = _catalogue()
    device = next((item for item in catalogue.devices if item.name == word), None)
    if device is None:
        raise _unknown(name, word, [item.name for item in catalogue.devices])
    if device.jetpack:
        release = _release_of(device, suffix, name)
        return _target(f"{device.name}@jp{release.name}", device, release, release.tensorrt)
    if device.sm == 0:
        if suffix:
            raise UserError(f"target {name!r}: the CPU runs ONNX Runtime, not TensorRT", fix="write --target cpu")
        return _target(device.name, device, None, None)
    version = suffix.removeprefix("trt") if suffix else NEWEST_TENSORRT
    if suffix and (not suffix.startswith("trt") or version not in KNOWN_TENSORRT):
        raise UserError(
            f"target {name!r}: {suffix!r} is no TensorRT version that is known here",
            expected=f"{device.name}@trtVERSION with one of: {', '.join(KNOWN_TENSORRT)}",
        )
    return _target(f"{device.name}@{suffix}" if suffix else device.name, device, None, version)


def release_of_l4t(version: str) -> Release | None:
    """The JetPack release of a Jetson Linux version such as "36.4.3"; None if it is not known here."""
    for release in _catalogue().releases.values():
        if any(f"{version}.".startswith(f"{known}.") for known in release.l4t):
            return release
    return None


@dataclass(frozen=True)
class _Catalogue:
    devices: tuple[Device, ...]
    releases: Mapping[str, Release]  # by name and alias
    families: Mapping[str, Efficiency]
    precisions: Mapping[int, tuple[str, ...]]
    tensorrt_since: Mapping[str, str]


@functools.lru_cache(maxsize=1)
def _catalogue() -> _Catalogue:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    table = tomllib.loads(DATA.read_text(encoding="utf-8"))
    releases = [_record(Release, entry) for entry in table["jetpack"]]
    return _Catalogue(
        devices=tuple(_record(Device, entry) for entry in table["device"]),
        releases={name: release for release in releases for name in (release.name, *release.aliases)},
        families={name: _record(Efficiency, entry) for name, entry in table["families"].items()},
        precisions={int(sm): tuple(names) for sm, names in table["precisions"].items()},
        tensorrt_since=table["tensorrt_since"],
    )


def _record(cls: type, entry: Mapping[str, Any]) -> Any:
    """A dataclass from a table of our own data file; a wrong key is a defect of ours and fails the tests."""
    known = {item.name for item in fields(cls)}
    required = {item.name for item in fields(cls) if item.default is MISSING}
    if wrong := (entry.keys() - known) | (required - entry.keys()):
        raise ValueError(f"{DATA.name}: {dict(entry)}: unknown or missing keys {sorted(wrong)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})


def _target(name: str, device: Device, release: Release | None, tensorrt: str | None) -> Target:
    catalogue = _catalogue()
    level = max(sm for sm in catalogue.precisions if sm <= device.sm)
    return Target(name, device, release, tensorrt, catalogue.precisions[level], catalogue.families[device.family])


def _release_of(device: Device, suffix: str, name: str) -> Release:
    releases = _catalogue().releases
    if not suffix:
        return releases[[item for item in device.jetpack if "+" not in item][-1]]
    release = releases.get(suffix.removeprefix("jp"))
    if suffix.startswith("jp") and release is not None and release.name in device.jetpack:
        return release
    what = f"JetPack {suffix[2:]}" if re.match(r"jp\d", suffix) else repr(suffix)
    raise UserError(
        f"target {name!r}: {what} does not exist for {device.title}",
        expected="one of: " + ", ".join(f"{device.name}@jp{item}" for item in device.jetpack),
    )


def _since(precision: str) -> str | None:
    return _catalogue().tensorrt_since.get(precision)


def _unknown(name: str, word: str, known: list[str]) -> UserError:
    close = difflib.get_close_matches(word, known, n=1) or [item for item in known if word and word in item][:1]
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return UserError(
        f"there is no target {name!r}{hint}",
        expected="one of: " + ", ".join(known),
        fix="add the release to a Jetson, e.g. orin-nano-8gb@jp6.2; lightkv targets shows all",
    )
