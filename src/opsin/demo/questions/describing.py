"""Everything in the picture, as a list or as a caption, and how much of a true caption an answer states."""

from __future__ import annotations

import random

from opsin.demo.questions.nouns import COUNT_WORDS, an, join, noun_of, plural
from opsin.demo.questions.phrasing import phrase
from opsin.demo.questions.places import place_name, place_of, place_phrase
from opsin.demo.questions.question import Question, spelled
from opsin.demo.scenes import Scene, Split, Thing


def ask_list(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for everything in the picture."""
    return Question("list", phrase(rng, split, "list"), list_of(scene))


def ask_caption(scene: Scene, rng: random.Random, split: Split) -> Question | None:
    """Ask for a description."""
    return Question("caption", phrase(rng, split, "caption"), caption_of(scene))


def list_of(scene: Scene) -> str:
    """Say what is in a scene: "two red circles, a dog and the word "hello""."""
    parts = [_group_phrase(group) for group in _groups(scene)]
    parts += [_text_phrase(scene, thing) for thing in scene.texts]
    return join(parts) if parts else "nothing"


def caption_of(scene: Scene) -> str:
    """Describe a scene in a sentence or two: what, where, and the background if it has one plain colour."""
    parts = []
    for group in _groups(scene):
        where = f" {place_phrase(place_name(group[0]))}" if len(group) == 1 else ""
        parts.append(_group_phrase(group) + where)
    parts += [f"{_text_phrase(scene, thing)} in {thing.color}" for thing in scene.texts]
    text = join(parts) if parts else "an empty picture"
    text = text[0].upper() + text[1:] + "."
    if scene.background.color:
        text += f" The background is {scene.background.color}."
    return text


def _groups(scene: Scene) -> list[list[Thing]]:
    """Group equal things that are not text, in reading order of each group's first."""
    groups: dict[str, list[Thing]] = {}
    for thing in sorted(scene.solid, key=lambda t: (place_of(t)[0], t.x)):
        groups.setdefault(noun_of(thing), []).append(thing)
    return list(groups.values())


def _group_phrase(group: list[Thing]) -> str:
    if len(group) == 1:
        return an(group[0])
    return f"{COUNT_WORDS[len(group)]} {plural(noun_of(group[0]))}"


def _text_phrase(scene: Scene, thing: Thing) -> str:
    return f'the {scene.text_kind} "{spelled(thing.name)}"'


def caption_facts(caption: str) -> list[str]:
    """Take a caption apart into what it claims, for scoring: each thing, each thing's place, the background."""
    facts = []
    for sentence in caption.rstrip(".").split(". "):
        lowered = sentence[:1].lower() + sentence[1:]
        for part in lowered.replace(" and ", ", ").split(", "):
            for mark in (" at the ", " on the ", " in the ", " in "):
                noun, found, place = part.partition(mark)
                if found:
                    facts.extend((noun, f"{noun}{mark}{place}"))
                    break
            else:
                facts.append(part)
    return facts


def recall(truth: str, answer: str) -> float:
    """Return the share of a true caption's facts that an answer states."""
    wanted, given = caption_facts(truth), caption_facts(answer)
    return sum(fact in given for fact in wanted) / len(wanted)
