"""Where a checkpoint lies: built in, a local directory, or a hub id (downloaded once, only safetensors and JSON).

A hub id may name a revision: ORG/NAME@REVISION. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured. Code that a
checkpoint brings along is never run.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightkv_export.errors import UserError
from lightkv_export.filesystem import disk_error
from lightkv_export.recipe import recipe_directory

HUB_FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model"]  # no pickles, no code
BUILTIN = "builtin:"  # a checkpoint that lies beside its recipe
SUPPORTED = {"torch": ("2.13", "2.14"), "transformers": ("5.20", "6")}
"""Package -> (first release that exports are made with, first that they are not), as in pyproject.toml."""


def check_versions() -> None:
    """Raises UserError if torch or transformers is of a release for which the lowering is not written."""
    for name, (first, end) in SUPPORTED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # its import will say how to install it
        if not _release(first) <= _release(found) < _release(end):
            raise UserError(
                f"{name} {found} is installed",
                expected=f"{name} >= {first} and < {end}, whose layers and operators this version exports",
                fix=f'pip install "{name}>={first},<{end}"',
            )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def split_revision(model: str) -> tuple[str, str | None]:
    """ORG/NAME@REVISION -> (ORG/NAME, REVISION); the name of a directory stays whole."""
    name, _, revision = model.partition("@")
    return (model, None) if not revision or Path(model).is_dir() else (name, revision)


def config_of(model: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a local directory or a hub id.

    Raises:
        UserError: there is none, it is damaged, or it asks for what is never done (see `_check_config`).
    """
    is_local = Path(model).is_dir()
    directory = Path(model) if is_local else Path(_from_hub(model, revision, ["config.json"]))
    return _read_config(directory, model)


def checkpoint_directory(checkpoint: str, revision: str | None = None) -> Path:
    """The local directory of a recipe's checkpoint, downloaded first if need be."""
    if checkpoint.startswith(BUILTIN):
        return recipe_directory() / checkpoint.removeprefix(BUILTIN)
    config_of(checkpoint, revision)  # what will be refused is refused before gigabytes are downloaded
    return Path(checkpoint if Path(checkpoint).is_dir() else _from_hub(checkpoint, revision, HUB_FILES))


def _read_config(directory: Path, model: str) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{model} has no config.json", expected="a Hugging Face checkpoint directory") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", fix="download the checkpoint again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a configuration", expected="a JSON object", fix="download it again")
    _check_config(config, model)
    return config


def _check_config(config: Mapping[str, Any], model: str) -> None:
    """Refuses checkpoints that need their own code, and weights that are not plain numbers."""
    if config.get("auto_map"):
        raise UserError(
            f"{model} asks for Python code of its own (auto_map in config.json), which is never run",
            expected="an architecture that transformers has itself",
            fix="use the same model's checkpoint for transformers; its name often ends in -hf",
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UserError(
            f"{model} is quantized ({method})",
            expected="weights in float16, bfloat16 or float32",
            fix="use the model's original checkpoint",
        )


def _from_hub(model: str, revision: str | None, patterns: list[str]) -> str:
    """Snapshot directory of a hub repository; what the hub answers becomes a message that says what to do."""
    import huggingface_hub
    from huggingface_hub import errors

    at = f"{model}@{revision}" if revision else model
    try:
        return huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
    except errors.GatedRepoError:
        url = f"https://huggingface.co/{model}"
        raise UserError(f"{model} is gated", fix=f"accept its terms at {url}, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no repository {model}, or it is private",
            expected="ORG/NAME, or a local directory",
            fix="check the name; for a private repository set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"the hub has no revision {revision!r} of {model}", expected="a branch, a tag or a commit", fix="check it"
        ) from None
    except errors.HFValidationError:
        raise UserError(f"{model!r} cannot be a repository's name", expected="ORG/NAME, or a local directory") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _not_reached(at, error) from None
    except (OSError, errors.HTTPError) as error:
        if disk_error(error):
            raise
        raise _not_reached(at, error) from None


def _not_reached(model: str, error: Exception) -> UserError:
    """The network, or the offline mode, kept us from `model`."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return UserError(
            f"{model} was not downloaded before, and HF_HUB_OFFLINE is set",
            fix=f"unset HF_HUB_OFFLINE, or download it where there is a network: hf download {model.partition('@')[0]}",
        )
    return UserError(
        f"{model} could not be downloaded: {type(error).__name__}",
        expected="a connection to the hub, huggingface.co or what HF_ENDPOINT says",
        fix="check the network and HTTPS_PROXY, or pass a local directory; what arrived is kept, so just run it again",
    )
