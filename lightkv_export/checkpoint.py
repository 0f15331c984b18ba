"""Where a checkpoint lies: built in, a local directory, or a hub id (downloaded once, only safetensors and JSON)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightkv_export.errors import UserError

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]  # no pickles, no code


def config_of(model: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a local directory or a hub id; raises UserError if there is none."""
    directory = Path(model)
    path = (
        directory / "config.json"
        if directory.is_dir()
        else Path(_from_hub(model, revision, ["config.json"])) / "config.json"
    )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} has no config.json", expected="a Hugging Face checkpoint directory") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", fix="download the checkpoint again") from None


def checkpoint_directory(checkpoint: str, revision: str | None = None) -> Path:
    """The local directory of a recipe's checkpoint, downloaded or built first if need be."""
    if checkpoint == "builtin:tiny-llava":
        from lightkv_export.tiny import tiny_llava_checkpoint

        return tiny_llava_checkpoint()
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    return Path(_from_hub(checkpoint, revision, HUB_FILES))


def _from_hub(model: str, revision: str | None, patterns: list[str]) -> str:
    """Snapshot directory of a hub repository; HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured by the library."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
    except GatedRepoError:
        raise UserError(f"{model} is gated", fix="accept its terms on the hub, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no repository {model}", expected="org/name, or a local directory") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{model} could not be downloaded: {type(error).__name__}",
            fix="check the network, or pass a local directory; HF_HUB_OFFLINE=1 uses what was downloaded before",
        ) from None
