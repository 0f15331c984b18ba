"""Models of any family with seeded random weights, for the tests.

Weights are normal with standard deviation gain / sqrt(fan-in), so that activations keep their scale through the layers;
the gains (GAINS) make attention pick tokens instead of averaging them. What is generated then depends on the image and
on the prompt, and does not settle into one token.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

GAINS = {"q_proj": 2.0, "k_proj": 2.0}  # by the module's name; all others 1


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


def save_checkpoint(model: PreTrainedModel, out: Path, files: list[Path]) -> None:
    """Writes a checkpoint that `from_pretrained` loads: the model, and copies of the tokenizer and processor files.

    Of `files`, configuration and weights are left out: the model's own are written.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a few MB: nothing to watch
    model.save_pretrained(out)
    if shown:
        logging.enable_progress_bar()
    for path in files:
        if path.name not in ("config.json", "model.safetensors"):
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
