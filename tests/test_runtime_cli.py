"""`lightkv run` and `lightkv chat` on the toy bundle, and what they import."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from toy_model import IMAGE_TOKENS, ToyModel

from lightkv_export.cli import main

PROMPT = "What is in this picture?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(ToyModel().bundle(tmp_path_factory.mktemp("toy") / "bundle").path)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    return str(path)


def test_run_prints_one_json_document(bundle, picture, capsys):
    arguments = ["run", bundle, "--image", picture, "--prompt", PROMPT]
    arguments += ["--keep", "0.83", "--max-new-tokens", "5", "--threads", "1"]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["vision_tokens_per_layer"] == [IMAGE_TOKENS, IMAGE_TOKENS, IMAGE_TOKENS // 2]
    assert document["finish_reason"] == "length" and len(document["token_ids"]) == 5
    assert document["kv_bytes"] == sum(document["kv_bytes_per_layer"])
    assert document["ttft_ms"] > 0 and document["tokens_per_s"] > 0 and document["keep"] == pytest.approx(5 / 6)
    assert main([*arguments, "--stream"]) == 0
    streamed = capsys.readouterr()
    assert streamed.out == document["text"] + "\n" and "keep 0.833" in streamed.err


def test_sampling_options(bundle, capsys):
    arguments = ["run", bundle, "--prompt", PROMPT, "--temperature", "2", "--seed", "1", "--json"]
    texts = [main(arguments) or json.loads(capsys.readouterr().out)["token_ids"] for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "Hi", "--image", "none.png"], "does not exist"),
        (["--prompt", "Hi", "--keep", "0.2"], "no keep 0.2"),
        (["--prompt", "Hi", "--max-new-tokens", "5000"], "5000 new tokens"),
        (["--prompt", "Hi", "--backend", "tpu"], "unknown backend 'tpu'"),
        (["--prompt", "Hi", "--seed", "1"], "no effect at temperature 0"),
        (["--prompt", "Hi", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a <image> b"], "image token"),
    ],
)
def test_mistakes_get_a_message_and_status_2(bundle, capsys, arguments, message):
    assert main(["run", bundle, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_chat_reads_lines(bundle, picture, capsys, monkeypatch):
    lines = ["", PROMPT, f"/image {picture}", "And here?", "/image none.png", "/keep 0.2", "/nothing", "/keep x"]
    lines += ["/keep 1", "Hi", "/reset", "Hi", "/help", "/quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", bundle, "--max-new-tokens", "3", "--image", picture]) == 0
    captured = capsys.readouterr()
    answers = captured.out.splitlines()
    assert len(answers) >= 4 and answers[-1] == answers[-2], "a new conversation gives the same answer"
    unknown = "unknown command '/nothing'"
    for message in ("none.png' does not exist", "no keep 0.2", unknown, "'x' is not a number", "keep 1.000"):
        assert message in captured.err


def test_chat_survives_an_interrupted_answer(bundle, capsys, monkeypatch):
    import lightkv_export.runtime.session as session

    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nAgain\n"))
    pushes = iter([None, KeyboardInterrupt])
    real = session.Detokenizer.push

    def push(self, token):
        if next(pushes, None) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return real(self, token)

    monkeypatch.setattr(session.Detokenizer, "push", push)
    assert main(["chat", bundle, "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert "[stopped]" in captured.err and captured.out.count("\n") == 2


def test_the_runtime_loads_no_training_framework(bundle, picture):
    """In a fresh process: import, load and run a bundle; then look at what was imported."""
    code = f"""
import sys
import lightkv_export.runtime
assert "numpy" not in sys.modules and "onnxruntime" not in sys.modules
from lightkv_export.runtime import load
result = load({bundle!r}, threads=1).run({PROMPT!r}, [{picture!r}], max_new_tokens=2)
assert len(result.token_ids) == 2
bad = {{"torch", "transformers", "onnx", "safetensors", "rich"}} & set(sys.modules)
assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
