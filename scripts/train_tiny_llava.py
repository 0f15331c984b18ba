"""Trains tiny-llava and writes recipes/tiny-llava/model.safetensors (fp16).

    python scripts/train_tiny_llava.py [--work DIR] [--device cpu|cuda] [--workers N] [--out DIR] [--phase NAME=STEPS]

Phases (PHASES): first the vision tower alone learns to tell what each patch shows, within windows of one place and
then over the whole image; then the decoder alone learns to answer questions, first from a random ninth and quarter of
the vision tokens, at last from all 576. It saves its state every two minutes and goes on from there when started again,
with new scenes. On a CPU each worker is a process with one thread that takes its share of every batch: where other
programs compete for the cores that is three times as fast as one process with two threads.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tiny_model
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from questions import SKILLS, ask_many
from scenes import COLOURS, GRID, SHAPES, SIZES, WORDS, Scene, SceneMaker
from tokenizers import Tokenizer

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "tiny-llava"
TRAIN_SEED, WATCH_SEED = 1, 2  # the frozen sets have others: make_tiny_sets.py
QUESTIONS, LENGTH = 16, 22  # per image, and tokens per question with its answer: more than the longest has
MUON = 2.0  # its learning rate over AdamW's
EMBEDDINGS = re.compile("embed|lm_head")  # AdamW's, like everything that is not a matrix
SAVE_SECONDS, WATCH_SECONDS = 120, 180


@dataclass(frozen=True)
class Phase:
    """Steps of one kind. The rate falls by a cosine from `rate` to `last_rate` after a short warm-up."""

    name: str
    steps: int
    batch: int
    rate: float
    last_rate: float
    windows: int = 1  # attention of the vision tower stays in windows x windows squares
    whole_every: int = 0  # but not in one of so many steps
    stride: int = 0  # vision tokens shown to the decoder: one of each stride x stride; 0: no questions
    crowded: bool = False  # scenes with nine things each
    skills: tuple[str, ...] = tuple(SKILLS)
    length: int = LENGTH  # longer questions are left out; 16 leaves out one in twenty


LOOK = ("colour", "shape", "place", "size", "number", "word")  # skills that look one thing up
COUNTING = (*SKILLS, "count", "count", "compare")  # counting is learnt last
PHASES = (
    Phase("parts", 600, 32, 1.5e-3, 1.5e-3, windows=3),
    Phase("crowded", 900, 32, 1.5e-3, 1.0e-3, windows=3, crowded=True),
    Phase("whole", 400, 32, 1.0e-3, 5e-4),
    Phase("fine", 1200, 32, 1.0e-3, 2e-5, windows=3, whole_every=4, crowded=True),
    Phase("look", 750, 24, 1.0e-3, 1.0e-3, crowded=True, stride=3, skills=LOOK, length=16),
    Phase("ninth", 3000, 24, 1.0e-3, 7e-4, stride=3, length=16),
    Phase("quarter", 600, 32, 7e-4, 2e-4, stride=2, skills=COUNTING),
    Phase("all", 400, 32, 2e-4, 1e-5, stride=1, skills=COUNTING),
)


@dataclass
class State:
    """What a run is made of; `save` writes it, but for the data's randomness: a resumed run draws new scenes."""

    model: torch.nn.Module
    heads: tiny_model.DenseHeads
    adam: torch.optim.Optimizer
    muon: torch.optim.Optimizer  # for the matrices of the tower and the decoder
    done: dict[str, int] = field(default_factory=dict)  # steps per phase
    seconds: float = 0.0
    images: int = 0

    def save(self, path: Path) -> None:
        """Writes the state to `path`, whole or not at all."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "heads", "adam", "muon")}
        numbers = {name: getattr(self, name) for name in ("done", "seconds", "images")}
        torch.save({**parts, **numbers}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def load(self, path: Path) -> None:
        """Goes back to what `save` wrote."""
        saved = torch.load(path, weights_only=True)
        for name in ("model", "heads", "adam", "muon"):
            getattr(self, name).load_state_dict(saved[name])
        self.done, self.seconds, self.images = saved["done"], saved["seconds"], saved["images"]


@dataclass
class Worker:
    """One of `workers` processes, with a stream of scenes of its own."""

    rank: int
    workers: int
    device: str
    encoder: Encoder
    maker: SceneMaker
    rng: random.Random


class Encoder:
    """Questions as token ids, in the prompt of the chat template."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(RECIPE / "tokenizer.json"))
        head = self.tokenizer.encode("USER: <image>\n").ids
        image = self.tokenizer.token_to_id("<image>")
        if head.index(image) != tiny_model.HEAD:
            raise SystemExit(f"the prompt's head is {head}, expected {tiny_model.HEAD} tokens before <image>")
        self.head = torch.tensor([token for token in head if token != image])
        self.eos = self.tokenizer.token_to_id("</s>")
        self.pad = self.tokenizer.token_to_id("<pad>")
        self.cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def text(self, asked: list[list], length: int = LENGTH) -> tiny_model.Text:
        """`asked`: as many questions for every image. Targets only at the answers; too long ones are cut out."""
        ids = torch.full((len(asked), len(asked[0]), length), self.pad)
        targets = torch.full_like(ids, -100)
        for i, questions in enumerate(asked):
            for j, question in enumerate(questions):
                prompt = self.ids(question.text + " ASSISTANT:")
                answer = [*self.ids(" " + question.answer), self.eos]
                total = len(prompt) + len(answer)
                if total > length:
                    continue
                ids[i, j, :total] = torch.tensor(prompt + answer)
                targets[i, j, len(prompt) - 1 : total - 1] = torch.tensor(answer)
        return tiny_model.Text(ids, targets)


def images_of(scenes: list[Scene], device: str) -> torch.Tensor:
    """The scenes' pixels as the image processor gives them, float32 [B, 3, 96, 96]."""
    return tiny_model.normalized(torch.from_numpy(np.stack([scene.pixels for scene in scenes])).to(device))


def places_shown(batch: int, stride: int) -> torch.Tensor:
    """One random vision token of every stride x stride square, int64 [B, n], ascending."""
    side = GRID // stride
    corner = torch.arange(side) * stride
    rows = corner[:, None] + torch.randint(stride, (batch, side, side))
    columns = corner[None, :] + torch.randint(stride, (batch, side, side))
    return (rows * GRID + columns).flatten(1).sort(1).values


def step(state: State, phase: Phase, worker: Worker) -> dict[str, float]:
    """One optimizer step, of the tower (by the patches' labels) or of the decoder; returns what to watch."""
    device, batch = worker.device, phase.batch // worker.workers
    scenes = [worker.maker.scene(crowded=phase.crowded) for _ in range(batch)]
    state.images += phase.batch
    whole = phase.whole_every and state.done.get(phase.name, 0) % phase.whole_every == 0
    with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(not phase.stride):
        vision = tiny_model.vision_tokens(state.model, images_of(scenes, device), 1 if whole else phase.windows)
    if phase.stride:
        loss, watched = answer_loss(state, phase, worker, scenes, vision)
    else:
        labels = torch.from_numpy(np.stack([scene.patch_labels for scene in scenes])).flatten(0, 2).to(device)
        loss, watched = state.heads(vision.flatten(0, 1).float(), labels)
    state.adam.zero_grad(), state.muon.zero_grad()
    loss.backward()
    weights = [w for module in (state.model, state.heads) for w in module.parameters() if w.grad is not None]
    average_gradients(weights, worker.workers)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    state.adam.step(), state.muon.step()
    return watched


def answer_loss(
    state: State, phase: Phase, worker: Worker, scenes: list[Scene], vision: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of the answers to questions about the scenes, from some of their vision tokens [B, 576, D]."""
    device = worker.device
    asked = [ask_many(worker.rng, scene, QUESTIONS, phase.skills) for scene in scenes]
    text = worker.encoder.text(asked, phase.length)
    places = places_shown(len(scenes), phase.stride)
    shown = vision.gather(1, places.to(device)[..., None].expand(-1, -1, vision.shape[2]))
    if phase.stride > 1 and worker.rng.random() < 0.5:  # as if the image had this many tokens
        places = torch.arange(places.shape[1]).expand_as(places)
    with torch.autocast(device, torch.bfloat16):
        logits, targets = tiny_model.answer_logits(
            state.model, shown, places.to(device), text.to(device), worker.encoder.head.to(device)
        )
    loss = F.cross_entropy(logits, targets)
    return loss, {"answers": loss.item(), "tokens": (logits.argmax(-1) == targets).float().mean().item()}


def average_gradients(weights: list[torch.Tensor], workers: int) -> None:
    """The mean of all workers' gradients, in place."""
    if workers == 1:
        return
    flat = torch.cat([weight.grad.flatten() for weight in weights])
    torch.distributed.all_reduce(flat)
    flat /= workers
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.grad.copy_(part.view_as(weight))


@torch.no_grad()
def accuracy(state: State, worker: Worker, num_scenes: int = 32) -> dict[str, float]:
    """Share of right answers per skill on held-out scenes, all vision tokens shown: exact match, teacher-forced."""
    encoder, device = worker.encoder, worker.device
    maker, rng = SceneMaker(WATCH_SEED, num_textures=32), random.Random(WATCH_SEED)
    right: dict[str, list[bool]] = {skill: [] for skill in SKILLS}
    for _ in range(num_scenes // 8):
        scenes = [maker.scene() for _ in range(8)]
        asked = [ask_many(rng, scene, QUESTIONS) for scene in scenes]
        text = encoder.text(asked).to(device)
        with torch.autocast(device, torch.bfloat16):
            vision = tiny_model.vision_tokens(state.model, images_of(scenes, device))
            places = torch.arange(GRID**2, device=device).expand(8, -1)
            logits, targets = tiny_model.answer_logits(state.model, vision, places, text, encoder.head.to(device))
        owner = (text.targets != -100).nonzero()[:, :2]
        asked_at = {(int(i), int(j)) for i, j in owner}  # without those that are too long
        wrong = {(int(i), int(j)) for i, j in owner[logits.argmax(-1) != targets]}
        for i, j in asked_at:
            right[asked[i][j].skill].append((i, j) not in wrong)
    return {skill: sum(marks) / max(len(marks), 1) for skill, marks in right.items()}


def rate_at(phase: Phase, index: int) -> float:
    """Learning rate of a step of the phase."""
    warm = min(1.0, (index + 1) / 60)
    fall = 0.5 + 0.5 * math.cos(math.pi * min(index / phase.steps, 1.0))
    return warm * (phase.last_rate + (phase.rate - phase.last_rate) * fall)


def train(state: State, phases: list[Phase], worker: Worker, work: Path) -> None:
    """Runs what is left of every phase."""
    begin, saved, watched = time.monotonic() - state.seconds, time.monotonic(), time.monotonic()
    mean: dict[str, float] = {}
    for phase in phases:
        if phase.stride and not any(state.done.get(other.name) for other in phases if other.stride):
            align(state, worker.encoder)
        while (index := state.done.get(phase.name, 0)) < phase.steps:
            for group in (*state.adam.param_groups, *state.muon.param_groups):
                group["lr"] = rate_at(phase, index) * group["scale"]
            for name, value in step(state, phase, worker).items():
                mean[name] = 0.95 * mean.get(name, value) + 0.05 * value
            state.done[phase.name] = index + 1
            now = time.monotonic()
            state.seconds = now - begin
            if worker.rank:
                continue
            if index % 20 == 19:
                shares = " ".join(f"{name} {value:.3f}" for name, value in mean.items())
                print(f"{phase.name} {index + 1} {state.seconds:.0f} s {state.images} images: {shares}", flush=True)
            if phase.stride and now - watched > WATCH_SECONDS:
                watched = now
                skills = accuracy(state, worker)
                shares = " ".join(f"{name} {value:.2f}" for name, value in skills.items())
                print(f"held out: mean {sum(skills.values()) / len(skills):.3f} {shares}", flush=True)
            if now - saved > SAVE_SECONDS or index + 1 == phase.steps:
                saved = now
                state.save(work / "state.pt")


def align(state: State, encoder: Encoder) -> None:
    """Before the first question: word embeddings take the directions in which the vision tokens tell the same thing."""
    names = {"kind": ("", *SHAPES, "word", "number"), "colour": tuple(COLOURS), "size": tuple(SIZES), "word": WORDS}
    names |= {"row": ("top", "", "bottom"), "column": ("left", "centre", "right")}
    table = state.model.model.language_model.embed_tokens.weight.data
    for group, words in names.items():
        rows = state.heads.heads[group].weight.data
        for word, row in zip(words, rows - rows.mean(0), strict=True):
            ids = encoder.ids(" " + word)
            if word and len(ids) == 1:
                table[ids[0]] = row / row.norm() * table[ids[0]].norm()
    state.model.lm_head.weight.data.copy_(table * 0.1)


def new_state(device: str, path: Path) -> State:
    """A model with first weights, or the state saved at `path`."""
    from transformers import LlavaConfig

    model = tiny_model.initial_model(LlavaConfig.from_pretrained(RECIPE), TRAIN_SEED).to(device)
    heads = tiny_model.DenseHeads(model.config.text_config.hidden_size).to(device)
    matrices, others = [], [*heads.parameters()]
    for name, weight in model.named_parameters():
        (matrices if weight.dim() == 2 and not EMBEDDINGS.search(name) else others).append(weight)
    adam = torch.optim.AdamW([{"params": others, "scale": 1.0}], betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    muon = torch.optim.Muon([{"params": matrices, "scale": MUON}], weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    state = State(model, heads, adam, muon)
    if path.exists():
        state.load(path)
        print(f"goes on from {path}: {state.done}", flush=True)
    return state


def work(rank: int, phases: list[Phase], arguments: argparse.Namespace) -> None:
    """One worker's run, from its start to the written weights."""
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    if arguments.workers > 1:
        store = torch.distributed.FileStore(str(arguments.work / "meeting"), arguments.workers)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=arguments.workers)
    tiny_model.compile_layers()
    state = new_state(arguments.device, arguments.work / "state.pt")
    seed = (TRAIN_SEED, rank, state.images)
    torch.manual_seed(hash(seed))
    worker = Worker(rank, arguments.workers, arguments.device, Encoder(), SceneMaker(seed), random.Random(str(seed)))
    train(state, phases, worker, arguments.work)
    if rank == 0:
        write_weights(state.model, arguments.out)


def main() -> int:
    """Reads the arguments, trains, writes the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/tiny-llava"), help="where the run's state lies")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes on a CPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RECIPE, help="directory of model.safetensors")
    parser.add_argument("--phase", action="append", default=[], metavar="NAME=STEPS", help="another number of steps")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / "meeting").unlink(missing_ok=True)
    steps = dict(item.split("=") for item in arguments.phase)
    phases = [replace(phase, steps=int(steps.get(phase.name, phase.steps))) for phase in PHASES]
    torch.multiprocessing.spawn(work, (phases, arguments), arguments.workers)
    return 0


def write_weights(model: torch.nn.Module, out: Path) -> None:
    """Writes model.safetensors in fp16 with the names of `save_pretrained`."""
    import tempfile

    from transformers import LlavaForConditionalGeneration

    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict(model.state_dict())
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        half.half().save_pretrained(scratch)
        weights = (Path(scratch) / "model.safetensors").replace(out / "model.safetensors")
    weights.chmod(0o644)  # safetensors gives it to its owner alone


if __name__ == "__main__":
    sys.exit(main())
