"""Makes the frozen sets calibration/tiny-eval.* and calibration/tiny-calibration.*: scenes and questions.

    python scripts/make_tiny_sets.py [--out DIR]

Per set: NAME.zip (PNG images), NAME.jsonl (one question a line: image, skill, question, answer), and an entry in
tiny-sets.json with seed, numbers and sha256. The seeds differ from each other and from training's. The files are
frozen: make them again only together with new figures for the model.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import sys
import zipfile
from collections import Counter
from pathlib import Path

from PIL import Image
from questions import SKILLS, Question, ask
from scenes import Scene, SceneMaker

OUT = Path(__file__).resolve().parent.parent / "calibration"
SETS = {"tiny-eval": (1001, 240), "tiny-calibration": (1002, 120)}  # seed, scenes
PER_SCENE = 4


def make(name: str, out: Path) -> dict[str, object]:
    """Writes one set; returns its entry for tiny-sets.json."""
    seed, num_scenes = SETS[name]
    maker, rng = SceneMaker(seed), random.Random(seed)
    asked: Counter[str] = Counter()
    skills: Counter[str] = Counter()
    lines = []
    with zipfile.ZipFile(out / f"{name}.zip", "w") as archive:  # PNGs are compressed already
        for index in range(num_scenes):
            scene = maker.scene()
            image = f"{index:03}.png"
            archive.writestr(zipfile.ZipInfo(image), _png(scene))
            for question in _questions(rng, scene, asked):
                row = {"image": image, "skill": question.skill, "question": question.text, "answer": question.answer}
                lines.append(json.dumps(row))
                skills[question.skill] += 1
    (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = {
        f"{name}.{end}": hashlib.sha256((out / f"{name}.{end}").read_bytes()).hexdigest() for end in ("zip", "jsonl")
    }
    return {
        "seed": seed,
        "scenes": num_scenes,
        "questions": len(lines),
        "skills": dict(sorted(skills.items())),
        "sha256": files,
    }


def _questions(rng: random.Random, scene: Scene, asked: Counter[str]) -> list[Question]:
    """Up to PER_SCENE questions of different skills, decided by different places; first those asked least so far."""
    found: list[Question] = []
    for skill in sorted(rng.sample(list(SKILLS), len(SKILLS)), key=lambda skill: asked[skill]):
        if len(found) < PER_SCENE and (question := ask(rng, skill, scene)):
            found.append(question)
            asked[skill] += 1
    by_places: dict[frozenset[int], Question] = {}
    for question in found:
        by_places.setdefault(question.places, question)
    return list(by_places.values())


def _png(scene: Scene) -> bytes:
    out = io.BytesIO()
    Image.fromarray(scene.pixels).save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> int:
    """Makes both sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="directory (default: %(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    entries = {name: make(name, out) for name in SETS}
    (out / "tiny-sets.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
