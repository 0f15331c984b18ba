"""tiny-llava and the random models of the tests: Hugging Face loads them, they are reproducible, and they look."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import make_llava  # noqa: E402

from lightkv_export.families.llava import FAMILY  # noqa: E402
from lightkv_export.recipe import load_recipe  # noqa: E402
from lightkv_export.tiny import tiny_llava_checkpoint  # noqa: E402

PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the star?"}]}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return tiny_llava_checkpoint()


def noise(seed: int, size: tuple[int, int] = (120, 150)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def generate(path: Path, image: Image.Image, new_tokens: int) -> tuple[int, list[int]]:
    """Number of image tokens in the prompt, and what plain Hugging Face code generates greedily."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path)
    processor = transformers.AutoProcessor.from_pretrained(path)
    text = processor.apply_chat_template(PROMPT, add_generation_prompt=True)
    assert text == "USER: <image>\nWhat colour is the star? ASSISTANT:"
    inputs = processor(images=image, text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    count = int((inputs.input_ids == model.config.image_token_id).sum())
    return count, out[0, inputs.input_ids.shape[1] :].tolist()


def test_hugging_face_loads_it_and_it_looks_at_the_image(checkpoint: Path) -> None:
    answers = [generate(checkpoint, noise(seed), 16) for seed in (0, 1)]
    for count, tokens in answers:
        assert count == 576
        assert len(set(tokens)) > 5  # not one token over and over
    assert answers[0][1] != answers[1][1]


def test_sizes_are_those_of_the_recipe(checkpoint: Path) -> None:
    config = transformers.LlavaConfig.from_pretrained(checkpoint)
    assert FAMILY.shape(config.to_dict()) == load_recipe("tiny-llava").shape
    model = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint)
    assert sum(weight.numel() for weight in model.parameters()) < 8e6
    assert model.dtype == torch.float32


def test_two_caches_hold_the_same_bytes(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(123)  # the global generator plays no part
    again = tiny_llava_checkpoint()
    assert again != checkpoint and again.name == checkpoint.name
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}
        for root in (again, checkpoint)
    ]
    assert digests[0] == digests[1]
    assert [path.name for path in again.parent.iterdir()] == [again.name]  # no temporary directory left
    before = (again / "model.safetensors").stat().st_mtime_ns
    assert tiny_llava_checkpoint() == again
    assert (again / "model.safetensors").stat().st_mtime_ns == before
    assert tiny_llava_checkpoint(seed=1) != again


def test_the_tokenizer_is_what_its_script_makes(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, root / "scripts" / "make_tiny_tokenizer.py", tmp_path / "out.json"], check=True)
    assert (tmp_path / "out.json").read_bytes() == (root / "recipes" / "tiny-llava" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_random_models_of_other_shapes(tmp_path: Path, kv_heads: int) -> None:
    path = make_llava(tmp_path / "model", kv_heads, kv_heads=kv_heads, image_size=48, patch=6)
    count, tokens = generate(path, noise(0, (50, 40)), 8)
    assert count == 64 and len(tokens) == 8 and len(set(tokens)) > 2
