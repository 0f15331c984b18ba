"""Draws recipes/tiny-llava/example.png, the picture that the quickstart asks about: a house, a tree, the sun.

Run: python scripts/draw_example.py [FILE]. Deterministic: plain shapes, no fonts, no smoothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

EXAMPLE = Path(__file__).parent.parent / "recipes" / "tiny-llava" / "example.png"


def draw_scene() -> Image.Image:
    """The scene as an RGB image of 320 x 240 pixels; not square, so that preprocessing has something to do."""
    image = Image.new("RGB", (320, 240), (135, 196, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 170, 319, 239), fill=(96, 160, 72))
    draw.ellipse((250, 18, 298, 66), fill=(250, 214, 60))
    draw.rectangle((60, 100, 170, 190), fill=(214, 120, 84))
    draw.polygon(((48, 100), (115, 48), (182, 100)), fill=(140, 44, 40))
    draw.rectangle((100, 140, 130, 190), fill=(92, 58, 34))
    draw.rectangle((72, 112, 94, 134), fill=(240, 240, 200))
    draw.rectangle((136, 112, 158, 134), fill=(240, 240, 200))
    draw.rectangle((230, 130, 244, 196), fill=(104, 70, 40))
    draw.ellipse((200, 76, 274, 146), fill=(40, 110, 50))
    return image


if __name__ == "__main__":
    draw_scene().save(sys.argv[1] if len(sys.argv) > 1 else EXAMPLE, optimize=True)
