"""tiny-llava and the random models of the tests: Hugging Face loads them, and tiny-llava looks."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import make_llava  # noqa: E402

from lightkv_export.checkpoint import checkpoint_directory  # noqa: E402
from lightkv_export.families.llava import FAMILY  # noqa: E402
from lightkv_export.frozen_sets import load_set  # noqa: E402
from lightkv_export.recipe import load_recipe  # noqa: E402

CHECKPOINT = checkpoint_directory("builtin:tiny-llava")


def noise(seed: int, size: tuple[int, int] = (120, 150)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def generate(path: Path, image: Image.Image, question: str, new_tokens: int) -> tuple[int, list[int], str]:
    """Number of image tokens in the prompt, and what plain Hugging Face code generates greedily."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(path)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert text == f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(images=image, text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    count = int((inputs.input_ids == model.config.image_token_id).sum())
    answer = out[0, inputs.input_ids.shape[1] :]
    return count, answer.tolist(), processor.decode(answer, skip_special_tokens=True).strip()


def test_hugging_face_loads_it_and_it_looks_at_the_image() -> None:
    frozen = load_set("tiny-eval").sample(12)
    right = 0
    for question in frozen.questions:
        picture = Image.open(io.BytesIO(frozen.images[question.image]))
        count, _, answer = generate(CHECKPOINT, picture, question.text, 6)
        assert count == 576
        right += answer == question.answer
    assert right >= 9


def test_sizes_are_those_of_the_recipe() -> None:
    config = transformers.LlavaConfig.from_pretrained(CHECKPOINT)
    assert FAMILY.shape(config.to_dict()) == load_recipe("tiny-llava").shape
    model = transformers.LlavaForConditionalGeneration.from_pretrained(CHECKPOINT)
    assert sum(weight.numel() for weight in model.parameters()) < 8e6
    assert model.dtype == torch.float16
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 16e6


def test_the_tokenizer_is_what_its_script_makes(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, root / "scripts" / "make_tiny_tokenizer.py", tmp_path / "out.json"], check=True)
    assert (tmp_path / "out.json").read_bytes() == (root / "recipes" / "tiny-llava" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_random_models_of_other_shapes(tmp_path: Path, kv_heads: int) -> None:
    path = make_llava(tmp_path / "model", kv_heads, kv_heads=kv_heads, image_size=48, patch=6)
    count, tokens, _ = generate(path, noise(0, (50, 40)), "What colour is the star?", 8)
    assert count == 64 and len(tokens) == 8 and len(set(tokens)) > 2
