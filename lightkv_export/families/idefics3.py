"""Idefics3, which the first SmolVLM is too: what SmolVLM2 does with a still image, and no videos (arXiv 2408.12637).

Transformers has a configuration, a processor and a model of its own for it, with the same names inside.
"""

from __future__ import annotations

from lightkv_export.families.smolvlm import SmolVLM


class Idefics3(SmolVLM):
    """One unit per tile, as in SmolVLM2; a tile of Idefics3-8B has 169 vision tokens, about 42 per window at first."""


FAMILY = Idefics3()
