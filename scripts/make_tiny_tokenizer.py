"""Makes recipes/tiny-llava/tokenizer.json: byte-level BPE of 1024 entries, trained on the task's questions (so that
each of their words is one token) and on sentences and words written out below.

    python scripts/make_tiny_tokenizer.py [OUT]

Deterministic: the same `tokenizers` release gives the same file. Every byte is an entry, so any text can be encoded.
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

from questions import SKILLS, ask_many
from scenes import WORDS, SceneMaker
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

OUT = Path(__file__).resolve().parent.parent / "recipes" / "tiny-llava" / "tokenizer.json"
VOCABULARY = 1024
SPECIALS = ("<s>", "</s>", "<unk>", "<pad>", "<image>")

LISTS = """\
colour: red green blue yellow orange purple pink brown black white grey cyan
shape: dot bar arrow hexagon diamond heart ring cross star triangle square circle
size: small large big tiny medium
place: left right top bottom middle centre corner upper lower first second third last row column side edge background
number: zero one two three four five six seven eight nine ten eleven twelve
word: cat dog bird fish horse car bus train boat house tree flower book cup table chair window door street sky water \
sun person man woman child hand head word number letter digit sign text picture image photo scene object colour shape \
size texture pattern stripe noise light dark
"""
RELATIONS = ("left of", "right of", "above", "below", "next to", "between", "behind", "inside", "near", "far from")
QUESTIONS = (
    "What colour is the {size} {shape}?",
    "What is the colour of the {shape} at the {place}?",
    "What shape is {relation} the {colour} {shape}?",
    "Which object is {relation} the {colour} {shape}?",
    "How many {colour} {shape}s are there in the image?",
    "Is there a {colour} {shape} in the picture? Answer yes or no.",
    "Are there more {shape}s than {colour} objects?",
    "Is the {colour} {shape} {relation} the {size} {word}?",
    "What number is written in the {place} of the image?",
    "Read the {word} at the {place}. Which word is it?",
    "Describe the {word} in one sentence.",
    "Can this question be answered from the image: who painted the {word}?",
)
ANSWERS = (
    "Yes, there is a {colour} {shape}.",
    "No, there is no {colour} {shape}.",
    "There are {number} {colour} {shape}s.",
    "The {shape} is {colour} and it is {relation} the {word}.",
    "It cannot be answered from the image; that is unknown.",
    "A {size} {colour} {shape} stands in the {place}, {number} of them.",
)


def corpus() -> list[str]:
    """Questions and answers with every word of the lists, single words and digits."""
    lists = {name: words.split() for name, words in (line.split(":") for line in LISTS.strip().splitlines())}
    wheels = {name: itertools.cycle(words) for name, words in (lists | {"relation": RELATIONS}).items()}
    lines = []
    for _ in range(60):
        for question, answer in itertools.product(QUESTIONS, ANSWERS):
            turn = f"USER: {question} ASSISTANT: {answer}"
            lines.append(turn.format(**{name: next(wheel) for name, wheel in wheels.items()}))
    words = sorted({word for words in lists.values() for word in words})
    lines += [f"{first} {second} {first.capitalize()} {second}s" for first, second in itertools.product(words, words)]
    return lines + [f"{number} {number % 10}" for number in range(1000)] + task()


def task() -> list[str]:
    """Questions and answers about 2000 scenes, in the form in which the model reads them."""
    rng, maker = random.Random(0), SceneMaker(0, num_textures=4)
    asked = (question for _ in range(2000) for question in ask_many(rng, maker.scene(), len(SKILLS)))
    lines = [f"USER: \n{question.text} ASSISTANT: {question.answer}" for question in asked]
    return lines + [f" {word}" for word in WORDS * 300]  # as answers these are too rare to become one token each


def make(out: Path) -> None:
    """Trains the tokenizer and writes it to `out`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(name, normalized=False, special=True) for name in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise SystemExit(f"{tokenizer.get_vocab_size()} entries, expected {VOCABULARY}: the corpus is too small")
    begin = SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B:1", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.save(str(out), pretty=False)


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
