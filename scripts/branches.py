"""Many compressed runs of one prompt at once: what schedules have in common is computed once (PyTorch, eager).

A path is a sequence of steps, each a stage with what weighs its tokens and how positions go on behind it. `walk` runs
the layers of all paths as a tree. An answer is judged by feeding the right one in one piece: greedy decoding gives
exactly this answer where each of its tokens is the best one.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch
from PIL import Image

from lightkv_export.checkpoint import checkpoint_directory
from lightkv_export.families import family_named
from lightkv_export.frozen_sets import FrozenSet, Question, load_set
from lightkv_export.recipe import Recipe, StageSpec, load_recipe
from lightkv_export.reference import Chunk, EagerSession, Reference, Vision
from lightkv_export.runtime.image import decode
from lightkv_export.stages import importance

GUIDANCES = ("prompt", "shuffled", "random", "uniform")


@dataclass(frozen=True)
class Step:
    """A stage, what weighs its tokens (one of GUIDANCES), and the positions policy behind it."""

    stage: StageSpec
    positions: str = "original"
    guidance: str = "prompt"


Route: TypeAlias = "tuple[Step, ...]"
Merge: TypeAlias = "Callable[[EagerSession, Chunk, Route], Chunk]"
"""(session, chunk, route up to and with the step to take) -> chunk behind it."""


@dataclass(frozen=True)
class Judged:
    """One answer: whether it is right, and the mean negative log-likelihood of the right one's tokens."""

    right: bool
    loss: float


@dataclass(frozen=True)
class Task:
    """A question to judge. `guide` is the question whose attention weighs "shuffled" merges; `seed` is for "random"."""

    question: Question
    guide: str
    seed: int


def route_of(stages: Sequence[StageSpec], positions: str, guidance: str = "prompt") -> Route:
    """A schedule with one policy and one guidance throughout; no stages: the uncompressed model."""
    return tuple(Step(stage, positions, guidance) for stage in stages)


def tasks_of(frozen: FrozenSet) -> list[Task]:
    """Every question; its guide is one about another image, half the set away."""
    questions = frozen.questions
    half = len(questions) // 2
    return [Task(q, questions[(place + half) % len(questions)].text, place) for place, q in enumerate(questions)]


class Asker:
    """Asks a recipe's model the questions of a set."""

    def __init__(self, recipe: Recipe, frozen: FrozenSet) -> None:
        checkpoint = checkpoint_directory(recipe.checkpoint, recipe.revision)
        self.reference = Reference(checkpoint, family_named(recipe.family))
        self.units = (recipe.shape.vision.tokens,)
        self.frozen = frozen

    @torch.no_grad()
    def judge(self, task: Task, routes: Collection[Route]) -> dict[Route, Judged]:
        """The model's answer along every route."""
        image = Image.fromarray(decode(self.frozen.images[task.question.image]))
        vision = self.reference.vision(self.reference.image_inputs([image]), self.units)
        answer, judged = self._answer(task.question), {}
        with self.reference.recording():
            merge = self._merge(task, image, vision, routes)
            session, ids = EagerSession(self.reference, ()), self._ids(task.question.text, image)
            for route, end, chunk in walk(session, session.begin(ids, vision), routes, merge):
                end.seen += len(ids)
                rows = torch.cat([end.logits(chunk), self._forced(end, answer[:-1])]).log_softmax(-1)
                chosen = rows[torch.arange(len(answer)), answer]
                judged[route] = Judged(bool((rows.argmax(-1) == answer).all()), -float(chosen.mean()))
        return judged

    def _merge(self, task: Task, image: Image.Image, vision: Vision, routes: Collection[Route]) -> Merge:
        """The merge of every guidance. For "shuffled", the guide's question is asked first and its weights are kept."""
        guided = [route for route in routes if route and route[0].guidance == "shuffled"]
        scores: dict[Route, torch.Tensor] = {}

        def record(session: EagerSession, chunk: Chunk, route: Route) -> Chunk:
            def weigh(*arguments: object) -> torch.Tensor:
                scores[route] = importance(*arguments)
                return scores[route]

            return session.merge(chunk, route[-1].stage, weigh)

        if guided:
            session = EagerSession(self.reference, ())
            for _ in walk(session, session.begin(self._ids(task.guide, image), vision), guided, record):
                pass

        def merge(session: EagerSession, chunk: Chunk, route: Route) -> Chunk:
            length, end = chunk.hidden.shape[1], chunk.spans[-1][1]
            weights = torch.ones(1, length)
            if route[-1].guidance == "prompt":
                return session.merge(chunk, route[-1].stage)
            if route[-1].guidance == "shuffled":  # the image comes before the text, so its rows are the same
                weights[:, :end] = scores[route][:, :end]
            elif route[-1].guidance == "random":
                weights = torch.rand(1, length, generator=torch.Generator().manual_seed(64 * task.seed + len(route)))
            return session.merge(chunk, route[-1].stage, lambda *_: weights)

        return merge

    def _forced(self, session: EagerSession, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] after each of the tokens [N] that follow the prompt."""
        chunk = session.begin(tokens)
        for index in range(len(self.reference.text.layers)):
            chunk = session.run_layer(chunk, index)
        return session.logits(chunk, len(tokens))

    def _ids(self, text: str, image: Image.Image) -> torch.Tensor:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return self.reference.encode([{"role": "user", "content": content}], [image]).ids

    def _answer(self, question: Question) -> torch.Tensor:
        """The right answer as the model writes it: a space, at least one token, and the end of the sequence."""
        tokenizer = self.reference.processor.tokenizer
        ids = tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, tokenizer.eos_token_id])


def walk(
    session: EagerSession, chunk: Chunk, routes: Collection[Route], merge: Merge, layer: int = 0, taken: Route = ()
) -> Iterator[tuple[Route, EagerSession, Chunk]]:
    """Yields every route with the session and the chunk at its end. All `routes` begin with what was `taken`."""
    routes, place = list(dict.fromkeys(routes)), len(taken)
    for index in range(layer, len(session.reference.text.layers)):
        chunk = session.run_layer(chunk, index)
        here = [route for route in routes if len(route) > place and route[place].stage.layer == index]
        for step in dict.fromkeys(route[place] for route in here):
            fork = session.fork()
            fork.positions = step.positions
            follow = [route for route in here if route[place] == step]
            yield from walk(fork, merge(fork, chunk, (*taken, step)), follow, merge, index + 1, (*taken, step))
        routes = [route for route in routes if route not in here]
        if not routes:
            return
    for route in routes:
        yield route, session.fork(), chunk


def judge_all(
    recipe: str, frozen: FrozenSet, routes: Collection[Route], workers: int, what: str
) -> dict[Route, list[Judged]]:
    """Every question of the set along every route, by processes of one thread each; progress on standard error."""
    tasks, found = tasks_of(frozen), {route: [] for route in routes}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (recipe, frozen.name)) as pool:
        for done, judged in enumerate(pool.map(_work, tasks, [tuple(found)] * len(tasks), chunksize=4), 1):
            for route, item in judged.items():
                found[route].append(item)
            print(f"\r{what}: {done} of {len(tasks)}, {len(found)} routes ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def _start(recipe: str, name: str) -> None:
    global _asker  # one model per worker process
    torch.set_num_threads(1)
    _asker = Asker(load_recipe(recipe), load_set(name))


def _work(task: Task, routes: tuple[Route, ...]) -> dict[Route, Judged]:
    return _asker.judge(task, routes)
