"""Chooses the schedules of tiny-llava on the calibration set, never on the evaluation set.

    python scripts/tune_tiny_schedules.py [--keep K ...] [--workers N] [--positions P]

Rounds: the positions policy, with one schedule of three stages per keep; the layers (one to four stages, all with one
ratio); the windows for the best layers; the best of these on the whole set. In each round the share of right answers
decides, the likelihood of the right answers where it is equal. The last lines are TOML for recipes/tiny-llava.toml;
standard error shows the rounds. About 15 minutes on two cores that are free.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from branches import Judged, Route, judge_all, route_of

from lightkv_export.errors import UserError
from lightkv_export.frozen_sets import FrozenSet, load_set
from lightkv_export.recipe import POSITIONS, Recipe, StageSpec, load_recipe
from lightkv_export.schedule import schedule_from_stages
from lightkv_export.solver import KEEP_TOLERANCE

MODEL, SET = "tiny-llava", "tiny-calibration"
KEEPS = (0.75, 0.55, 0.4, 0.3, 0.2)
RATIOS = (0.5, 0.35, 0.25)
# Windows per side of consecutive stages. The first pattern goes with every choice of layers.
WINDOWS = ((4, 2, 1, 1), (6, 4, 2, 1), (4, 4, 2, 2), (8, 4, 4, 2), (2, 2, 1, 1), (2, 1, 1, 1), (1, 1, 1, 1))
QUESTIONS = (96, 64, 128)  # of the rounds but the last
LEFT = (4, 3)  # schedules per keep that the layer round and the window round hand on

Schedules = dict[float, list[tuple[StageSpec, ...]]]


@dataclass(frozen=True)
class Score:
    """A schedule's share of right answers, and the mean loss of the right ones; more is better, then less."""

    right: float
    loss: float

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Score:
        return cls(float(np.mean([item.right for item in judged])), float(np.mean([item.loss for item in judged])))

    @property
    def rank(self) -> tuple[float, float]:
        return -self.right, self.loss


class Tuner:
    """Runs rounds on parts of the calibration set."""

    def __init__(self, recipe: Recipe, frozen: FrozenSet, workers: int) -> None:
        self.recipe, self.frozen, self.workers = recipe, frozen, workers

    def scores(self, routes: Iterable[Route], limit: int | None, what: str) -> dict[Route, Score]:
        part = self.frozen.sample(min(limit or len(self.frozen.questions), len(self.frozen.questions)))
        judged = judge_all(self.recipe.name, part, list(dict.fromkeys(routes)), self.workers, what)
        return {route: Score.of(items) for route, items in judged.items()}

    def policy(self, schedules: Schedules) -> str:
        """The positions policy under which the middle schedule of three stages, of every keep, answers best."""
        plain = [[s for s in found if len(s) == 3 and s[0].discard_ratio == RATIOS[0]] for found in schedules.values()]
        middle = [found[len(found) // 2] for found in plain if found]
        routes = {policy: [route_of(stages, policy) for stages in middle] for policy in POSITIONS}
        scores = self.scores([r for some in routes.values() for r in some], QUESTIONS[0], "positions")
        for policy, some in routes.items():
            figures = ", ".join(f"{scores[route].right:.1%} (loss {scores[route].loss:.3f})" for route in some)
            print(f"  {policy}: {figures}", file=sys.stderr)
        return min(POSITIONS, key=lambda p: tuple(np.mean([scores[r].rank for r in routes[p]], axis=0)))

    def best(
        self, schedules: Schedules, positions: str, limit: int | None, count: int, what: str
    ) -> dict[float, list[tuple[tuple[StageSpec, ...], Score]]]:
        """The best `count` schedules of every keep with their scores, the best first."""
        routes = [route_of(stages, positions) for found in schedules.values() for stages in found]
        scores = self.scores(routes, limit, what)
        result = {}
        for keep, found in schedules.items():
            ranked = sorted(((s, scores[route_of(s, positions)]) for s in found), key=lambda item: item[1].rank)
            result[keep] = ranked[:count]
            for stages, score in (*ranked[:count], ranked[-1]):
                print(f"  keep {keep}: {score.right:.1%} loss {score.loss:.3f}  {_text(stages)}", file=sys.stderr)
        return result


def candidates(recipe: Recipe, keep: float, windows: Sequence[int]) -> list[tuple[StageSpec, ...]]:
    """All schedules of up to `len(windows)` stages with one ratio and these windows that land on the keep."""
    layers, tokens = recipe.shape.text.layers, recipe.shape.vision.tokens
    found = []
    for count in range(1, len(windows) + 1):
        for ratio in RATIOS:
            for places in combinations(range(layers - 1), count):
                stages = tuple(StageSpec(p, w, ratio) for p, w in zip(places, windows, strict=False))
                if _lands(layers, tokens, stages, keep):
                    found.append(stages)
    return found


def with_windows(recipe: Recipe, keep: float, stages: Sequence[StageSpec]) -> list[tuple[StageSpec, ...]]:
    """The same layers and ratio with every pattern of WINDOWS that still lands on the keep."""
    changed = [
        tuple(StageSpec(s.layer, w, s.discard_ratio) for s, w in zip(stages, windows, strict=False))
        for windows in WINDOWS
    ]
    sizes = recipe.shape.text.layers, recipe.shape.vision.tokens
    return [found for found in dict.fromkeys(changed) if _lands(*sizes, found, keep)]


def _lands(layers: int, tokens: int, stages: Sequence[StageSpec], keep: float) -> bool:
    try:
        return abs(schedule_from_stages(layers, tokens, stages).keep - keep) <= KEEP_TOLERANCE
    except UserError:  # a stage that has nothing to do
        return False


def _text(stages: Sequence[StageSpec]) -> str:
    return " ".join(map(str, stages))


def toml_from_schedules(
    recipe: Recipe, positions: str, chosen: Mapping[float, tuple[tuple[StageSpec, ...], Score]]
) -> str:
    """The recipe's entries, each with what was measured."""
    lines = [f'positions = "{positions}"']
    for keep, (stages, score) in chosen.items():
        achieved = schedule_from_stages(recipe.shape.text.layers, recipe.shape.vision.tokens, stages).keep
        listed = ", ".join(f'"{stage}"' for stage in stages)
        note = f"# achieves {achieved:.3f}; {score.right:.1%} right on {SET}"
        lines += ["", "[[schedule]]", f"keep = {keep:g} {note}", f"stages = [{listed}]"]
    return "\n".join(lines)


def main() -> int:
    """Runs the rounds and prints the recipe's entries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, action="append", help=f"repeatable (default: {KEEPS})")
    parser.add_argument("--positions", choices=POSITIONS, help="leave the first round out and use this policy")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="at most so many questions in every round, to try the script")
    arguments = parser.parse_args()
    recipe, start = load_recipe(MODEL), time.monotonic()
    tuner = Tuner(recipe, load_set(SET).sample(arguments.limit), arguments.workers)
    schedules = {keep: candidates(recipe, keep, WINDOWS[0]) for keep in arguments.keep or KEEPS}
    for keep, found in schedules.items():
        if not found:
            raise SystemExit(f"keep {keep}: no schedule of up to {len(WINDOWS[0])} stages reaches it")
    positions = arguments.positions or tuner.policy(schedules)
    by_layer = tuner.best(schedules, positions, QUESTIONS[1], LEFT[0], "layers")
    widened = {
        keep: list(dict.fromkeys(other for stages, _ in found for other in with_windows(recipe, keep, stages)))
        for keep, found in by_layer.items()
    }
    by_windows = tuner.best(widened, positions, QUESTIONS[2], LEFT[1], "windows")
    last = {keep: [stages for stages, _ in found] for keep, found in by_windows.items()}
    final = tuner.best(last, positions, None, 1, "all questions")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    print(toml_from_schedules(recipe, positions, {keep: found[0] for keep, found in final.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
