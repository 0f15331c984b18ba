"""Questions about the scenes of `scenes.py`, with answers that follow from the scene and from nothing else.

Eleven skills. Answers are one to three words. Each skill's answers are balanced as far as a scene allows, so that a
model that does not look at the image gains little. `ask` may return None: the scene does not suit the skill.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from scenes import COLOURS, PLACES, SHAPES, SIZES, Item, Scene

UNKNOWN = "unknown"


class Question(NamedTuple):
    """A question, its only right answer, the skill that it tests, and the places of the scene that decide it."""

    skill: str
    text: str
    answer: str
    places: frozenset[int]


def ask(rng: random.Random, skill: str, scene: Scene) -> Question | None:
    """A question of the skill about the scene, if the scene allows one."""
    made = SKILLS[skill](rng, scene)
    return None if made is None else Question(skill, *made)


def ask_many(rng: random.Random, scene: Scene, number: int, skills: tuple[str, ...] | None = None) -> list[Question]:
    """`number` questions, the skills in turn from a random order; a few of them may be the same."""
    skills = list(skills or SKILLS)
    found: list[Question] = []
    while len(found) < number:
        rng.shuffle(skills)
        found += [question for skill in skills if (question := ask(rng, skill, scene))]
    return found[:number]


def at(place: int) -> str:
    """Where, as a phrase: "at the top left", "in the centre"."""
    return f"{'in' if PLACES[place] == 'centre' else 'at'} the {PLACES[place]}"


Made = tuple[str, str, frozenset[int]] | None
EVERYWHERE = frozenset(range(len(PLACES)))


def _shapes(scene: Scene) -> list[Item]:
    return [item for item in scene.items if item.kind == "shape"]


def _names(scene: Scene, item: Item, *, colour: bool = True, shape: bool = True, size: bool = True) -> list[str]:
    """Noun phrases that mean this shape alone, of the attributes that may be used."""
    candidates = []
    for with_size in (False, True) if size else (False,):
        for with_colour in (False, True) if colour else (False,):
            for with_shape in (False, True) if shape else (False,):
                if with_colour + with_shape == 0:
                    continue
                same = [
                    other
                    for other in _shapes(scene)
                    if (not with_size or other.size == item.size)
                    and (not with_colour or other.colour == item.colour)
                    and (not with_shape or other.name == item.name)
                ]
                if len(same) == 1:
                    words = (item.size * with_size, item.colour * with_colour, item.name if with_shape else "shape")
                    candidates.append("the " + " ".join(word for word in words if word))
    return candidates


def _pick(rng: random.Random, scene: Scene, **use: bool) -> tuple[Item, str] | None:
    """A shape, and one of its shortest two names."""
    shapes = _shapes(scene)
    rng.shuffle(shapes)
    for item in shapes:
        if names := _names(scene, item, **use):
            return item, rng.choice(sorted(names, key=len)[:2])
    return None


def _colour(rng: random.Random, scene: Scene) -> Made:
    if rng.random() < 0.3:
        item = rng.choice(_shapes(scene))
        thing = f"the shape {at(item.place)}"
    elif picked := _pick(rng, scene, colour=False):
        item, thing = picked
    else:
        return None
    return rng.choice(_COLOUR).format(thing), item.colour, frozenset({item.place})


_COLOUR = ("What colour is {}?", "What is the colour of {}?", "Name the colour of {}.", "Which colour does {} have?")


def _shape(rng: random.Random, scene: Scene) -> Made:
    if rng.random() < 0.6:
        item = rng.choice(_shapes(scene))
        texts = ("What shape is {}?", "Which shape is {}?", "Name the shape {}.", "Which shape do you see {}?")
        return rng.choice(texts).format(at(item.place)), item.name, frozenset({item.place})
    if not (picked := _pick(rng, scene, shape=False)):
        return None
    texts = ("What is {}, by its outline?", "Which outline does {} have?", "Name the outline of {}.")
    return rng.choice(texts).format(picked[1]), picked[0].name, frozenset({picked[0].place})


def _place(rng: random.Random, scene: Scene) -> Made:
    if not (picked := _pick(rng, scene)):
        return None
    texts = ("Where is {}?", "At which place is {}?", "Find {}. Where is it?", "In which part of the image is {}?")
    return rng.choice(texts).format(picked[1]), PLACES[picked[0].place], frozenset({picked[0].place})


def _size(rng: random.Random, scene: Scene) -> Made:
    if rng.random() < 0.3:
        item = rng.choice(_shapes(scene))
        thing = f"the shape {at(item.place)}"
    elif picked := _pick(rng, scene, size=False):
        item, thing = picked
    else:
        return None
    texts = ("Is {} small or large?", "Is {} large or small?", "What size is {}?", "Which size does {} have?")
    return rng.choice(texts).format(thing), item.size, frozenset({item.place})


def _class(rng: random.Random, scene: Scene) -> tuple[str, int]:
    """Shapes of a kind: what they are called, and how many there are."""
    shapes = _shapes(scene)
    sort = rng.random()
    name = rng.choice(shapes).name if rng.random() < 0.75 else rng.choice(SHAPES)
    colour = rng.choice(shapes).colour if rng.random() < 0.75 else rng.choice(list(COLOURS))
    if sort < 0.45:
        return f"{name}s" if name != "cross" else "crosses", sum(item.name == name for item in shapes)
    if sort < 0.85:
        return f"{colour} shapes", sum(item.colour == colour for item in shapes)
    size = rng.choice(tuple(SIZES))
    return f"{size} shapes", sum(item.size == size for item in shapes)


def _count(rng: random.Random, scene: Scene) -> Made:
    found = dict(_class(rng, scene) for _ in range(6))
    if rng.random() < 0.1:
        found = {"shapes": len(_shapes(scene))}
    number = rng.choice(sorted(set(found.values())))
    things = rng.choice([name for name, count in found.items() if count == number])
    texts = ("How many {} are there?", "Count the {}.", "How many {} do you see?", "What is the number of {}?")
    return rng.choice(texts).format(things), str(number), EVERYWHERE


def _exist(rng: random.Random, scene: Scene) -> Made:
    shapes = _shapes(scene)
    there = {(item.colour, item.name) for item in shapes}
    if rng.random() < 0.5:
        colour, name = rng.choice(sorted(there))
        answer = "yes"
    else:  # half of the absent things are near misses: both words fit, but not on one shape
        near = sorted({(a.colour, b.name) for a in shapes for b in shapes} - there)
        if near and rng.random() < 0.5:
            colour, name = rng.choice(near)
        else:
            colour = rng.choice(shapes).colour
            name = rng.choice([name for name in SHAPES if all(name != item.name for item in shapes)])
        answer = "no"
    article = "an" if colour == "orange" else "a"
    texts = ("Is there {} {} {}?", "Do you see {} {} {}?", "Does the image show {} {} {}?", "Can you find {} {} {}?")
    places = {item.place for item in shapes if (item.colour, item.name) == (colour, name)}
    return rng.choice(texts).format(article, colour, name), answer, frozenset(places) or EVERYWHERE


def _relation(rng: random.Random, scene: Scene) -> Made:
    """Left or right, above or below: told by the columns or rows of the places."""
    shapes = [(item, names) for item in _shapes(scene) if (names := _names(scene, item))]
    pairs = [(a, b) for a in shapes for b in shapes if a[0].place != b[0].place]
    if not pairs:
        return None
    (a, a_names), (b, b_names) = rng.choice(pairs)
    first, second = (min(rng.sample(names, min(2, len(names))), key=len) for names in (a_names, b_names))
    across, down = a.place % 3 - b.place % 3, a.place // 3 - b.place // 3
    if across and (not down or rng.random() < 0.5):
        answer = "left" if across < 0 else "right"
        texts = ("Is {} left or right of {}?", "Is {} to the left or right of {}?", "On which side of {1} is {0}?")
    else:
        answer = "above" if down < 0 else "below"
        texts = ("Is {} above or below {}?", "Is {} below or above {}?", "Does {} lie above or below {}?")
    return rng.choice(texts).format(first, second), answer, frozenset({a.place, b.place})


def _sign(rng: random.Random, scene: Scene, kind: str) -> Made:
    signs = [item for item in scene.items if item.kind == kind]
    if not signs:
        return None
    item = rng.choice(signs)
    if len(signs) == 1 and rng.random() < 0.6:
        texts = ("Which {} is written?", "Read the {}.", "What is the {}?", "Which {} do you see?")
        return rng.choice(texts).format(kind), item.name, frozenset({item.place})
    texts = ("Which {} is written {}?", "Read the {} {}.", "What is the {} {}?", "Which {} do you see {}?")
    return rng.choice(texts).format(kind, at(item.place)), item.name, frozenset({item.place})


def _number(rng: random.Random, scene: Scene) -> Made:
    return _sign(rng, scene, "number")


def _word(rng: random.Random, scene: Scene) -> Made:
    return _sign(rng, scene, "word")


def _compare(rng: random.Random, scene: Scene) -> Made:
    wanted = rng.choice(("yes", "no"))
    for _ in range(12):
        (first, many), (second, few) = _class(rng, scene), _class(rng, scene)
        alike = ("shapes" in first) == ("shapes" in second)
        if first == second or not alike or (many == few and rng.random() < 0.6):  # equal: possible, but not often
            continue
        more = rng.random() < 0.5
        if ("yes" if (many > few if more else many < few) else "no") == wanted:
            texts = ("Are there {} {} than {}?", "Do you see {} {} than {}?", "Does the image show {} {} than {}?")
            return rng.choice(texts).format("more" if more else "fewer", first, second), wanted, EVERYWHERE
    return None


def _unanswerable(rng: random.Random, scene: Scene) -> Made:
    """What the image does not tell: a thing that is not there, or a thing that no image tells."""
    sort = rng.random()
    if sort < 0.4:
        missing = [name for name in SHAPES if all(item.name != name for item in _shapes(scene))]
        texts = (*_COLOUR, "Where is {}?", "Is {} small or large?", "Is {} above or below the centre?")
        return rng.choice(texts).format(f"the {rng.choice(missing)}"), UNKNOWN, EVERYWHERE
    if sort < 0.6:
        kinds = [kind for kind in ("word", "number") if all(item.kind != kind for item in scene.items)]
        if not kinds:
            return None
        texts = ("Which {} is written?", "Read the {}.", "What is the {}?", "Which {} do you see?")
        return rng.choice(texts).format(rng.choice(kinds)), UNKNOWN, EVERYWHERE
    if sort < 0.8:
        empty = [place for place in range(9) if all(item.place != place for item in scene.items)]
        texts = (
            "What shape is {}?",
            "Which shape is {}?",
            "What colour is the shape {}?",
            "Which shape do you see {}?",
        )
        text, place = rng.choice(texts), rng.choice(empty)
        return text.format(at(place)), UNKNOWN, frozenset({place})
    thing = rng.choice(_shapes(scene)).name
    texts = (
        "Who made the {}?",
        "How old is the {}?",
        "What is behind the {}?",
        "How heavy is the {}?",
        "Who owns the {}?",
    )
    return rng.choice(texts).format(thing), UNKNOWN, frozenset()


SKILLS: dict[str, Callable[[random.Random, Scene], Made]] = {
    "colour": _colour,
    "shape": _shape,
    "place": _place,
    "size": _size,
    "count": _count,
    "exist": _exist,
    "relation": _relation,
    "number": _number,
    "word": _word,
    "compare": _compare,
    "unanswerable": _unanswerable,
}
