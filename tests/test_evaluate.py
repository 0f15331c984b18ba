"""`lightkv eval`: frozen sets and their hashes, intervals, and answers through the toy bundle."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_model import IMAGE_TOKENS, D, ToyModel

from lightkv_export import evaluate as evaluation
from lightkv_export.cli import main
from lightkv_export.errors import UserError
from lightkv_export.evaluate import Answered, EvalRequest, answer_tokens, difference, evaluate, ratio, share
from lightkv_export.frozen_sets import FrozenSet, load_set, set_names
from lightkv_export.runtime import Model, load
from lightkv_export.runtime.image import ImageFeatures

TEXTS = ("What is it?", "Where is it?", "How many?")


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_set(root: Path, name: str = "small") -> None:
    """Two images with three questions each, as scripts/make_tiny_sets.py writes them."""
    with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
        for index in range(2):
            archive.writestr(f"{index}.png", png(index))
    rows = [
        {"image": f"{index}.png", "skill": f"skill {number % 2}", "question": text, "answer": "Red"}
        for index in range(2)
        for number, text in enumerate(TEXTS)
    ]
    (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    digests = {
        f"{name}.{end}": hashlib.sha256((root / f"{name}.{end}").read_bytes()).hexdigest() for end in ("zip", "jsonl")
    }
    (root / "tiny-sets.json").write_text(json.dumps({name: {"sha256": digests}}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    bundle = ToyModel().bundle(tmp_path_factory.mktemp("toy") / "bundle")
    return load(bundle.path, threads=1)


@pytest.fixture
def small(tmp_path: Path) -> FrozenSet:
    write_set(tmp_path)
    return load_set("small", tmp_path)


# --- frozen sets --------------------------------------------------------------------------------------------------


def test_the_shipped_sets_are_what_was_frozen():
    assert set_names() == ["tiny-calibration", "tiny-eval"]
    tuned, judged = load_set("tiny-calibration"), load_set("tiny-eval")
    assert len(judged.questions) >= 600 and len({q.image for q in judged.questions}) >= 200
    assert len({q.skill for q in judged.questions}) >= 8
    assert not set(tuned.images.values()) & set(judged.images.values())
    assert all(q.image in some.images and q.answer for some in (tuned, judged) for q in some.questions)


@pytest.mark.parametrize("end", ["zip", "jsonl"])
def test_an_altered_or_missing_file_is_refused(tmp_path, end):
    write_set(tmp_path)
    path = tmp_path / f"small.{end}"
    path.write_bytes(path.read_bytes().replace(b"0.png", b"1.png"))
    with pytest.raises(UserError, match=f"small.{end} is altered: sha256"):
        load_set("small", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"small.{end}: No such file"):
        load_set("small", tmp_path)


def test_unknown_sets_are_named(tmp_path):
    with pytest.raises(UserError, match="no frozen set called 'big'") as error:
        load_set("big")
    assert "tiny-calibration, tiny-eval" in error.value.expected
    with pytest.raises(UserError, match=r"tiny-sets.json cannot be read"):
        load_set("small", tmp_path)


def test_a_limit_draws_the_same_part_every_time(small):
    part = small.sample(2).questions
    assert len(part) == 2 and part == small.sample(2).questions
    assert part == tuple(q for q in small.questions if q in part), "in the set's order"
    assert small.sample(6) is small and small.sample(99) is small and small.sample(None) is small
    with pytest.raises(UserError, match="limit is 0"):
        small.sample(0)


# --- intervals ----------------------------------------------------------------------------------------------------


def test_a_share_has_the_interval_of_a_binomial():
    right = np.arange(1000) % 5 > 0
    found = share(right, np.arange(1000))
    assert found.value == 0.8 and found.questions == 1000
    wide = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert found.low == pytest.approx(0.8 - wide, abs=0.004) and found.high == pytest.approx(0.8 + wide, abs=0.004)
    assert found == share(right, np.arange(1000)), "seeded"
    sure = share(np.ones(10, bool), np.arange(10))
    assert (sure.value, sure.low, sure.high) == (1, 1, 1)


def test_questions_about_one_image_go_together():
    right = np.repeat(np.arange(100) % 2 == 0, 4)
    alone, together = share(right, np.arange(400)), share(right, np.repeat(np.arange(100), 4))
    assert alone.value == together.value == 0.5
    assert together.high - together.low > 1.7 * (alone.high - alone.low)  # 2 by theory


def test_comparisons_are_paired():
    rng = np.random.default_rng(1)
    base, images = rng.random(400) < 0.7, np.arange(400) // 4
    same = ratio(base, base, images)
    assert (same.value, same.low, same.high) == (1, 1, 1)
    worse = base & (np.arange(400) % 10 > 0)
    assert ratio(worse, base, images).value == pytest.approx(worse.sum() / base.sum())
    lost = difference(worse, base, images)
    assert lost.value == pytest.approx(worse.mean() - base.mean())
    assert lost.low < lost.value < lost.high < 0
    assert share(base, images).low < share(worse, images).high, "not told apart without pairing"


# --- answers ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_single_requests(model, small):
    scores = evaluate(model, small, EvalRequest())
    assert [score.keep for score in scores] == [1.0, 0.83]
    tokens = answer_tokens(model, small.questions)
    for score in scores:
        alone = [
            model.run(q.text, [small.images[q.image]], keep=score.keep, max_new_tokens=tokens) for q in small.questions
        ]
        assert list(score.answers) == [result.text.strip().lower() for result in alone]
        assert score.kv_bytes == pytest.approx(np.mean([result.kv_bytes for result in alone]))
    assert scores[1].achieved == pytest.approx(5 / 6) and set(scores[1].skills) == {"skill 0", "skill 1"}


def test_scores_of_known_answers(model, small, monkeypatch):
    answers = {1.0: ["red"] * 5 + ["blue"], 0.83: ["red", "", "red", "red", "green", "red"]}

    def told(model, frozen, keeps, **settings):
        return {keep: Answered(tuple(answers[keep]), 10.0, 1.0) for keep in keeps}

    monkeypatch.setattr(evaluation, "answers_of", told)
    full, less = evaluate(model, small, EvalRequest(keeps=(0.83,)))
    assert (full.keep, less.keep) == (1.0, 0.83), "keep 1.0 is always measured"
    assert full.exact_match.value == pytest.approx(5 / 6) and less.exact_match.value == pytest.approx(4 / 6)
    assert full.of_uncompressed.value == 1 and less.of_uncompressed.value == pytest.approx(4 / 5)
    assert less.skills["skill 1"].value == 0 and less.skills["skill 0"].value == 1
    answers[1.0] = ["blue"] * 6
    assert evaluate(model, small, EvalRequest())[1].of_uncompressed is None
    with pytest.raises(UserError, match="no keep 0.5"):
        evaluate(model, small, EvalRequest(keeps=(0.5,)))


def test_an_image_is_encoded_once(model, small, monkeypatch):
    shown: list[np.ndarray] = []
    real = model.graphs.image_features

    def features(pixels, size):
        shown.append(pixels)
        return real(pixels, size)

    monkeypatch.setattr(model.graphs, "image_features", features)
    evaluate(model, small, EvalRequest())
    assert len(shown) == 2
    blind = evaluate(model, small, EvalRequest(blank=True))
    assert len(shown) == 3 and all(np.ptp(channel) == 0 for channel in shown[-1][0])
    by_text = dict(zip([q.text for q in small.questions], blind[0].answers, strict=True))
    assert all(by_text[q.text] == answer for q, answer in zip(small.questions, blind[0].answers, strict=True))


def test_an_encoded_image_must_fit_the_bundle(model):
    rows = np.zeros((IMAGE_TOKENS + 1, D), np.float32)
    with pytest.raises(UserError, match="encoded image of shape"):
        model.run("Hi", [ImageFeatures(rows, model.manifest.sizes[0])])


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_one_document_and_keeps_it(model, capsys):
    path = model.bundle.path
    arguments = ["eval", str(path), "--set", "tiny-eval", "--limit", "3", "--threads", "1"]
    assert main([*arguments, "--keep", "0.83", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [keep["keep"] for keep in document["keeps"]] == [1.0, 0.83]
    assert document["questions"] == 3 and document["set"] == "tiny-eval" and len(document["sha256"]) == 64
    assert {"value", "low", "high", "questions"} == document["keeps"][0]["exact_match"].keys()
    assert json.loads((path / "report.json").read_text())["eval"] == document
    assert main([*arguments, "--blank", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "blank images, 3 questions" in " ".join(shown.out.split()) and "Per skill" in shown.out and shown.err == ""
    report = json.loads((path / "report.json").read_text())
    assert report["eval_blank"]["blank"] and report["eval"] == document
    assert main([*arguments, "--keep", "0.5"]) == 2
    assert "no keep 0.5" in capsys.readouterr().err
