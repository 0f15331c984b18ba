"""What the gate asks: conversations, with pictures of the bundle's image sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from lightkv_export.manifest import Keep, Manifest, Size
from lightkv_export.recipe import StageSpec


@dataclass(frozen=True)
class Case:
    """A conversation: each turn is a text and the number of images shown with it; `first` is the place in the bundle's
    sizes of the first image's, the next image has the next one."""

    name: str
    turns: tuple[tuple[str, int], ...]
    first: int = 0

    @property
    def num_images(self) -> int:
        """Images of all turns."""
        return sum(images for _, images in self.turns)


LONG = (
    "Look at the picture and tell me, in the order in which you notice them, " + "what stands out, " * 12 + "and why."
)
ONE_IMAGE = Case("one image", (("What is in the picture?", 1),))
CASES = (
    Case("text only", (("Tell me something about the sea.", 0),)),
    ONE_IMAGE,
    Case("one image, long prompt", ((LONG, 1),)),
    Case("two images", (("Which of the two pictures is brighter?", 2),)),
    Case("second turn", (("What is in the picture?", 1), ("And what is behind it?", 0))),
)


@dataclass(frozen=True)
class Picture:
    """A test picture and the size of the bundle that it is made for."""

    image: Image.Image
    size: Size

    @property
    def units(self) -> tuple[int, ...]:
        """Vision tokens of each of its units."""
        return (self.size.tokens,) * self.size.units


def with_other_sizes(cases: Sequence[Case], manifest: Manifest) -> list[Case]:
    """The cases, and those with one image once for every further size of the bundle."""
    others = [
        replace(ONE_IMAGE, name=f"{ONE_IMAGE.name}, {size.name}", first=place)
        for place, size in enumerate(manifest.sizes)
        if place > 0 and ONE_IMAGE in cases
    ]
    return [*cases, *others]


def pictures_for(case: Case, manifest: Manifest) -> list[Picture]:
    """The pictures of a case: of exactly the bundle's sizes, in turn; of any size where all are cropped to one."""
    places = [(case.first + place) % len(manifest.sizes) for place in range(case.num_images)]
    sizes = [manifest.sizes[place] for place in places]
    if manifest.preprocess.kind == "clip":
        images = pictures(case.num_images)
    else:
        images = [picture(place, size.width, size.height) for place, size in enumerate(sizes)]
    return [Picture(image, size) for image, size in zip(images, sizes, strict=True)]


def pictures(count: int) -> list[Image.Image]:
    """Test pictures of different sizes."""
    return [picture(index, 320 - 40 * index, 240 + 60 * index) for index in range(count)]


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A deterministic test picture: gradients, discs and noise, so that no two patches are alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=-1)
    for _ in range(6):
        centre, radius = rng.integers(0, (height, width)), rng.integers(20, 70)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        pixels[inside] = rng.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8))


def stages_of(keep: Keep) -> dict[int, list[StageSpec]]:
    """The stages of a keep by the length of the units that they merge; empty for keep 1.0."""
    return {
        plan.tokens: [StageSpec(stage.layer, stage.windows_per_side, stage.discard_ratio) for stage in plan.stages]
        for plan in keep.plans
        if plan.stages
    }
