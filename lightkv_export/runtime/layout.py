"""Where units of vision tokens are in a chunk, before and after each stage: the index inputs of the stage graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightkv_export.runtime.tokens import Tokens


@dataclass(frozen=True)
class Unit:
    """A run of vision tokens that is merged on its own.

    Attributes:
        start: its first token in this segment's chunk.
        tokens: how many of them are here.
        whole: tokens v of the whole unit before any stage; says which plan of a keep holds for it.
    """

    start: int
    tokens: int
    whole: int

    @property
    def places(self) -> np.ndarray:
        """int64 [tokens]: where its tokens are."""
        return np.arange(self.start, self.start + self.tokens, dtype=np.int64)


@dataclass(frozen=True)
class Layout:
    """A chunk as one segment sees it.

    Attributes:
        length: tokens S in this segment.
        units: of all images, in order of their places.
        survivors: int64 [S], place of each token in the uncompressed chunk.
    """

    length: int
    units: tuple[Unit, ...]
    survivors: np.ndarray

    @staticmethod
    def of(tokens: Tokens) -> Layout:
        """The chunk as it enters segment 0. A unit at its start or end may be cut, if no stage is to merge it."""
        whole = np.maximum(tokens.units, 1)
        begins = (tokens.places >= 0) & (tokens.places % whole == 0)
        begins[:1] |= tokens.places[:1] >= 0
        units = []
        for start in np.flatnonzero(begins).tolist():
            left = int(whole[start] - tokens.places[start] % whole[start])
            units.append(Unit(start, min(left, len(tokens) - start), int(whole[start])))
        return Layout(len(tokens), tuple(units), np.arange(len(tokens), dtype=np.int64))

    @property
    def text_index(self) -> np.ndarray:
        """int64 [T]: places of all tokens that are no vision token of any image."""
        is_text = np.ones(self.length, bool)
        for unit in self.units:
            is_text[unit.start : unit.start + unit.tokens] = False
        return np.flatnonzero(is_text).astype(np.int64)

    def vision_index(self, units: Sequence[int]) -> np.ndarray:
        """int64 [I, v]: places of the tokens of these units, which are equally long."""
        return np.stack([self.units[unit].places for unit in units])

    @property
    def order(self) -> np.ndarray:
        """int64 [S]: gathers concat(text tokens, tokens of all units) into sequence order."""
        return np.argsort(np.concatenate([self.text_index, *(unit.places for unit in self.units)]))

    def merged(self, kept: Mapping[int, np.ndarray]) -> Layout:
        """The chunk after a stage.

        Args:
            kept: for each unit that was merged (its place in `units`) int64 [v'], places of its survivors within it,
                ascending. Where units stand afterwards depends on their number only.
        """
        stays = np.ones(self.length, bool)
        for number, places in kept.items():
            unit = self.units[number]
            stays[unit.places] = False
            stays[unit.start + places] = True
        before = np.cumsum(stays) - stays
        units = tuple(
            Unit(int(before[unit.start]), len(kept[number]) if number in kept else unit.tokens, unit.whole)
            for number, unit in enumerate(self.units)
        )
        return Layout(int(stays.sum()), units, self.survivors[stays])
