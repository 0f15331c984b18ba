"""Accuracy of tiny-llava by plain Hugging Face `generate` (eager attention, float32): per skill, overall, and blind.

    python scripts/evaluate_tiny_llava.py [--model DIR] [--set NAME] [--no-blind] [--threads N] [--device cpu|cuda]

An answer is right when it equals the set's answer (exact match; case and outer spaces do not count). "blind" asks the
same model about a blank image. Intervals: bootstrap over scenes, 95 %. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BATCH, NEW_TOKENS, RESAMPLES = 16, 6, 2000


def load_set(name: str) -> tuple[list[dict[str, str]], dict[str, Image.Image]]:
    """The questions of a frozen set and its images by name."""
    rows = [json.loads(line) for line in (ROOT / "calibration" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    with zipfile.ZipFile(ROOT / "calibration" / f"{name}.zip") as archive:
        images = {image: Image.open(archive.open(image)).convert("RGB") for image in archive.namelist()}
    return rows, images


@torch.no_grad()
def answers(model: torch.nn.Module, processor: object, rows: list[dict], images: dict[str, Image.Image]) -> list[str]:
    """Greedy answers to all questions."""
    found: list[str] = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}],
                add_generation_prompt=True,
            )
            for row in part
        ]
        inputs = processor(
            images=[images[row["image"]] for row in part], text=prompts, padding=True, return_tensors="pt"
        )
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        found += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"\r{len(found)} of {len(rows)} answers", end="", file=sys.stderr)
    print(file=sys.stderr)
    return [answer.strip().lower() for answer in found]


def interval(right: np.ndarray, scene: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean of `right`; whole scenes are drawn, since their questions go together."""
    names, owner = np.unique(scene, return_inverse=True)
    hits, sizes = np.bincount(owner, right, len(names)), np.bincount(owner, minlength=len(names))
    drawn = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    low, high = np.quantile(hits[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


def summary(rows: list[dict[str, str]], given: list[str]) -> dict[str, dict[str, float]]:
    """Share of right answers, interval and number of questions, per skill and overall."""
    right = np.array([answer == row["answer"] for answer, row in zip(given, rows, strict=True)])
    skill, scene = np.array([row["skill"] for row in rows]), np.array([row["image"] for row in rows])
    result = {}
    for name in ("overall", *sorted(set(skill))):
        chosen = (skill == name) | (name == "overall")
        low, high = interval(right[chosen], scene[chosen])
        result[name] = {
            "accuracy": float(right[chosen].mean()),
            "low": low,
            "high": high,
            "questions": int(chosen.sum()),
        }
    return result


def main() -> int:
    """Reads the arguments, evaluates, prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "recipes" / "tiny-llava")
    parser.add_argument("--set", default="tiny-eval", help="name of a set in calibration/ (default: %(default)s)")
    parser.add_argument("--no-blind", action="store_true", help="leave the blank images out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--wrong", action="store_true", help="list the wrong answers")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager", device_map=arguments.device
    ).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    rows, images = load_set(arguments.set)
    start = time.monotonic()
    given = answers(model, processor, rows, images)
    result = {"set": arguments.set, "seconds": round(time.monotonic() - start), "image": summary(rows, given)}
    if not arguments.no_blind:
        blank = {name: Image.new("RGB", image.size, (128, 128, 128)) for name, image in images.items()}
        result["blind"] = summary(rows, answers(model, processor, rows, blank))
    if arguments.wrong:
        for row, answer in zip(rows, given, strict=True):
            if answer != row["answer"]:
                print(f"{row['image']} {row['question']} {row['answer']!r}, answered {answer!r}")
    for name, entry in result["image"].items():
        blind = f"   blind {result['blind'][name]['accuracy']:6.1%}" if "blind" in result else ""
        span = f"[{entry['low']:.1%}, {entry['high']:.1%}]"
        print(f"{name:14} {entry['accuracy']:6.1%}  {span:16} of {entry['questions']:4}{blind}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
