"""The tokens of a conversation as the caches know them: ids, and which image each vision token belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """A run of tokens of the uncompressed sequence.

    Attributes:
        ids: int64 [S], image placeholders expanded to one per vision token.
        keys: int64 [S], what identifies a token in a cache: its id, or -1 - serial for a vision token. Two images
            have the same placeholder ids, but different serials.
        places: int64 [S], place of a vision token within its image, -1 for text.
    """

    ids: np.ndarray
    keys: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def of(ids: Sequence[int], image_token_id: int, image_tokens: int, serials: Sequence[int]) -> Tokens:
        """Tokens of a whole prompt; `serials` names its images, in order."""
        array = np.asarray(ids, np.int64)
        keys, places = array.copy(), np.full(len(array), -1, np.int64)
        vision = array == image_token_id
        keys[vision] = np.repeat(-1 - np.asarray(serials, np.int64), image_tokens)
        places[vision] = np.tile(np.arange(image_tokens), len(serials))
        return Tokens(array, keys, places)

    def part(self, start: int, stop: int | None = None) -> Tokens:
        """Tokens [start, stop)."""
        return Tokens(self.ids[start:stop], self.keys[start:stop], self.places[start:stop])

    @property
    def images(self) -> tuple[int, ...]:
        """First token of every image that begins here."""
        return tuple(np.flatnonzero(self.places == 0).tolist())

    @property
    def serials(self) -> tuple[int, ...]:
        """The images that have tokens here, in order."""
        return tuple(dict.fromkeys((-1 - self.keys[self.places >= 0]).tolist()))
