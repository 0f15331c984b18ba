"""Finds the stages that reach a keep. Standard library only; deterministic.

The stages are spaced like the authors' (12, 18, 24 of 32 layers): the layers behind each stage in runs as equal as
possible, none of them before SHALLOWEST_LAYER. Ratio 0.5 is preferred, because at the same keep it lets the stages lie
deepest, and shallow stages cost most quality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

from lightkv_export.errors import UserError
from lightkv_export.recipe import StageSpec
from lightkv_export.windows import MIN_TOKENS_PER_WINDOW, most_windows, tokens_after

KEEP_TOLERANCE = 0.01  # a schedule is an answer to a keep if it lands this close
SHALLOWEST_LAYER = 2  # no stage before this layer: the first layers are where vision tokens are read most
RATIOS = tuple(percent / 100 for percent in range(50, 0, -5))


class _Candidate(NamedTuple):
    """Stages at `layers`, all with one ratio, and the keep that they reach."""

    keep: float
    layers: tuple[int, ...]
    windows: tuple[int, ...]
    ratio: float

    @property
    def specs(self) -> tuple[StageSpec, ...]:
        return tuple(StageSpec(layer, w, self.ratio) for layer, w in zip(self.layers, self.windows, strict=True))

    def __str__(self) -> str:
        return f"{self.keep:.3f} ({' '.join(f'--stage {spec}' for spec in self.specs)})"


def solve(num_layers: int, vision_tokens: int, windows: Sequence[int], keep: float) -> tuple[StageSpec, ...]:
    """Stages whose keep is within KEEP_TOLERANCE of `keep` (below 1), at most one per entry of `windows`.

    As many stages as `windows` has entries, at ratio 0.5, at the most evenly spaced layers; only where no layers land
    close enough a smaller ratio, and only then fewer stages. Where the skip rule would disable a stage, it gets the
    most windows per side that the rule allows.

    Raises:
        UserError: no stages reach `keep`; names the reachable range and the stages at its ends.
    """
    seen: list[_Candidate] = []
    for group in _groups(num_layers, vision_tokens, windows):
        close = [item for item in group if abs(item.keep - keep) <= KEEP_TOLERANCE]
        if close:
            return min(close, key=lambda item: _preference(item, num_layers, keep)).specs
        seen += group
    raise _unreachable(seen, keep, f"{num_layers} layers and {vision_tokens} vision tokens")


def _groups(num_layers: int, vision_tokens: int, windows: Sequence[int]) -> Iterator[list[_Candidate]]:
    """All candidates with the same number of stages and the same ratio, the preferred groups first."""
    for count in range(len(windows), 0, -1):
        for ratio in RATIOS:
            chain = _chain(vision_tokens, windows[:count], ratio)
            if chain is not None:
                sides, tokens = chain
                yield [
                    _Candidate(_keep(num_layers, layers, tokens), layers, sides, ratio)
                    for layers in combinations(range(SHALLOWEST_LAYER, num_layers - 1), count)
                ]


def _chain(tokens: int, windows: Sequence[int], ratio: float) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Windows per side of each stage, and the tokens before, between and after them; None if a stage would be idle."""
    sides, counts = [], [tokens]
    for wanted in windows:
        side = min(wanted, most_windows(counts[-1]))
        left = tokens_after(counts[-1], side, ratio) if side else counts[-1]
        if left == counts[-1]:
            return None
        sides.append(side)
        counts.append(left)
    return tuple(sides), tuple(counts)


def _runs(num_layers: int, layers: Sequence[int]) -> list[int]:
    """Lengths of the runs of layers before, between and behind the stages."""
    edges = (-1, *layers, num_layers - 1)
    return [later - earlier for earlier, later in pairwise(edges)]


def _keep(num_layers: int, layers: Sequence[int], tokens: Sequence[int]) -> float:
    cached = sum(run * count for run, count in zip(_runs(num_layers, layers), tokens, strict=True))
    return cached / (num_layers * tokens[0])


def _preference(item: _Candidate, num_layers: int, keep: float) -> tuple[int, float, tuple[int, ...]]:
    """Smaller is better: even runs behind the stages, then close to the keep, then deep stages."""
    behind = _runs(num_layers, item.layers)[1:]
    return max(behind) - min(behind), abs(item.keep - keep), tuple(-layer for layer in item.layers)


def _unreachable(candidates: Sequence[_Candidate], keep: float, model: str) -> UserError:
    if not candidates:
        return UserError(
            f"keep {keep} is out of reach: no stage has anything to merge in {model}",
            expected=f"at least {SHALLOWEST_LAYER + 2} layers and {MIN_TOKENS_PER_WINDOW} vision tokens, or keep 1.0",
            fix="ask for --keep 1.0",
        )
    lowest, highest = (pick(candidates, key=lambda item: item.keep) for pick in (min, max))
    nearest = min(candidates, key=lambda item: abs(item.keep - keep))
    return UserError(
        f"keep {keep} is out of reach with {model}",
        expected=f"within {KEEP_TOLERANCE} of what stages from layer {SHALLOWEST_LAYER} on can reach: "
        f"from {lowest} to {highest}, or 1.0 without stages",
        fix=f"ask for the nearest, --keep {nearest.keep:.3f}, or give the stages with --stage",
    )
