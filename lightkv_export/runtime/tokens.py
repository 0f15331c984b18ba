"""The tokens of a conversation as the caches know them: ids, the image that each vision token belongs to, and for
mRoPE the positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightkv_export.manifest import Size


@dataclass(frozen=True)
class ShownImage:
    """An image of the conversation.

    Attributes:
        serial: its number, never used twice in a conversation.
        size: how many tokens it has.
        positions: mRoPE: int64 [3, size.image_tokens], relative to the position of its first token.
    """

    serial: int
    size: Size
    positions: np.ndarray | None = None


@dataclass(frozen=True)
class Tokens:
    """A run of tokens of the uncompressed sequence.

    Attributes:
        ids: int64 [S], image placeholders expanded to one per vision token.
        keys: int64 [S], what identifies a token in a cache: its id, or -1 - serial for a vision token. Two images
            have the same placeholder ids, but different serials.
        places: int64 [S], place of a vision token within its image, -1 for text.
        units: int64 [S], vision tokens of the whole unit that a vision token belongs to, 0 for text.
        positions: int64 [3, S] for mRoPE, else None: then a token's position is its place in the sequence.
    """

    ids: np.ndarray
    keys: np.ndarray
    places: np.ndarray
    units: np.ndarray
    positions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def of(
        ids: Sequence[int], image_token_id: int, images: Sequence[ShownImage] = (), *, mrope: bool = False
    ) -> Tokens:
        """Tokens of a whole conversation: `ids` with expanded placeholders, and its images in order."""
        array = np.asarray(ids, np.int64)
        keys, places, units = array.copy(), np.full(len(array), -1, np.int64), np.zeros(len(array), np.int64)
        vision = np.flatnonzero(array == image_token_id) if images else np.empty(0, np.int64)
        if images:
            counts = [image.size.image_tokens for image in images]
            keys[vision] = np.repeat([-1 - image.serial for image in images], counts)
            places[vision] = np.concatenate([np.arange(count) for count in counts])
            units[vision] = np.repeat([image.size.tokens for image in images], counts)
        return Tokens(array, keys, places, units, _mrope_positions(len(array), vision, images) if mrope else None)

    def part(self, start: int, stop: int | None = None) -> Tokens:
        """Tokens [start, stop)."""
        arrays = (array[start:stop] for array in (self.ids, self.keys, self.places, self.units))
        return Tokens(*arrays, None if self.positions is None else self.positions[:, start:stop])

    def then(self, token: int) -> Tokens:
        """The text token that comes after these."""
        following = Tokens.of([token], -1)
        return following if self.positions is None else replace(following, positions=self._next_position())

    @property
    def serials(self) -> tuple[int, ...]:
        """The images that have tokens here, in order."""
        return tuple(dict.fromkeys((-1 - self.keys[self.places >= 0]).tolist()))

    @property
    def vision_counts(self) -> dict[int, int]:
        """How many vision tokens belong to units of each length: {v: tokens}."""
        lengths, counts = np.unique(self.units[self.places >= 0], return_counts=True)
        return dict(zip(lengths.tolist(), counts.tolist(), strict=True))

    def _next_position(self) -> np.ndarray:
        """int64 [3, 1]: one more than the largest position of the last token, as Hugging Face continues."""
        return np.full((3, 1), self.positions[:, -1].max() + 1, np.int64)


def _mrope_positions(length: int, vision: np.ndarray, images: Sequence[ShownImage]) -> np.ndarray:
    """Positions int64 [3, length]: text advances by one on all axes, an image's tokens lie around its first position,
    and after it the text goes on at first + advance."""
    steps = np.ones(length, np.int64)
    steps[vision] = 0
    if images:
        last = vision[np.cumsum([image.size.image_tokens for image in images]) - 1]
        steps[last] = [image.size.advance for image in images]
    positions = np.tile(np.cumsum(steps) - steps, (3, 1))
    if images:
        positions[:, vision] += np.concatenate([image.positions for image in images], axis=1)
    return positions
