"""Small random models and their bundles, each made once per test run: an export takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; what is printed into a file shall be as wide as a user gets it


@dataclass(frozen=True)
class Small:
    """A small random LLaVA: `make_llava`'s arguments, and the keeps or stages that its bundles have."""

    model: dict[str, Any]
    keeps: tuple[float, ...] = ()
    stages: tuple[str, ...] = ()
    link_weights: bool = False
    positions: str | None = "restart"  # the policy that `oracle_logits` of test_export.py follows


MODELS = {  # the seeds were chosen for answers of 64 tokens, without a stop token
    # Three keeps below 1.0 over the same segments, stages after neighbouring layers; wide MLPs make weights dominate.
    "wide": Small({"seed": 1, "layers": 6, "image_size": 48, "patch": 6, "intermediate_size": 2048}, (0.65, 0.71, 0.8)),
    # Grouped queries, an odd grid (9 x 9, so windows are uneven), biases, a stage right after layer 0.
    "grouped": Small(
        {"seed": 2, "layers": 4, "hidden": 96, "heads": 6, "kv_heads": 2, "image_size": 72, "attention_bias": True},
        stages=("0:2:0.5", "2:1:0.3"),
    ),
    # One key head, a head size that is not hidden / heads, scaled RoPE.
    "one key": Small(
        {
            "seed": 3,
            "layers": 3,
            "kv_heads": 1,
            "head_dim": 24,
            "image_size": 48,
            "patch": 6,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
        stages=("1:1:0.4",),
    ),
    # The head is the embedding table; the float32 bundle uses the checkpoint's own file.
    "tied": Small(
        {"seed": 1, "layers": 3, "heads": 2, "kv_heads": 2, "image_size": 64, "tied": True},
        stages=("0:2:0.5",),
        link_weights=True,
    ),
    # 12 x 12 vision tokens in 4 x 4 windows.
    "many windows": Small({"seed": 5, "layers": 3, "kv_heads": 2}, stages=("1:4:0.5",)),
}

RECIPES = {"tiny-llava": Small({}, (0.75, 0.55, 0.4), positions=None)}  # shipped models


@dataclass
class Exports:
    """Checkpoints and bundles by name, made when first asked for; tests must not change them."""

    root: Path
    made: dict[str, Path] = field(default_factory=dict)

    def model(self, name: str) -> Path:
        """The checkpoint of `MODELS[name]`."""
        from models import make_llava

        if name in RECIPES:
            return Path(name)  # needs no directory
        if name not in self.made:
            self.made[name] = make_llava(self.root / name.replace(" ", "-"), **MODELS[name].model)
        return self.made[name]

    def bundle(self, name: str, **options: Any) -> Path:
        """Its bundle. `options` are fields of ExportRequest; without any: float32, the modern lowering."""
        from lightkv_export.pipeline import ExportRequest, export_bundle
        from lightkv_export.recipe import StageSpec

        key = f"{name} {options}"
        if key not in self.made:
            small, out = {**MODELS, **RECIPES}[name], self.root / f"bundle-{len(self.made)}"
            cuts = {"keeps": small.keeps, "stages": tuple(StageSpec.parse(text) for text in small.stages)}
            fixed = {"max_tokens": 2048, "link_weights": small.link_weights, "positions": small.positions}
            request = ExportRequest(str(self.model(name)), out, **{**fixed, **cuts, **options})
            self.made[key] = export_bundle(request).path
        return self.made[key]


def repack(source: Path, out: Path, edit: Callable[[Path], None] = lambda root: None, /, **changes: Any) -> Path:
    """A copy of a bundle with files changed by `edit` and manifest fields replaced, whole and rightly hashed: what a
    defect of the exporter would have written."""
    from lightkv_export.bundle import BundleWriter, open_bundle

    bundle = open_bundle(source)
    with BundleWriter(out) as writer:
        for name in bundle.manifest.files:
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            (writer.path / name).write_bytes((source / name).read_bytes())
        edit(writer.path)
        writer.finish(replace(bundle.manifest, **changes))
    return out


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """See `Exports`."""
    pytest.importorskip("torch").set_num_threads(1)
    return Exports(tmp_path_factory.mktemp("exports"))
