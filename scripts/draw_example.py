"""Draws recipes/tiny-llava/example.png, the picture that the quickstart asks about: a scene of the kind that tiny-llava
knows, four times as large so that a person can look at it.

Run: python scripts/draw_example.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from scenes import SceneMaker

EXAMPLE = Path(__file__).resolve().parent.parent / "recipes" / "tiny-llava" / "example.png"
SEED = 2240  # of neither the frozen sets nor the training
SCALE = 4


def draw_scene() -> Image.Image:
    """The scene as an RGB image."""
    picture = Image.fromarray(SceneMaker(SEED).scene().pixels)
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    draw_scene().save(sys.argv[1] if len(sys.argv) > 1 else EXAMPLE, optimize=True)
