"""Frozen sets: images, questions and right answers that figures are measured on. Standard library only.

A set NAME is two files in `calibration/`: NAME.zip (the images) and NAME.jsonl (a question a line: image, skill,
question, answer). tiny-sets.json lists the sets with their hashes, which are compared every time a set is read: a
figure is worth nothing if the questions changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightkv_export.errors import UserError

INDEX = "tiny-sets.json"


@dataclass(frozen=True)
class Question:
    """A question about an image, the skill that it tests, and its only right answer (lower case)."""

    image: str
    skill: str
    text: str
    answer: str


@dataclass(frozen=True)
class FrozenSet:
    """A set as it is frozen: `images` holds the files' bytes by name; `sha256` is that of the questions' file."""

    name: str
    questions: tuple[Question, ...]
    images: Mapping[str, bytes]
    sha256: str

    def sample(self, limit: int | None) -> FrozenSet:
        """At most `limit` questions, drawn without order (a set has as many of each image, so a stride would favour
        skills), but always the same; None: all."""
        if limit is None or limit >= len(self.questions):
            return self
        if limit < 1:
            raise UserError(f"limit is {limit}", expected="at least 1 question")
        chosen = sorted(random.Random(0).sample(range(len(self.questions)), limit))
        return replace(self, questions=tuple(self.questions[place] for place in chosen))


def calibration_directory() -> Path:
    """`lightkv_export/calibration` in an installed package, `calibration` beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "calibration"
    return installed if installed.is_dir() else package.parent / "calibration"


def set_names(directory: Path | None = None) -> list[str]:
    """Names of the frozen sets."""
    return sorted(_index(directory or calibration_directory()))


def load_set(name: str, directory: Path | None = None) -> FrozenSet:
    """Reads the set called `name`.

    Raises:
        UserError: no such set, or a file of it is missing, altered or not what it should be.
    """
    directory = directory or calibration_directory()
    index = _index(directory)
    if name not in index:
        raise UserError(f"there is no frozen set called {name!r}", expected=f"one of: {', '.join(sorted(index))}")
    digests = index[name]["sha256"]
    content = {end: _checked(directory / f"{name}.{end}", digests[f"{name}.{end}"]) for end in ("zip", "jsonl")}
    rows = [json.loads(line) for line in content["jsonl"].decode("utf-8").splitlines()]
    questions = tuple(Question(row["image"], row["skill"], row["question"], row["answer"]) for row in rows)
    with zipfile.ZipFile(io.BytesIO(content["zip"])) as archive:
        images = {image: archive.read(image) for image in archive.namelist()}
    return FrozenSet(name, questions, images, digests[f"{name}.jsonl"])


def _index(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory / INDEX} cannot be read: {error}", fix="install lightkv-export again, or restore calibration/"
        ) from None


def _checked(path: Path, sha256: str) -> bytes:
    """A file's bytes, after a comparison with its hash."""
    again = "restore the file from the repository; figures from another set cannot be compared"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", expected="a file of a frozen set", fix=again) from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{path} is altered: sha256 {found}", expected=f"sha256 {sha256}, by {INDEX}", fix=again)
    return content
