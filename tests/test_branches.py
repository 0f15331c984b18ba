"""The experiments' tree of runs (scripts/branches.py) against the plain eager session, and `--positions`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from conftest import Exports  # noqa: E402

from lightkv_export.families import resolve_recipe  # noqa: E402
from lightkv_export.frozen_sets import FrozenSet, Question  # noqa: E402
from lightkv_export.recipe import POSITIONS, StageSpec  # noqa: E402
from lightkv_export.reference import EagerSession  # noqa: E402
from lightkv_export.runtime import load  # noqa: E402
from lightkv_export.runtime.generation import Request  # noqa: E402

sys.path.append(str(Path(__file__).parent.parent / "scripts"))
from branches import Asker, Judged, Task, route_of, tasks_of  # noqa: E402

LATE, EARLY, TWO = ("1:4:0.5",), ("0:2:0.5",), ("0:2:0.5", "1:1:0.3")  # of "many windows": 3 layers, 12 x 12 tokens


def stages(texts: tuple[str, ...]) -> tuple[StageSpec, ...]:
    return tuple(StageSpec.parse(text) for text in texts)


@pytest.fixture(scope="module")
def frozen() -> FrozenSet:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(out, "PNG")
    texts = ("What colour is the star?", "How many?")
    return FrozenSet(
        "two", tuple(Question("0.png", "s", text, "top left") for text in texts), {"0.png": out.getvalue()}, ""
    )


@pytest.fixture(scope="module")
def asker(exports: Exports, frozen: FrozenSet) -> Asker:
    return Asker(resolve_recipe(str(exports.model("many windows"))), frozen)


def alone(asker: Asker, question: Question, specs: tuple[StageSpec, ...], positions: str) -> Judged:
    """The same by one eager session, a token at a time."""
    image = Image.open(io.BytesIO(asker.frozen.images[question.image]))
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = asker.reference.encode([{"role": "user", "content": content}], [image])
    tokenizer = asker.reference.processor.tokenizer
    answer = [*tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    session = EagerSession(asker.reference, specs, positions)
    rows = [session.feed(prompt.ids.tolist(), prompt.image_inputs, asker.units)]
    rows += [session.feed([token]) for token in answer[:-1]]
    chosen = torch.stack(rows).log_softmax(-1)
    loss = -float(chosen[torch.arange(len(answer)), answer].mean())
    return Judged([int(row.argmax()) for row in rows] == answer, loss)


def test_every_route_is_what_a_session_of_its_own_gives(asker: Asker, frozen: FrozenSet) -> None:
    task = tasks_of(frozen)[0]
    chosen = {(texts, policy): route_of(stages(texts), policy) for texts in (LATE, EARLY, TWO) for policy in POSITIONS}
    judged = asker.judge(task, [(), *chosen.values()])
    assert judged.keys() == {(), *chosen.values()}
    assert judged[()].loss == pytest.approx(alone(asker, task.question, (), "restart").loss, rel=1e-5)
    for (texts, policy), route in chosen.items():
        expected = alone(asker, task.question, stages(texts), policy)
        assert judged[route].loss == pytest.approx(expected.loss, rel=1e-5) and judged[route].right == expected.right
    assert len({round(item.loss, 5) for item in judged.values()}) > 5, "schedules and policies make a difference"


def test_guidance(asker: Asker, frozen: FrozenSet) -> None:
    question, other = frozen.questions
    routes = {name: route_of(stages(TWO), "restart", name) for name in ("prompt", "shuffled", "random", "uniform")}
    own = asker.judge(Task(question, question.text, 1), list(routes.values()))
    assert own[routes["shuffled"]].loss == pytest.approx(own[routes["prompt"]].loss, abs=1e-6), "guided by itself"
    mixed = asker.judge(Task(question, other.text, 1), list(routes.values()))
    assert len({round(item.loss, 6) for item in mixed.values()}) == 4
    assert mixed[routes["random"]] == own[routes["random"]], "seeded"
    assert mixed[routes["random"]] != asker.judge(Task(question, "", 2), [routes["random"]])[routes["random"]]


def test_positions_of_an_export(exports: Exports, asker: Asker, frozen: FrozenSet) -> None:
    """The policy is recorded, and the bundle's answers are the eager model's at that policy."""
    path = exports.bundle("many windows", positions="original")
    model = load(path, threads=1)
    assert model.manifest.positions == "original" and model.manifest.source["positions"] == "original"
    question, rows = frozen.questions[0], []
    tokenizer = asker.reference.processor.tokenizer
    answer = (*tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    request = Request(forced=answer, on_logits=lambda row: rows.append(row.copy()))
    image = frozen.images[question.image]
    model.run(question.text, [Image.open(io.BytesIO(image))], keep=model.manifest.default_keep, request=request)
    found = torch.from_numpy(np.stack(rows)).log_softmax(-1)[torch.arange(len(answer)), list(answer)]
    assert -float(found.mean()) == pytest.approx(alone(asker, question, stages(LATE), "original").loss, rel=1e-4)
    assert -float(found.mean()) != pytest.approx(alone(asker, question, stages(LATE), "restart").loss, rel=1e-4)
