"""The questions of the frozen sets: what their script makes, and each about other places of its image."""

from __future__ import annotations

import io
import random
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))

import make_tiny_sets  # noqa: E402
from questions import ask  # noqa: E402
from scenes import SceneMaker  # noqa: E402


def pixels(path: Path) -> dict[str, bytes]:
    """The images of a set by name, decoded: another release of a library may pack them otherwise."""
    with zipfile.ZipFile(path) as archive:
        return {name: Image.open(io.BytesIO(archive.read(name))).tobytes() for name in archive.namelist()}


@pytest.mark.parametrize("name", make_tiny_sets.SETS)
def test_the_shipped_sets_are_what_the_script_makes(tmp_path: Path, name: str) -> None:
    make_tiny_sets.make(name, tmp_path)
    shipped = ROOT / "calibration"
    assert (tmp_path / f"{name}.jsonl").read_bytes() == (shipped / f"{name}.jsonl").read_bytes()
    assert pixels(tmp_path / f"{name}.zip") == pixels(shipped / f"{name}.zip")


def test_questions_about_an_image_are_decided_by_different_places() -> None:
    maker, rng, asked = SceneMaker(7, num_textures=4), random.Random(7), Counter()
    for _ in range(40):
        questions = make_tiny_sets._questions(rng, maker.scene(), asked)
        assert len({question.places for question in questions}) == len(questions) > 1
        assert len({question.skill for question in questions}) == len(questions)


def test_what_decides_a_question_has_the_answer() -> None:
    maker, rng = SceneMaker(8, num_textures=4), random.Random(8)
    for _ in range(40):
        scene = maker.scene()
        for skill in ("colour", "shape", "size", "number", "word"):
            question = ask(rng, skill, scene)
            if question is not None:
                (item,) = (item for item in scene.items if {item.place} == question.places)
                assert question.answer in (item.colour, item.name, item.size)
