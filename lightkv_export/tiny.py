"""tiny-llava: the built-in checkpoint, a LLaVA of 6.8 M parameters with true structure and seeded random weights.

The sizes, tokenizer, chat template and processor settings are files of `recipes/tiny-llava/`; the weights are made on
first use and cached. They are normal with standard deviation gain / sqrt(fan-in), so that activations keep their scale
through the layers; the gains (GAINS) make attention pick tokens instead of averaging them. What is generated then
depends on the image and on the prompt, and does not settle into one token.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lightkv_export.recipe import recipe_directory

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

WEIGHTS_VERSION = 1  # raise it when `random_llava` gives other weights for the same config and seed
GAINS = {"q_proj": 2.0, "k_proj": 2.0}  # by the module's name; all others 1


def tiny_llava_checkpoint(seed: int = 0) -> Path:
    """Directory of the checkpoint (fp32 safetensors, config, tokenizer, processor), built on first use.

    It lies in $XDG_CACHE_HOME (or ~/.cache) under lightkv_export/, named by a hash of its sources and seed. It is
    written to a temporary directory and renamed, so it exists whole or not at all, also with several processes at once.
    """
    source = recipe_directory() / "tiny-llava"
    files = sorted(path for path in source.iterdir() if path.is_file())
    digest = hashlib.sha256(f"{WEIGHTS_VERSION} {seed} {sorted(GAINS.items())}".encode())
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightkv_export"
    target = root / f"tiny-llava-{digest.hexdigest()[:16]}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tiny-llava-", dir=root) as scratch:
        whole = Path(scratch) / "whole"
        save_llava(random_llava(source, seed), whole, files)
        try:
            whole.rename(target)
        except OSError:  # another process was first: its directory is as good
            if not target.is_dir():
                raise
    return target


def random_llava(config: Path | LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA in float32 on the CPU with seeded random weights, from a configuration or a directory that has one."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    if isinstance(config, Path):
        config = LlavaConfig.from_pretrained(config)
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights of its own, unused
        model = LlavaForConditionalGeneration(config).float()
    return randomized(model, seed)


def randomized(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Any float32 model of transformers with its weights overwritten in place, for inference; see the module's text."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        weight.data.copy_(_random(name, weight.shape, generator))
    return model.eval()


def save_llava(model: PreTrainedModel, out: Path, files: list[Path]) -> None:
    """Writes a checkpoint that `from_pretrained` loads: the model, and copies of the tokenizer and processor files.

    A config.json among `files` is left out: the model's own is written.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a few MB: nothing to watch
    model.save_pretrained(out)
    if shown:
        logging.enable_progress_bar()
    for path in files:
        if path.name != "config.json":
            shutil.copyfile(path, out / path.name)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    import torch

    values = torch.randn(shape, generator=generator)
    if "embed" in name and "patch_embedding" not in name:  # token, position and class embeddings
        return values
    if len(shape) == 1:  # norm weights and biases: not just ones and zeros, so that a lost one shows
        return 0.1 * values + (name.endswith("weight"))
    gain = GAINS.get(name.split(".")[-2], 1.0)
    return values * gain * math.prod(shape[1:]) ** -0.5
