"""Where the images are in a chunk, before and after each stage: the index inputs of the stage graphs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """A chunk as one segment sees it.

    Attributes:
        length: tokens S in this segment.
        images: first token of each image, ascending.
        tokens: tokens v of each image in this segment.
        survivors: int64 [S], place of each token in the uncompressed chunk.
    """

    length: int
    images: tuple[int, ...]
    tokens: int
    survivors: np.ndarray

    @staticmethod
    def uncompressed(length: int, images: tuple[int, ...], tokens: int) -> Layout:
        """The chunk as it enters segment 0."""
        return Layout(length, images, tokens, np.arange(length, dtype=np.int64))

    @property
    def vision_index(self) -> np.ndarray:
        """int64 [I, v]: places of each image's tokens."""
        return np.asarray(self.images, np.int64)[:, None] + np.arange(self.tokens, dtype=np.int64)

    @property
    def text_index(self) -> np.ndarray:
        """int64 [T]: places of all other tokens."""
        is_text = np.ones(self.length, bool)
        is_text[self.vision_index] = False
        return np.flatnonzero(is_text).astype(np.int64)

    def merged_starts(self, tokens_out: int) -> tuple[int, ...]:
        """First token of each image after a stage that leaves `tokens_out` per image."""
        removed = self.tokens - tokens_out
        return tuple(start - place * removed for place, start in enumerate(self.images))

    def order(self, tokens_out: int) -> np.ndarray:
        """int64 [S']: gathers concat(text tokens [T], merged tokens [I*v']) into sequence order."""
        length = self.length - len(self.images) * (self.tokens - tokens_out)
        is_text = np.ones(length, bool)
        order = np.empty(length, np.int64)
        num_text = self.length - len(self.images) * self.tokens
        for place, start in enumerate(self.merged_starts(tokens_out)):
            first = num_text + place * tokens_out
            order[start : start + tokens_out] = np.arange(first, first + tokens_out)
            is_text[start : start + tokens_out] = False
        order[is_text] = np.arange(num_text)
        return order

    def merged(self, kept: np.ndarray) -> Layout:
        """The chunk after a stage. `kept` int64 [I, v']: place of each survivor within its image, ascending."""
        tokens_out = kept.shape[1]
        vision = np.take_along_axis(self.vision_index, kept, axis=1).reshape(-1)
        places = np.concatenate([self.text_index, vision])[self.order(tokens_out)]
        return Layout(len(places), self.merged_starts(tokens_out), tokens_out, self.survivors[places])
