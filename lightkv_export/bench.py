"""How fast a bundle answers on this machine: time to first token, tokens per second, cache bytes, peak memory.

The keeps take turns within one process, after a warm-up, so that their ratios hold even where the machine's speed
drifts. No torch.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightkv_export.errors import UserError
from lightkv_export.manifest import Size
from lightkv_export.runtime.generation import Result
from lightkv_export.runtime.model import Model

PROMPT = "Describe the picture in detail."

OnRun = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchRequest:
    """What is measured; the command line reads its defaults from here.

    Attributes:
        keeps: keeps of the bundle, by what was asked for; empty: all of them.
        num_images: pictures in the prompt.
        image_size: which of the bundle's sizes they have, e.g. "672x504"; empty: its default.
        prompt: the text.
        new_tokens: tokens generated per run, at least 2.
        runs: counted runs per keep.
        warmup: runs per keep that are not counted.
    """

    keeps: tuple[float, ...] = ()
    num_images: int = 1
    image_size: str = ""
    prompt: str = PROMPT
    new_tokens: int = 32
    runs: int = 5
    warmup: int = 1

    def __post_init__(self) -> None:
        for name, least in (("num_images", 0), ("new_tokens", 2), ("runs", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name.replace('_', ' ')} is {getattr(self, name)}", expected=f"at least {least}")


@dataclass(frozen=True)
class Spread:
    """Median with range over the counted runs."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class KeepFigures:
    """What one keep costs. `peak_memory_bytes` is the process's resident peak during its runs, None where unknown."""

    keep: float
    achieved: float
    ttft_ms: Spread
    tokens_per_s: Spread
    kv_bytes: int
    peak_memory_bytes: int | None
    prompt_tokens: int


def bench(model: Model, request: BenchRequest, on_run: OnRun = lambda name, done, total: None) -> list[KeepFigures]:
    """Runs the request `warmup + runs` times per keep, keeps taking turns; stop tokens do not end a run."""
    keeps = [model.manifest.keep_named(keep) for keep in request.keeps] or list(model.manifest.keeps)
    size = size_of(model, request)
    image = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    token = (model.manifest.image_token_id + 1) % model.manifest.embedding.shape[0]  # any that is no image
    results: dict[float, list[Result]] = {keep.requested: [] for keep in keeps}
    peaks: dict[float, int | None] = dict.fromkeys(results)
    total = (request.warmup + request.runs) * len(keeps)
    for round_ in range(request.warmup + request.runs):
        for index, keep in enumerate(keeps):
            on_run(f"keep {keep.requested:g}", round_ * len(keeps) + index, total)
            reset = reset_peak_memory()
            images = [image] * request.num_images
            result = model.run(request.prompt, images, keep=keep.requested, forced=(token,) * request.new_tokens)
            if round_ >= request.warmup:
                results[keep.requested].append(result)
            if reset:
                peaks[keep.requested] = max(peaks[keep.requested] or 0, peak_memory_bytes() or 0)
    return [
        KeepFigures(
            keep=keep.requested,
            achieved=keep.keep,
            ttft_ms=_spread([result.ttft_ms for result in results[keep.requested]]),
            tokens_per_s=_spread([result.tokens_per_s for result in results[keep.requested]]),
            kv_bytes=results[keep.requested][0].kv_bytes,
            peak_memory_bytes=peaks[keep.requested],
            prompt_tokens=results[keep.requested][0].prompt_tokens,
        )
        for keep in keeps
    ]


def size_of(model: Model, request: BenchRequest) -> Size:
    """The size of the pictures; raises UserError if the bundle lacks it."""
    manifest = model.manifest
    return manifest.size_named(request.image_size) if request.image_size else manifest.sizes[0]


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def reset_peak_memory() -> bool:
    """Restarts the kernel's count of this process's peak memory (Linux); False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int | None:
    """Resident peak of this process since the last reset (Linux), else None."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def device_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or platform.machine()


def document_from_figures(model: Model, request: BenchRequest, figures: Sequence[KeepFigures]) -> dict[str, Any]:
    """The JSON form: machine, request, and figures per keep."""
    return {
        "bundle": model.manifest.name,
        "dtype": model.manifest.dtype,
        "lowering": model.manifest.lowering,
        "device": device_name(),
        "request": asdict(request) | {"image_size": size_of(model, request).name},
        "keeps": [asdict(figure) for figure in figures],
    }
