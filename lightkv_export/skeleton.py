"""A Hugging Face model without its weights, and the names under which a checkpoint stores them.

Parameters are fake tensors (no memory, whatever the model's size); buffers such as RoPE frequencies are real, since the
graphs need their values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightkv_export.errors import UserError
from lightkv_export.families.base import Family
from lightkv_export.segment import ATTENTION_NAME
from lightkv_export.weights import TensorRef, same_bytes


@dataclass(frozen=True)
class Skeleton:
    """The architecture of a checkpoint. `names` maps id(parameter) to its name in the Hugging Face model."""

    model: nn.Module
    family: Family
    dtype: torch.dtype
    fake: FakeTensorMode
    names: Mapping[int, str]

    @property
    def text(self) -> nn.Module:
        """The decoder."""
        return self.family.text_model(self.model)

    @property
    def embedding_name(self) -> str:
        """The model's name of the token embedding table."""
        return self.names[id(self.text.embed_tokens.weight)]

    def weights_of(self, module: nn.Module) -> dict[str, str]:
        """Parameter name inside `module` -> name in the whole model."""
        return {name: self.names[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}


def load_skeleton(
    directory: Path, family: Family, dtype: torch.dtype, stored: Mapping[str, TensorRef] | None = None
) -> Skeleton:
    """Builds the architecture of `directory`'s config.json with fake parameters of `dtype`.

    `stored` are the checkpoint's tensors. What config.json calls tied is tied unless different values are stored for it
    (InternVL3's head and token embedding), as transformers does it when it loads weights. The decoder gets this
    package's attention; the vision side attends as the family says, with primitive operators that all targets take.
    `trust_remote_code` stays off.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    attention = {"": ATTENTION_NAME, "text_config": ATTENTION_NAME, "vision_config": family.vision_attention}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation=attention)
    if not _differ(model, stored or {}):
        model.tie_weights()  # init_empty_weights wraps every parameter anew, which unties them
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:  # tied parameters stay tied
                with fake:
                    made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
            setattr(module, name, made[id(parameter)])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return Skeleton(model.eval(), family, dtype, fake, names)


def checkpoint_names(model: nn.Module, stored: Mapping[str, object]) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, by transformers' own renaming rules.

    Raises UserError for parameters that the checkpoint lacks, and for tensors that would have to be rearranged.
    """
    found = _renamed(model, stored)
    missing = [name for name, _ in model.named_parameters() if name not in found]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"the checkpoint lacks {shown}", fix="check that the download is complete and its config.json right"
        )
    return found


def _differ(model: nn.Module, stored: Mapping[str, TensorRef]) -> bool:
    """Whether other values are stored for a tied parameter than for the one that it is tied to."""
    found = _renamed(model, stored) if model.all_tied_weights_keys else {}
    pairs = [pair for pair in model.all_tied_weights_keys.items() if found.keys() >= set(pair)]
    return any(not same_bytes(*(stored[found[name]] for name in pair)) for pair in pairs)


def _renamed(model: nn.Module, stored: Mapping[str, object]) -> dict[str, str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    found: dict[str, str] = {}
    for key in stored:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converted is not None and name in state:
            raise UserError(
                f"tensor {key} is stored in a form that must be rearranged", fix="save it again with save_pretrained"
            )
        found[name if name in state else key] = key
    return found
