"""The host side of a checkpoint: tokenizer, chat template, image settings and stop tokens, in the runtime's form.

Everything is read through transformers, which knows every older layout, and written as plain files that the runtime
reads without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightkv_export.errors import UserError
from lightkv_export.families import Checkpoint
from lightkv_export.families.processors import load_processor
from lightkv_export.manifest import Preprocess

# Settings that only say how Hugging Face itself should run.
NOT_SETTINGS = (
    "image_processor_type",
    "processor_class",
    "data_format",
    "input_data_format",
    "device",
    "return_tensors",
)


@dataclass(frozen=True)
class Assets:
    """What the manifest says about the host side."""

    preprocess: Preprocess
    eos_token_ids: tuple[int, ...]


def load_checkpoint(directory: Path) -> Checkpoint:
    """Configuration and processor of a checkpoint; raises UserError if the processor's files are not there or wrong."""
    from transformers import AutoConfig

    processor = load_processor(directory)
    return Checkpoint(directory, AutoConfig.from_pretrained(directory, trust_remote_code=False), processor)


def write_assets(checkpoint: Checkpoint, out: Path, preprocess_kind: str) -> Assets:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja, preprocessor_config.json and
    generation_config.json into `out`; raises UserError if the checkpoint has no chat template."""
    processor = checkpoint.processor
    template = processor.chat_template or processor.tokenizer.chat_template
    if not isinstance(template, str):
        raise UserError(
            f"{checkpoint.directory} has no chat template", expected="chat_template.jinja beside the weights"
        )
    processor.tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = {key: value for key, value in processor.image_processor.to_dict().items() if _is_setting(key, value)}
    _write_json(out / "preprocessor_config.json", settings)
    generation = _read_json(checkpoint.directory / "generation_config.json")
    _write_json(out / "generation_config.json", generation)
    eos = generation.get("eos_token_id", processor.tokenizer.eos_token_id)
    ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    return Assets(Preprocess(preprocess_kind, settings), ids)


def _is_setting(key: str, value: Any) -> bool:
    return value is not None and not key.startswith("_") and key not in NOT_SETTINGS


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
